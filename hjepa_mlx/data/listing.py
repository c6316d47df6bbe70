"""A listing: the pictures among a person's files; every other file is named, with the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import features

from hjepa_mlx.data.images import EXTENSIONS
from hjepa_mlx.errors import UsageError
from hjepa_mlx.files import read

# Beside EXTENSIONS, what Pillow always reads; what some builds read; what the extra `heic` reads
MORE = frozenset(
    {".apng", ".dib", ".j2k", ".jfif", ".jp2", ".jpe", ".jpf", ".jpx", ".mpo", ".pbm", ".pgm",
     ".pnm", ".psd", ".tga"}
)  # fmt: skip
AVIF, HEIC = frozenset({".avif"}), frozenset({".heic", ".heif", ".hif"})
LIST = ".txt"  # a file of paths
RAW = "a raw photograph: export it as JPEG"
VIDEO = "a video: extract frames, for example with ffmpeg"
REASONS = {
    **dict.fromkeys(HEIC, "pip install 'hjepa-mlx[heic]' reads it"),
    **dict.fromkeys(AVIF, "Pillow 11.3 or newer reads it"),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), RAW),
    **dict.fromkeys((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"), VIDEO),
    **dict.fromkeys((".dcm", ".exr", ".hdr", ".nii", ".npy", ".npz"), "convert it to 16-bit PNG"),
    **dict.fromkeys((".7z", ".gz", ".rar", ".tar", ".tgz", ".zip"), "an archive: unpack it"),
}
OTHER, HIDDEN, NO_FILE = "no picture", "hidden", "no file, or a link to nothing"
SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,7}")  # of any format; other names are judged by content
STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"BM")
BRANDS = {b"avif": AVIF, b"heic": HEIC, b"heix": HEIC, b"mif1": HEIC}  # at byte 8


@dataclass(frozen=True)
class Listing:
    """`paths` below `root`, sorted; `left_out`: other files, or their folders → why."""

    root: str
    paths: list[str]
    left_out: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The paths below the root."""
        start = len(os.path.join(self.root, ""))
        return [path[start:] for path in self.paths]


def extensions() -> frozenset[str]:
    """Suffixes of the formats that the installed libraries read."""
    avif = AVIF if features.check("avif") else frozenset()
    return EXTENSIONS | MORE | avif | (HEIC if find_spec("pillow_heif") else frozenset())


def scan(places: Sequence[str | Path], old: bool = False) -> Listing:
    """All pictures in folders, in list files (a path a line), and single files.

    old: only EXTENSIONS, and also in runs, as earlier versions did. Raises UsageError for a place
    that does not exist, and when there is no picture.
    """
    known = EXTENSIONS if old else extensions()
    paths: list[str] = []
    left_out: dict[str, str] = {}
    for place in map(Path, places):
        if not place.exists():
            raise UsageError(
                f"{place} does not exist. Give a folder of images, an image, or a {LIST} file "
                "with a path a line."
            )
        listed = not place.is_dir() and place.suffix == LIST
        for one in _listed(place, left_out) if listed else [str(place)]:
            if os.path.isdir(one):
                _walk(one, known, old, paths, left_out)
            elif not os.path.isfile(one):
                left_out[one] = NO_FILE
            else:
                _add(one, os.path.basename(one), known, paths, left_out)
    one_folder = len(places) == 1 and os.path.isdir(places[0])
    if not one_folder:
        paths = list(map(os.path.abspath, paths))
    if not paths:
        raise UsageError(
            f"There are no images in {', '.join(map(str, places))} (looked for "
            f"{', '.join(sorted(known))}). {summary(left_out)}".rstrip()
        )
    paths = sorted(dict.fromkeys(paths))
    root = str(Path(places[0])) if one_folder else os.path.commonpath(map(os.path.dirname, paths))
    return Listing(root, paths, left_out)


def _listed(file: Path, left_out: dict[str, str]) -> list[str]:
    """The files and folders that a list names, relative to its folder."""
    try:
        lines = read(file).decode("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
    found = [str(file.parent / os.path.expanduser(line.strip())) for line in lines if line.strip()]
    left_out.update({path: "listed, but not there" for path in found if not os.path.exists(path)})
    return [path for path in found if os.path.exists(path)]


def _walk(
    root: str, known: frozenset[str], old: bool, paths: list[str], left_out: dict[str, str]
) -> None:
    seen: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            if folder == root:
                raise
            left_out[folder] = f"cannot be read: {error.strerror}"
            continue
        inner = []
        if (status.st_dev, status.st_ino) in seen:
            left_out[folder] = "a link to a folder that is read already"
        elif not old and _is_run({entry.name for entry in entries}):
            left_out[folder] = "a run, or pictures of one"
        else:
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                # the first costs no call to the system
                if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
                    _add(entry.path, entry.name, known, paths, left_out)
                elif not os.path.isdir(entry.path):
                    left_out[entry.path] = NO_FILE
                elif entry.name.startswith(".") or entry.name == "__MACOSX":
                    left_out[entry.path] = HIDDEN
                else:
                    inner.append(entry.path)
        folders += reversed(inner)


def _is_run(names: set[str]) -> bool:
    """Whether a folder with these files and folders was written by `train` or by `viz`."""
    run = "config.yaml" in names and not names.isdisjoint({"metrics.jsonl", "checkpoints"})
    return run or {"report.html", "pca.png", "similarity.png"} <= names


def _add(
    path: str, name: str, known: frozenset[str], paths: list[str], left_out: dict[str, str]
) -> None:
    """Add a file to the pictures, or to those left out."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        left_out[path] = HIDDEN
    elif suffix in known:
        paths.append(path)
    elif SUFFIX.fullmatch(suffix) or known is EXTENSIONS:
        left_out[path] = REASONS.get(suffix, OTHER)
    elif reason := _by_content(path, known):
        left_out[path] = reason
    else:
        paths.append(path)


def _by_content(path: str, known: frozenset[str]) -> str:
    """Why a file whose name tells nothing is no picture; empty if it is one."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    kind = BRANDS.get(start[8:], frozenset())
    if start.startswith(STARTS) or start[8:] == b"WEBP" or kind & known:
        return ""
    return REASONS.get(min(kind, default=""), OTHER)


def summary(left_out: dict[str, str]) -> str:
    """One line that counts and names what was left out, by reason and suffix; '' for nothing."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in left_out.items():
        suffix = "" if reason == HIDDEN else os.path.splitext(path)[1].lower()
        groups.setdefault((reason, suffix), []).append(path)
    words = [
        f"{len(paths):,} {suffix} ({reason}; {os.path.basename(paths[0])}".replace("  ", " ")
        + (", …)" if paths[1:] else ")")
        for (reason, suffix), paths in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return f"Left out: {', '.join(words)}." if words else ""
