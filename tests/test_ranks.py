"""Several ranks train the run that one rank does, and end well when one of them does not."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
from commands import HJEPA, TINY, assert_one_line, hjepa, pictures
from mlx.core import load
from ranks import RUNS, end, start

import hjepa_mlx as hj
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.ranks import check, of_rank_0
from hjepa_mlx.session import watched

WORKER = [str(Path(ranks.__file__))]
TRAIN = ["-m", "hjepa_mlx", "train", "tiny.yaml", "--run-dir"]
BROKEN = ("a/00.jpg", "a/02.jpg", "b/03.jpg")
RECIPE = TINY.replace("epochs: 2", "epochs: 6").replace("1.0e-9", "1000")  # 24 steps
RECIPE = RECIPE.replace("[1, 2, 4]", "[1, 2, image]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of what one, two and three ranks made of the same runs."""
    folders = {count: tmp_path_factory.mktemp(f"ranks-{count}") for count in (1, 2, 3)}
    pictures(folders[1] / "pictures", 40)
    (folders[1] / "pictures/b/23.jpg").write_text("Not a picture.")
    for count, folder in folders.items():
        if count > 1:
            own = start(count, folder, [*WORKER, str(folder), str(folders[1] / "pictures")])
            assert [status for status, _ in end(own, 600)] == [0] * count
    ranks.train_all(folders[1])
    ranks.read_all(folders[1], folders[1] / "pictures")
    return folders


def arrays(run: Path) -> dict[str, np.ndarray]:
    """Weights and moments of a run's newest checkpoint."""
    newest = hj.Run(run).latest
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{n}:{k}": np.array(v) for n in names for k, v in load(str(newest / n)).items()}


def distance(run: Path, other: Path, file: str = "model") -> float:
    """Relative norm of the difference of two runs' weights."""
    ours, theirs = arrays(run), arrays(other)
    keys = [key for key in ours if key.startswith(file)]
    squares = [(np.square(ours[k] - theirs[k]).sum(), np.square(ours[k]).sum()) for k in keys]
    return float(np.sqrt(np.divide(*np.sum(squares, 0))))


def column(run: Path, key: str) -> list[float]:
    return [row[key] for row in hj.Run(run).metrics if key in row]


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in RUNS), ("sigreg", 3)])
def test_several_ranks_train_what_one_does_and_end_with_the_same_bits(trained, name, count):
    hashes = [path.read_text() for path in trained[count].glob(f"{name}-*.sha256")]
    assert len(hashes) == count
    assert len({*hashes}) == 1
    one, several = trained[1] / name, trained[count] / name
    close = 1e-4 if name == "float16" else 1e-6
    assert column(several, "loss") == pytest.approx(column(one, "loss"), rel=close)
    assert 0 < distance(one, several) < close
    if name == "float16":
        assert column(one, "overflow") == column(several, "overflow")
        assert {0.0, 1.0} == {*column(one, "overflow")}


@pytest.mark.parametrize("count", [2, 3])
def test_the_rows_of_all_ranks_are_the_batch_also_where_an_image_is_unreadable(trained, count):
    whole = np.load(trained[1] / "rows-0.npz")
    parts = [np.load(trained[count] / f"rows-{rank}.npz") for rank in range(count)]
    assert np.array_equal(whole["images"], np.concatenate([p["images"] for p in parts], 1))
    for masks in ("context", "targets", "centres"):
        assert np.array_equal(whole[masks], np.concatenate([part[masks] for part in parts]))
    assert all(np.array_equal(whole["positions"], part["positions"]) for part in parts)
    assert {*whole["skipped"]} == {*np.concatenate([part["skipped"] for part in parts])}
    assert [name[-8:] for name in whole["skipped"]] == ["b/23.jpg"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    pictures(tmp_path / "pictures", 40)
    for name in BROKEN:
        (tmp_path / "pictures" / name).write_text("Not a picture.")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def finish(place: Path, run: str, count: int, *more: str) -> Path:
    """Train to the end."""
    ended = end(start(count, place, [*TRAIN, run, *more]))
    assert [status for status, _ in ended] == [0] * count, ended
    return place / run


def interrupt(place: Path, count: int, rank: int, number: int, *more: str) -> list[tuple]:
    """Train; after two more steps a signal comes to one of the ranks."""
    before = len(column(place / "run", "loss"))
    processes = start(count, place, [*TRAIN, "run", *more])
    while len(column(place / "run", "loss")) < before + 2:
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.01)
    processes[rank].send_signal(number)
    if number == signal.SIGSTOP:
        processes[1 - rank].terminate()
        processes[1 - rank].wait(60)
        processes[rank].send_signal(signal.SIGCONT)
    return end(processes, 60)


def test_a_run_that_loses_ranks_and_is_resumed_is_the_run_that_did_not(place):
    whole = finish(place, "whole", 2)
    assert [status for status, _ in interrupt(place, 2, 1, signal.SIGINT)] == [130, 130]
    (one, said), (other, _) = interrupt(place, 2, 1, signal.SIGKILL, "--resume")
    assert (one, other) == (1, -signal.SIGKILL)
    assert "saved. Go on with: mlx.launch -n 2 -- hjepa-mlx train run/config.yaml" in said[-1]
    assert_saved(place / "run")
    (one, _), (other, said) = interrupt(place, 2, 0, signal.SIGKILL, "--resume")
    assert (one, other) == (-signal.SIGKILL, 1)
    assert "Rank 1 has lost another one" in said[-1]
    finish(place, "run", 2, "--resume")
    ours, theirs = arrays(place / "run"), arrays(whole)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert column(place / "run", "loss") == column(whole, "loss")


def test_ranks_resume_with_the_images_of_the_run_that_rank_0_finds(place):
    command = [*TRAIN[:-1], "--set", "optim.epochs=1"]
    for more in [], ["--resume"]:
        ended = end(start(2, place, [*command, *more]))
        assert [status for status, _ in ended] == [0, 0], ended
        shutil.copy(place / "pictures/a/04.jpg", place / "pictures/a/late.jpg")


def named(run: Path) -> list[str]:
    """The ends of the names of images that a run could not read."""
    rows = (run / "skipped.txt").read_text().splitlines()
    return sorted(row.split("\t")[0][-9:-1] for row in rows)


def assert_saved(run: Path) -> None:
    """The last step that was logged is in a checkpoint."""
    steps = hj.Run(run).metrics[-1]["step"]
    assert hj.Run(run).latest.name == f"step-{steps:08d}"


def test_a_rank_that_hangs_is_left_and_the_run_goes_on_with_fewer_ranks_or_more(place):
    whole = finish(place, "whole", 1)
    (one, said), (other, _) = interrupt(place, 2, 1, signal.SIGSTOP)
    assert (one, other) == (1, 1)
    assert "Rank 0 has lost another one" in said[-1]
    assert_saved(place / "run")
    assert interrupt(place, 1, 0, signal.SIGTERM, "--resume")[0][0] == 130
    finish(place, "run", 2, "--resume")
    assert distance(whole, place / "run") < 1e-6
    assert column(place / "run", "loss") == pytest.approx(column(whole, "loss"), rel=1e-6)
    assert named(whole) == named(place / "run") == ["a/00.jpg", "a/02.jpg", "b/03.jpg"]


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (["--set", "optim.lr=3e-4"], "Rank 0 and rank 1 differ: optim.lr is 0.001 and 0.0003."),
        (["--set", "data.name=stl10"], "Rank 0 and rank 1 differ: data.name is "),
    ],
)
def test_ranks_that_differ_are_refused_in_one_line(place, others, line):
    command = [*TRAIN, "run"]
    ended = end(start(2, place, command, [*command, *others]))
    assert [status for status, _ in ended] == [2, 2]
    (said,) = [line for _, lines in ended for line in lines]
    assert said.startswith(f"hjepa-mlx: {line}")
    assert not (place / "run").exists()
    if "optim" in line:  # all with the same config, as the line says
        finish(place, "run", 2, *others, "--set", "optim.epochs=1")


def test_ranks_on_a_cpu_and_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr("hjepa_mlx.backend.on_gpu", lambda: False)
    monkeypatch.setattr(
        "hjepa_mlx.agreement.values", lambda own: [own, own | {"the device": "a GPU"}]
    )
    with pytest.raises(HJEPAError, match="the device is 'a CPU' and 'a GPU'"):
        check({"data": {"batch_size": 4}})


def test_ranks_of_other_versions_are_refused_before_their_configs_are_read(monkeypatch):
    there = {"version": {"hjepa-mlx": "0.0.1"}}
    monkeypatch.setattr("hjepa_mlx.world.size", lambda: 2)
    monkeypatch.setattr("hjepa_mlx.agreement.values", lambda own: [own, there])
    with pytest.raises(HJEPAError, match=r"version\.hjepa-mlx is '.*' and '0\.0\.1'"):
        of_rank_0(hj.load_config("demo"))


@pytest.mark.parametrize(
    ("size", "line"),
    [(9, "cannot be shared by 2 ranks. Use a multiple"), (4000, "needs at least 4000 training")],
)
def test_a_batch_that_the_ranks_cannot_share_or_fill_is_refused(place, size, line):
    ended = end(start(2, place, [*TRAIN, "run", "--set", f"data.batch_size={size}"]))
    assert [status for status, _ in ended] == [2, 2]
    assert f"data.batch_size={size} {line}" in ended[0][1][0]
    for size in re.findall(r"for example (\d+)", ended[0][1][0]):
        finish(place, "run", 2, "--set", f"data.batch_size={size}", "--set", "optim.epochs=1")


def test_what_waits_without_a_step_is_cut_off():
    one, other = socket.socketpair()
    with one, other, watched(0.5) as beat:
        one.settimeout(60)
        beat()
        assert one.recv(1) == b""


def test_doctor_says_whether_ranks_pay(place):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "-p", str(port), "--"]
    doctor = [*HJEPA, "doctor", "--distributed", "tiny.yaml"]
    ended = subprocess.run([*launch, *doctor], cwd=place, capture_output=True, text=True)
    assert "2 ranks (ring) take " in ended.stdout, ended.stderr
    ended = hjepa(place, "doctor --distributed tiny.yaml")
    assert_one_line(ended, "only one rank", "mlx.launch -n 2 -- hjepa-mlx doctor")
