"""A local web server that misbehaves on demand."""

import hashlib
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from hjepa_mlx.data.catalog import Remote

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

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
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
        range_ignored(handler, content, start)


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
