"""Downloads: whole, checked and atomic, or one clear line."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from rich.progress import Progress

from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import atomic_write

CHUNK = 1 << 20


def download(url: str, path: Path, md5: str) -> None:
    """Fetch `url` to `path`; the file appears only when complete and its MD5 is right.

    Raises HJEPAError that names the URL and what went wrong; it can simply be run again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            atomic_write(path) as file,
            Progress(transient=True) as progress,
        ):
            total = int(response.headers.get("Content-Length", 0)) or None
            task = progress.add_task(path.name, total=total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                progress.advance(task, len(chunk))
            if digest.hexdigest() != md5:
                raise HJEPAError(
                    f"{url} gave a file with MD5 {digest.hexdigest()}, not {md5}: the download was "
                    "cut short or is not the published file. Run the command again."
                )
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ValueError,
    ) as error:
        raise HJEPAError(f"Downloading {url} failed: {error}. Run the command again.") from error
