"""The catalog: what is known of each data set. Everything that shows or checks this reads it here.

`Promise` holds what the project's founding comparison of data sets expects of 100 epochs of ViT-S
on an M1 Max: figures to be checked, none of them measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hjepa_mlx.errors import UsageError, did_you_mean

Range = tuple[float, float]


@dataclass(frozen=True)
class Promise:
    """Expected of 100 epochs on an M1 Max; accuracies and rank (of the dimension) in per cent."""

    hours: Range
    linear_probe: Range
    knn: Range
    rank: float


@dataclass(frozen=True)
class Remote:
    """A file to download: its URL, published MD5 and size (for progress and disk space)."""

    url: str
    md5: str
    size: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Dataset:
    """One data set.

    splits: number of images of `pretrain`, `train` (labelled, evaluation learns from it), `test`.
    files: those that `download` fetches from the web.
    """

    name: str
    title: str
    splits: dict[str, int]
    resolution: int
    classes: int
    download_gb: float
    terms: str
    goal: str = ""
    promise: Promise | None = None
    files: tuple[Remote, ...] = ()
    hub: str | None = None  # repository on Hugging Face
    parts: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Images of one epoch of pretraining."""
        return self.splits["pretrain"]

    @property
    def stored_splits(self) -> tuple[str, ...]:
        """The splits that are prepared: pretrain only where it has other images than train."""
        same = self.splits["pretrain"] == self.splits["train"]
        return ("train", "test") if same else ("pretrain", "train", "test")


FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

_ROWS = (
    Dataset(
        name="cifar10",
        title="CIFAR-10",
        splits={"pretrain": 50_000, "train": 50_000, "test": 10_000},
        resolution=32,
        classes=10,
        download_gb=0.17,
        terms="Free for research; no licence is stated. Cite Krizhevsky, Learning Multiple Layers "
        "of Features from Tiny Images (2009). https://www.cs.toronto.edu/~kriz/cifar.html",
        goal="testing only",
        promise=Promise(hours=(2, 3), linear_probe=(30, 50), knn=(25, 45), rank=30),
        files=(
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c32a1d4ab5d03f1284b67883e8d87530",
                170_052_171,
            ),
        ),
    ),
    Dataset(
        name="stl10",
        title="STL-10",
        splits={"pretrain": 100_000, "train": 5_000, "test": 8_000},
        resolution=96,
        classes=10,
        download_gb=2.6,
        terms="Images from ImageNet: for research, under ImageNet's terms. Cite Coates, Lee and "
        "Ng (AISTATS 2011). https://cs.stanford.edu/~acoates/stl10/",
        goal="quick alternative",
        promise=Promise(hours=(8, 12), linear_probe=(55, 65), knn=(50, 60), rank=50),
        files=(
            Remote(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "91f7769df0f17e558f3565bffb0c7dfb",
                2_640_397_119,
            ),
        ),
    ),
    Dataset(
        name="imagenet100",
        title="ImageNet-100",
        splits={"pretrain": 126_689, "train": 126_689, "test": 5_000},
        resolution=224,
        classes=100,
        download_gb=8.5,  # 17 + 1 files of about 0.5 GB; the founding comparison says 15
        terms="Images from ImageNet: non-commercial research and education only, "
        "https://image-net.org/download. The 100 classes are those of Tian, Krishnan and Isola, "
        "Contrastive Multiview Coding (ECCV 2020).",
        goal="quick experimentation",
        promise=Promise(hours=(10, 15), linear_probe=(60, 70), knn=(55, 65), rank=60),
        hub="clane9/imagenet-100",
    ),
    Dataset(
        name="imagenet100+stl10",
        title="ImageNet-100 + STL-10",
        splits={"pretrain": 226_689, "train": 126_689, "test": 5_000},
        resolution=224,
        classes=100,
        download_gb=11,
        terms="Those of its parts.",
        goal="maximum quality (fast)",
        promise=Promise(hours=(18, 24), linear_probe=(65, 75), knn=(60, 70), rank=65),
        parts=("imagenet100", "stl10"),
    ),
    Dataset(
        name="imagenet1k",
        title="ImageNet-1K",
        splits={"pretrain": 1_281_167, "train": 1_281_167, "test": 50_000},
        resolution=224,
        classes=1_000,
        download_gb=155,
        terms="Non-commercial research and education only; an account is needed: "
        "https://image-net.org/download",
        goal="publication results",
        promise=Promise(hours=(168, 240), linear_probe=(70, 75), knn=(65, 72), rank=70),
    ),
    Dataset(
        name="fashion-mnist",
        title="Fashion-MNIST",
        splits={"pretrain": 60_000, "train": 60_000, "test": 10_000},
        resolution=28,
        classes=10,
        download_gb=0.03,
        terms="MIT licence, Zalando SE. Cite Xiao, Rasul and Vollgraf, arXiv 1708.07747.",
        goal="trying things on a CPU",
        files=tuple(
            Remote(f"{FASHION_URL}/{name}", md5, size)
            for name, md5, size in (
                ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
                ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
                ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
                ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
            )
        ),
    ),
    Dataset(
        name="demo",
        title="the demo's part of Fashion-MNIST",
        splits={"pretrain": 5_500, "train": 5_500, "test": 1_000},
        resolution=28,
        classes=10,
        download_gb=0,
        terms="MIT licence, Zalando SE.",
        goal="make demo",
    ),
)
CATALOG = {row.name: row for row in _ROWS}

CMC, KAGGLE, IMAGENET = "CMC's ImageNet-100", "Kaggle's ImageNet-100", "ImageNet-1K"
KAGGLE_IMAGES = 130_000  # for training; 5,000 for evaluation, as in CMC's

# ImageNet's own archives, by name; MD5 as published on its download page
IMAGENET_ARCHIVES = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}


def look_up(name: str) -> Dataset:
    """The catalog's row; UsageError with the nearest name when there is none."""
    if name not in CATALOG:
        hint = did_you_mean(name, CATALOG)
        raise UsageError(f"No data set '{name}'.{hint} There are: {', '.join(CATALOG)}.")
    return CATALOG[name]


def class_list(name: str) -> tuple[str, ...]:
    """WordNet ids of an ImageNet-100: 'cmc' or 'kaggle', in the order of its labels.

    cmc: imagenet100.txt of Tian et al. (ECCV 2020); kaggle: Labels.json of ambityga/imagenet100.
    """
    path = Path(__file__).parent / "classes" / f"imagenet100-{name}.txt"
    return tuple(path.read_text().split())


def class_list_name(classes: tuple[str, ...]) -> str:
    """Which ImageNet list these WordNet ids are, in words."""
    for name, words in (("cmc", CMC), ("kaggle", KAGGLE)):
        if set(classes) == set(class_list(name)):
            return words
    return IMAGENET if len(classes) == 1000 else f"an unknown list of {len(classes)} classes"
