"""Servers that misbehave: what is downloaded is right in the end, or not kept as finished."""

import gzip
import hashlib
import random
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import layouts
from hostile import compressed_zeros
from materials import good
from rules import broken, hand_over, run

from hjepa_mlx.data import download
from hjepa_mlx.data.catalog import CATALOG
from tests import servers as web

NAME = "cifar-10-binary.tar.gz"
COMMAND = "datasets download cifar10 --data-dir data"
MAY_WRITE = ("data",)
PATIENCE = 0.5  # seconds that the command waits for a byte; 30 for users
PLACES = ("file:///etc/passwd", "ftp://127.0.0.1:1/a", "data:,hello", "//[", "http://127.0.0.1:1/a",
          "https://127.0.0.1:1/", "http://127.0.0.1:99999/", "gopher://a/", "\x00",
          "http://a b/")  # fmt: skip


def endless(handler, content, start):
    """What is right at first, then zeros until the client goes."""
    handler.answer(content[start:], 206 if start else 200, length="none", Connection="close",
                   **({"Content_Range": f"bytes {start}-/*"} if start else {}))  # fmt: skip
    _write(handler, lambda: bytes(1 << 16), 4000)


def endless_header(handler, content, start):
    handler.send_response(200)
    handler.flush_headers()
    _write(handler, lambda: b"X-More: " + b"x" * 60_000 + b"\r\n", 3000)


def long_header_line(handler, content, start):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    _write(handler, lambda: b"x" * 65_536, 3000)


def endless_chunk_size(handler, content, start):
    handler.answer(b"", length="none", Transfer_Encoding="chunked", Connection="close")
    _write(handler, lambda: b"0" * 65_536, 3000)


def _write(handler, piece, times):
    handler.close_connection = True
    try:
        for _ in range(times):
            handler.wfile.write(piece())
    except OSError:
        pass


def trickling(handler, content, start):
    """A byte at a time, then nothing."""
    handler.answer(content[start : start + 1], length=len(content) - start)
    handler.close_connection = True
    for at in range(start + 1, start + 20):
        time.sleep(0.02)
        handler.wfile.write(content[at : at + 1])
        handler.wfile.flush()
    time.sleep(2 * PATIENCE)


def compressed(handler, content, start):
    handler.answer(gzip.compress(content[start:]), Content_Encoding="gzip")


def bomb(handler, content, start):
    handler.answer(compressed_zeros(1 << 33), Content_Encoding="gzip")


def elsewhere(place: str) -> Callable:
    return lambda handler, content, start: handler.answer(b"", 302, Location=place)


def another(handler, content, start):
    """A mirror with another version of the file, of the same length."""
    web.good(handler, bytes(len(content)), start)


def longer(handler, content, start):
    web.good(handler, content + bytes(1000), start)


def manner(rng: random.Random, size: int) -> Callable:
    """One of all manners."""
    amount = rng.choice((0, 1, size // 3, size - 1))
    span = rng.choice(("bytes 0-1/2", "bytes", f"bytes {2**63}-{2**64}/*", "lines 0-9/9", "\x01"))
    lengths = ("none", "many", -5, 0, 1 << 62, "1, 2", "9" * 5000)
    return rng.choice(
        (web.good, web.range_ignored, web.cut_after(amount), web.cut_after(amount, reset=True),
         web.status(rng.choice((204, 206, 304, 400, 401, 403, 404, 408, 416, 418, 429, 500, 503,
         599))),
         web.wrong_byte, web.web_page, web.disguised_page, web.redirect, web.circle, web.no_http,
         web.claims(rng.choice(lengths)), web.broken_chunks, web.chunked, web.other_span,
         web.chunk_cut_after(rng.choice((0, 20_000))), lambda h, *_: web.hang_up(h), endless,
         endless_header, long_header_line, endless_chunk_size, trickling, compressed, bomb, another,
         longer, elsewhere(rng.choice(PLACES)),
         lambda h, content, start: h.answer(content[start:], 206, Content_Range=span))
    )  # fmt: skip


def _data(folder: Path) -> tuple[Path, bytes]:
    """A place to download to, and the archive."""
    source, place = folder / "source", folder / "place"
    shutil.copytree(good() / "data/cifar10", source)
    for path in (source / "cifar-10-batches-bin").glob("*.bin"):
        path.write_bytes(path.read_bytes() * 3)
    content = layouts.archive(source / "cifar-10-batches-bin", folder / NAME).read_bytes()
    shutil.rmtree(source)
    (folder / NAME).unlink()
    place.mkdir()
    return place, content


def from_server(url: str, content: bytes) -> Callable[[], None]:
    """Let the child's catalog name this server; it is impatient."""

    def change() -> None:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        row, remote = CATALOG["cifar10"], CATALOG["cifar10"].files[0]
        changed = {"url": f"{url}/{NAME}", "md5": md5, "size": len(content)}
        files = [remote.model_copy(update=changed)]
        CATALOG["cifar10"] = row.model_copy(update={"files": files})
        download.PAUSE, download.TIMEOUT = 0.01, PATIENCE

    return change


def _kept_if_right(place: Path, content: bytes) -> None:
    path = place / "data/cifar10" / NAME
    assert not path.exists() or path.read_bytes() == content, "a wrong file was kept as finished"
    kept = [part for part in (place / "data").rglob("*.part") if part.stat().st_size > 10**6]
    assert not kept, f"{kept} is larger than the file"


def misbehaving(rng: random.Random, folder: Path) -> str:
    """Commands against a server of many manners, until it behaves."""
    place, content = _data(folder)
    said = []
    with web.serving() as server:
        server.files = {NAME: content}
        change = from_server(server.url, content)
        for _ in range(3):
            server.manners = [manner(rng, len(content)) for _ in range(rng.choice((1, 2, 5)))]
            said.append(hand_over([COMMAND], place, MAY_WRITE, change=change))
            _kept_if_right(place, content)
        server.manners = []
        for _ in range(2):  # the first may find that what was kept is wrong
            said.append(hand_over([COMMAND], place, MAY_WRITE, change=change))
    assert said[-1].endswith(" 0"), f"no success with a server that behaves: {said}"
    assert (place / "data/cifar10" / NAME).read_bytes() == content
    return ", ".join(line.split()[-1] for line in said)


def two_at_once(rng: random.Random, folder: Path) -> str:
    """Two downloads of one data set: one is refused, or comes later; the file is right."""
    place, content = _data(folder)
    endings: list = []
    with web.serving() as server:
        server.files = {NAME: content}
        server.manners = [rng.choice((trickling, web.cut_after(9), web.good)) for _ in range(3)]
        change = from_server(server.url, content)
        rooms = [folder / "a" / "place", folder / "b" / "place"]
        for room in rooms:
            room.mkdir(parents=True)
            (room / "data").symlink_to(place)
        starts = [rng.random() * 0.3 for _ in rooms]

        def one(room: Path, start: float) -> None:
            time.sleep(start)
            endings.append(run(COMMAND, room, change=change))

        threads = [
            threading.Thread(target=one, args=pair) for pair in zip(rooms, starts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ended in endings:
            assert not broken(ended), ended
        last = run(COMMAND, rooms[0], change=change)
    assert last.status == 0, last
    assert (place / "cifar10" / NAME).read_bytes() == content
    return f"ended with {endings[0].status} and {endings[1].status}"


def wrong_certificate(rng: random.Random, folder: Path) -> str:
    """A server with a certificate of its own making."""
    place, content = _data(folder)
    name = rng.choice(("localhost", "example.org", "www.cs.toronto.edu"))
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key -out cert -subj"
    made = subprocess.run([*command.split(), f"/CN={name}"], cwd=folder, capture_output=True)
    assert made.returncode == 0, made
    with web.serving() as server:
        server.files = {NAME: content}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert", folder / "key")
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        change = from_server(server.url.replace("http:", "https:"), content)
        said = hand_over([COMMAND], place, MAY_WRITE, change=change)
        asked = list(server.asked)
    assert said.endswith(" 1")
    assert not asked, "something was asked in spite of the certificate"
    assert not (place / "data/cifar10" / NAME).exists()
    return f"{name}: {said}"


TRIALS = {
    "misbehaving": misbehaving,
    "two at once": two_at_once,
    "wrong certificate": wrong_certificate,
}
