"""A person's own pictures as a data set: labels, splits, and the range of 16-bit greys."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hjepa_mlx.data.images import opened
from hjepa_mlx.data.listing import Listing, scan, summary
from hjepa_mlx.errors import HJEPAError, UsageError, counted
from hjepa_mlx.files import read, read_json, write_json
from hjepa_mlx.rng import generator
from hjepa_mlx.sections import Data

TRAIN_FOLDERS = "train", "training"
TEST_FOLDERS = "val", "test", "valid", "validation", "testing"
HELD_OUT = 10  # a folder without a test split keeps every tenth image of a class for evaluation
FEWEST = 5  # images of a class of which at least one is held out; smaller classes share
LEAST_MEAN = 2  # images a folder; with fewer, `labels: auto` takes folders for no labels
DEEP = frozenset({".png", ".tif", ".tiff", ".pgm", ".pnm", ".jp2", ".j2k", ""})  # may have 16 bits
LOOKED_AT = 64  # files, to measure the range of 16-bit ones
RECORD = "images.json"  # in a run: the images that it trains on, and those held out


@dataclass(frozen=True)
class Folder:
    """Pictures, the split of each [N] (0: train, 1: test), and its label [N], -1 for none.

    tops: the folders of the splits, '' for the whole. bits: that 16-bit greys use; None without
    such. notes: lines about what was decided. gone: one about images that a run's record has.
    """

    listing: Listing
    sides: np.ndarray
    tops: tuple[str, str]
    labels: np.ndarray
    classes: tuple[str, ...]
    bits: int | None
    notes: tuple[str, ...]
    gone: str


def open_folder(data: Data, record: Path | None = None) -> Folder:
    """The pictures in `data.dir`, with labels as `data.labels` says.

    `train` and `val` (or `test` and the like, in any case) at the top are the splits; otherwise
    every tenth image of a fixed shuffle of each class is held out. record: of a run, which then
    says what the splits are. Raises UsageError.
    """
    if data.dir is None:
        raise UsageError("data.name=folder needs the folder of images: give --data-dir FOLDER.")
    old = data.listing == 1
    notes: list[str] = []
    found = scan([Path(os.path.expanduser(data.dir))], old)
    sides, groups, tops = _sides([name.split(os.sep) for name in found.names])
    why = "beside the folders of the splits"
    gone = ""
    if record and record.is_file():
        (sides, gone), why = _recorded(record, found), "came since the run began"
    kept = np.flatnonzero(sides >= 0)
    rest = {found.paths[row]: why for row in np.flatnonzero(sides < 0)}
    found = Listing(found.root, [found.paths[row] for row in kept], found.left_out | rest)
    sides, groups = sides[kept], [groups[row] for row in kept]
    labels, classes = _labels(data, found, groups, notes)
    if not (record and record.is_file()) and tops[0] == tops[1]:
        sides[_held_out(labels, old)] = 1
        if classes:
            each = np.bincount(labels[(sides == 1) & (labels >= 0)], minlength=len(classes))
            low, high = f"{each.min():,}", f"{each.max():,}"
            notes.append(f"Held out of each class: {low}{'' if low == high else f' to {high}'}.")
    bits = bits_of(found.paths) if data.bits == "auto" else data.bits
    if data.bits == "auto" and bits and bits < 16:
        notes.append(f"16-bit greys use {bits} of their bits (data.bits={bits}).")
    notes = [line for line in (summary(found.left_out), gone, *notes) if line]
    return Folder(found, sides, tops, labels, classes, bits, tuple(notes), gone)


def _sides(parts: list[list[str]]) -> tuple[np.ndarray, list[str], tuple[str, str]]:
    """The split of each path (-1: neither), its class folder, or '', and the splits' folders."""
    tops = sorted({part[0] for part in parts if part[1:]})
    inside = {name.lower(): name for name in tops}  # where both are, train wins over Train
    train, held_out = (
        next((inside[name] for name in names if name in inside), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train and (held_out or tops == [train]):
        side = {train: 0, held_out: 1}
        sides = [side.get(part[0], -1) if part[1:] else -1 for part in parts]
        tops_of = train, held_out or train
        return np.array(sides), [part[1] if part[2:] else "" for part in parts], tops_of
    return np.zeros(len(parts), int), [part[0] if part[1:] else "" for part in parts], ("", "")


def _labels(
    data: Data, found: Listing, names: list[str], notes: list[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels [N] and classes, from each image's folder or from a file."""
    if data.labels.endswith(".csv"):
        names = _from_csv(Path(os.path.expanduser(data.labels)), found, notes)
    counts = Counter(names)
    stray = counts.pop("", 0)
    classes, labelled = tuple(sorted(counts)), sum(counts.values())
    if data.labels == "auto" and len(classes) > 1 and labelled < LEAST_MEAN * len(classes):
        notes.append(
            f"{len(classes):,} folders hold {counted(labelled)}, too few to be classes: there are "
            "no labels. data.labels=folders makes labels of them."
        )
        classes = ()
    if len(classes) < 2 or data.labels == "none" or (stray and data.listing == 1):
        return np.full(len(names), -1), ()
    if stray and not data.labels.endswith(".csv"):
        notes.append(
            f"In no class folder: {stray:,} (first: {found.names[names.index('')]}). They are "
            "trained on, but have no label for k-NN and probes."
        )
    number = {name: label for label, name in enumerate(classes)} | {"": -1}
    return np.array([number[name] for name in names]), classes


def _from_csv(file: Path, found: Listing, notes: list[str]) -> list[str]:
    """The label of each image, or '', in a CSV file of (path, label).

    Paths are relative to the images' folder or to the file's. A first row `path,label` is skipped.
    """
    try:
        content = read(file)
    except OSError as error:
        raise UsageError(f"data.labels={file} cannot be read: {error.strerror}.") from None
    try:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Excel may write it
        text = content.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    except (csv.Error, UnicodeError) as error:
        raise UsageError(f"data.labels={file} is no CSV file: {error}.") from None
    if rows and [cell.lower() for cell in rows[0][:2]] == ["path", "label"]:
        rows = rows[1:]
    if bad := next((row for row in rows if len(row) < 2), None):
        raise UsageError(f"{file}: each row must be path,label; one is {','.join(bad)!r}.")
    places = {os.path.abspath(path): number for number, path in enumerate(found.paths)}
    names, unknown = [""] * len(found.paths), []
    for path, label, *_ in rows:
        tries = (os.path.abspath(os.path.join(base, path)) for base in (found.root, file.parent))
        number = next((places[one] for one in tries if one in places), None)
        if number is None:
            unknown.append(path)
        elif names[number] not in ("", label):
            raise UsageError(f"{file}: {path} has two labels, {names[number]} and {label}.")
        else:
            names[number] = label
    if not any(names):
        raise UsageError(
            f"{file}: none of its {len(rows)} rows names an image in {found.root}. Paths must be "
            "relative to that folder or to the file's, or absolute."
        )
    if unknown:
        notes.append(
            f"{file.name}: rows that name no image: {len(unknown):,} (first: {unknown[0]})."
        )
    if missing := names.count(""):
        first = found.names[names.index("")]
        notes.append(f"{file.name}: images without a label: {missing:,} (first: {first}).")
    return names


def _held_out(labels: np.ndarray, old: bool) -> np.ndarray:
    """Rows to hold out: every tenth of a fixed shuffle of each class, one of FEWEST to 19.

    old: of all images together, as earlier versions did.
    """
    shuffled = generator(0, "held out").permutation(len(labels))
    if old:
        return shuffled[HELD_OUT - 1 :: HELD_OUT]
    small = np.bincount(labels + 1) < FEWEST
    groups = np.where(small[labels + 1], -2, labels)[shuffled]
    order = np.argsort(groups, kind="stable")
    shuffled, groups = shuffled[order], groups[order]
    chosen = []
    for rows in np.split(np.arange(len(order)), np.flatnonzero(np.diff(groups)) + 1):
        shared = groups[rows[0]] == -2
        chosen.append(rows[HELD_OUT - 1 if shared else min(HELD_OUT, len(rows)) - 1 :: HELD_OUT])
    return shuffled[np.concatenate(chosen)]


def bits_of(paths: list[str]) -> int | None:
    """Bits that 16-bit greys use in a sample, 8 to 16; None when there are none in it."""
    deep = [path for path in paths if os.path.splitext(path)[1].lower() in DEEP]
    largest: list[int] = []
    shuffled = [deep[number] for number in generator(0, "bits").permutation(len(deep))]
    turns, turn = Counter[str](), {}
    for path in shuffled:
        turns[os.path.dirname(path)] += 1
        turn[path] = turns[os.path.dirname(path)]
    for path in sorted(shuffled, key=turn.__getitem__)[:LOOKED_AT]:  # one of each folder, then two
        try:
            with opened(Path(path)) as image:
                if image.mode.startswith("I"):
                    largest.append(int(np.asarray(image).max()))
        except ValueError:
            continue  # named when it is read
    return min(16, max(8, max(largest).bit_length())) if largest else None


def write_record(folder: Folder, path: Path) -> None:
    """Write which images a run trains on, and which are held out."""
    pairs = list(zip(folder.listing.names, folder.sides.tolist(), strict=True))
    train, test = ([name for name, side in pairs if side == number] for number in (0, 1))
    root = os.path.abspath(folder.listing.root)
    write_json(path, {"root": root, "train": train, "test": test})


def record_of(run: str | Path | None, own: Data, used: Data) -> Path | None:
    """The record of a run's images, where `used` names the same images as its `own` data."""
    one, other = (
        (data.name, data.name == "folder" and os.path.abspath(data.dir or ""))
        for data in (own, used)
    )
    return Path(run) / RECORD if run is not None and one == other else None


def _recorded(record: Path, found: Listing) -> tuple[np.ndarray, str]:
    """The recorded split of each image, -1 where it was not there then; a line about lost ones."""
    splits = list(enumerate(("train", "test")))
    try:
        made = read_json(record, 1 << 28)
        side = {name: number for number, split in splits for name in made[split]}
        names = found.names
        if not side.keys() & set(names):  # a list whose images lie in another common folder now
            names = [os.path.relpath(path, made.get("root", found.root)) for path in found.paths]
        gone = sorted(side.keys() - set(names))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HJEPAError(f"{record} is damaged ({error!r:.200}). Start a new run.") from None
    line = f"Gone since the run began: {counted(len(gone))} (first: {gone[0]})." if gone else ""
    return np.array([side.get(name, -1) for name in names]), line
