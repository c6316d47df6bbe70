"""`hjepa-mlx datasets download`: from nothing on disk to a data set that trains."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

from hjepa_mlx.data import imagenet, shards
from hjepa_mlx.data.archives import unpack
from hjepa_mlx.data.catalog import IMAGENET_ARCHIVES, Dataset, look_up
from hjepa_mlx.data.download import download, md5_of
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import check_space, sha256, write_json
from hjepa_mlx.progress import bar

CHECKSUMS = "checksums.json"  # SHA-256 of what was downloaded or unpacked, for `verify`

IMAGENET_STEPS = """\
ImageNet-1K cannot be downloaded without an account. Once:
  1. Make an account at https://image-net.org/download and accept its terms.
  2. From "ILSVRC2012" download these three files (155 GB) into {folder}:
       ILSVRC2012_img_train.tar        Training images (Task 1 & 2)
       ILSVRC2012_img_val.tar          Validation images (all tasks)
       ILSVRC2012_devkit_t12.tar.gz    Development kit (Task 1 & 2)
  3. hjepa-mlx datasets prepare {name} --data-dir {root}
Kaggle's "ImageNet Object Localization Challenge", unpacked there, serves as well."""


def fetch(name: str, root: Path) -> Path:
    """Download a data set into `root/name`; what an earlier call finished is kept.

    Raises HJEPAError with one line that says what went wrong; it can be run again.
    """
    row = look_up(name)
    if row.parts:
        for part in row.parts:
            fetch(part, root)
        return root
    folder = root / name
    if name == "imagenet1k":
        return _check_imagenet(name, root, folder)
    if not row.files and not row.hub:
        return root  # it comes with the package
    folder.mkdir(parents=True, exist_ok=True)
    if shards.complete(folder / shards.FOLDER) or _whole(folder):
        return folder
    if row.hub:
        found = imagenet.layout(name, [folder, root])
        if found and found[0] != "parquet files":  # which a download leaves that was interrupted
            return found[1]
        _from_hub(row, folder)
    else:
        archives = sum(remote.size for remote in row.files)
        _check_disk(row.title, archives + sum((row.unpacks or {}).values()), folder)
        _from_web(row, folder)
    return folder


def _whole(folder: Path) -> bool:
    """Whether every recorded file is there; their content is for `verify` to check."""
    return (folder / CHECKSUMS).is_file() and all(
        (folder / name).is_file() for name in checksums(folder)
    )


def checksums(folder: Path) -> dict[str, str]:
    """File name → SHA-256, as recorded by the download."""
    try:
        read = json.loads((folder / CHECKSUMS).read_text())
        return {str(name): str(value) for name, value in read.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise HJEPAError(
            f"{folder / CHECKSUMS} cannot be read ({error}). Delete it and download again."
        ) from None


def _check_disk(what: str, needed: int, folder: Path) -> None:
    """Refuse what the disk cannot hold; files that have arrived already count."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needs = f"What is not yet here of {what} needs"
    check_space(needs, needed - there, folder, "Free some, or choose another folder.")


def _from_web(row: Dataset, folder: Path) -> None:
    unpacked = [folder / name for name in row.unpacks or ()]
    if unpacked and all(path.is_file() for path in unpacked):
        _record(folder, unpacked)
        return
    paths = []
    for remote in row.files:
        path = folder / remote.name
        if not path.is_file():
            download(remote, path)
        else:
            _check_placed(path, remote.md5)
        paths.append(path)
    if row.unpacks:
        (archive,) = paths
        with bar(f"Unpacking {archive.name}", sum(row.unpacks.values())) as advance:
            paths = unpack(archive, row.unpacks, folder, advance)
        _record(folder, paths)
        archive.unlink()
    else:
        _record(folder, paths)


def _check_placed(path: Path, published: str) -> None:
    with open(path, "rb") as file:
        md5 = md5_of(file)
    if md5 != published:
        raise HJEPAError(
            f"{path} has the MD5 {md5}, not the published {published}. Move it away and run the "
            "command again."
        )


def _record(folder: Path, paths: list[Path]) -> None:
    with bar("Recording checksums", len(paths), "files") as advance:
        found = {}
        for path in paths:
            found[path.relative_to(folder).as_posix()] = sha256(path)
            advance(1)
    write_json(folder / CHECKSUMS, found)


def _from_hub(row: Dataset, folder: Path) -> None:
    """Parquet files of a repository on Hugging Face, compared with the checksums it publishes."""
    assert row.hub is not None
    try:
        published = _snapshot(row.hub, folder)
    except HJEPAError:
        raise
    except Exception as error:  # the hub's client has errors of its own, others in each version
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HJEPAError(
            f"Downloading {row.hub} from Hugging Face failed: {lines[0].rstrip('.')}. Run the "
            "command again to go on."
        ) from error
    with bar("Checking", len(published), "files") as advance:
        for name, wanted in published.items():
            if sha256(folder / name) != wanted:
                (folder / name).unlink()
                raise HJEPAError(
                    f"{folder / name} is not the published file (its SHA-256 differs). It was "
                    "deleted; run the command again."
                )
            advance(1)
    write_json(folder / CHECKSUMS, published)


def _snapshot(repository: str, folder: Path) -> dict[str, str]:
    """Download its parquet files; returns the published SHA-256 of each."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise HJEPAError(f"{repository} is on Hugging Face: pip install 'hjepa-mlx[hub]'") from None
    info = hub.HfApi().dataset_info(repository, files_metadata=True)
    published = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings or []
        if file.rfilename.endswith(".parquet") and file.lfs
    }
    if not published:
        raise HJEPAError(f"The repository {repository} has no parquet files any more.")
    sizes = sum(file.size or 0 for file in info.siblings or [] if file.rfilename in published)
    _check_disk(repository, sizes, folder)
    hub.snapshot_download(
        repository,
        repo_type="dataset",
        revision=info.sha,
        local_dir=folder,
        allow_patterns=list(published),
    )
    return published


def _check_imagenet(name: str, root: Path, folder: Path) -> Path:
    """Say what to get and where to put it, or check what is there."""
    missing = [file for file in IMAGENET_ARCHIVES if not (folder / file).is_file()]
    found = imagenet.layout(name, [folder])
    if missing and found and found[0] != "tar archives":
        return found[1]  # another layout, which nobody publishes checksums of
    if missing:
        print(IMAGENET_STEPS.format(folder=folder, name=name, root=quote(str(root))))
        raise HJEPAError(f"{folder} lacks {', '.join(missing)}.")
    for file_name, md5 in IMAGENET_ARCHIVES.items():
        _check_placed(folder / file_name, md5)
    return folder
