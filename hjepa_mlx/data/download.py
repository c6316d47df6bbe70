"""Downloads: resumed where they stopped, checked, whole or absent; or one clear line."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hjepa_mlx.data.catalog import Remote
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import locked, publish
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with locked(part, str(path)) as file:
        with bar(path.name, remote.size) as advance:
            _fetch_all(remote, file, advance)
        _check(remote, file, part)
        publish(file, part, path)


def _fetch_all(remote: Remote, file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Fetch until complete; HJEPAError after TRIES answers in a row that brought nothing."""
    advance(file.seek(0, os.SEEK_END))
    failures = 0
    while True:
        before = file.tell()
        try:
            return _fetch(remote, file, advance)
        except _Broken as broken:
            failures = 0 if file.tell() > before else failures + 1
            if failures == TRIES:
                raise HJEPAError(
                    f"Downloading {remote.url} failed: {broken}. Run the command again to go on."
                ) from None
            time.sleep(PAUSE * 2**failures)


def _fetch(remote: Remote, file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Append the missing bytes to `file`; _Broken when the connection ends before that."""
    have = file.seek(0, os.SEEK_END)
    response = _open(remote, have)
    if response is None:
        return
    with response:
        if have and not _continues(response, have):
            advance(-have)
            file.truncate(0)
        expected, received = _length(response), 0
        while chunk := _read(response):
            file.write(chunk)
            received += len(chunk)
            advance(len(chunk))
    if expected is not None and received < expected:
        raise _Broken(f"the connection ended after {received:,} of {expected:,} bytes")


def _open(remote: Remote, have: int) -> http.client.HTTPResponse | None:
    """The server's answer, from byte `have` on; None when it has nothing after that."""
    headers = {"User-Agent": "hjepa-mlx"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(remote.url, headers=headers)
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            return None
        answer = f"the server answered {error.code} {_words(error)}"
        if error.code >= 500 or error.code in (408, 429):  # for the moment only
            raise _Broken(answer) from None
        raise HJEPAError(
            f"Downloading {remote.url} failed: {answer}. The file may have moved; a copy from "
            "elsewhere, put in its place by hand, is checked and used."
        ) from None
    except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise HJEPAError(
                f"Downloading {remote.url} failed: {_words(error)}. This Python does not know the "
                "usual certificates (python.org's on a Mac: run Install Certificates.command)."
            ) from None
        raise _Broken(_words(error)) from None
    except ValueError as error:
        raise HJEPAError(f"Downloading {remote.url} failed: {error}.") from None
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise HJEPAError(
            f"{remote.url} answered with a web page instead of the file (a log-in page of the "
            "network?). Open it in a browser to see, then run the command again."
        )
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except http.client.IncompleteRead as error:
        if error.partial:
            return error.partial  # the next call raises again
        raise _Broken("the connection ended early") from None
    except (http.client.HTTPException, OSError) as error:
        raise _Broken(_words(error)) from None


def _words(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__


def _continues(response: http.client.HTTPResponse, have: int) -> bool:
    """Whether the answer starts at byte `have`; a server that ignores Range starts anew."""
    span = response.headers.get("Content-Range", "")
    return response.status == 206 and span.startswith(f"bytes {have}-")


def _length(response: http.client.HTTPResponse) -> int | None:
    """Bytes this answer brings, if it says so."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _check(remote: Remote, file: BinaryIO, part: Path) -> None:
    """Compare the MD5; remove a file that is not the published one."""
    file.flush()
    file.seek(0)
    md5 = md5_of(file)
    if md5 == remote.md5:
        return
    size = file.seek(0, os.SEEK_END)
    part.unlink()
    raise HJEPAError(
        f"{remote.url} gave {size:,} bytes with MD5 {md5}, not the published {remote.md5}: not "
        "the right file. It was deleted; run the command again to start anew."
    )


def md5_of(file: BinaryIO) -> str:
    """Hexadecimal MD5 of the rest of a file, with a bar."""
    total = os.fstat(file.fileno()).st_size - file.tell()
    hashed = hashlib.md5(usedforsecurity=False)
    with bar("Checking", total) as advance:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            advance(len(chunk))
    return hashed.hexdigest()
