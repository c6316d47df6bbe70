import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.data as dx
import pytest
from commands import assert_one_line, hjepa

from hjepa_mlx import backend

with_openblas = pytest.mark.skipif(backend._openblas is None, reason="OpenBLAS is not installed")


@with_openblas
def test_prefetch_threads_leave_openblas_its_cores():
    threads = backend._openblas.openblas_get_num_threads
    seen = []
    buffer = dx.buffer_from_vector([{"i": i} for i in range(50)])
    looking = buffer.sample_transform(lambda sample: seen.append(threads()) or sample)
    list(looking.ordered_prefetch(4, 2))
    assert set(seen) == {threads()}


@with_openblas
def test_openblas_does_not_take_this_processor_for_a_pentium():
    if not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("an old processor, or not of this kind")
    backend._openblas.openblas_get_corename.restype = ctypes.c_char_p
    assert backend._openblas.openblas_get_corename() not in (b"Prescott", b"Katmai")


LIMITED = """
import json
from hjepa_mlx.backend import computing_threads
with computing_threads():
    import scipy.linalg
    from threadpoolctl import threadpool_info
    print(json.dumps([[lib["filepath"], lib["num_threads"]] for lib in threadpool_info()]))
"""


@pytest.mark.skipif(backend.on_gpu(), reason="a GPU needs no limit")
def test_a_blas_that_is_first_needed_while_threads_compute_has_one_thread_as_well():
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    threads = dict(json.loads(done.stdout))
    assert any("scipy" in library for library in threads)
    assert set(threads.values()) == {1}


SMI = """#!/bin/sh
echo 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB'
"""


@pytest.fixture
def with_nvidia_gpu(tmp_path, monkeypatch):
    """An nvidia-smi that finds a GPU, with a driver too old for CUDA 13."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return "NVIDIA H100 80GB HBM3, driver 550.54.15, 81559 MiB"


@pytest.mark.skipif(backend.on_gpu(), reason="the GPU is used")
def test_a_gpu_that_mlx_does_not_use_is_named_by_every_command(tmp_path, with_nvidia_gpu):
    ended = hjepa(tmp_path, "datasets list")
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == 1
    assert f"this NVIDIA GPU is not used: {with_nvidia_gpu}" in ended.stderr
    doctor = hjepa(tmp_path, "doctor --json -")
    assert doctor.stderr == ""
    facts = json.loads(doctor.stdout)
    assert (facts["device"], facts["nvidia_gpu"]) == ("CPU", with_nvidia_gpu)
    assert ended.stderr.strip() in facts["advice"]


@pytest.mark.skipif(sys.platform != "linux", reason="the same wheel serves every Mac")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("libcuda.so.1: cannot open shared object file", "needs an NVIDIA GPU and driver 580"),
        ("CUDA driver version is insufficient", "nvidia-smi finds NVIDIA H100 80GB HBM3, driver"),
        ("libmlx.so: cannot open shared object file", "Install one: pip install 'hjepa-mlx[cpu]'"),
    ],
)
def test_where_mlx_does_not_start_every_command_says_so(
    tmp_path, monkeypatch, with_nvidia_gpu, error, says
):
    """These are the errors of MLX's wheels for CUDA without a GPU, and without any backend."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text(f"raise ImportError({error!r})")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for command in ("doctor", "train demo"):
        ended = hjepa(tmp_path, command)
        assert ended.returncode == 1
        assert_one_line(ended, says)


@with_openblas
def test_imported_first_as_the_warning_says_the_package_finds_openblas() -> None:
    for modules, said in (("mlx.core, hjepa_mlx", "Import hjepa_mlx first"), ("hjepa_mlx", "")):
        command = [sys.executable, "-c", f"import {modules}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (said in ended.stderr, bool(said)) == (True, bool(ended.stderr))


def test_a_step_may_take_what_other_processes_leave_of_an_nvidia_gpu(monkeypatch):
    card = {"device_name": "NVIDIA H100", "total_memory": 80 * 10**9, "free_memory": 30 * 10**9}
    held = backend.mx.get_active_memory() + backend.mx.get_cache_memory()
    monkeypatch.setattr(backend, "device", lambda: "cuda")
    monkeypatch.setattr(backend.mx, "device_info", lambda: card)
    assert backend.memory_gb() == 80
    assert backend.step_memory_gb() == pytest.approx(0.9 * (30 + held / 1e9))
