"""Hostile archives and tables of published data sets, handed to `datasets prepare` and `train`."""

import gzip
import io
import random
import shutil
import tarfile
from pathlib import Path

import layouts
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import compressed_zeros, idx, mutated, nested
from materials import change, handed, place_in


def _tar(entries: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for info, data in entries:
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return out.getvalue()


def hostile_entry(rng: random.Random, folder: Path) -> tuple[tarfile.TarInfo, bytes]:
    """A member that climbs, links, is a device, lies about its length or has an odd name."""
    outside = str(folder / "outside.txt")
    names = ("../outside.txt", outside, "a/../../../outside.txt", "x" * 255, "a\0b",
             "new\nline.jpg",
             "n/" * 2000 + "x.jpg", "\ud800.jpg", "", ".", "/", "é\x1b[31m.jpg")  # fmt: skip
    info, data = tarfile.TarInfo(rng.choice(names)), b"x" * rng.choice((0, 10, 600))
    kind = rng.randrange(6)
    if kind == 0:
        info.type, info.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), outside
    elif kind == 1:
        info.type = rng.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"))
    elif kind == 2:
        info.size, data = rng.choice((1 << 33, 1 << 60, 5_000_000)), b""
    elif kind == 3:
        info.pax_headers = {rng.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.size")):
                            rng.choice(("-512", "9" * 30, "0", "nan", "1,2,3",
                            "x" * 5000))}  # fmt: skip
    return info, data


def _changed_tar(rng: random.Random, folder: Path, content: bytes) -> bytes:
    """A tar with hostile members, mutated, or with a header of its own that lies."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutated(rng, content)
    if kind == 1:  # a header whose checksum is right
        data, blocks = bytearray(content), range(0, len(content) - 512, 512)
        heads = [at for at in blocks if content[at + 257 : at + 262] == b"ustar"]
        at = rng.choice(heads)
        field, size = rng.choice(((0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155)))
        values = (b"\xff" * size, b"\x80" + bytes(size - 1), b"7" * size,
                  b"\x80" + b"\x7f" * (size - 1),
                  b"x", b"K", b"L", b"S", b"g", b"5", b"-1")  # fmt: skip
        data[at + field : at + field + size] = rng.choice(values)[:size].ljust(size, b"\0")
        data[at + 148 : at + 156] = b" " * 8
        total = sum(data[at : at + 512])
        data[at + 148 : at + 156] = b"%06o\0 " % total
        return bytes(data)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(m, tar.extractfile(m).read() if m.isfile() else b"") for m in tar]  # type: ignore
    for _ in range(rng.choice((1, 3))):
        members.insert(rng.randrange(len(members) + 1), hostile_entry(rng, folder))
    try:
        return _tar(members, rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
    except (ValueError, UnicodeError):  # this format cannot hold such a name
        return mutated(rng, content)


def compressed_archive(rng: random.Random, folder: Path) -> str:
    """The .tar.gz of CIFAR-10 or STL-10."""
    name, inner = rng.choice((("cifar10", "cifar-10-batches-bin"), ("stl10", "stl10_binary")))
    path = {"cifar10": "cifar-10-binary.tar.gz", "stl10": "stl10_binary.tar.gz"}[name]
    place = place_in(folder, name)
    archive = layouts.archive(place / f"data/{name}/{inner}", place / f"data/{name}/{path}")
    shutil.rmtree(place / f"data/{name}/{inner}")
    kind = rng.randrange(8)
    if kind < 3:
        change(rng, archive)
    elif kind < 7:
        content = gzip.decompress(archive.read_bytes())
        archive.write_bytes(gzip.compress(_changed_tar(rng, folder, content), 1))
    else:
        large = tarfile.TarInfo(f"{inner}/large.bin")
        large.type = rng.choice((b"0", b"x", b"L", b"K", b"g", b"S"))
        large.size = 60_000_000_000
        head = gzip.compress(large.tobuf(tarfile.GNU_FORMAT), 1)
        archive.write_bytes(head + compressed_zeros(rng.choice((3, 20)) * 10**9))
    commands = (f"datasets prepare {name} --data-dir data", f"train {name} --data-dir data")
    return f"{name}: " + handed(rng, place, commands, (f"data/{name}/prepared",))


def plain_archive(rng: random.Random, folder: Path) -> str:
    """ImageNet's tars, and the development kit with the classes of the validation images."""
    place = place_in(folder, "imagenet100:tars")
    root = place / "data/imagenet100"
    path = rng.choice(sorted(root.iterdir()))
    if path.suffix == ".gz":
        content = layouts.development_kit(layouts.photos(layouts.CMC[:3], 4, 3))
        name = rng.choice([*content])
        content[name] = mutated(rng, content[name])
        with tarfile.open(path, "w:gz") as tar:
            for name, data in content.items():
                layouts.add(tar, f"{layouts.KIT}/data/{name}", data)
    else:
        path.write_bytes(_changed_tar(rng, folder, path.read_bytes()))
    command = "datasets prepare imagenet100 --data-dir data"
    return f"{path.name}: " + handed(rng, place, (command,), ("data/imagenet100/prepared",))


def table(rng: random.Random, folder: Path) -> str:
    """Hugging Face's parquet files."""
    place = place_in(folder, "imagenet100:parquet")
    path = rng.choice(sorted((place / "data/imagenet100/data").iterdir()))
    change(rng, path)
    command = "datasets prepare imagenet100 --data-dir data"
    return f"{path.name}: " + handed(rng, place, (command,), ("data/imagenet100/prepared",))


def odd_table(rng: random.Random, folder: Path) -> str:
    """Whole parquet files of other types, and of a few large values many times over."""
    place = place_in(folder, "imagenet100:parquet")
    path = rng.choice(sorted((place / "data/imagenet100/data").iterdir()))
    value, label = rng.choice(
        ((10**12, 0), ("text", 0), (None, 0), (b"x", 1.5), (b"x", [1]), (b"x", "a"), (b"x", None),
         (b"x", -1), (b"x", 10**18), ([1], 0), (True, True), (bytes(10_000_000), 0))
    )  # fmt: skip
    count = 20_000 if value == bytes(10_000_000) else 3
    inner = pa.array([value] * (1 if count > 3 else 3))
    if count > 3:
        inner = inner.dictionary_encode().take(pa.array([0] * count))
    image = pa.StructArray.from_arrays([inner, pa.array(["p"] * count)], ["bytes", "path"])
    about = rng.choice((b"{}", b"[]", nested(100_000), b"5", b'{"info": 5}',
                       b'{"info": {"features": '
                        b'{"label": {"names": 5}}}}', b"\xff"))  # fmt: skip
    table = pa.table(
        {"image": image, "label": pa.array([label] * count)}, metadata={b"huggingface": about}
    )
    pq.write_table(table, path, row_group_size=count)
    command = "datasets prepare imagenet100 --data-dir data"
    said = handed(rng, place, (command,), ("data/imagenet100/prepared",))
    return f"{count} times {str(value)[:10]}, label {label!r}: {said}"


def idx_files(rng: random.Random, folder: Path) -> str:
    place = place_in(folder, "fashion-mnist")
    path = rng.choice(sorted((place / "data/fashion-mnist").iterdir()))
    kind = rng.randrange(4)
    if kind == 0:
        change(rng, path)
    elif kind == 1:
        sides = (0, 1, 20, 28, 33, 65_536, 1 << 31, (1 << 32) - 1)
        count = 3 if "images" in path.name else 1
        axes = tuple(rng.choice(sides) for _ in range(rng.choice((count, count, 2, 8))))
        path.write_bytes(idx(axes, bytes(rng.choice((0, 20, 15_680)))))
    elif kind == 2:
        path.write_bytes(gzip.compress(mutated(rng, gzip.decompress(path.read_bytes())), 1))
    else:
        head = idx((20, 28, 28), b"")
        path.write_bytes(rng.choice((head, b"")) + compressed_zeros(20 * 10**9))
    command = "datasets prepare fashion-mnist --data-dir data"
    return f"{path.name}: " + handed(rng, place, (command,), ("data/fashion-mnist/prepared",))


FILES = {
    "compressed archive": compressed_archive,
    "plain archive": plain_archive,
    "parquet": table,
    "odd parquet": odd_table,
    "IDX": idx_files,
}
