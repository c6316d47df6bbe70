"""Tars of images: every image is found where it is, damage and hostile content is refused."""

import contextlib
import gzip
import os
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import layouts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_archives import SPECIAL, special, tar_of

from hjepa_mlx.data.archives import images_in_tar
from hjepa_mlx.errors import HJEPAError

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
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "t.tar"
        path.write_bytes(raw)
        found = list(images_in_tar(path))
    read = [(m.group, m.name, raw[m.offset : m.offset + m.size]) for m in found]
    assert read == [item for item in expected if is_image(item[1])]


def test_folders_name_classes_and_only_visible_images_count(tmp_path):
    members = {
        "train/cat/1.jpg": b"c",
        "train/dog/2.PNG": b"d",
        "train/cat/._1.jpg": b"",
        "r.txt": b"",
    }
    path = tar_of(tmp_path / "t.tar", members, special("train/cat", tarfile.DIRTYPE), mode="w")
    assert [(m.group, m.name) for m in images_in_tar(path)] == [
        ("cat", "1.jpg"),
        ("dog", "2.PNG"),
    ]


def small(path: Path, count: int = 4) -> bytes:
    """A tar with a tar of `count` images in it, twice; without the zeros that fill up a record."""
    inner = packed({f"{n}.jpg": bytes([n + 1]) * 300 for n in range(count)}, tarfile.USTAR_FORMAT)
    both = {"one.tar": inner + END, "two.tar": inner + END}
    raw = packed(both, tarfile.USTAR_FORMAT) + END
    path.write_bytes(raw)
    return raw


@pytest.fixture
def whole(tmp_path) -> tuple[Path, bytes, list]:
    """That tar, its bytes, and the images in it."""
    raw = small(tmp_path / "t.tar")
    members = list(images_in_tar(tmp_path / "t.tar"))
    assert len(members) == 8
    return tmp_path / "t.tar", raw, members


def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(whole):
    path, raw, _ = whole
    for length in range(0, len(raw) - len(END) + 1, 256):
        path.write_bytes(raw[:length])
        with pytest.raises(HJEPAError, match=r"t\.tar"):
            list(images_in_tar(path))


@pytest.mark.parametrize("header", ["inner", "outer"])
@pytest.mark.parametrize("rest", [0, 2_000_000], ids=["garbled", "a gap of zeros"])
def test_damage_in_the_middle_does_not_pass_for_the_end(whole, header, rest):
    path, raw, members = whole
    start = members[1].offset - 512 if header == "inner" else members[4].offset - 1024
    end = bytes(rest) if rest else b"\xff" * 512 + raw[start + 512 :]
    path.write_bytes(raw[:start] + end)
    with pytest.raises(HJEPAError, match=r"t\.tar"):
        list(images_in_tar(path))


def test_a_block_of_zeros_loses_no_image_in_silence(whole):
    path, raw, members = whole
    lost = []
    for start in range(0, len(raw), 512):
        path.write_bytes(raw[:start] + bytes(512) + raw[start + 512 :])
        with contextlib.suppress(HJEPAError):
            if list(images_in_tar(path)) != members:
                lost.append(start)
    assert lost == []


def test_what_follows_the_end_mark_is_not_left_out_in_silence(tmp_path):
    one = tar_of(tmp_path / "1.tar", {"a/1.jpg": b"1"}, mode="w").read_bytes()
    two = tar_of(tmp_path / "2.tar", {"b/2.jpg": b"2"}, mode="w").read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    with contextlib.suppress(HJEPAError):
        assert len(list(images_in_tar(tmp_path / "both.tar"))) == 2


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
        list(images_in_tar(path))


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
        list(islice(images_in_tar(path), 1000))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "info",
    [special("/evil.jpg", tarfile.REGTYPE), special("../evil.jpg", tarfile.REGTYPE)]
    + [special("a.jpg", kind, "/etc/passwd") for kind in SPECIAL.values()],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
def test_links_devices_and_unsafe_names_among_images_are_refused(tmp_path, info, nested):
    path = tar_of(tmp_path / "t.tar", {}, info, mode="w")
    if nested:
        tar_of(path, {"n01440764.tar": path.read_bytes()}, mode="w")
    with pytest.raises(HJEPAError, match="unsafe"):
        list(images_in_tar(path))


@pytest.mark.parametrize("content", [b"", b"x" * 5000, gzip.compress(END)], ids=["", "x", "gz"])
def test_what_is_no_tar_is_named(tmp_path, content):
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    with pytest.raises(HJEPAError, match=r"t\.tar"):
        list(images_in_tar(path))


def test_names_that_are_not_utf8_are_found(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        layouts.add(tar, "été/café.jpg", b"x")
    (member,) = images_in_tar(path)
    assert os.fsencode(member.name) == "café.jpg".encode("latin-1")


def test_a_shallow_look_gives_inner_tars_and_the_same_classes(tmp_path):
    layouts.tars(tmp_path, layouts.photos(layouts.CMC[:4], train=3))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    shallow = list(images_in_tar(path, deep=False))
    assert [m.name for m in shallow] == sorted(f"{name}.tar" for name in layouts.CMC[:4])
    assert {m.group for m in shallow} == {m.group for m in images_in_tar(path)}


@given(st.binary(max_size=3000))
def test_any_bytes_give_images_or_the_error_meant_for_people(data):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"hjepa-fuzz-{os.getpid()}.tar"
    path.write_bytes(data)
    try:
        with contextlib.suppress(HJEPAError):
            list(images_in_tar(path))
    finally:
        path.unlink()
