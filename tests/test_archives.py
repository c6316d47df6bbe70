"""Archives: only what is known is taken out, images are read in place, hostile ones are refused."""

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import layouts
import numpy as np
import pytest
from hypothesis import given, settings
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


def tar_of_pairs(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members:
            layouts.add(tar, name, data)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def everything(folder: Path) -> dict[str, tuple[int, str | bytes]]:
    """Kind and content of whatever lies in a folder; links are not followed."""
    found: dict[str, tuple[int, str | bytes]] = {}
    for path in folder.rglob("*"):
        kind = stat.S_IFMT(path.lstat().st_mode)
        link = os.readlink(path) if stat.S_ISLNK(kind) else ""
        content = path.read_bytes() if stat.S_ISREG(kind) else link
        found[path.relative_to(folder).as_posix()] = (kind, content)
    return found


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


def declares(size: int) -> bytes:
    """A tar whose wanted member says it has `size` bytes; 512 follow."""
    info = tarfile.TarInfo("set/a.bin")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + b"a" * 512


HOSTILE = {
    "absolute": lambda path: tar_of(path, {"/tmp/evil": b"x", **GOOD}),
    "upwards": lambda path: tar_of(path, {"set/../../evil": b"x", **GOOD}),
    "symbolic link": lambda path: tar_of(path, GOOD, special("set", tarfile.SYMTYPE, "/tmp")),
    "hard link": lambda path: tar_of(path, GOOD, special("set/c", tarfile.LNKTYPE, "/etc/passwd")),
    "wanted is a link": lambda path: tar_of(
        path, {"set/b.bin": b"b"}, special("set/a.bin", tarfile.SYMTYPE, "/etc/passwd")
    ),
    "the folder itself": lambda path: tar_of(path, {"..": b"x", **GOOD}),
    "block device": lambda path: tar_of(path, GOOD, special("set/c", tarfile.BLKTYPE)),
    "wanted is a hard link": lambda path: tar_of(
        path, {"set/b.bin": b"b"}, special("set/a.bin", tarfile.LNKTYPE, "../../x.tar.gz")
    ),
    "wanted is a device": lambda path: tar_of(
        path, {"set/b.bin": b"b"}, special("set/a.bin", tarfile.CHRTYPE)
    ),
    "wanted twice": lambda path: tar_of_pairs(
        path, ("set/a.bin", b"1"), ("set/a.bin", b"2"), ("set/b.bin", b"b")
    ),
    "declares a terabyte": lambda path: path.write_bytes(declares(1 << 40)),
    "declares more than is there": lambda path: path.write_bytes(gzip.compress(declares(1000))),
    "declares less than nothing": lambda path: path.write_bytes(declares(-512)),
    "cut plain tar": lambda path: path.write_bytes(
        tar_of(path, GOOD, mode="w").read_bytes()[: 512 + 700]
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
    before = everything(tmp_path)
    with pytest.raises(HJEPAError, match=r"x\.tar\.gz"):
        unpack(place / "x.tar.gz", WANTED, place / "out", nothing)
    after = everything(tmp_path)
    new = after.keys() - before.keys()
    allowed = {"deep/place/out", "deep/place/out/set"}
    assert new <= allowed | {f"deep/place/out/{name}" for name in WANTED}
    assert {name: after[name] for name in before} == before
    assert {after[name][0] for name in new} <= {stat.S_IFDIR, stat.S_IFREG}
    assert not os.path.lexists("/tmp/evil")
    for name, data in tree(place / "out").items():  # whole, or absent
        assert len(data) <= WANTED[name]
        assert not name.endswith(".part")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_changed_byte_is_refused_or_does_no_harm(tmp_path, mode):
    content = np.random.default_rng(0).integers(0, 4, 60_000, np.uint8).tobytes()
    wanted = {"set/a.bin": 60_000, "set/b.bin": 1000}
    path = tar_of(tmp_path / "x.tar.gz", {"set/a.bin": content, "set/b.bin": b"b" * 10}, mode=mode)
    whole = path.read_bytes()
    refused, raised = 0, {}
    for place in range(0, len(whole), 101):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            unpack(path, wanted, tmp_path / "out", nothing)
        except HJEPAError:
            refused += 1
        except Exception as error:
            raised[type(error).__name__] = str(error)
        sizes = {name: len(data) for name, data in tree(tmp_path / "out").items()}
        assert sizes.items() <= {("set/a.bin", 60_000), ("set/b.bin", 10)}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert raised == {}
    assert refused


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


FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
STEMS = st.one_of(
    st.text("abc._- 0é", min_size=1, max_size=8).filter(lambda name: name.strip(".")),
    st.integers(90, 140).map(lambda length: "long" + "g" * length),
)
ENDINGS = st.sampled_from([".JPEG", ".jpg", ".png", ".txt", ".jpg.txt", ".tar.gz", ""])
IMAGES = (".JPEG", ".jpg", ".png")
FILES = st.dictionaries(
    st.tuples(STEMS, ENDINGS).map("".join), st.binary(max_size=1100), max_size=5
)
CLASSES = st.sampled_from(["n01440764", "n02119789", "n15075141"])
END = bytes(1024)


def packed(members: dict[str, bytes], form: int) -> bytes:
    """A tar without its end mark."""
    blocks = []
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        blocks.append(info.tobuf(form, "utf-8") + data + bytes(-len(data) % 512))
    return b"".join(blocks)


def is_image(name: str) -> bool:
    return name.endswith(IMAGES) and not name.startswith(".")


@given(st.dictionaries(CLASSES, st.tuples(FILES, FORMATS, st.booleans())), FILES, FORMATS)
@settings(max_examples=30)
def test_whatever_is_packed_is_found_where_it_is(classes, loose, form):
    inner = {
        f"{name}.tar": packed(files, inner_form) + (END if ends else b"")
        for name, (files, inner_form, ends) in classes.items()
    }
    beside = {f"beside/{name}": data for name, data in loose.items()}
    raw = packed(inner | beside, form) + END
    expected = [(c, n, data) for c, (files, _, _) in classes.items() for n, data in files.items()]
    expected += [("beside", name, data) for name, data in loose.items()]
    seen: list[int] = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "t.tar"
        path.write_bytes(raw)
        found = list(images_in_tar(path, seen.append))
    read = [(m.group, m.name, raw[m.offset : m.offset + m.size]) for m in found]
    assert read == [item for item in expected if is_image(item[1])]
    assert seen == sorted(seen)


def test_images_in_tars_agree_with_what_tarfile_takes_out(tmp_path):
    layouts.tars(tmp_path, layouts.photos(layouts.CMC[:4], train=3))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    expected = {}
    with tarfile.open(path) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as tar:
                for image in tar:
                    expected[member.name, image.name] = tar.extractfile(image).read()
    index, raw = tar_index(path, nothing), path.read_bytes()
    rows = zip(index.group, index.names, index.offset, index.size, strict=True)
    assert {
        (f"{index.groups[group]}.tar", name.decode()): raw[offset : offset + size]
        for group, name, offset, size in rows
    } == expected


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


def small(path: Path, count: int = 4) -> bytes:
    """A tar with a tar of `count` images in it, twice; without the zeros that fill up a record."""
    inner = packed({f"{n}.jpg": bytes([n + 1]) * 300 for n in range(count)}, tarfile.USTAR_FORMAT)
    both = {"one.tar": inner + END, "two.tar": inner + END}
    raw = packed(both, tarfile.USTAR_FORMAT) + END
    path.write_bytes(raw)
    return raw


def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path):
    path = tmp_path / "t.tar"
    raw = small(path)
    for length in range(0, len(raw) - len(END) + 1, 256):
        path.write_bytes(raw[:length])
        with pytest.raises(HJEPAError, match=r"t\.tar"):
            list(images_in_tar(path, nothing))


def test_a_block_of_zeros_loses_no_image_in_silence(tmp_path):
    path = tmp_path / "t.tar"
    raw = small(path)
    members = list(images_in_tar(path, nothing))
    lost = []
    for start in range(0, len(raw), 512):
        path.write_bytes(raw[:start] + bytes(512) + raw[start + 512 :])
        with contextlib.suppress(HJEPAError):
            if list(images_in_tar(path, nothing)) != members:
                lost.append(start)
    assert lost == []


def test_what_follows_the_end_mark_is_not_left_out_in_silence(tmp_path):
    one = tar_of(tmp_path / "1.tar", {"a/1.jpg": b"1"}, mode="w").read_bytes()
    two = tar_of(tmp_path / "2.tar", {"b/2.jpg": b"2"}, mode="w").read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    with contextlib.suppress(HJEPAError):
        assert len(list(images_in_tar(tmp_path / "both.tar", nothing))) == 2


def test_tars_in_tars_without_end_are_refused(tmp_path):
    headers, size = [special("x.jpg", tarfile.REGTYPE).tobuf(tarfile.USTAR_FORMAT)], 512
    for _ in range(2000):
        info = tarfile.TarInfo("a.tar")
        info.size = size
        headers.append(info.tobuf(tarfile.USTAR_FORMAT))
        size += 512
    path = tmp_path / "t.tar"
    path.write_bytes(b"".join(reversed(headers)) + END)
    with pytest.raises(HJEPAError, match=r"t\.tar"):
        list(images_in_tar(path, nothing))


def less_than_nothing(by_pax: bool) -> bytes:
    """A member whose size sends the reader back to this very header (CVE-2025-8194)."""
    info = tarfile.TarInfo("2.jpg")
    if not by_pax:
        info.size = -512
        return info.tobuf(tarfile.GNU_FORMAT)
    record = b"14 size=-1536\n"
    extended = special("pax", tarfile.XHDTYPE)
    extended.size = len(record)
    header = extended.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    return header + info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("by_pax", [False, True])
def test_a_member_of_less_than_nothing_does_not_turn_in_a_circle(tmp_path, by_pax):
    path = tmp_path / "t.tar"
    first = packed({"1.jpg": b"1"}, tarfile.GNU_FORMAT)
    path.write_bytes(first + less_than_nothing(by_pax) + END)
    with pytest.raises(HJEPAError, match=r"t\.tar"):
        list(islice(images_in_tar(path, nothing), 1000))


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_among_images_are_refused(tmp_path, kind, nested):
    path = tar_of(tmp_path / "t.tar", {}, special("a.jpg", kind, "/etc/passwd"), mode="w")
    if nested:
        tar_of(path, {"n01440764.tar": path.read_bytes()}, mode="w")
    with pytest.raises(HJEPAError, match="unsafe"):
        list(images_in_tar(path, nothing))


@pytest.mark.parametrize("content", [b"", b"x" * 5000, gzip.compress(END)], ids=["", "x", "gz"])
def test_what_is_no_tar_is_named_and_gets_no_index(tmp_path, content):
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    with pytest.raises(HJEPAError, match=r"t\.tar"):
        tar_index(path, nothing)
    assert [file.name for file in tmp_path.iterdir()] == ["t.tar"]


def test_names_that_are_not_utf8_are_indexed(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        layouts.add(tar, "été/café.jpg", b"x")
    first, again = tar_index(path, nothing), tar_index(path, nothing)
    assert first.names.tolist() == again.names.tolist() == ["café.jpg".encode("latin-1")]
    assert first.groups == again.groups


def same(one, other) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_an_index_damaged_anywhere_is_made_anew(tmp_path):
    path = tar_of(tmp_path / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"22"}, mode="w")
    right, kept = tar_index(path, nothing), tmp_path / "t.tar.index.npz"
    whole = kept.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 37)]
    for place in range(0, len(whole), 7):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    raised = {}
    for content in damaged:
        kept.write_bytes(content)
        try:
            assert same(tar_index(path, nothing), right)
        except (Exception, AssertionError) as error:
            raised[type(error).__name__] = str(error)
    assert raised == {}


@pytest.mark.parametrize("key", ["groups", "group", "names", "offset", "size", "stamp"])
def test_an_index_without_one_of_its_arrays_is_made_anew(tmp_path, key):
    path = tar_of(tmp_path / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"22"}, mode="w")
    right, kept = tar_index(path, nothing), tmp_path / "t.tar.index.npz"
    with np.load(kept) as arrays:
        rest = {name: arrays[name] for name in arrays if name != key}
    for lacking in (rest, rest | {key: np.array([{"an": "object"}])}):
        np.savez(kept, **lacking)
        assert same(tar_index(path, nothing), right)
        with np.load(kept) as arrays:
            assert key in arrays


def test_the_index_of_another_tar_is_not_taken_for_this_ones(tmp_path):
    one = tar_of(tmp_path / "1.tar", {"a/1.jpg": b"1"}, mode="w")
    two = tar_of(tmp_path / "2.tar", {"b/2.jpg": b"2"}, mode="w")
    os.utime(one, ns=(0, 1))
    tar_index(one, nothing)
    (tmp_path / "1.tar.index.npz").rename(tmp_path / "2.tar.index.npz")
    assert tar_index(two, nothing).groups == ("b",)


def test_a_kept_index_is_used_without_reading_the_tar(tmp_path):
    path = tar_of(tmp_path / "t.tar", {"a/1.jpg": b"1"}, mode="w")
    first, status = tar_index(path, nothing), path.stat()
    path.write_bytes(b"?" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert same(tar_index(path, nothing), first)


def test_two_that_make_the_index_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"22"}, mode="w")
    savez, others = np.savez, []

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(np, "savez", savez)
        others.append(tar_index(path, nothing))
        savez(*args, **kwargs)

    monkeypatch.setattr(np, "savez", meanwhile)
    index = tar_index(path, nothing)
    assert same(index, others[0])
    assert same(tar_index(path, nothing), index)
    assert {file.name for file in tmp_path.iterdir()} == {"t.tar", "t.tar.index.npz"}


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("left", [None, b"damaged"], ids=["no index", "damaged index"])
def test_in_a_folder_that_cannot_be_written_the_index_is_only_not_kept(left):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = tar_of(folder / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"22"}, mode="w")
        if left:
            (folder / "t.tar.index.npz").write_bytes(left)
        before = everything(folder)
        folder.chmod(0o555)
        try:
            with nobody():
                index = tar_index(path, nothing)
        finally:
            folder.chmod(0o755)
        assert (index.groups, index.size.tolist()) == (("a", "b"), [1, 2])
        assert everything(folder) == before


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
