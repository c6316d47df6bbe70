"""The power goes at any moment: the disk holds what was synced, and maybe some of the rest.

A write lasts once an fsync of its file has followed, a name once an fsync of its folder has (POSIX
promises no more). The operations of an undisturbed run are played again up to some moment, without
those that nothing has made last or with some of them; the run goes on from the result.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from torture import kills
from torture.kills import Command
from torture.run import Trial
from torture.trials import assert_same, log_of, result


@dataclass
class Node:
    """A file's bytes, or a folder's names."""

    is_folder: bool
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, Node] = field(default_factory=dict)


@dataclass
class Change:
    """Of a node: bytes at a place, a size, a name that goes, one that is given to another node."""

    node: Node
    gone: str = ""
    name: str = ""
    to: Node | None = None
    place: int = -1
    data: bytes = b""
    size: int = -1
    lasts: bool = False


class Disk:
    """Plays a log; remembers which changes last."""

    def __init__(self, root: str) -> None:
        self.root, self.top = root, Node(True)
        self.seen: dict[str, Node] = {root: self.top}  # as programs see it
        self.files: dict[int, Node] = {}
        self.changes: list[Change] = []

    def entry(self, path: str, to: Node | None = None, gone: str = "") -> None:
        """The name at `path` is given to a node, or taken away."""
        folder, name = os.path.split(path)
        if to is None:
            gone, name = name, ""
            self.seen.pop(path)
        else:
            self.seen[path] = to
        if path != self.root:
            self.changes.append(Change(self.seen[folder], gone, name, to))

    def play(self, kind: str, *what) -> None:
        """One operation of the log."""
        if kind == "open":
            number, path, mode = what
            if path not in self.seen:
                self.entry(path, Node(False))
            self.files[number] = self.seen[path]
            if "w" in mode:
                self.changes.append(Change(self.seen[path], size=0))
        elif kind == "write":
            self.changes.append(Change(self.files[what[0]], place=what[1], data=what[2]))
        elif kind == "truncate":
            self.changes.append(Change(self.files[what[0]], size=what[1]))
        elif kind == "mkdir" and what[0] not in self.seen:
            self.entry(what[0], Node(True))
        elif kind in ("unlink", "rmdir"):
            self.entry(what[0])
        elif kind == "rename":
            self.rename(*what)
        elif kind == "sync":
            self.sync(*what)

    def rename(self, path: str, to: str) -> None:
        node = self.seen[path]
        inside = [name for name in self.seen if name.startswith(path + "/")]
        if os.path.dirname(path) == os.path.dirname(to):  # both names change at once
            self.entry(to, self.seen.pop(path), os.path.basename(path))
        else:
            self.entry(path)
            self.entry(to, node)
        for name in inside:
            self.seen[to + name[len(path) :]] = self.seen.pop(name)

    def sync(self, what: int | str, content: list[str] | bytes = b"") -> None:
        """Of a file that was opened, or of a path with its names or bytes.

        Some were written by other languages, so the log lacks them.
        """
        if isinstance(what, str):
            inner = content if isinstance(content, list) else [""]
            for path in (os.path.join(what, name).rstrip("/") for name in inner):
                if path not in self.seen:
                    self.entry(path, Node(False))
            if isinstance(content, bytes):
                self.changes.append(Change(self.seen[what], place=0, data=content))
        node = self.seen[what] if isinstance(what, str) else self.files[what]
        for change in self.changes:
            change.lasts |= change.node is node

    def after(self, rng: random.Random, share: float) -> Node:
        """The folder that the disk holds: what lasts, and this share of the other changes."""
        for change in self.changes:
            change.node.content.clear()
            change.node.names.clear()
        for change in self.changes:
            if not change.lasts and rng.random() >= share:
                continue
            node, content = change.node, change.node.content
            if change.place >= 0:
                content.extend(bytes(max(0, change.place - len(content))))
                content[change.place : change.place + len(change.data)] = change.data
            elif change.size >= 0:
                del content[change.size :]
                content.extend(bytes(change.size - len(content)))
            else:
                node.names.pop(change.gone, None)
                if change.to is not None:
                    node.names[change.name] = change.to
        return self.top


def write(node: Node, path: Path) -> None:
    """Make a real folder of it."""
    path.mkdir(exist_ok=True)
    for name, inner in node.names.items():
        if inner.is_folder:
            write(inner, path / name)
        else:
            (path / name).write_bytes(inner.content)


def checkpoints(log: list[tuple]) -> list[int]:
    """Steps of a training's checkpoints whose names last."""
    found, named = [], []
    for kind, *what in log:
        if kind == "rename" and (match := re.search(r"/step-(\d+)$", what[1])):
            named.append(int(match[1]))
        if kind == "sync" and str(what[0]).endswith("/checkpoints"):
            found, named = found + named, []
    return found


def lose_power(rng: random.Random, folder: Path, name: str, what: Command) -> str:
    """The power goes while the command runs; it is repeated until done."""
    what.put(folder)
    whole = what.undisturbed(name)
    log = log_of(whole)
    at = kills.moment(rng, log)
    share = rng.choice([0.0, 0.0, 0.5, rng.random()])
    disk = Disk(str(Path(os.path.realpath(whole)) / what.root))
    for operation in log[:at]:
        disk.play(*operation)
    write(disk.after(rng, share), folder / what.root)
    said = "" if what.done(folder) else what.run(folder)
    assert_same(result(folder, what.root), result(whole, what.root))
    if steps := checkpoints(log[:at]):
        at_step = int([*re.findall(r" at step (\d+) of", said), "-1"][0])
        assert at_step >= steps[-1], f"operation {at}: checkpoint {steps[-1]} was lost: {said}"
    return f"power lost at operation {at} of {len(log)}; kept {share:.0%} of what no fsync followed"


def lose(name: str) -> Trial:
    """The trial of one of the commands."""
    return lambda rng, folder: lose_power(rng, folder, name, kills.COMMANDS[name])


TRIALS = {name: lose(name) for name in kills.COMMANDS}
