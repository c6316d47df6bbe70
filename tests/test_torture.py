"""`make torture` runs, and says which trial was broken and how to repeat it."""

import subprocess
import sys
from pathlib import Path

RUN = [sys.executable, str(Path(__file__).parent / "torture/run.py")]


def test_a_trial_of_make_torture_holds() -> None:
    command = [*RUN, "--repeat", "power/prepare photographs/0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended
    assert ended.stdout.startswith("power/prepare photographs/0: power lost at operation ")
    assert ended.stdout.endswith("1 tried, 0 faults.\n")
