"""Hostile content: refused in one line, in little memory, and nothing is run or written."""

import contextlib
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import layouts
import mlx.core as mx
import numpy as np
import pytest
import servers
from PIL import Image

from hjepa_mlx import checkpoint, recipes, weights
from hjepa_mlx.cli.common import _line_and_status, _plain
from hjepa_mlx.data import archives, download, images, importers, matlab, prepared
from hjepa_mlx.data.folder import open_folder
from hjepa_mlx.data.ground_truth import classes_of
from hjepa_mlx.data.listing import scan
from hjepa_mlx.data.prepare import originals_of
from hjepa_mlx.data.storage import LARGEST, Array, Files, KnownFile, StorageError
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import read, read_json
from hjepa_mlx.sections import Data


def saved(kind: str, mode: str = "RGB", size=(40, 30), **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def holes(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


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
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)  # of WebP, whose canvas comes twice: half
    with pytest.raises(ValueError, match="40x30 pixels"):
        images.decodable(saved("WEBP"))


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


# Weights and checkpoints


def safetensors(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


HEADERS = {
    "the same bytes many times": {
        str(n): {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]} for n in range(100)
    },
    "a million axes": {"a": {"dtype": "U8", "shape": [1 << 31] * 10**6, "data_offsets": [0, 1000]}},
    "nested": b'{"a":' + b"[" * 100_000,
    "no offsets": {"a": {"dtype": "U8", "shape": [1], "data_offsets": []}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path, header):
    with pytest.raises(HJEPAError, match="is damaged"):
        checkpoint.read_safetensors(safetensors(tmp_path / "a.safetensors", header, bytes(1000)))


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"blocks.0.norm1.weight": torch.zeros(1).expand(10**12)}, tmp_path / "a.pth")
    with pytest.raises(HJEPAError, match="is damaged"):
        weights.read(tmp_path / "a.pth")


STATE = {
    "format": 1, "step": 8, "epoch": 2.0, "images": 36, "position": [1, 0], "own_parts": {},
    "window": [{"loss": 1.0}], "random_state": [1, 2], "loss_scale": {}, "sha256": {},
}  # fmt: skip


def test_every_key_of_a_checkpoint_s_state_has_its_type(tmp_path):
    def read_with(**changes):
        (tmp_path / "state.json").write_text(json.dumps(STATE | changes))
        return checkpoint.read_state(tmp_path)

    assert read_with()["step"] == 8
    for key in STATE.keys() - {"format"}:
        with pytest.raises(HJEPAError, match=f"state.json cannot be read .*{key}.* Delete that"):
            read_with(**{key: "x"})
    (tmp_path / "state.json").write_bytes(b"[" * 100_000)
    with pytest.raises(HJEPAError, match="nested too deeply"):
        checkpoint.read_state(tmp_path)


def test_a_resumed_optimizer_is_that_of_the_weights(tmp_path, tiny_config):
    from hjepa_mlx.models.hjepa import HJEPA
    from hjepa_mlx.step import Step

    config = tiny_config()
    step = Step(HJEPA(config), config)
    kept = {key: STATE[key] for key in ("epoch", "images", "position", "own_parts", "window")}
    path = checkpoint.save(tmp_path, step, 1, kept, 1)
    checkpoint.restore(path, step)
    mx.save_safetensors(str(path / "optimizer.safetensors"), {"step": mx.zeros(3)})
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = checkpoint.sha256(path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(HJEPAError, match="belongs to other weights"):
        checkpoint.restore(path, step)
    with pytest.raises(HJEPAError, match="has no learning rate"):
        checkpoint.learning_rate(path)


# Configs, lists and records


def test_a_config_of_many_aliases_or_of_deep_nesting_is_no_yaml(tmp_path):
    few = "data: {crop_scale: &a [0.5, 1.0]}\nfinetune: {crop_scale: *a}"
    twice = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 10))
    path = tmp_path / "a.yaml"
    path.write_text(few)
    assert recipes.load_config(path).finetune.crop_scale == [0.5, 1.0]
    for text in ("x0: &x0 [1]\n" + twice, "a: " + "[" * 20_000, "a: 1\n" + "#" * 10**6):
        path.write_text(text)
        with pytest.raises(HJEPAError, match=r"is not valid YAML|is larger than"):
            recipes.load_config(path)


@pytest.mark.parametrize(
    "override",
    ["data.image_size=100000", "model.depth=100000", "model.dim=1000000", "data.workers=100000",
     "data.image_size=4096", f"name=[{'[1],' * 10_000}]"],
)  # fmt: skip
def test_a_size_beyond_all_measure_is_refused_in_a_short_line(override):
    with pytest.raises(UsageError) as error:
        recipes.load_config("demo", [override])
    assert len(str(error.value)) < 600


def test_the_home_of_nobody_is_a_folder_that_does_not_exist():
    assert recipes.load_config("demo", ["data.dir=~no-such-user/x"]).data.dir.endswith("-user/x")


def test_what_has_no_end_or_many_holes_is_not_read(tmp_path):
    large = holes(tmp_path / "a.txt", 10**11)
    for path in (large, Path("/dev/zero")):
        with pytest.raises(HJEPAError, match="too large for its kind"):
            read(path)
    with pytest.raises(HJEPAError, match="too large for its kind"):
        scan([large])
    large.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(large)


def test_a_damaged_record_of_a_run_s_images_is_named(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(saved("JPEG"))
    for text in ("", "[]", '{"train": 5, "test": []}', '{"train": [[]], "test": []}'):
        (tmp_path / "images.json").write_text(text)
        with pytest.raises(HJEPAError, match=r"images\.json is damaged"):
            open_folder(Data(dir=str(tmp_path)), tmp_path / "images.json")


def test_a_message_is_one_line_without_control_characters():
    assert _plain("a\nb\x1b[31mé\udcff ×") == "a\\nb\\x1b[31mé\\udcff ×"
    assert _line_and_status(MemoryError()) == ("There is too little memory for this.", 1)


def test_a_download_never_grows_larger_than_the_file_should_be(tmp_path, monkeypatch):
    sizes = []

    def md5_of(file):
        sizes.append(os.fstat(file.fileno()).st_size)
        return "another"

    monkeypatch.setattr(download, "md5_of", md5_of)

    def endless(handler, content, start):
        handler.answer(content, length="none", Connection="close")
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(bytes(1 << 20))

    with servers.serving() as server:
        server.manners = [endless]
        with pytest.raises(HJEPAError, match="not the right file"):
            download.download(servers.remote(server), tmp_path / "file.bin")
    assert sizes == [len(servers.CONTENT) + 1]
    assert not list(tmp_path.iterdir())
