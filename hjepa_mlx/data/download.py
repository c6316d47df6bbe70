"""Downloads: resumed where they stopped, checked, whole or absent; or one clear line."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hjepa_mlx.data.catalog import Remote
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import locked, make_folder, publish
from hjepa_mlx.progress import bar

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
TRIES = 4  # in a row without a byte of progress
PAUSE = 2.0  # seconds before another try, doubled each time


class _Broken(Exception):
    """The connection broke; the bytes so far are good."""


def download(remote: Remote, path: Path) -> None:
    """Fetch `remote` to `path`; the file appears only when complete and its MD5 is right.

    Until then its bytes are kept as `.NAME.part`, and resumed after a broken connection or in the
    next call. Raises HJEPAError that names the URL and the reason.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part")
    with locked(part, str(path)) as file:
        with bar(path.name, remote.size) as advance:
            _fetch(remote, path.parent, file, advance)
        file.flush()
        file.seek(0)
        md5 = md5_of(file)
        if md5 != remote.md5:
            part.unlink()
            raise HJEPAError(
                f"{remote.url} gave {file.tell():,} bytes with MD5 {md5}, not {remote.md5}: not "
                "the right file. It was deleted. Run the command again to start over."
            )
        publish(file, part, path)


def _fetch(remote: Remote, folder: Path, file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Append the missing bytes, up to one more than there should be.

    HJEPAError after TRIES answers in a row that brought nothing.
    """
    url, most = remote.url, remote.size + 1
    end = file.seek(0, os.SEEK_END)
    advance(end)
    failures = 0
    while failures < TRIES:
        before = end
        try:
            for begin, chunk in _answer(url, end, folder):
                if begin < end:
                    file.truncate(begin)
                file.write(chunk[: most - begin])
                advance(begin + len(chunk) - end)
                end = begin + len(chunk)
                if end >= most:  # not the right file, and perhaps endless
                    return
            return
        except _Broken as broken:
            reason = str(broken)
        failures = 0 if end > before else failures + 1
        if failures < TRIES:
            time.sleep(PAUSE * 2**failures)
    raise HJEPAError(f"Downloading {url} failed: {reason}. Run the command again to go on.")


def _answer(url: str, have: int, folder: Path) -> Iterator[tuple[int, bytes]]:
    """The bytes after the first `have` of a file, in chunks, each with its place in the file.

    A server that ignores the range starts at 0 again. _Broken when the connection ends early.
    """
    headers = {"User-Agent": "hjepa-mlx"} | ({"Range": f"bytes={have}-"} if have else {})
    at = have
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise HJEPAError(
                    f"{url} answered with a web page (does the network ask you to log in?). Open "
                    "it in a browser, then run the command again."
                )
            span = answer.headers.get("Content-Range", "")
            at = start = have if answer.status == 206 and span.startswith(f"bytes {have}-") else 0
            while chunk := answer.read1(CHUNK):
                yield at, chunk
                at += len(chunk)
            length = answer.headers.get("Content-Length", "")
            if length.isdigit() and at - start < int(length):
                raise _Broken(f"the connection ended after {at - start:,} of {int(length):,} bytes")
    except http.client.IncompleteRead as error:
        if error.partial:
            yield at, error.partial
        raise _Broken("the connection ended early") from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        if getattr(error, "code", None) != 416:  # the server has nothing after `have` bytes
            raise _failure(url, error, folder) from None


def _failure(url: str, error: Exception, folder: Path) -> Exception:
    """_Broken where another try may help, else HJEPAError."""
    words = " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__
    advice = ""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        words = f"the server answered {error.code} {words}"
        if error.code >= 500 or error.code in (408, 429):  # for the moment only
            return _Broken(words)
        advice = f" Get the file from elsewhere, put it into {folder} and run the command again."
    elif isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
        advice = " Python lacks certificates. On a Mac, run Install Certificates.command."
    elif isinstance(error, (http.client.HTTPException, OSError)):
        return _Broken(words)
    return HJEPAError(f"Downloading {url} failed: {words}.{advice}")


def md5_of(file: BinaryIO) -> str:
    """Hexadecimal MD5 of the rest of a file, with a bar."""
    total = os.fstat(file.fileno()).st_size - file.tell()
    hashed = hashlib.md5(usedforsecurity=False)
    with bar("Checking", total) as advance:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            advance(len(chunk))
    return hashed.hexdigest()
