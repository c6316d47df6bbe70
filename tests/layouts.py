"""Small data sets in exactly the published layouts, and what was put into them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from hjepa_mlx.data.catalog import class_list
from hjepa_mlx.data.prepare import originals_of, prepare

CMC, KAGGLE = class_list("cmc"), class_list("kaggle")
OTHERS = ("n01443537", "n02123159", "n15075141")  # of ImageNet-1K, in neither list of a hundred
KIT = "ILSVRC2012_devkit_t12"

Made = dict[str, tuple[list[np.ndarray], list[int]]]  # split → images [H, W, 3], labels
Photos = dict[str, list[tuple[str, str, bytes]]]  # split → (class, file name, JPEG)


def pictures(seed: int, count: int, side: int) -> np.ndarray:
    """[count, side, side, 3] uint8 without any symmetry: a turned or mirrored one is another."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def jpeg(seed: int, height: int = 60, width: int = 80) -> bytes:
    """A smooth picture, different for each seed, as JPEG."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin((seed % 7 + 1) * x + (c + 1) * y + seed) for c in range(3)]
    file = io.BytesIO()
    Image.fromarray((127.5 + 127 * np.stack(waves, 2)).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def cifar10(root: Path, per_batch: int = 60) -> Made:
    """cifar-10-batches-bin: a label, then 1,024 red, green and blue bytes, row by row."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    made: Made = {"train": ([], []), "test": ([], [])}
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        images = pictures(seed, per_batch, 32)
        labels = (np.arange(per_batch) * 7 + seed) % 10
        with open(folder / name, "wb") as file:
            for image, label in zip(images, labels, strict=True):
                file.write(bytes([label]))
                for channel in range(3):
                    for row in image[:, :, channel]:
                        file.write(row.tobytes())
        split = "test" if name.startswith("test") else "train"
        made[split][0].extend(images)
        made[split][1].extend(labels.tolist())
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")
    return made


def stl10(root: Path, train: int = 60, test: int = 40, unlabeled: int = 200) -> Made:
    """stl10_binary: red, green and blue planes of 96×96, each column by column; labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    made: Made = {}
    for seed, (stem, count) in enumerate(
        (("train", train), ("test", test), ("unlabeled", unlabeled))
    ):
        images = pictures(10 + seed, count, 96)
        with open(folder / f"{stem}_X.bin", "wb") as file:
            for image in images:
                for channel in range(3):
                    for column in range(96):
                        file.write(image[:, column, channel].tobytes())
        labels = (np.arange(count) * 3 + seed) % 10
        if stem != "unlabeled":
            (folder / f"{stem}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        made[stem] = (list(images), labels.tolist())
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    return made


def prepared(root: Path, name: str, **options: int) -> Path:
    """The folder of a data set that lies in `root`, prepared."""
    folder = root / name / "prepared"
    prepare(name, originals_of(name, root), folder, **options)
    return folder


def archive(folder: Path, path: Path) -> Path:
    """A folder as the .tar.gz it is published as."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def photos(classes: tuple[str, ...], train: int = 2, val: int = 1, seed: int = 0) -> Photos:
    """JPEGs named as ImageNet names them; validation images in an order of their own."""
    made: Photos = {"train": [], "val": []}
    for place, name in enumerate(sorted(classes)):
        for number in range(train):
            data = jpeg(seed + 31 * place + number)
            made["train"].append((name, f"{name}_{number * 17 + 3}.JPEG", data))
    shuffled = np.random.default_rng(seed).permutation([*classes] * val)
    for number, name in enumerate(shuffled, 1):
        data = jpeg(5000 + seed + number)
        made["val"].append((str(name), f"ILSVRC2012_val_{number:08d}.JPEG", data))
    return made


def folders(root: Path, made: Photos) -> None:
    """train/ and val/ with a folder a class."""
    for split, items in made.items():
        for name, file_name, data in items:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / file_name).write_bytes(data)


def kaggle_hundred(root: Path, made: Photos) -> None:
    """ambityga/imagenet100: classes spread over train.X1 … train.X4, val.X, Labels.json."""
    for split, items in made.items():
        for name, file_name, data in items:
            part = f"train.X{KAGGLE.index(name) // 25 + 1}" if split == "train" else "val.X"
            (root / part / name).mkdir(parents=True, exist_ok=True)
            (root / part / name / file_name).write_bytes(data)
    (root / "Labels.json").write_text(json.dumps({name: f"words of {name}" for name in KAGGLE}))


def kaggle_contest(root: Path, made: Photos) -> None:
    """ImageNet Object Localization Challenge: flat validation images and a table."""
    inner = root / "ILSVRC/Data/CLS-LOC"
    folders(inner, {"train": made["train"]})
    (inner / "val").mkdir(parents=True)
    rows = ["ImageId,PredictionString"]
    for name, file_name, data in made["val"]:
        (inner / "val" / file_name).write_bytes(data)
        rows.append(f"{file_name[:-5]},{name} 1 2 300 400 {name} 5 6 70 80 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")


def tars(root: Path, made: Photos) -> None:
    """ILSVRC2012_img_train.tar with a tar a class in it, ILSVRC2012_img_val.tar, and the kit."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in dict.fromkeys(name for name, _, _ in made["train"]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for owner, file_name, data in made["train"]:
                    if owner == name:
                        add(tar, file_name, data)
            add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for _, file_name, data in made["val"]:
            add(tar, file_name, data)
    with tarfile.open(root / f"{KIT}.tar.gz", "w:gz") as tar:
        for name, data in development_kit(made).items():
            add(tar, f"{KIT}/data/{name}", data)


def development_kit(made: Photos) -> dict[str, bytes]:
    """Ground truth by ILSVRC2012_ID, an order that is not the WordNet ids'; and meta.mat."""
    classes = sorted({name for name, _, _ in made["val"]})
    order = list(np.random.default_rng(5).permutation(classes))
    number = {name: i for i, name in enumerate(order, 1)}
    truth = "".join(f"{number[name]}\n" for name, _, _ in made["val"])
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    synsets = np.zeros(len(order) + 2, [(field, "O") for field in fields.split()])
    for row, name in enumerate([*order, "n00001740", "n00001930"]):
        inner = row >= len(order)
        children = np.array([1, 2], np.uint16) if inner else np.array([], np.uint16)
        synsets[row] = (row + 1, name, "w", "g", len(children), children, 2 * inner, 1300)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets.reshape(-1, 1)})
    return {"ILSVRC2012_validation_ground_truth.txt": truth.encode(), "meta.mat": file.getvalue()}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A plain file in an open tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def parquet(
    root: Path, made: Photos, files: int = 3, group: int = 16, words: list[str] | None = None
) -> None:
    """clane9/imagenet-100: data/train-00000-of-00003-HASH.parquet …, labels in CMC's order."""
    words = words or ["bonnet, poke bonnet"] + [f"words of {name}" for name in CMC[1:]]
    features = {"image": {"_type": "Image"}, "label": {"names": words, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    (root / "data").mkdir(parents=True)
    for stem, items, count in (("train", made["train"], files), ("validation", made["val"], 1)):
        for number in range(count):
            rows = [
                {"image": {"bytes": data, "path": name}, "label": CMC.index(owner)}
                for owner, name, data in items[number::count]
            ]
            path = root / f"data/{stem}-{number:05d}-of-{count:05d}-0123456789abcdef.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without symmetry and without noise, which lossy formats would change."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(3 * x + (c + 1) * y) * np.cos((c + 2) * x * y) for c in range(channels)]
    return (127.5 + 127 * np.stack(waves, 2)).astype(np.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    return np.abs(one.astype(float) - other.astype(float))


def saved(kind: str, mode: str = "RGB", size=(40, 30), **options) -> bytes:
    """A black picture as a file of that format."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def holes(path: Path, size: int) -> Path:
    """A file of so many bytes that takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path
