"""Read-only copies of a cache for tests: archives, and folders and archives behind a web server of this machine."""

from __future__ import annotations

import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.engine.web_server import web_server

READ_ONLY = ("zip path", "zip url", "zip of a folder", "tar", "web", "web without listings", "zip on the web")


class _Pages(SimpleHTTPRequestHandler):
    """Python's own file server, quiet; like most others it may refuse to list folders."""

    lists = True

    def log_message(self, *_: object) -> None:
        pass

    def list_directory(self, path):
        if self.lists:
            return super().list_directory(path)
        self.send_error(403, "no listings here")
        return None


@contextmanager
def served(folder: Path, *, lists: bool = True) -> Iterator[str]:
    """Serve a folder on a free port of this machine; gives its URL."""
    handler = type("Handler", (_Pages,), {"lists": lists})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def read_only_copy(folder: Path, way: str) -> Iterator[str]:
    """Give the address of a read-only copy of a local cache."""
    archive = folder.parent / ("copy.tar" if way == "tar" else "copy.zip")
    if way == "tar":
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, ".")
    elif "zip" in way:
        with zipfile.ZipFile(archive, "w") as packed:
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder.parent if way == "zip of a folder" else folder)
                if path.is_file():
                    packed.write(path, inside)
    if way in ("zip path", "zip of a folder", "tar"):
        yield str(archive)
    elif way == "zip url":
        yield f"zip://{archive}"
    elif way == "zip on the web":
        with web_server() as web:  # Python's own gives no ranges, which an archive is read by
            web.files["/copy.zip"] = archive.read_bytes()
            yield f"zip://::{web.url}/copy.zip"
    else:
        with served(folder.parent, lists=way != "web without listings") as url:
            yield f"{url}/{folder.name}"
