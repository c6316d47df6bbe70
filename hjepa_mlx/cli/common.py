"""Shared by all commands: options, and one line instead of a traceback."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from hjepa_mlx.errors import HJEPAError, UsageError

LONGEST = 3000  # characters of a message
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Command = TypeVar("Command", bound=Callable[..., Any])
DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with one folder per data set. Default: $HJEPA_DATA, else ./data."),
]


def in_runs(given: str) -> str:
    """A run's folder that is given by its path or by its name in runs/."""
    inside = os.path.join("runs", given)
    if os.path.isdir(given):  # pictures, say, that a run is named like
        there, here = (os.path.isfile(os.path.join(x, "config.yaml")) for x in (inside, given))
        return inside if there and not here else given
    return inside if not os.path.exists(given) and os.path.isdir(inside) else given


def check_out(run: str, out: str | None) -> None:
    """Refuse to write into the Hub's cache, where the run of `hf:USER/NAME` lies."""
    if run.startswith("hf:") and out is None:
        raise UsageError(f"Say where to write what is made of {run}: --out FOLDER.")


RunOrCheckpoint = Annotated[
    str, typer.Argument(parser=in_runs, help="Run folder, its name in runs/, or a checkpoint.")
]
OtherData = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_CONFIG", help="Use this data set instead of the run's own."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS", help="Another side, or HEIGHTxWIDTH: multiples of the patch size."
    ),
]
Fit = Annotated[
    str,
    typer.Option(help="crop: the largest central part; whole: all of the picture, resized."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the config; may be repeated."),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON ('-': print)."),
]


def readable(command: Command) -> Command:
    """End with a status and one line instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            _check_writable(kwargs.get("json_file"))
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            print("hjepa-mlx: stopped.", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("HJEPA_DEBUG"):
                traceback.print_exc()
            line, status = _line_and_status(error)
            if line:  # else rank 0 says it
                print(f"hjepa-mlx: {_plain(line)}", file=sys.stderr)
            raise typer.Exit(status) from None

    return wrapped  # type: ignore[return-value]


def _plain(line: str) -> str:
    """One line, whatever the names of files in it: no control characters, and never endless."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def _line_and_status(error: Exception) -> tuple[str, int]:
    if isinstance(error, HJEPAError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = " Free some space and run it again (train: with --resume)."
        advice = full if error.errno in FULL else ""
        return f"{where}{error.strerror or error}.{advice}", 1
    if isinstance(error, MemoryError):
        return "There is too little memory for this.", 1
    return f"unexpected {type(error).__name__}: {error} (--debug shows where).", 1


def sides(image_size: str | None) -> tuple[int, int] | None:
    """Height and width of `--image-size`: "96" or "64x96"."""
    if image_size is None:
        return None
    parts = image_size.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--image-size {image_size}: give pixels, 96 or HEIGHTxWIDTH, 64x96.")
    return int(parts[0]), int(parts[-1])


def _check_writable(json_file: str | None) -> None:
    """Refuse a file that could not be written in the end."""
    if json_file in (None, "-"):
        return
    if Path(json_file).is_dir():
        raise UsageError(f"--json {json_file} is a folder; give a file.")
    if not Path(json_file).parent.is_dir():
        raise UsageError(f"--json {json_file}: the folder {Path(json_file).parent} does not exist.")


def output_json(content: Any, json_file: str | None) -> bool:
    """Where `--json` asked for: printed, or in a file, which may be a pipe or a link.

    Returns whether words may be printed too.
    """
    text = json.dumps(content, indent=1)
    if json_file == "-":
        print(text)
    elif json_file is not None:
        Path(json_file).write_text(text + "\n")
    return json_file != "-"
