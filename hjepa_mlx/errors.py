"""Errors meant for the person at the keyboard: one line that says what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class HJEPAError(Exception):
    """Something went wrong that the user can put right; the message says how."""

    exit_status = 1


class UsageError(HJEPAError):
    """What the user asked for cannot be done as asked: command line, config or run folder."""

    exit_status = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name, with a space before it; or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_choice(what: str, name: str, known: Iterable[str], more: str = "") -> None:
    """UsageError, with the nearest name and all others, where `name` is none that is known."""
    if name not in (names := list(known)):
        hint = did_you_mean(name, names)
        raise UsageError(f"No {what} '{name}'.{hint} There are: {', '.join(names)}{more}.")


def counted(number: int, thing: str = "image") -> str:
    """A number and its noun: "1 image", "2,000 images", "1 class"."""
    more = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{more}"


def required(module: str, extra: str) -> Any:
    """Import a module that an extra of this package brings, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise UsageError(f"This needs {missing}: pip install 'hjepa-mlx[{extra}]'") from None
