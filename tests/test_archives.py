"""Archives: only one known member is read from them, hostile ones are refused."""

import gzip
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest

from hjepa_mlx.data.archives import opened_member
from hjepa_mlx.errors import HJEPAError

GOOD = {"set/b.bin": b"b" * 10, "set/a.bin": b"a" * 1000}


def tar_of(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo, mode="w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for info in special:
            tar.addfile(info)
        for name, data in members.items():
            layouts.add(tar, name, data)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read_member(path: Path, name: str = "set/a.bin", largest: int = 1000) -> bytes:
    with opened_member(path, name, largest, 1 << 20) as file:
        return file.read()


def test_a_member_is_read_without_unpacking(tmp_path):
    more = {"set/readme.html": b"hello", "other/a.bin": b"x"}
    path = tar_of(tmp_path / "good.tar.gz", more | GOOD)
    assert {name: read_member(path, name) for name in GOOD} == GOOD
    assert [file.name for file in tmp_path.iterdir()] == ["good.tar.gz"]


def bomb(path: Path) -> None:
    """A tar.gz whose member a.bin says it has 100 MB, and has."""
    tar_of(path, {"set/a.bin": bytes(100_000_000)})
    assert path.stat().st_size < 200_000


def declares(size: int) -> bytes:
    """A tar whose wanted member says it has `size` bytes; 512 follow."""
    info = tarfile.TarInfo("set/a.bin")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + b"a" * 512


def of(members: dict[str, bytes], *infos: tarfile.TarInfo) -> Callable[[Path], object]:
    return lambda path: tar_of(path, members, *infos)


def wanted_is(kind: bytes) -> Callable[[Path], object]:
    return of({"set/b.bin": b"b"}, special("set/a.bin", kind, "/etc/passwd"))


SPECIAL = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}
HOSTILE = {
    "absolute": of({"/tmp/evil": b"x", **GOOD}),
    "upwards": of({"set/../../evil": b"x", **GOOD}),
    "the folder itself": of({"..": b"x", **GOOD}),
    "wanted is a folder": wanted_is(tarfile.DIRTYPE),
    **{name: of(GOOD, special("set/c", kind, "/etc/passwd")) for name, kind in SPECIAL.items()},
    **{f"wanted is a {name}": wanted_is(kind) for name, kind in SPECIAL.items()},
    "declares a terabyte": lambda path: path.write_bytes(declares(1 << 40)),
    "declares more than is there": lambda path: path.write_bytes(gzip.compress(declares(1000))),
    "declares less than nothing": lambda path: path.write_bytes(declares(-512)),
    "cut plain tar": lambda path: path.write_bytes(
        tar_of(path, GOOD, mode="w").read_bytes()[: 512 + 700]
    ),
    "bomb": bomb,
    "too large": of({**GOOD, "set/a.bin": b"a" * 1001}),
    "member missing": of({"set/b.bin": b"a"}),
    "no archive": lambda path: path.write_bytes(b"<html>not here</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(
        tar_of(path, {**GOOD, "set/a.bin": os.urandom(1000)}).read_bytes()[:700]
    ),
    "not gzip inside": lambda path: path.write_bytes(gzip.compress(b"no tar")),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_damaged_archive_is_refused_and_nothing_is_written(tmp_path, make):
    make(tmp_path / "x.tar.gz")
    with pytest.raises(HJEPAError, match=r"x\.tar\.gz"):
        read_member(tmp_path / "x.tar.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar.gz"]
    assert not os.path.lexists("/tmp/evil")


def test_a_changed_byte_is_refused_or_gives_a_whole_member(tmp_path):
    content = np.random.default_rng(0).integers(0, 4, 60_000, np.uint8).tobytes()
    path = tar_of(tmp_path / "x.tar.gz", {"set/a.bin": content})
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 101):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert len(read_member(path, largest=60_000)) == 60_000
        except HJEPAError:
            refused += 1
    assert refused
