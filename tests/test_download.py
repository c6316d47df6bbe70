"""Downloads from servers that misbehave: a second call succeeds; a wrong file is never taken."""

import contextlib
import fcntl
import resource
import threading

import pytest
import servers
from servers import CONTENT, cut_after, good, remote, serving, status, web_page

from hjepa_mlx.data import download as module
from hjepa_mlx.data.download import download
from hjepa_mlx.errors import HJEPAError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    with serving() as running:
        yield running


def arrives(server, folder) -> None:
    """The file is downloaded whole, and nothing else is left."""
    download(remote(server), folder / "file.bin")
    assert (folder / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["file.bin"]


PUT_RIGHT = {
    "well": [],
    "no length": [servers.no_length],
    "nonsense length": [servers.claims("many")],
    "length too large": [servers.claims(lambda right: right + 10)],
    "negative length": [servers.claims(-5)],
    "in chunks": [servers.chunked],
    "cut inside a chunk": [servers.chunk_cut_after(20_000)],
    "cut between chunks": [servers.chunk_cut_after(0)],
    "reset again and again": [cut_after(50_000, reset=True)] * 5,
    "no HTTP at first": [servers.no_http],
    "redirected, then cut": [servers.redirect, cut_after(100_000), servers.redirect],
    "cut, then another span": [cut_after(100_000), servers.other_span],
    "cut ever again": [cut_after(n) for n in (1, 5_000, 70_000, 70_000, 1)],
    "cut, then starts anew": [cut_after(200_000), servers.range_ignored],
    "busy for a moment": [status(503), status(429), status(408)],
    "a bad gateway": [status(502)],
    "broken chunks": [servers.broken_chunks],
}


@pytest.mark.parametrize("manners", PUT_RIGHT.values(), ids=PUT_RIGHT)
def test_a_download_that_breaks_goes_on_by_itself(server, tmp_path, manners):
    server.manners = list(manners)
    arrives(server, tmp_path)


@pytest.mark.parametrize(
    "manner", [good, servers.range_ignored, servers.other_span, servers.chunked, servers.no_length]
)
def test_a_later_call_resumes_or_starts_anew_where_the_server_cannot(server, tmp_path, manner):
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:1000] if manner is good else b"x" * 1000)
    server.manners = [manner]
    arrives(server, tmp_path)
    assert server.asked == [("/file.bin", 1000)]


def test_a_server_that_has_nothing_after_half_a_file_leads_to_no_file(server, tmp_path):
    (tmp_path / ".file.bin.part").write_bytes(CONTENT[:1000])
    server.manners = [status(416)]
    with pytest.raises(HJEPAError, match=r"gave 1,000 bytes .*not the right file"):
        download(remote(server), tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []
    arrives(server, tmp_path)
    assert server.asked == [("/file.bin", 1000), ("/file.bin", 0)]


@pytest.mark.parametrize("manner", [status(403), status(404), web_page])
def test_what_has_arrived_survives_a_refusal(server, tmp_path, manner):
    server.manners = [cut_after(1000), manner]
    with pytest.raises(HJEPAError):
        download(remote(server), tmp_path / "file.bin")
    arrives(server, tmp_path)
    assert server.asked == [("/file.bin", 0), ("/file.bin", 1000), ("/file.bin", 1000)]


def test_what_arrived_before_a_stall_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    enough = threading.Event()

    def stall(handler, content, start):
        handler.answer(content[:100_000], length=len(content))
        enough.wait(20)
        handler.close_connection = True

    server.manners = [stall]
    arrives(server, tmp_path)
    enough.set()
    assert server.asked == [("/file.bin", 0), ("/file.bin", 100_000)]


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
    "disguised page": ([servers.disguised_page], "not the right file"),
    "wrong byte": ([servers.wrong_byte], "not the right file"),
    "length too small": ([servers.short_length], "not the right file"),
    "redirected to a web page": ([servers.redirect, web_page], "answered with a web page"),
    "redirected in a servers.circle": ([servers.circle] * 5, "answered 302"),
    "redirected to nowhere": ([status(302)], "answered 302"),
    "no HTTP": ([servers.no_http] * 4, "failed"),
    "nothing": ([cut_after(0)] * 4, "the connection ended after 0 of"),
    "no answer": ([lambda handler, *_: servers.hang_up(handler)] * 4, "failed"),
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
    arrives(server, tmp_path)


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
        arrives(server, tmp_path)


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
