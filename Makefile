# make demo   sets everything up, trains a small model on real images, and says what it learned
# make test   sets everything up; lint, format, types, unused code, tests
# make parity compares with torch, timm and transformers (installs them: several GB on Linux)
# make torture kills, fills disks, breaks files and numbers for MINUTES (SEED, KINDS="kills disk")
VENV ?= .venv
MINUTES ?= 5
SEED ?= 0
RUN := $(VENV)/bin/python -m

.PHONY: demo test parity torture clean

demo:
	@tools/setup.sh $(VENV)
	@$(RUN) hjepa_mlx train demo

test:
	@tools/setup.sh $(VENV) dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) vulture
	$(RUN) pytest -n 2 -m "not parity"

parity:
	@tools/setup.sh $(VENV)-parity parity
	$(VENV)-parity/bin/python -m pytest -m parity tests/test_parity.py tests/test_export.py tests/test_foreign_weights.py tests/test_benchmark_scripts.py

torture:
	@tools/setup.sh $(VENV) dev
	$(VENV)/bin/python tests/torture/run.py --minutes $(MINUTES) --seed $(SEED) $(KINDS)

clean:
	rm -rf $(VENV) $(VENV)-parity .pytest_cache .mypy_cache .ruff_cache .hypothesis
