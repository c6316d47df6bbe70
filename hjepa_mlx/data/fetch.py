"""`hjepa-mlx datasets download`: from nothing on disk to a data set that trains."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from hjepa_mlx.data import importers, prepared
from hjepa_mlx.data.catalog import Dataset, look_up
from hjepa_mlx.data.download import download, md5_of
from hjepa_mlx.data.prepare import IMAGE_BYTES, fingerprints, originals_of, prepare
from hjepa_mlx.errors import HJEPAError, required
from hjepa_mlx.files import check_space, make_folder, sha256
from hjepa_mlx.hub import asking
from hjepa_mlx.progress import bar

IMAGENET_STEPS = """\
ImageNet-1K cannot be downloaded without an account. Once:
  1. Make an account at https://image-net.org/download and accept its terms.
  2. From "ILSVRC2012" download these three files (155 GB) into {folder}:
       ILSVRC2012_img_train.tar        Training images (Task 1 & 2)
       ILSVRC2012_img_val.tar          Validation images (all tasks)
       ILSVRC2012_devkit_t12.tar.gz    Development kit (Task 1 & 2)
  3. hjepa-mlx datasets download {name} --data-dir {root}
Kaggle's "ImageNet Object Localization Challenge", unpacked there, serves as well."""


def fetch(name: str, root: Path, earlier: bool = False) -> list[Path]:
    """Download a data set into `root/name` and prepare it there; finished steps are not repeated.

    Returns the originals that are not needed any more: none while an image of theirs could not be
    read, and those of a data set that was prepared before only if `earlier` asks for them. Raises
    HJEPAError with the reason in one line; it can be run again.
    """
    row = look_up(name)
    if row.parts:
        return [path for part in row.parts for path in fetch(part, root, earlier)]
    folder = prepared.find(name, root)
    if name == "demo" or (folder and not (earlier and importers.find(name, root))):
        return []
    if not folder:
        (_by_hand if row.archives else _from_hub if row.hub else _from_web)(row, root)
    originals = originals_of(name, root)
    if folder:
        made = prepared.manifest(folder)
    else:
        made = prepare(name, originals, root / name / prepared.FOLDER)
    from_others = made.get("originals") != fingerprints(originals)
    if from_others or any(part["skipped"] for part in made["splits"].values()):
        return []
    files = dict.fromkeys(path for original in originals.values() for path in original.files)
    return [path for path in files if path.is_relative_to(root)]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_disk(row: Dataset, download: int, folder: Path) -> None:
    """Refuse a disk too small for the download and the prepared form; files there already count."""
    make_folder(folder)
    images = sum(row.splits[split] for split in row.stored_splits)
    size = 3 * max(32, row.resolution) ** 2 if row.resolution < 224 else IMAGE_BYTES
    advice = "Free some, or choose another folder with --data-dir."
    check_space(f"{row.title} needs", download + images * size - size_of(folder), folder, advice)


def _from_web(row: Dataset, root: Path) -> None:
    """Fetch the files that are not there; compare those that are with their MD5.

    Debian's package has files of its own, compressed anew: their MD5 is another.
    """
    folder = root / row.name
    found = importers.find(row.name, root)
    if not found:
        _check_disk(row, sum(remote.size for remote in row.files), folder)
    for remote in row.files:
        path = folder / remote.name
        if found and not path.is_file():
            path = root / remote.name
        if path.is_file():
            _check_md5(path, remote.md5)
        elif not found:
            download(remote, path)


def _by_hand(row: Dataset, root: Path) -> None:
    """Say which files to get and where to put them, or check those that are there."""
    folder = root / row.name
    missing = [file for file in row.archives if not (folder / file).is_file()]
    found = importers.find(row.name, root)
    if missing and found and found.layout != "tar archives":
        return  # another layout, which nobody publishes checksums of
    if missing:
        print(IMAGENET_STEPS.format(folder=folder, name=row.name, root=quote(str(root))))
        raise HJEPAError(f"{folder} lacks {', '.join(missing)}.")
    for file, md5 in row.archives.items():
        _check_md5(folder / file, md5)


def _check_md5(path: Path, published: str) -> None:
    with open(path, "rb") as file:
        md5 = md5_of(file)
    if md5 != published:
        raise HJEPAError(f"{path} has the MD5 {md5}, not the published {published}. Move it away.")


def _from_hub(row: Dataset, root: Path) -> None:
    """Parquet files of a repository on Hugging Face, compared with the SHA-256 it publishes."""
    folder, found = root / row.name, importers.find(row.name, root)
    if found and found.layout != "parquet files":  # an interrupted download leaves some of those
        return
    hub = required("huggingface_hub", "hub")
    assert row.hub is not None
    with asking(row.hub, f"Downloading {row.hub}", " Run the command again to go on."):
        info = hub.HfApi().dataset_info(row.hub, files_metadata=True)
        files = [f for f in info.siblings or [] if f.rfilename.endswith(".parquet") and f.lfs]
        if not files:
            raise HJEPAError(f"The repository {row.hub} has no parquet files any more.")
        _check_disk(row, sum(file.size or 0 for file in files), folder)
        hub.snapshot_download(
            row.hub,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[file.rfilename for file in files],
        )
    with bar("Checking", len(files), "files") as advance:
        for file in files:
            path = folder / file.rfilename
            if file.lfs and sha256(path) != file.lfs.sha256:
                path.unlink()
                raise HJEPAError(f"{path} had the wrong SHA-256. Run the command again to get it.")
            advance(1)
