"""Errors meant for the person at the keyboard: one line that says what to do."""


class HJEPAError(Exception):
    """Something went wrong that the user can put right; the message says how."""

    exit_status = 1


class UsageError(HJEPAError):
    """What the user asked for cannot be done as asked: command line, config or run folder."""

    exit_status = 2
