"""Archives: only what is known is taken out, images are read in place, hostile ones are refused."""

import contextlib
import gzip
import io
import os
import tarfile
from pathlib import Path

import layouts
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa_mlx.data.archives import images_in_tar, tar_index, unpack
from hjepa_mlx.errors import HJEPAError

WANTED = {"set/a.bin": 1000, "set/b.bin": 1000}
GOOD = {"set/a.bin": b"a" * 1000, "set/b.bin": b"b" * 10}


def nothing(_: int) -> None:
    pass


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


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_known_members_are_taken_out_and_others_left(tmp_path):
    more = {"set/readme.html": b"hello", "other/a.bin": b"x"}
    path = tar_of(tmp_path / "good.tar.gz", more | GOOD)
    seen: list[int] = []
    unpack(path, WANTED, tmp_path / "out", seen.append)
    assert tree(tmp_path / "out") == GOOD
    assert sum(seen) == 1010


def bomb() -> bytes:
    """A tar.gz whose member a.bin says it has 100 MB, and has."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=9) as tar:
        layouts.add(tar, "set/a.bin", bytes(100_000_000))
    assert len(file.getvalue()) < 200_000
    return file.getvalue()


def wrong_size() -> bytes:
    """A tar whose member says it has more bytes than the archive holds."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        layouts.add(tar, "set/a.bin", b"a" * 100)
    data = bytearray(file.getvalue()[:1024])
    info = tarfile.TarInfo("set/a.bin")
    info.size = 900
    data[:512] = info.tobuf(tarfile.USTAR_FORMAT)
    return bytes(data)


HOSTILE = {
    "absolute": lambda path: tar_of(path, {"/tmp/evil": b"x", **GOOD}),
    "upwards": lambda path: tar_of(path, {"set/../../evil": b"x", **GOOD}),
    "symbolic link": lambda path: tar_of(path, GOOD, special("set", tarfile.SYMTYPE, "/tmp")),
    "hard link": lambda path: tar_of(path, GOOD, special("set/c", tarfile.LNKTYPE, "/etc/passwd")),
    "wanted is a link": lambda path: tar_of(
        path, {"set/b.bin": b"b"}, special("set/a.bin", tarfile.SYMTYPE, "/etc/passwd")
    ),
    "device": lambda path: tar_of(path, GOOD, special("set/c", tarfile.CHRTYPE)),
    "pipe": lambda path: tar_of(path, GOOD, special("set/c", tarfile.FIFOTYPE)),
    "wanted is a folder": lambda path: tar_of(
        path, {"set/b.bin": b"b"}, special("set/a.bin", tarfile.DIRTYPE)
    ),
    "bomb": lambda path: path.write_bytes(bomb()),
    "too large": lambda path: tar_of(path, {**GOOD, "set/a.bin": b"a" * 1001}),
    "wrong declared size": lambda path: path.write_bytes(wrong_size()),
    "member missing": lambda path: tar_of(path, {"set/a.bin": b"a"}),
    "no archive": lambda path: path.write_bytes(b"<html>not here</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(
        tar_of(path, {**GOOD, "set/a.bin": os.urandom(1000)}).read_bytes()[:700]
    ),
    "not gzip inside": lambda path: path.write_bytes(gzip.compress(b"no tar")),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_damaged_archive_is_refused_and_nothing_is_written_elsewhere(tmp_path, make):
    place = tmp_path / "deep" / "place"
    place.mkdir(parents=True)
    make(place / "x.tar.gz")
    with pytest.raises(HJEPAError, match=r"x\.tar\.gz"):
        unpack(place / "x.tar.gz", WANTED, place / "out", nothing)
    outside = {name for name in tree(tmp_path) if not name.startswith("deep/place/out/set/")}
    assert outside == {"deep/place/x.tar.gz"}
    assert not os.path.lexists("/tmp/evil")
    for name, data in tree(place / "out").items():  # whole, or absent
        assert len(data) <= WANTED[name]
        assert not name.endswith(".part")


def test_images_of_inner_tars_are_found_where_they_are(tmp_path):
    made = layouts.photos(layouts.CMC[:6], train=5)
    layouts.tars(tmp_path, made)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    raw = path.read_bytes()
    found = [
        (m.group, m.name, raw[m.offset : m.offset + m.size]) for m in images_in_tar(path, nothing)
    ]
    assert sorted(found) == sorted(made["train"])


def test_an_inner_tar_without_its_end_mark_ends_where_it_ends(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        layouts.add(tar, "a.jpg", b"x" * 512)
    bare = inner.getvalue()[:1024]
    path = tar_of(tmp_path / "o.tar", {"one.tar": bare, "two.tar": bare}, mode="w")
    groups = [member.group for member in images_in_tar(path, nothing)]
    assert groups == ["one", "two"]


def test_folders_name_classes_and_only_visible_images_count(tmp_path):
    members = {
        "train/cat/1.jpg": b"c",
        "train/dog/2.PNG": b"d",
        "train/cat/._1.jpg": b"",
        "r.txt": b"",
    }
    path = tar_of(tmp_path / "t.tar", members, special("train/cat", tarfile.DIRTYPE), mode="w")
    assert [(m.group, m.name) for m in images_in_tar(path, nothing)] == [
        ("cat", "1.jpg"),
        ("dog", "2.PNG"),
    ]


@pytest.mark.parametrize("name", ["/evil.jpg", "../evil.jpg"])
def test_unsafe_names_are_refused_even_though_nothing_is_written(tmp_path, name):
    path = tar_of(tmp_path / "t.tar", {name: b"x"}, mode="w")
    with pytest.raises(HJEPAError, match="unsafe"):
        list(images_in_tar(path, nothing))


@pytest.mark.parametrize("where", [100, 700, 3000, 9_000])
def test_a_cut_tar_is_named(tmp_path, where):
    layouts.tars(tmp_path, layouts.photos(layouts.CMC[:3]))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:where])
    with pytest.raises(HJEPAError, match=r"ILSVRC2012_img_train\.tar"):
        list(images_in_tar(path, nothing))


@pytest.mark.parametrize(
    "how", ["inner header", "outer header", "cut between members", "a gap of zeros"]
)
def test_damage_in_the_middle_does_not_pass_for_the_end(tmp_path, how):
    layouts.tars(tmp_path, layouts.photos(layouts.CMC[:5], train=10))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    members = list(images_in_tar(path, nothing))
    assert len(members) == 50
    data = bytearray(path.read_bytes())
    if how == "inner header":
        data[members[25].offset - 512 : members[25].offset - 500] = b"\xff" * 12
    elif how == "outer header":
        outer = members[20].offset - 1024
        data[outer : outer + 512] = b"\xff" * 512
    elif how == "cut between members":
        del data[members[30].offset - 1024 :]
    else:
        data[members[20].offset - 1024 :] = bytes(2_000_000)
    path.write_bytes(data)
    with pytest.raises(HJEPAError, match=r"ILSVRC2012_img_train\.tar"):
        list(images_in_tar(path, nothing))


def test_the_index_is_kept_and_made_anew_when_the_tar_changes(tmp_path):
    path = tar_of(tmp_path / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"22"}, mode="w")
    first = tar_index(path, nothing)
    kept = tmp_path / "t.tar.index.npz"
    assert (first.groups, first.size.tolist()) == (("a", "b"), [1, 2])
    untouched = kept.stat().st_mtime_ns
    again = tar_index(path, nothing)
    assert all(
        np.array_equal(x, y)
        for x, y in zip(vars(first).values(), vars(again).values(), strict=True)
    )
    assert kept.stat().st_mtime_ns == untouched
    tar_of(path, {"c/3.jpg": b"333"}, mode="w")
    assert tar_index(path, nothing).groups == ("c",)
    kept.write_bytes(b"damaged")
    assert tar_index(path, nothing).groups == ("c",)


@given(st.binary(max_size=3000))
def test_any_bytes_give_images_or_the_error_meant_for_people(data):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"hjepa-fuzz-{os.getpid()}.tar"
    path.write_bytes(data)
    try:
        with contextlib.suppress(HJEPAError):
            list(images_in_tar(path, nothing))
    finally:
        path.unlink()
