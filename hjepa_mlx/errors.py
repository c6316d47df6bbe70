"""Errors meant for the person at the keyboard: one line that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
