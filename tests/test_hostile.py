"""Hostile data: refused in one line, in little memory, and nothing is run or written."""

import io
import json
import struct
import tarfile
import zlib

import layouts
import numpy as np
import pytest
from layouts import holes, saved
from PIL import Image

from hjepa_mlx.data import archives, images, importers, matlab, prepared
from hjepa_mlx.data.ground_truth import classes_of
from hjepa_mlx.data.prepare import originals_of
from hjepa_mlx.data.storage import LARGEST, Array, Files, KnownFile, StorageError
from hjepa_mlx.errors import HJEPAError

# Pictures


def test_postscript_is_no_picture_whatever_its_name(tmp_path):
    """Pillow would start Ghostscript, which runs it."""
    eps = saved("EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="not an image"):
        images.decodable(eps)


def test_a_jpeg_of_many_scans_is_refused():
    data = saved("JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    assert len(images.decodable(data)) == len(data)
    many = data[:last] + 200 * data[last:-2] + data[-2:]
    for refused in (images.decodable, images.look_at, lambda d: images.shrunk(d, 16, 90)):
        with pytest.raises(ValueError, match="scans, are too many"):
            refused(many)


def test_a_picture_that_takes_much_memory_to_decode_has_fewer_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_OTHER", 1000)
    assert len(images.decodable(saved("JPEG")))
    with pytest.raises(ValueError, match="40x30 pixels are too many"):
        images.decodable(saved("PNG"))
    monkeypatch.setattr(images, "MAX_OTHER", 2000)  # of formats that take twice as much: half
    assert len(images.decodable(saved("PNG")))
    for kind in images.DOUBLE:
        with pytest.raises(ValueError, match="40x30 pixels"):
            images.decodable(saved(kind))


def test_files_too_large_for_an_image_are_not_read(tmp_path):
    path = holes(tmp_path / "a.jpg", LARGEST + 1)
    with pytest.raises(ValueError, match="too many for an image"):
        Files(tmp_path, [str(path)]).read(0)
    with pytest.raises(ValueError, match="too many for an image"):
        KnownFile(path).read(0, LARGEST + 1)


# Archives and tables


def test_a_header_that_says_it_is_large_is_not_read(tmp_path):
    """A gzip of zeros costs a thousandth of what it unpacks to."""
    head = tarfile.TarInfo("x")
    head.type, head.size = b"x", 1 << 30
    for name, mode in (("a.tar", None), ("a.tar.gz", "gz")):
        path = tmp_path / name
        raw = head.tobuf() + bytes(1 << 21)
        path.write_bytes(raw if mode is None else zlib.compress(raw, wbits=31))
    with pytest.raises(HJEPAError, match="a header of"):
        list(archives.images_in_tar(tmp_path / "a.tar"))
    with (
        pytest.raises(HJEPAError, match="a header of"),
        archives.opened_member(tmp_path / "a.tar.gz", "b", 10, 1 << 30),
    ):
        pass


def test_an_archive_is_not_unpacked_further_than_the_data_set_is_large(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        layouts.add(tar, "large", bytes(100_000))
        layouts.add(tar, "wanted", b"here")
    with archives.opened_member(tmp_path / "a.tar.gz", "wanted", 10, 200_000) as file:
        assert file.read(4) == b"here"
    with (
        pytest.raises(HJEPAError, match="it is too large"),
        archives.opened_member(tmp_path / "a.tar.gz", "wanted", 10, 50_000),
    ):
        pass


def test_an_idx_header_whose_product_overflows_is_no_idx_file(tmp_path):
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", 1 << 31, 1 << 31, 4)
    (tmp_path / "a.gz").write_bytes(zlib.compress(head, wbits=31))
    with pytest.raises(HJEPAError, match="not a whole IDX file"):
        importers.read_idx(tmp_path / "a.gz", 3)


def test_matlab_s_form_is_read_as_scipy_reads_it():
    from scipy.io import loadmat

    kit = layouts.development_kit(layouts.photos(layouts.CMC[:5]))["meta.mat"]
    expected = loadmat(io.BytesIO(kit), squeeze_me=True)["synsets"]
    found = matlab.structs(kit, "synsets")
    assert ["".join(map(chr, x)) for x in found["WNID"]] == expected["WNID"].tolist()
    for key in ("ILSVRC2012_ID", "num_children", "wordnet_height"):
        assert [int(x[0]) for x in found[key]] == expected[key].astype(int).tolist()


def test_a_kit_that_is_cut_or_a_bomb_is_refused(tmp_path):
    folder = tmp_path / "ILSVRC2012_devkit_t12/data"
    folder.mkdir(parents=True)
    kit = layouts.development_kit(layouts.photos(layouts.CMC[:2]))
    bomb = zlib.compress(bytes(matlab.LARGEST + 1000))
    for mat in (
        kit["meta.mat"][:-500],
        kit["meta.mat"][:128] + struct.pack("<II", 15, len(bomb)) + bomb,
    ):
        (folder / "meta.mat").write_bytes(mat)
        with pytest.raises(StorageError, match=r"meta.mat cannot be read"):
            classes_of(tmp_path, ["ILSVRC2012_val_00000001.JPEG"])


@pytest.mark.parametrize("value", ["text", 10**12, [1]])
def test_a_parquet_column_of_another_type_is_named(tmp_path, value):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "imagenet100/data"
    folder.mkdir(parents=True)
    image = pa.array([{"bytes": value, "path": "p"}])
    for stem in ("train", "validation"):
        path = folder / f"{stem}-00000-of-00001.parquet"
        pq.write_table(pa.table({"image": image, "label": [0]}), path)
    with pytest.raises(StorageError, match=r"image.bytes is"):
        originals_of("imagenet100", tmp_path)


# Prepared data


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path):
    layouts.cifar10(tmp_path / "cifar10", 2)
    folder = layouts.prepared(tmp_path, "cifar10")
    made = json.loads((folder / "dataset.json").read_text())
    for name in ("../secret", "/dev/zero", "a/b"):
        made["splits"]["train"]["files"][0]["file"] = name
        (folder / "dataset.json").write_text(json.dumps(made))
        with pytest.raises(StorageError, match="is not in its folder"):
            prepared.read(folder, "train")


@pytest.mark.parametrize(
    "shape", [(), (4,), (1 << 32, 1 << 32, 1, 1), (10**12, 0, 0, 3), (-1, 2, 2, 3)]
)
def test_pixels_of_an_impossible_shape_are_refused(tmp_path, shape):
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(StorageError):
        Array(tmp_path / "a.npy", "")


@pytest.mark.parametrize("field", ["offset", "size", "label"])
def test_an_index_that_points_nowhere_is_refused(tmp_path, field):
    layouts.tars(tmp_path / "imagenet100", layouts.photos(layouts.CMC[:2]))
    folder = layouts.prepared(tmp_path, "imagenet100")
    rows = np.load(folder / "train-00000.npy")
    most = np.iinfo(rows[field].dtype).max
    for value in (-2, most, most - 1000):
        rows[field][1] = value
        np.save(folder / "train-00000.npy", rows)
        with pytest.raises(StorageError, match=r"damaged|is cut"):
            prepared.read(folder, "train")
