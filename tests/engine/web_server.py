"""A web server on this machine for tests: files from a dictionary, ranges, listings, and misbehaviour on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class WebFiles:
    """What the server has and what it was asked for.

    Parameters
    ----------
    files : dict of path (such as "/a.png") to bytes
    pages : dict of path (such as "/") to HTML
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, str] = {}
        self.status: dict[str, list[int]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.etags = True
        self.lengths = True
        self.seconds = 0.0  # before a file is sent
        self.url = ""

    def bytes_sent(self) -> int:
        return sum(int(size) for kind, _, size in self.asked if kind == "sent")


@contextmanager
def web_server() -> Iterator[WebFiles]:
    """Serve on a free port of 127.0.0.1 until the context ends."""
    held = WebFiles()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(self.path)
            held.asked.append((self.command, path, self.headers.get("Range", "")))
            content, kind = held.files.get(path), "application/octet-stream"
            if content is None and path in held.pages:
                content, kind = held.pages[path].encode(), "text/html"
            status = 200 if content is not None else 404
            if held.status.get(path):
                status, content = held.status[path].pop(0), b""
            content = content or b""
            wanted = self.headers.get("Range", "")
            told_range = ""
            if wanted and status == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) + 1, len(content)) if last else len(content)
                told_range = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], 206
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if held.etags:
                self.send_header("ETag", f'"{hash(content)}"')
                self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            if told_range:
                self.send_header("Content-Range", told_range)
            if held.lengths:
                self.send_header("Content-Length", str(len(content)))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if body:
                time.sleep(held.seconds)
                held.asked.append(("sent", path, str(len(content))))
                with suppress(ConnectionError):  # who asked may have seen enough
                    self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    held.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
