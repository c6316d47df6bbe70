"""Runs: a folder with the resolved config, the metrics and the checkpoints of one training."""

from __future__ import annotations

import json
import os
import time
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table

from hjepa_mlx import checkpoint, hub, pretrained, weights
from hjepa_mlx.config import Config
from hjepa_mlx.data.folder import RECORD, Folder, write_record
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.eval.report import CLASSIFIER, Report
from hjepa_mlx.files import atomic_write, locked, make_folder, read_json, sync
from hjepa_mlx.models.hjepa import HJEPA, Origin
from hjepa_mlx.recipes import load_config
from hjepa_mlx.tables import Shown, table

# Keys that may differ when a run is resumed: they change neither what is learned nor from what
# (`compile` changes the last bits of a step).
FREE_KEYS = ("run", "finetune", "compile", "data.dir", "data.workers")
# Keys that may differ when a run goes on longer.
STAGE_KEYS = (
    *("optim.", "data.batch_size", "data.image_size", "data.progressive", "masks.context_tokens"),
    *("model.positions", "views.size"),
)


class Run(Shown):
    """A run's folder, read lazily."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        steps = self.metrics[-1]["step"] if self.metrics else 0
        return f"Run({str(self.path)!r}, config={self.config.name!r}, step={steps})"

    def __rich__(self) -> Table:
        c, data = self.config, self.config.data
        rows = [("recipe", f"{c.name}: {data.name} at {data.image_size}×{data.image_size}")]
        last = next((row for row in reversed(self.metrics) if "loss" in row), None)
        if last:
            rows.append(("trained", f"{last['step']:,} steps, {last['epoch']:g} epochs"))
            rows.append(("loss", f"{last['loss']:.4f}"))
        evaluated = (self.path / "eval.json").is_file()
        rows.append(("checkpoint", self.latest.name if self.latest else "none yet"))
        rows.append(("evaluated", "eval.json" if evaluated else "not yet"))
        return table(str(self.path), ("", ""), rows)

    @property
    def scores(self) -> dict[str, Any]:
        """The scores of the last evaluation, empty when there was none; HJEPAError if damaged."""
        path = self.path / "eval.json"
        if not path.is_file():
            return {}
        try:
            return dict(read_json(path))
        except (ValueError, TypeError):
            command = f"hjepa-mlx eval {quote(str(self.path))}"
            raise HJEPAError(f"{path} is damaged. Evaluate again with: {command}") from None

    @property
    def report(self) -> Report | None:
        """The report of the last evaluation, if there was one."""
        scores = self.scores
        return Report(scores) if scores else None

    @cached_property
    def config(self) -> Config:
        """The resolved config the run was last started with."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UsageError(f"{self.path} is not a run: it has no config.yaml.")
        try:
            return load_config(path)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def store(self, config: Config) -> None:
        """Write config.yaml: the run's config, as it is started or resumed."""
        with atomic_write(self.path / "config.yaml") as file:
            file.write(config.to_yaml().encode())
        self.config = config

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return checkpoint.latest(self.checkpoints)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows; a last line that a power cut has torn is left out."""
        path = self.path / "metrics.jsonl"
        rows: list[dict[str, Any]] = []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    @property
    def last_stage(self) -> list[dict[str, Any]]:
        """The rows logged at the final image size: losses at other sizes are not comparable."""
        before = (1 - self.config.stages[-1][1]) * self.config.optim.epochs
        before = max([before, *(stage.epoch for stage in self.config.run.history)])
        return [row for row in self.metrics if row["epoch"] > before or not before]

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log_skipped(self, images: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Add (name, reason) of unreadable images to skipped.txt; returns the new ones."""
        path = self.path / "skipped.txt"
        known = path.read_text(encoding="utf-8") if images and path.is_file() else ""
        new = [(name, reason) for name, reason in images if f"{name!r}\t" not in known]
        if new:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{name!r}\t{reason}\n" for name, reason in new)
        return new

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be trained again."""
        kept = [row for row in self.metrics if row["step"] <= step]
        with atomic_write(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())


def check_new(config: Config) -> None:
    """Refuse a `run.dir` that holds a run; take the history of another run from the config."""
    config.run.history = []
    if config.run.dir and (Path(config.run.dir) / "config.yaml").exists():
        raise UsageError(
            f"{config.run.dir} already holds a run. Continue it with --resume, or choose another "
            "--run-dir."
        )


def create(config: Config, images: Folder | None = None) -> Run:
    """Make the folder of a new run: `run.dir`, or runs/<config>-<time>.

    It keeps a record of its images if they come from a folder. config.yaml comes last: with it, it
    is a run.
    """
    try:
        run = Run(config.run.dir or _free_name(config.name))
        make_folder(run.path)
        with locked(run.path / ".lock", str(run.path)):  # two may begin it at once
            check_new(config)
            if images:
                write_record(images, run.path / RECORD)
            run.store(config)
    except OSError as error:
        raise HJEPAError(
            f"The run folder {config.run.dir or 'runs/…'} cannot be made ({error.strerror}). "
            "Choose another --run-dir."
        ) from error
    return run


def _free_name(name: str) -> Path:
    """A new folder runs/<name>-<time>, a second later if another run began in this one."""
    while True:
        path = Path(f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        make_folder(path.parent)
        try:
            path.mkdir()
        except FileExistsError:
            time.sleep(0.1)
        else:
            sync(path.parent)
            return path


def reopen(config: Config) -> Run:
    """The run to resume: `run.dir`, or the newest runs/<config>-* folder.

    `config` gets the run's choices where it says `auto`; UsageError if it differs otherwise.
    """
    if config.run.dir:
        run = Run(config.run.dir)
    else:
        found = sorted(Path("runs").glob(f"{config.name}-{'[0-9]' * 8}-{'[0-9]' * 6}/config.yaml"))
        if not found:
            raise UsageError(
                f"There is no run of '{config.name}' in runs/ to resume (named {config.name}-DATE-"
                "TIME). Give its --run-dir."
            )
        run = Run(found[-1].parent)
    keep_choices(config, run.config)
    differing = differences(run.config.model_dump(), config.model_dump())
    if len(config.run.history) > len(run.config.run.history):
        differing = {
            key: both
            for key, both in differing.items()
            if not key.startswith(STAGE_KEYS) or key == "optim.kind"
        }
    else:
        config.run.history = run.config.run.history
    if differing:
        key, (then, now) = next(iter(differing.items()))
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        advice = f"Resume with the run's own config, {run.path}/config.yaml, or start a new run."
        if list(differing) == ["optim.epochs"] and now > then:
            advice = f"To train it longer: hjepa-mlx train {quote(str(run.path))} --epochs {now}"
        raise UsageError(
            f"{run.path} was started with another config: {key} was {then!r}, now {now!r}{more}. "
            f"{advice}"
        )
    return run


def keep_choices(config: Config, before: Config) -> None:
    """Where `config` says `auto`, take the choice made `before`; list a folder's images as then."""
    if config.precision == "auto":
        config.precision = before.precision
    if config.compile == "auto":
        config.compile = before.compile
    if config.model.init and config.model.init == before.model.init:
        config.model.positions = before.model.positions
    if config.data.bits == "auto":
        config.data.bits = before.data.bits
    config.data.listing = before.data.listing


def differences(then: dict, now: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys of a run's config, as trees, that were one value and are another; without FREE_KEYS."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in then.items():
        name = prefix + key
        if name in FREE_KEYS:
            continue
        if isinstance(value, dict):
            found |= differences(value, now.get(key, {}), name + ".")
        elif value != now.get(key):
            found[name] = (value, now.get(key))
    return found


def load(path: str | Path, model: HJEPA | None = None) -> HJEPA:
    """The model of a run (its newest checkpoint), a checkpoint, an export or hf:USER/NAME.

    model: where to put the weights, for a run of a network of your own: that network, built from
    `Run(path).config`. Raises UsageError when there is no checkpoint and HJEPAError when it is
    damaged.
    """
    path = hub.download(str(path)) if str(path).startswith("hf:") else Path(path)
    if (path / CLASSIFIER).is_file():
        raise UsageError(
            f"{path} is a classifier: `hjepa-mlx predict` uses it, and `hjepa-mlx train RECIPE "
            f"--init {quote(str(path))}` starts from its encoder. Give the run instead."
        )
    one = (path / "state.json").is_file()
    run = Run(path.parent.parent if one else path)
    folder, config = path if one else run.latest, run.config
    if folder is None and any(path.glob("*.safetensors")):  # an export
        model = HJEPA(config) if model is None else model
        pretrained.put(weights.read(path), model, whole=True)
        return model
    if folder is None:
        raise UsageError(f"The run {path} has no checkpoint yet.")
    own = checkpoint.read_state(folder)["own_parts"]["model"]
    if own and model is None:
        raise UsageError(
            f"{path} was trained with a network of your own, {own}. Load it with "
            f"hj.load(path, {own}(config))."
        )
    model = HJEPA(config) if model is None else model
    state = checkpoint.load_model(folder, model)
    model.origin = Origin(str(run.path), state["step"], state["epoch"])
    return model
