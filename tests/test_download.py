"""Downloads from servers that misbehave: a second call succeeds; a wrong file is never taken."""

import contextlib
import fcntl
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from servers import (
    CONTENT,
    broken_chunks,
    chunk_cut_after,
    chunked,
    circle,
    claims,
    cut_after,
    disguised_page,
    good,
    hang_up,
    no_http,
    no_length,
    other_span,
    range_ignored,
    redirect,
    remote,
    serving,
    short_length,
    slow,
    status,
    web_page,
    wrong_byte,
)

from hjepa_mlx.data import download as module
from hjepa_mlx.data.download import download
from hjepa_mlx.errors import HJEPAError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with serving() as running:
        yield running


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
