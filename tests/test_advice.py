"""Advice in messages is followed, and what it says to do ends well."""

from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
from commands import advised, pictures, works

from hjepa_mlx.bench import fit, machine

TINY, DEMO = "train tiny.yaml --dry-run", "train demo --dry-run"
LEARNED = "train tiny.yaml --run-dir learned --set model.positions=learned --set optim.epochs=1"
# What is done first (by the shell, if no command of ours); the command that gives advice; the
# advice, a pattern; and what follows it, with the groups of the pattern in place of {0} and {1}.
ADVICE = (
    # Recipes and keys
    ("", "train demoo --dry-run", "Did you mean '(demo)'", "train {0} --dry-run"),
    ("", f"{TINY} --set data.name=dmeo", "Did you mean '(demo)'", f"{TINY} --set data.name={{0}}"),
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
    ("", "train list.yaml --dry-run", "must hold 'key: value' lines",
     "echo 'data: {{name: demo}}' > keys.yaml; train keys.yaml --dry-run"),
    ("mkdir aged; sed 's/^data:/&\\n  weights: [1]/' run/config.yaml > aged/config.yaml",
     "train aged --resume", "train anew", "train tiny.yaml --run-dir anew"),
    ("", "train run/config.yaml --dry-run --set model.size=tiny",
     "contradicts (model.dim)=64, depth and heads. Set these to (auto)",
     "train run/config.yaml --dry-run --set model.size=tiny --set {0}={1} --set model.depth={1}"
     " --set model.heads={1}"),
    ("", f"{DEMO} --set model.predictor_dim=198", "must be a multiple of 4",
     f"{DEMO} --set model.predictor_dim=192"),
    ("", f"{DEMO} --set data.image_size=2048", r"raise (model\.patch_size)=4",
     f"{DEMO} --set data.image_size=2048 --set {{0}}=256"),
    ("", f"{DEMO} --set model.predictor_context=both --set masks.targets=1",
     "needs (masks.targets) of at least (2)",
     f"{DEMO} --set model.predictor_context=both --set {{0}}={{1}}"),
    ("", f"{DEMO} --set model.level_blocks=[1,1]", r"one item per level of model\.level_pool=",
     f"{DEMO} --set model.level_blocks=[1,1] --set model.level_pool=[1,2]"),
    ("", f"{DEMO} --set model.level_blocks=[1,1,3] --set model.level_pool=[1,1,2]",
     "two levels the same; change one",
     f"{DEMO} --set model.level_blocks=[1,2,3] --set model.level_pool=[1,1,2]"),
    ("", f"{DEMO} --set model.levels=4", r"or one to auto: (level_pool=auto) is",
     f"{DEMO} --set model.levels=4 --set model.{{0}}"),
    ("", f"{DEMO} --set model.level_pool=[1,1,1,1]", "needs 4 blocks; (model.depth) is 3",
     f"{DEMO} --set model.level_pool=[1,1,1,1] --set {{0}}=4 --set model.size=custom"
     " --set model.dim=64 --set model.heads=1"),
    ("", f"{DEMO} --set views.size=6", "multiple of model.patch_size=(4)",
     f"{DEMO} --set views.size={{0}}"),
    ("", f"{DEMO} --set model.patch_size=16", r"Use (model\.patch_size=\d+)",
     f"{DEMO} --set {{0}}"),
    ("", f"{DEMO} --set masks.context_tokens=60", r"Lower (masks.context_tokens) to (\d+)",
     f"{DEMO} --set {{0}}={{1}}"),
    ("", f"{DEMO} --set model.level_pool=[1,8,16]", r"Use (model\.level_pool=\[1,8\])",
     f"{DEMO} --set {{0}}"),
    ("", f"{DEMO} --set model.level_pool=[1,8,16]", "a finer grid",
     f"{DEMO} --set model.level_pool=[1,8,16] --set model.patch_size=1"),
    ("", f"{DEMO} --set model.level_pool=[1,4,8]", "larger targets",
     f"{DEMO} --set model.level_pool=[1,4,8] --set masks.target_area=[0.4,0.5]"
     " --set masks.targets=2 --set masks.context_tokens=4"),
    ("", f"{DEMO} --set masks.context_tokens=50", "fewer or smaller target blocks",
     f"{DEMO} --set masks.context_tokens=50 --set masks.targets=2"
     " --set masks.target_area=[0.01,0.04]"),
    ("", "train demo --set optim.lr=1e30 --set optim.grad_clip=0 --set optim.warmup_epochs=0 "
     "--set data.limit=64 --set compile=false --run-dir diverged", "run with a lower optim.lr",
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
    ("", "datasets download demo", "Train with: hjepa-mlx (train .*)", "{0} --dry-run"),
    ("", "datasets download cifar10 --data-dir cifar", "Train with: hjepa-mlx (train .*)",
     "{0} --dry-run"),
    ("", "datasets combine demo cifar10 --out two.yaml", "Train with: hjepa-mlx (train .*)",
     "{0} --dry-run --data-dir cifar"),
    ("", "datasets prepare cifar10+stl10 --data-dir cifar", "one data set at a time: (cifar10)",
     "datasets prepare {0} --data-dir cifar"),
    ("datasets prepare cifar10 --data-dir cifar", "datasets prepare cifar10 --data-dir cifar",
     r"prepared already\. Delete (\S+) to do it again",
     "rm -r {0}; datasets prepare cifar10 --data-dir cifar"),
    ("cp -r cifar cut; datasets prepare cifar10 --data-dir cut; "
     "head -c 9999 cut/cifar10/prepared/train-images.npy > cut/part; "
     "mv cut/part cut/cifar10/prepared/train-images.npy", "train cifar10 --data-dir cut",
     r"Delete (\S+) and prepare again", "rm -r {0}; datasets prepare cifar10 --data-dir cut; "
     "train cifar10 --data-dir cut --dry-run"),
    ("datasets prepare folder --data-dir pictures --out hurt; echo > hurt/train-00000.npy",
     "train tiny.yaml --data-dir hurt", r"Delete (\S+) and prepare the data set again",
     "rm -r {0}; datasets prepare folder --data-dir pictures --out hurt; "
     f"{TINY} --data-dir hurt"),
    ("cp -r unreadable poor", "datasets prepare folder --data-dir poor --out whole",
     r"Put whole files there, delete (\S+) and run again",
     "cp pictures/a/* poor; rm -r {0}; datasets prepare folder --data-dir poor --out whole"),
    # Runs
    ("", "train tiny.yaml --run-dir tiny.yaml/run", "Choose another --run-dir",
     "train tiny.yaml --run-dir chosen"),
    ("datasets prepare folder --data-dir few --out own1; train tiny.yaml --data-dir own1 "
     "--run-dir same; datasets prepare folder --data-dir pictures --out own2",
     "train same --resume --data-dir own2", "Give the same (--data-dir)",
     "train same --resume {0} own1"),
    ("cp -r run odd; echo > odd/images.json", "train odd --resume", "Start a new run",
     "train tiny.yaml --run-dir even"),
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
    ("cp -r run stale; eval stale --draws 0 --attentive-images 0; train stale --epochs 5",
     "compare run stale",
     "not since: hjepa-mlx (eval stale)", "{0} --draws 0 --attentive-images 0"),
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
    ("finetune run --freeze --out head7", "embed head7 pictures --out e.npz",
     "(--init .*)` starts from its encoder", "train tiny.yaml --dry-run {0}"),
    ("", "train run --epochs 9 --run-dir run9", "RECIPE (--init run)[.]",
     "train tiny.yaml --dry-run {0}"),
    ("finetune run --freeze --out head6; echo > head6/model.safetensors",
     "predict head6 pictures --out p.csv", r"(\S+) is damaged: .* Delete it and fine-tune again",
     "rm -r {0}; finetune run --freeze --out {0}; predict {0} pictures --out p.csv"),
    ("", "predict run pictures --out p.csv", "Make one: finetune RUN",
     "finetune run --freeze --out head4; predict head4 pictures --out p.csv"),
    ("finetune run --freeze --out head5", "predict head5 pictures --out p.txt",
     "give a .csv file", "predict head5 pictures --out p.csv"),
    ("export run --to safetensors --out made4", f"{DEMO} --init pictures",
     r"a folder with (\.safetensors), one such file",
     f"{TINY} --init made4; {TINY} --init made4/model{{0}}"),
    # Features and figures
    ("mkdir g.npz", "embed run pictures --out g.npz", "is a folder; give a file",
     "embed run pictures --out h.npz"),
    ("", "eval run --draws -1", "draws at least (0)",
     "eval run --draws {0} --attentive-images 0"),
    ("", "eval run --draws 0 --attentive-images 0", "`hjepa-mlx (viz) RUN` draws the curves",
     "{0} run"),
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
    ("", f"{TINY} --hours 1e-9", "give at least", f"{TINY} --hours 1"),
    ("", f"{TINY} --hours 0", "must be above 0", f"{TINY} --hours 9"),
    ("", f"{TINY} --hours 8", r"(optim\.epochs)=\d+.* Change any with (--set)",
     f"{TINY} {{1}} {{0}}=7"),
    ("", "train demo --hours 1 --epochs 2", "give either --hours or (--epochs)",
     "train demo {0} 2 --dry-run"),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _more(here: Path) -> Iterator[None]:
    """More pictures, and measurements that are cut short."""
    layouts.cifar10(here / "cifar/cifar10")
    for number in range(30):
        pictures(here / f"days/day {number}", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LONGEST", 0.1)  # seconds of measuring
        patch.setattr(machine, "MATMUL_SIDE", 256)
        yield


@pytest.mark.parametrize("row", ADVICE, ids=[row[1] for row in ADVICE])
def test_advice_that_is_followed_ends_well(row: tuple[str, str, str, str]) -> None:
    first, asked, advice, followed = row
    works(first)
    works(followed.format(*advised(asked, advice).groups()))
