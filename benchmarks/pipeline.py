"""Time the data pipelines beside their peers, on the same files and cores.

.venv-parity/bin/python benchmarks/pipeline.py --out benchmarks/results/pipeline.json
.venv/bin/python benchmarks/pipeline.py --images ~/data/imagenet100/train

Each contender runs in a process of its own, one after the other, in several rounds; medians.
--images: your own JPEGs. Without, pictures are made: coloured noise with a photograph's spectrum,
500 × 375.
The PyTorch contenders are left out where torch and torchvision are not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH = 224, 64
WARM_UP = 256  # images before the clock starts
CONTENDERS = (
    "mlx-data: decode and resize only",
    "hjepa-mlx: original files",
    "PyTorch DataLoader with PIL: original files",
    "mlx-data: decode and resize only, prepared files",
    "hjepa-mlx: prepared shards",
    "hjepa-mlx: STL-10 raw, 96 to 96",
    "hjepa-mlx: STL-10 raw, 96 to 224",
    "hjepa-mlx: CIFAR-10 raw, 32 to 32",
)


def make_data(folder: Path, images: int, raw: int) -> None:
    """ImageNet-like folders of two classes; STL-10 and CIFAR-10 as they are published."""
    from hjepa_mlx.bench.synthetic import photograph  # here: PyTorch's processes load no MLX

    for number in range(images):
        split = "val" if number % 10 == 9 else "train"
        path = folder / "photos" / split / f"class-{number // 10 % 2}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path, quality=92)
    random = np.random.default_rng(0)
    few = 10  # images of a split that is not timed
    cifar = {f"data_batch_{n}.bin": raw for n in range(1, 6)} | {"test_batch.bin": few}
    stl = {"unlabeled_X.bin": raw, "train_X.bin": few, "test_X.bin": few}
    for name, files, size in (("cifar10", cifar, 3_073), ("stl10", stl, 27_648)):
        (folder / name).mkdir()
        for file, count in files.items():
            records = random.integers(0, 256, (count, size), np.uint8)
            records[:, 0] %= 10  # CIFAR-10's label
            (folder / name / file).write_bytes(records.tobytes())
    for split in ("train", "test"):
        (folder / "stl10" / f"{split}_y.bin").write_bytes(bytes(range(1, few + 1)))


def run(contender: str, folder: Path, photos: Path, seconds: float, workers: int) -> float:
    """Images per second of one contender, after its warm-up."""
    if contender.startswith("mlx-data"):
        where = folder / "loose" if "prepared" in contender else photos / "train"
        stream = decode_and_resize(where, workers)
    elif contender.startswith("PyTorch"):
        stream = torch_loader(photos / "train", workers)
    else:
        stream = our_pipeline(contender, folder, photos, workers)
    seen, start, began = 0, 0.0, 0
    for count in stream:
        seen += count
        if not start and seen >= WARM_UP:
            start, began = time.perf_counter(), seen
        if start and time.perf_counter() - start > seconds:
            break
    return (seen - began) / (time.perf_counter() - start)


def decode_and_resize(folder: Path, workers: int) -> Iterator[int]:
    """The least that mlx-data can do: read a file, decode it, resize the whole picture."""
    import mlx.data as dx

    paths = [{"image": str(path).encode()} for path in sorted(folder.rglob("*.[Jj][Pp]*"))]
    while True:
        buffer = dx.buffer_from_vector(paths).shuffle()
        chain = buffer.load_image("image").image_resize("image", SIZE, SIZE)
        for batch in chain.batch(BATCH).ordered_prefetch(2, workers):
            yield len(batch["image"])


def our_pipeline(contender: str, folder: Path, photos: Path, workers: int) -> Iterator[int]:
    """The training pipeline as a run uses it."""
    from hjepa_mlx.data.pipeline import Position, Skipped, training_batches
    from hjepa_mlx.data.source import open_source
    from hjepa_mlx.recipes import load_config

    name, place, size = "folder", photos, SIZE
    if "prepared" in contender:
        place = folder / "shards"
    if "STL-10" in contender or "CIFAR-10" in contender:
        name = "stl10" if "STL-10" in contender else "cifar10"
        place, size = folder, int(contender.rsplit(" ", 1)[1])
    config = load_config(
        "imagenet100",
        [
            f"data.name={name}",
            f"data.dir={json.dumps(str(place))}",
            f"data.image_size={size}",
            f"data.batch_size={BATCH}",
            f"data.workers={workers}",
            "model.patch_size=4",
        ],
    )
    source = open_source(config.data, "pretrain")
    for batch in training_batches(source, config, Position(), Skipped()):
        yield len(batch.images)


def torch_loader(folder: Path, workers: int) -> Iterator[int]:
    """The same crops, flips and pictures from torchvision, PIL and one process a core."""
    import torch
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.3, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), transform),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def memory(folder: Path, images: int, workers: int) -> dict[str, float]:
    """Resident memory, MB, of the pipeline early on and after `images` images."""
    from hjepa_mlx.bench.machine import resident_mb

    seen, early = 0, 0.0
    for count in our_pipeline("hjepa-mlx: prepared shards", folder, folder, workers):
        seen += count
        if not early and seen >= images // 10:
            early = resident_mb()
        if seen >= images:
            break
    return {"images": seen, "early_mb": early, "late_mb": resident_mb()}


def prepare_all(folder: Path, photos: Path) -> dict[str, float]:
    """Prepare photos and raw images; seconds and bytes for 1,000 photos."""
    from hjepa_mlx.data.prepare import originals_of, prepare

    for name in ("cifar10", "stl10"):
        prepare(name, originals_of(name, folder), folder / name / "prepared")
    start = time.perf_counter()
    made = prepare("folder", originals_of("folder", photos), folder / "shards")
    seconds = time.perf_counter() - start
    images = sum(split["images"] for split in made["splits"].values())
    size = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    original = sum(path.stat().st_size for path in photos.rglob("*.[Jj][Pp]*"))
    _unpack(folder)
    return {
        "seconds_per_1000": 1000 * seconds / images,
        "mb_per_1000": size / images / 1e3,
        "original_mb_per_1000": original / images / 1e3,
    }


def _unpack(folder: Path) -> None:
    """The prepared pictures as loose files, for mlx-data alone."""
    import tarfile

    for path in (folder / "shards").glob("train-*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(folder / "loose", filter="data")


def machine() -> dict[str, Any]:
    """The machine and versions of these figures."""
    from hjepa_mlx.bench.machine import describe

    names = ("pillow", "torch", "torchvision")
    versions = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {**describe(), **versions}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> None:
    """Run all contenders in rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", help="folder with train/ and val/ of JPEGs in class folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--memory", type=int, default=50_000, help="images of the memory test")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, photos = Path(arguments.folder), Path(arguments.images)
        if arguments.one == "memory":
            print(json.dumps(memory(folder, arguments.memory, arguments.workers)))
        else:
            print(run(arguments.one, folder, photos, arguments.seconds, arguments.workers))
        os._exit(0)  # without waiting for data threads
    with tempfile.TemporaryDirectory() as name:
        figures = compare(Path(name), arguments)
    print(json.dumps(figures, indent=1))
    if arguments.out:
        from hjepa_mlx.files import write_json

        write_json(Path(arguments.out), figures)


def compare(folder: Path, arguments: argparse.Namespace) -> dict:
    """All figures: medians, the least and the most of each contender, ratios of medians."""
    make_data(folder, 1100 if not arguments.images else 0, 5_000)
    photos = Path(arguments.images or folder / "photos")
    prepared = prepare_all(folder, photos)
    contenders = [c for c in CONTENDERS if _installed("torchvision") or "PyTorch" not in c]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name in contenders:
            rates[name].append(float(_apart(name, folder, photos, arguments)))
            print(f"{name}: {rates[name][-1]:.0f} images/s", file=sys.stderr)
    grown = json.loads(_apart("memory", folder, photos, arguments))
    return {
        "machine": machine(),
        "workers": arguments.workers,
        "images_per_second": {
            name: {"median": float(np.median(r)), "least": min(r), "most": max(r)}
            for name, r in rates.items()
        },
        "prepare": prepared,
        "memory": grown,
    }


def _apart(name: str, folder: Path, photos: Path, arguments: argparse.Namespace) -> str:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
    command += ["--images", str(photos), "--seconds", str(arguments.seconds)]
    command += ["--workers", str(arguments.workers), "--memory", str(arguments.memory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
