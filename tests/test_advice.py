"""Advice in messages is followed, and what it says to do ends well."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
from commands import pictures
from typer.testing import CliRunner

from hjepa_mlx.bench import fit
from hjepa_mlx.cli import app

TINY, DEMO = "train tiny.yaml --dry-run", "train demo --dry-run"
LEARNED = "train tiny.yaml --run-dir learned --set model.positions=learned --set optim.epochs=1"
# What is done first (by the shell, if no command of ours); the command that gives advice; the
# advice, a pattern; and what follows it, with the groups of the pattern in place of {0} and {1}.
ADVICE = (
    # Recipes and keys
    ("", "train demoo --dry-run", "Did you mean '(demo)'", "train {0} --dry-run"),
    ("", "train no.xyz", "Give the path of a .yaml file", "train ./tiny.yaml --dry-run"),
    ("", f"{TINY} --set lr=1", "Did you mean '(optim.lr)'", f"{TINY} --set {{0}}=1"),
    ("", f"{TINY} --set seed", "key=value, e.g. (optim.lr=3e-4)", f"{TINY} --set {{0}}"),
    ("echo 'data: {weights: auto}' > old.yaml", "train old.yaml --dry-run", "is gone: .* Delete",
     "sed -i.bak s/weights:.auto// old.yaml; train old.yaml --dry-run --data-dir pictures"
     " --set data.batch_size=8"),
    ("", f"{DEMO} --set data.progressive=[[48,0.5]]", "must be smaller than (data.image_size=)32",
     f"{DEMO} --set data.progressive=[[48,0.5]] --set {{0}}64"),
    ("", f"{DEMO} --set data.progressive=[[32,0.9],[48,0.2]] --set data.image_size=64",
     "must add up to less than 1",
     f"{DEMO} --set data.progressive=[[32,0.7],[48,0.2]] --set data.image_size=64"),
    ("", f"{DEMO} --set model.size=custom", "needs (model.dim), (model.depth) and (model.heads)",
     f"{DEMO} --set model.size=custom --set {{0}}=64 --set {{1}}=3 --set {{2}}=1"),
    ("", f"{DEMO} --set model.predictor_dim=196", "use (192) or 256",
     f"{DEMO} --set model.predictor_dim={{0}}"),
    ("", f"{DEMO} --set optim.warmup_epochs=5", "must be less than optim.epochs",
     f"{DEMO} --set optim.warmup_epochs=4"),
    ("", f"{DEMO} --set loss.level_weights=[0,0,0]", "at least one must be predicted",
     f"{DEMO} --set loss.level_weights=[0,0,1]"),
    ("", f"{DEMO} --set model.level_pool=[2,1,1]", "must not decrease",
     f"{DEMO} --set model.level_pool=[1,1,2]"),
    ("", f"{DEMO} --set model.levels=4", "model.depth is (3)", f"{DEMO} --set model.levels={{0}}"),
    ("", f"{DEMO} --set views.size=6", "multiple of model.patch_size=(4)",
     f"{DEMO} --set views.size={{0}}"),
    ("", f"{DEMO} --set model.patch_size=16", r"Use (model\.patch_size=\d+)",
     f"{DEMO} --set {{0}}"),
    ("", f"{DEMO} --set masks.context_tokens=60", r"Lower (masks.context_tokens) to (\d+)",
     f"{DEMO} --set {{0}}={{1}}"),
    ("", f"{DEMO} --set model.level_pool=[1,8,16]", r"Use (model\.levels=\d)",
     f"{DEMO} --set {{0}} --set model.level_pool=[1,8]"),
    ("", "train demo --set optim.lr=1e30 --set optim.grad_clip=0 --set optim.warmup_epochs=0 "
     "--set data.limit=64 --set compile=false --run-dir diverged", "Lower optim.lr",
     "train demo --set data.limit=64 --set compile=false --set run.final_eval=false "
     "--set optim.epochs=1 --run-dir steady"),
    # Images and labels
    ("", f"{TINY} --set data.dir=null --set data.name=folder", "give --data-dir FOLDER", TINY),
    ("", f"{TINY} --data-dir few --set data.batch_size=16", "training images; there are (10)",
     f"{TINY} --data-dir few --set data.batch_size={{0}}"),
    ("", "train tiny.yaml --run-dir days1 --data-dir days", "(data.labels=folders) makes labels",
     "train tiny.yaml --run-dir days2 --data-dir days --set {0}"),
    ("", "datasets check nowhere", "Give a folder of images, an image, or a .txt file",
     "ls pictures/a/* > list.txt; datasets check list.txt"),
    ("", "datasets check pictures --labels no.csv", "cannot be read",
     "datasets check pictures --labels none"),
    ("echo a/00.jpg > narrow.csv", "datasets check pictures --labels narrow.csv",
     "each row must be (path,label)",
     "printf '{0}\\na/00.jpg,x\\nb/01.jpg,y\\n' > wide.csv; "
     "datasets check pictures --labels wide.csv"),
    ("echo 00.jpg,x > lost.csv", "datasets check pictures --labels lost.csv",
     "relative to that folder or to the file's, or absolute",
     "printf \"$PWD/pictures/a/00.jpg,x\\nb/01.jpg,y\\n\" > found.csv; "
     "datasets check pictures --labels found.csv"),
    ("", f"{TINY} --set data.labels=labels.txt", "data.labels", f"{TINY} --set data.labels=none"),
    ("", "eval run --data pictures", "(--data folder --data-dir pictures)",
     "eval run {0} --draws 0 --attentive-images 0"),
    ("mkdir four; cp pictures/a/0[0246].jpg four", "train tiny.yaml --run-dir one --data-dir four "
     "--set run.final_eval=true --set data.batch_size=4", "It needs 10, or 5 of a class",
     "cp pictures/a/08.jpg four; train tiny.yaml --run-dir two --data-dir four "
     "--set run.final_eval=true --set data.batch_size=4"),
    # Published data
    ("", "train cifar10 --dry-run --data-dir cifar", "Run: hjepa-mlx (.* cifar)",
     "{0}; train cifar10 --dry-run --data-dir cifar"),
    ("", "datasets prepare folder", "needs --data-dir PICTURES and --out FOLDER",
     "datasets prepare folder --data-dir pictures --out ready"),
    ("mkdir full; touch full/x", "datasets prepare folder --data-dir pictures --out full",
     "give a new folder with --out", "datasets prepare folder --data-dir pictures --out fresh"),
    ("datasets prepare folder --data-dir pictures --out made",
     "datasets prepare folder --data-dir pictures --out made --side 32", "Delete it",
     "rm -r made; datasets prepare folder --data-dir pictures --out made --side 32"),
    ("", "datasets combine demo stl10 --out mix", "must be a .yaml file",
     "datasets combine demo stl10 --out mix.yaml"),
    ("touch there.yaml", "datasets combine demo stl10 --out there.yaml", "give another file",
     "datasets combine demo stl10 --out other.yaml"),
    # Runs
    ("", "train tiny.yaml --run-dir run", "Continue it with (--resume)",
     "train tiny.yaml --run-dir run {0}"),
    ("", "train tiny.yaml --run-dir run", "choose another --run-dir",
     "train tiny.yaml --run-dir another"),
    ("", "train tiny.yaml --run-dir run --resume --set seed=1", "own config, (.*yaml),",
     "train {0} --resume"),
    ("", "train tiny.yaml --run-dir run --resume --set optim.epochs=3",
     "To train it longer: hjepa-mlx (.*)", "{0}"),
    ("", "train tiny.yaml --resume", "Give its (--run-dir)",
     "train run/config.yaml --resume {0} run"),
    ("cp -r run run4", "train run4 --epochs 1", "Give --epochs more", "train run4 --epochs 4"),
    ("mkdir empty; cp run/config.yaml empty", "train empty --epochs 4", "Start a new run",
     "train tiny.yaml --run-dir new --epochs 4"),
    (LEARNED, "train learned --epochs 2 --set data.image_size=48", "another: (--init .*=48)",
     "train tiny.yaml --run-dir larger --set model.positions=learned {0}"),
    ("cp -r pictures other; train tiny.yaml --run-dir gone --data-dir other; mv other/a away",
     "train gone --resume", "Put them back", "mv away other/a; train gone --resume"),
    ("cp -r run torn; echo > torn/checkpoints/$(cat torn/checkpoints/latest)/model.safetensors",
     "eval torn", r"Checkpoint (\S+) is damaged.* Delete that folder",
     "rm -r {0}; eval torn --draws 0 --attentive-images 0"),
    ("cp -r run bare", "compare run bare", "Not evaluated: hjepa-mlx (eval bare)",
     "{0} --draws 0 --attentive-images 0"),
    ("cp -r run bad; echo x > bad/eval.json", "compare run bad", "again with: hjepa-mlx (eval bad)",
     "{0} --draws 0 --attentive-images 0; compare run bad"),
    # Weights in and out
    ("", f"{DEMO} --init run", r"set (model\.heads=1)", f"{TINY} --init run --set {{0}}"),
    ("", f"{DEMO} --init pictures", "Give a run, a folder with .safetensors",
     f"{TINY} --init run"),
    ("", f"{DEMO} --init run --set model.heads=1",
     "Set (model.size=custom) and (model.dim), (model.depth) and (model.heads) as there",
     f"{DEMO} --init run --set {{0}} --set {{1}}=64 --set {{2}}=3 --set {{3}}=1"),
    ("export run --to safetensors --out made1", "export run --to safetensors --out made1",
     "Delete it, or give another --out", "export run --to safetensors --out made2"),
    ("export run --to safetensors --out made3", "finetune made3", "Give a run's folder",
     "finetune run --freeze"),
    ("finetune run --freeze --out head", "finetune run --freeze --out head",
     "Choose another --out", "finetune run --freeze --out head2"),
    ("", "finetune run --set model.predictor_depth=2 --out head4", "leave model",
     "finetune run --freeze --out head3"),
    ("", "finetune run --out tuned --set finetune.lr=1e30", "Lower finetune.lr",
     "finetune run --out tuned --set finetune.epochs=1"),
    ("", "predict run pictures --out p.csv", "Make one: finetune RUN",
     "finetune run --freeze --out head4; predict head4 pictures --out p.csv"),
    ("finetune run --freeze --out head5", "predict head5 pictures --out p.txt",
     "give a .csv file", "predict head5 pictures --out p.csv"),
    # Features and figures
    ("", "embed run pictures --out f.xyz", "must end in .*(.npz)",
     "embed run pictures --out f{0}"),
    ("", "embed run pictures --out f.csv --tokens", "for every cell, use (.npz)",
     "embed run pictures --out f{0} --tokens"),
    ("", "eval run --image-size 30", "not a multiple of the patch size (4)",
     "eval run --image-size 36 --draws 0 --attentive-images 0"),
    ("", "eval run --image-size big", "give pixels, (96) or HEIGHTxWIDTH",
     "eval run --image-size {0} --draws 0 --attentive-images 0"),
    ("", "eval run --attentive-images 3", "(0) leaves it out",
     "eval run --attentive-images {0} --draws 0"),
    ("", "datasets list --json no/x.json", "the folder no does not exist",
     "mkdir no; datasets list --json no/x.json"),
    ("", "datasets list --json pictures", "give a file", "datasets list --json list.json"),
    ("", "train my-folder --data-dir pictures --hours 1e-9 --dry-run", "give more",
     "train my-folder --data-dir pictures --hours 8 --dry-run"),
    ("", "train demo --hours 1 --epochs 2", "give either --hours or (--epochs)",
     "train demo {0} 2 --dry-run"),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with pictures, recipes and a run that may be changed."""
    folder = tmp_path_factory.mktemp("advice") / "here"
    shutil.copytree(prepared, folder)
    layouts.cifar10(folder / "cifar/cifar10")
    for number in range(30):
        pictures(folder / f"days/day {number}", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(fit, "LONGEST", 0.1)  # seconds of measuring
        yield folder


def do(commands: str) -> tuple[int, str]:
    """Run commands, of ours or of the shell; the status of the last and what it said."""
    status, said = 0, ""
    for command in filter(None, commands.split("; ")):
        if command.split()[0] in OURS:
            ended = CliRunner().invoke(app, shlex.split(command))
            status, said = ended.exit_code, " ".join(ended.output.split())
        else:
            subprocess.run(command, shell=True, check=True)
    return status, said


OURS = {"compare", "datasets", "embed", "eval", "export", "finetune", "predict", "train"}


@pytest.mark.parametrize("row", ADVICE, ids=[row[1] for row in ADVICE])
def test_advice_that_is_followed_ends_well(place: Path, row: tuple[str, str, str, str]) -> None:
    first, asked, advice, followed = row
    assert do(first)[0] == 0
    _, said = do(asked)
    found = re.search(advice, said)
    assert found, said
    status, said = do(followed.format(*found.groups()))
    assert status == 0, said
