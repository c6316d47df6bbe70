"""Downloads from servers that misbehave: a second call succeeds; a wrong file is never taken."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import layouts
import numpy as np
import pytest
from layouts import CMC
from test_sources import fashion_files
from typer.testing import CliRunner

from hjepa_mlx.cli import app
from hjepa_mlx.config import Data
from hjepa_mlx.data import download as module
from hjepa_mlx.data import importers, prepared
from hjepa_mlx.data.catalog import CATALOG, IMAGENET_ARCHIVES, Remote
from hjepa_mlx.data.download import download
from hjepa_mlx.data.fetch import fetch
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError

CONTENT = np.random.default_rng(0).bytes(300_000)
PAGE = b"<html>Please log in to this hotel's network.</html>"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` in the manner of the first of `server.manners`, then well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else 0
        self.server.asked.append((self.path, start))
        well = self.server.hub.answer if self.server.hub else good
        manner = self.server.manners.pop(0) if self.server.manners else well
        manner(self, self.server.files.get(self.path.lstrip("/"), CONTENT), start)

    def do_HEAD(self):
        self.do_GET()

    def answer(self, body: bytes, status=200, length=None, kind="application/octet-stream", **more):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length != "none":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def good(handler, content, start):
    if start >= len(content) and start:
        handler.answer(b"", 416)
    elif start:
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.answer(content[start:], 206, Content_Range=span)
    else:
        handler.answer(content)


def range_ignored(handler, content, start):
    handler.answer(content)


def hang_up(handler):
    handler.close_connection = True
    handler.wfile.flush()
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def cut_after(amount, reset=False):
    def cut(handler, content, start):
        body = content[start:]
        span = {"Content_Range": f"bytes {start}-{len(content) - 1}/*"} if start else {}
        handler.answer(body[:amount], 206 if start else 200, length=len(body), **span)
        handler.close_connection = True
        if reset:
            time.sleep(0.1)
            hang_up(handler)

    return cut


def status(code):
    return lambda handler, content, start: handler.answer(b"", code)


def wrong_byte(handler, content, start):
    good(handler, content[:-1] + bytes([content[-1] ^ 1]), start)


def web_page(handler, content, start):
    handler.answer(PAGE, kind="text/html; charset=utf-8")


def disguised_page(handler, content, start):
    handler.answer(PAGE)


def redirect(handler, content, start):
    handler.answer(b"", 302, Location="/elsewhere/file.bin")


def slow(handler, content, start):
    handler.answer(b"", length=len(content))
    for begin in range(0, len(content), 60_000):
        handler.wfile.write(content[begin : begin + 60_000])
        time.sleep(0.02)


def claims(length):
    """Answers with a length that may be missing, nonsense, or `length(content)`."""

    def manner(handler, content, start):
        said = length(len(content)) if callable(length) else length
        handler.answer(content, length=said, Connection="close")
        handler.close_connection = True

    return manner


no_length, short_length = claims("none"), claims(lambda right: right - 10)


def broken_chunks(handler, content, start):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(
        b"10000\r\n" + content[:0x10000] + b"\r\n10000\r\n" + content[0x10000:70_000]
    )
    hang_up(handler)


def chunked(handler, content, start):
    handler.answer(b"", length="none", Transfer_Encoding="chunked", Connection="close")
    for begin in range(0, len(content), 70_000):
        chunk = content[begin : begin + 70_000]
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    handler.wfile.write(b"0\r\n\r\n")
    handler.close_connection = True


def chunk_cut_after(amount):
    """The second chunk stops after `amount` of its bytes, or has not even a beginning."""

    def manner(handler, content, start):
        handler.answer(b"", length="none", Transfer_Encoding="chunked", Connection="close")
        handler.wfile.write(b"%x\r\n%b\r\n" % (70_000, content[:70_000]))
        if amount:
            handler.wfile.write(b"%x\r\n%b" % (70_000, content[70_000 : 70_000 + amount]))
        handler.close_connection = True

    return manner


def circle(handler, content, start):
    handler.answer(b"", 302, Location=handler.path)


def no_http(handler, content, start):
    handler.wfile.write(b"220 smtp.example.org ready\r\n")
    handler.close_connection = True


def other_span(handler, content, start):
    span = f"bytes 0-{len(content) - 1}/{len(content)}"
    handler.answer(content, 206, Content_Range=span)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(importers, "DEBIAN_FASHION", Path("/nowhere"))
    with serving() as running:
        yield running


@contextmanager
def serving():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.manners, running.asked, running.files, running.hub = [], [], {}, None
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def remote(server, content=CONTENT, name="file.bin") -> Remote:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Remote(url=f"{server.url}/{name}", md5=digest, size=len(content))


# What is put right without a word

PUT_RIGHT = {
    "well": [],
    "redirected": [redirect],
    "slow": [slow],
    "no length": [no_length],
    "nonsense length": [claims("many")],
    "length too large": [claims(lambda right: right + 10)],
    "negative length": [claims(-5)],
    "in chunks": [chunked],
    "cut inside a chunk": [chunk_cut_after(20_000)],
    "cut between chunks": [chunk_cut_after(0)],
    "reset again and again": [cut_after(50_000, reset=True)] * 5,
    "no HTTP at first": [no_http],
    "redirected, then cut": [redirect, cut_after(100_000), redirect],
    "cut, then another span": [cut_after(100_000), other_span],
    "asks for patience": [status(429), status(408)],
    "cut once": [cut_after(123_456)],
    "reset": [cut_after(100_000, reset=True)],
    "cut ever again": [cut_after(n) for n in (1, 5_000, 70_000, 70_000, 1)],
    "cut, then starts anew": [cut_after(200_000), range_ignored],
    "busy for a moment": [status(503), status(429), status(502)],
    "broken chunks": [broken_chunks],
}


@pytest.mark.parametrize("manners", PUT_RIGHT.values(), ids=PUT_RIGHT)
def test_a_download_that_breaks_goes_on_by_itself(server, tmp_path, manners):
    server.manners = list(manners)
    download(remote(server), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("amount", np.random.default_rng(1).integers(1, 300_000, 5).tolist())
def test_it_asks_for_no_byte_twice(server, tmp_path, amount):
    server.manners = [cut_after(amount)]
    download(remote(server), tmp_path / "file.bin")
    assert server.asked == [("/file.bin", 0), ("/file.bin", amount)]


@pytest.mark.parametrize("manner", [good, range_ignored, other_span, chunked, no_length])
def test_a_later_call_resumes_or_starts_anew_where_the_server_cannot(server, tmp_path, manner):
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:1000] if manner is good else b"x" * 1000)
    server.manners = [manner]
    download(remote(server), tmp_path / "file.bin")
    assert server.asked == [("/file.bin", 1000)]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_that_has_nothing_after_half_a_file_leads_to_no_file(server, tmp_path):
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:1000])
    server.manners = [status(416)]
    with pytest.raises(HJEPAError, match=r"gave 1,000 bytes .*not the right file"):
        download(remote(server), tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []
    download(remote(server), tmp_path / "file.bin")
    assert server.asked == [("/file.bin", 1000), ("/file.bin", 0)]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("manner", [status(403), status(404), web_page])
def test_what_has_arrived_survives_a_refusal(server, tmp_path, manner):
    server.manners = [cut_after(1000), manner]
    with pytest.raises(HJEPAError):
        download(remote(server), tmp_path / "file.bin")
    download(remote(server), tmp_path / "file.bin")
    assert server.asked == [("/file.bin", 0), ("/file.bin", 1000), ("/file.bin", 1000)]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_what_arrived_before_a_stall_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    enough = threading.Event()

    def stall(handler, content, start):
        handler.answer(content[:100_000], length=len(content))
        enough.wait(20)
        handler.close_connection = True

    server.manners = [stall]
    download(remote(server), tmp_path / "file.bin")
    enough.set()
    assert server.asked == [("/file.bin", 0), ("/file.bin", 100_000)]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


DOWNLOAD = """
import sys
from pathlib import Path
from hjepa_mlx.data.catalog import Remote
from hjepa_mlx.data.download import download
url, md5, size, path = sys.argv[1:]
download(Remote(url=url, md5=md5, size=int(size)), Path(path))
"""


def test_a_process_that_was_killed_is_gone_on_from(server, tmp_path):
    content, path = CONTENT * 10, tmp_path / "file.bin"
    part, finish = tmp_path / ".file.bin.part", threading.Event()

    def half(handler, content, start):
        handler.answer(content[:2_200_000], length=len(content))
        finish.wait(20)
        handler.close_connection = True

    server.files["file.bin"], server.manners = content, [half]
    wanted = remote(server, content)
    arguments = [wanted.url, wanted.md5, str(wanted.size), str(path)]
    with subprocess.Popen([sys.executable, "-c", DOWNLOAD, *arguments]) as process:
        until = time.monotonic() + 20
        while not (part.is_file() and part.stat().st_size >= 1_000_000):
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    finish.set()
    have = part.stat().st_size
    assert not path.exists()
    download(wanted, path)
    assert server.asked == [("/file.bin", 0), ("/file.bin", have)]
    assert path.read_bytes() == content


def test_a_full_disk_leaves_no_file_and_the_next_call_goes_on(server, tmp_path):
    path, (soft, hard) = tmp_path / "file.bin", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may be larger
    try:
        with pytest.raises(OSError, match="too large"):
            download(remote(server), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    download(remote(server), path)
    assert server.asked == [("/file.bin", 0), ("/file.bin", 100_000)]
    assert path.read_bytes() == CONTENT


# What ends in one line, and succeeds when run again

FAILING = {
    "403": ([status(403)], "answered 403"),
    "404": ([status(404)], "answered 404"),
    "500 for good": ([status(500)] * 4, "answered 500"),
    "503 for good": ([status(503)] * 4, "answered 503"),
    "web page": ([web_page], "answered with a web page"),
    "disguised page": ([disguised_page], "not the right file"),
    "wrong byte": ([wrong_byte], "not the right file"),
    "length too small": ([short_length], "not the right file"),
    "redirected to a web page": ([redirect, web_page], "answered with a web page"),
    "redirected in a circle": ([circle] * 5, "answered 302"),
    "redirected to nowhere": ([status(302)], "answered 302"),
    "no HTTP": ([no_http] * 4, "failed"),
    "nothing": ([cut_after(0)] * 4, "the connection ended after 0 of"),
    "no answer": ([lambda handler, *_: hang_up(handler)] * 4, "failed"),
}


@pytest.mark.parametrize(("manners", "says"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("before", [0, 1000])
def test_a_failure_is_one_line_and_the_next_call_succeeds(server, tmp_path, manners, says, before):
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:before])
    server.manners = list(manners)
    with pytest.raises(HJEPAError, match=says) as error:
        download(remote(server), tmp_path / "file.bin")
    assert f"{server.url}/file.bin" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "file.bin").exists()
    assert server.manners == []
    download(remote(server), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "part", [CONTENT[:77], CONTENT, CONTENT + b"more", b"rubbish", bytes(400_000)],
    ids=["a part", "all of it", "more than all", "rubbish", "longer rubbish"],
)  # fmt: skip
def test_whatever_an_earlier_call_left_the_file_comes_out_right(server, tmp_path, part):
    (tmp_path / ".file.bin.part").write_bytes(part)
    try:
        download(remote(server), tmp_path / "file.bin")
        assert CONTENT.startswith(part)
    except HJEPAError:
        assert not CONTENT.startswith(part)
        assert list(tmp_path.iterdir()) == []
        download(remote(server), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with serving() as gone:
        wanted = remote(gone)
    with pytest.raises(HJEPAError, match=f"{wanted.url} failed"):
        download(wanted, tmp_path / "file.bin")


def test_a_second_download_of_the_same_file_is_refused(server, tmp_path):
    started, finish = threading.Event(), threading.Event()

    def waiting(handler, content, start):
        started.set()
        finish.wait(20)
        good(handler, content, start)

    server.manners = [waiting]
    first = threading.Thread(target=download, args=(remote(server), tmp_path / "file.bin"))
    first.start()
    started.wait(20)
    with pytest.raises(HJEPAError, match="is being written by another process"):
        download(remote(server), tmp_path / "file.bin")
    finish.set()
    first.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_download_that_another_one_has_just_finished_does_no_harm(server, tmp_path, monkeypatch):
    path, flock = tmp_path / "file.bin", fcntl.flock

    def later(*args):
        monkeypatch.setattr(fcntl, "flock", flock)
        download(remote(server), path)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", later)
    with contextlib.suppress(HJEPAError):
        download(remote(server), path)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]


# Data sets


@pytest.fixture
def published(server, monkeypatch):
    """Makes the catalog's files those of the local server."""

    def publish(name: str, files: dict[str, bytes]) -> None:
        server.files |= files
        remotes = tuple(remote(server, content, file) for file, content in files.items())
        row = CATALOG[name].model_copy(update={"files": remotes})
        monkeypatch.setitem(CATALOG, name, row)

    return publish


def archive_of(name: str, tmp_path) -> dict[str, bytes]:
    """The archive of a small CIFAR-10 or STL-10, as the catalog names it."""
    folder = tmp_path / "made"
    if name == "cifar10":
        layouts.cifar10(folder, per_batch=10)
    else:
        layouts.stl10(folder, 10, 10, 10)
    inner = next(folder.iterdir())
    path = layouts.archive(inner, tmp_path / CATALOG[name].files[0].name)
    return {path.name: path.read_bytes()}


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_an_archive_is_fetched_and_ready_to_train_on(server, published, tmp_path, name):
    files = archive_of(name, tmp_path)
    published(name, files)
    root = tmp_path / "data"
    (archive,) = fetch(name, root)
    source = open_source(Data(name=name, dir=str(root)), "train")
    assert len(source) == (50 if name == "cifar10" else 10)
    assert archive.read_bytes() == next(iter(files.values()))
    assert {p.name for p in (root / name).iterdir()} == {"prepared", archive.name}
    asked = len(server.asked)
    assert fetch(name, root) == []
    shutil.rmtree(root / name / "prepared")
    assert fetch(name, root) == [archive]
    assert len(server.asked) == asked


def test_originals_are_kept_and_named_or_removed_if_wished(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    archive = tmp_path / "data/cifar10" / next(iter(files))
    command = ["datasets", "download", "cifar10", "--data-dir", str(tmp_path / "data")]
    ended = CliRunner().invoke(app, command)
    assert f"Not needed any more: {archive} (0.00 GB)" in ended.output
    assert f"Train with: hjepa-mlx train cifar10 --data-dir {tmp_path}/data" in ended.output
    assert archive.is_file()
    shutil.rmtree(tmp_path / "data/cifar10/prepared")
    ended = CliRunner().invoke(app, [*command, "--remove-originals"])
    assert f"Removed: {archive}" in ended.output
    assert not archive.exists()
    assert len(open_source(Data(name="cifar10", dir=str(tmp_path / "data")), "test")) == 10


def test_debians_files_are_used_and_never_removed(server, published, tmp_path, monkeypatch):
    files = fashion_files()
    published("fashion-mnist", {name: content + b"?" for name, content in files.items()})
    debian = tmp_path / "debian"
    debian.mkdir()
    for name, content in files.items():
        (debian / name).write_bytes(content)
    monkeypatch.setattr(importers, "DEBIAN_FASHION", debian)
    assert fetch("fashion-mnist", tmp_path / "data") == []
    assert server.asked == []
    assert len(open_source(Data(name="fashion-mnist", dir=str(tmp_path / "data")), "test")) == 12


def test_an_archive_placed_by_hand_is_checked_and_used(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    ((file, content),) = files.items()
    place = tmp_path / "data" / "cifar10"
    place.mkdir(parents=True)
    (place / file).write_bytes(content[:-1])
    with pytest.raises(HJEPAError, match=r"not the published .*Move it away"):
        fetch("cifar10", tmp_path / "data")
    (place / file).write_bytes(content)
    fetch("cifar10", tmp_path / "data")
    assert server.asked == []
    assert len(open_source(Data(name="cifar10", dir=str(tmp_path / "data")), "test")) == 10


def test_a_folder_that_is_not_whole_is_passed_over_for_the_archive(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    ((file, content),) = files.items()
    inner = tmp_path / "data/cifar10/cifar-10-batches-bin"
    inner.mkdir(parents=True)
    (inner.parent / file).write_bytes(content)
    (inner / "data_batch_1.bin").write_bytes(b"of another time")
    assert fetch("cifar10", tmp_path / "data") == [inner.parent / file]
    assert server.asked == []


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_what_was_unpacked_by_hand_is_not_downloaded(server, published, tmp_path, name):
    published(name, archive_of(name, tmp_path))
    (tmp_path / "made").rename(tmp_path / name)
    assert len(fetch(name, tmp_path)) == (6 if name == "cifar10" else 5)
    assert server.asked == []
    assert len(open_source(Data(name=name, dir=str(tmp_path)), "test")) == 10


def test_the_hundred_classes_of_an_imagenet1k_that_is_here_are_not_downloaded(server, tmp_path):
    layouts.folders(tmp_path / "imagenet1k", layouts.photos(CMC))
    assert fetch("imagenet100", tmp_path) == []
    assert len(open_source(Data(name="imagenet100", dir=str(tmp_path)), "test")) == 100


def test_an_archive_that_lacks_a_file_is_refused(server, published, tmp_path):
    right = archive_of("stl10", tmp_path)
    (tmp_path / "made/stl10_binary/test_y.bin").unlink()
    name = next(iter(right))
    lacking = layouts.archive(tmp_path / "made/stl10_binary", tmp_path / name).read_bytes()
    published("stl10", {name: lacking})
    with pytest.raises(HJEPAError, match=r"lacks stl10_binary/test_y\.bin"):
        fetch("stl10", tmp_path / "data")
    assert not prepared.find("stl10", tmp_path / "data")
    published("stl10", right)
    (tmp_path / "data/stl10" / name).unlink()
    fetch("stl10", tmp_path / "data")
    assert len(open_source(Data(name="stl10", dir=str(tmp_path / "data")), "test")) == 10


def test_files_of_fashion_mnist_placed_by_hand_are_checked_and_kept(server, published, tmp_path):
    files = fashion_files()
    published("fashion-mnist", files)
    place = tmp_path / "fashion-mnist"
    place.mkdir()
    first, *rest = files
    (place / first).write_bytes(files[first][:-1] + b"?")
    with pytest.raises(HJEPAError, match=rf"{first} has the MD5 .*not the published .*Move it"):
        fetch("fashion-mnist", tmp_path)
    assert (place / first).read_bytes() == files[first][:-1] + b"?"
    (place / first).write_bytes(files[first])
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in rest]


@pytest.mark.parametrize("number", [0, 2])
def test_fashion_mnist_goes_on_with_the_file_that_failed(server, published, tmp_path, number):
    files = fashion_files()
    published("fashion-mnist", files)
    server.manners = [good] * number + [status(404)]
    with pytest.raises(HJEPAError, match=list(files)[number]):
        fetch("fashion-mnist", tmp_path)
    assert len(list((tmp_path / "fashion-mnist").glob("[!.]*"))) == number
    server.asked.clear()
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in list(files)[number:]]
    assert len(open_source(Data(name="fashion-mnist", dir=str(tmp_path)), "train")) == 30


def test_a_small_disk_is_refused_before_anything_is_asked(server, published, tmp_path, monkeypatch):
    published("stl10", {"stl10_binary.tar.gz": b"x"})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000_000))
    with pytest.raises(HJEPAError, match=r"STL-10 needs 3\.12 GB in .*3\.00 GB are free"):
        fetch("stl10", tmp_path)
    assert server.asked == []
    with open(tmp_path / "stl10/.stl10_binary.tar.gz.part", "wb") as part:
        part.truncate(200_000_000)  # it counts as here already
    with pytest.raises(HJEPAError, match="not the right file"):
        fetch("stl10", tmp_path)


def test_archives_of_imagenet1k_with_the_right_md5_are_taken(tmp_path, monkeypatch):
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    archives = {path.name: path for path in (tmp_path / "imagenet1k").iterdir()}
    for name, path in archives.items():
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(IMAGENET_ARCHIVES, name, digest)
    tars = [path for name, path in archives.items() if name.endswith(".tar")]
    assert sorted(fetch("imagenet1k", tmp_path)) == sorted(tars)
    shutil.rmtree(tmp_path / "imagenet1k" / "prepared")
    kit = archives["ILSVRC2012_devkit_t12.tar.gz"]
    kit.write_bytes(kit.read_bytes()[:-1] + b"?")
    with pytest.raises(HJEPAError, match=r"devkit_t12\.tar\.gz has the MD5 .*Move it away"):
        fetch("imagenet1k", tmp_path)
    assert kit.is_file()


def test_imagenet1k_says_how_to_get_it_and_checks_what_was_placed(tmp_path, capsys):
    with pytest.raises(HJEPAError, match=r"lacks ILSVRC2012_img_train\.tar, ILSVRC2012_img_val"):
        fetch("imagenet1k", tmp_path)
    assert "https://image-net.org/download" in capsys.readouterr().out
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    with pytest.raises(HJEPAError, match=r"img_train\.tar has the MD5 .*not the published 1d675b"):
        fetch("imagenet1k", tmp_path)
    (tmp_path / "imagenet1k" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(HJEPAError, match=r"lacks ILSVRC2012_img_val\.tar\."):
        fetch("imagenet1k", tmp_path)


def test_another_layout_of_imagenet1k_is_enough(tmp_path):
    layouts.kaggle_contest(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    inner = tmp_path / "imagenet1k/ILSVRC/Data/CLS-LOC"
    assert fetch("imagenet1k", tmp_path) == [inner / "train", inner / "val"]


# Hugging Face


class Hub:
    """What huggingface_hub asks of a server, for one repository."""

    def __init__(self, server, files: dict[str, bytes]) -> None:
        self.files, self.served, self.instead = files, dict(files), None
        self.base = "api/datasets/clane9/imagenet-100"
        server.hub = self

    def entry(self, name: str) -> dict:
        content = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
        return {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}

    def answer(self, handler, content, start) -> None:
        if self.instead:
            self.instead(handler, content, start)
            return
        path = handler.path.lstrip("/").split("?")[0]
        siblings = [self.entry(name) for name in self.files]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith(f"{self.base}/tree/"):
            tree = [
                {"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"],
                 "lfs": e["lfs"]}
                for e in siblings
            ]  # fmt: skip
            handler.answer(json.dumps(tree).encode(), kind="application/json")
        elif path.startswith(self.base):
            info = {"id": "clane9/imagenet-100", "sha": "a" * 40, "siblings": siblings}
            handler.answer(json.dumps(info).encode(), kind="application/json")
        elif name in self.served:
            entry = self.entry(name)
            more = {"ETag": f'"{entry["lfs"]["sha256"]}"', "X_Repo_Commit": "a" * 40}
            body = self.served[name][start:]
            if start:
                more["Content_Range"] = f"bytes {start}-{len(self.served[name]) - 1}/*"
            handler.answer(body, 206 if start else 200, **more)
        else:
            handler.answer(b"{}", 404, kind="application/json", X_Error_Code="RepoNotFound")


@pytest.fixture
def hub(server, tmp_path):
    """A parquet file a split on a local Hugging Face."""
    made = tmp_path / "made"
    layouts.parquet(made, layouts.photos(CMC), files=1)
    files = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*.parquet")}
    return Hub(server, {**files, "README.md": b"card"})


def download_imagenet100(server, tmp_path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hjepa_mlx", "datasets", "download", "imagenet100"]
    place = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [*command, "--data-dir", tmp_path / "data"],
        env={**os.environ, **place, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )


def last_line(ended: subprocess.CompletedProcess) -> str:
    assert ended.returncode == 1, ended
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def test_imagenet100_comes_from_the_hub_and_is_checked(hub, server, tmp_path):
    ended = download_imagenet100(server, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "non-commercial research" in ended.stdout
    source = open_source(Data(name="imagenet100", dir=str(tmp_path / "data")), "train")
    assert len(source) == 200
    assert source.classes == CMC
    asked = len(server.asked)
    assert download_imagenet100(server, tmp_path).returncode == 0
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1] + b"?", "not the published file .*run the command again"),
        (lambda data: data[:-1000], "again"),
    ],
    ids=["wrong", "cut"],
)
def test_a_wrong_or_cut_file_from_the_hub_is_fetched_again(hub, server, tmp_path, damage, says):
    name = next(name for name in hub.files if name.endswith(".parquet"))
    hub.served[name] = damage(hub.files[name])
    assert re.search(says, last_line(download_imagenet100(server, tmp_path)))
    assert not (tmp_path / "data/imagenet100" / name).exists()
    hub.served = hub.files
    assert download_imagenet100(server, tmp_path).returncode == 0
    assert (tmp_path / "data/imagenet100" / name).read_bytes() == hub.files[name]


def test_a_repository_without_parquet_files_is_named(hub, server, tmp_path):
    hub.files = {"README.md": b"card"}
    line = last_line(download_imagenet100(server, tmp_path))
    assert re.search(r"clane9/imagenet-100 has no parquet files", line)


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    with serving() as gone:
        pass
    line = last_line(download_imagenet100(gone, tmp_path))
    assert re.search(r"clane9/imagenet-100.*failed: .*again", line)


@pytest.mark.parametrize(
    "manner", [status(404), status(500), web_page], ids=["404", "500", "web page"]
)
def test_a_hub_that_does_not_answer_well_is_one_line(hub, server, tmp_path, manner):
    hub.instead = manner
    line = last_line(download_imagenet100(server, tmp_path))
    assert re.search(r"clane9/imagenet-100.*failed: .*again", line)
    hub.instead = None
    assert download_imagenet100(server, tmp_path).returncode == 0
