"""Files at any path that fsspec opens: object stores, web servers, archives, memory.

A URL such as ``s3://bucket/images``, ``http://host/images`` or ``zip://images::file:///data/x.zip`` comes in; bytes,
listings and sizes go out. Nothing here is used, and so no network, unless such a URL was given.

Web servers know percent signs, not file names, so names below an ``http`` root are quoted when they are asked for.
Many threads may read at once; where a file system has one stream or connection for all of its files, they take turns.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from engine.errors import DataError, ImageError, UsageError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Waits before a connection that failed is tried again, in seconds.
PATIENCE = (0.2, 1.0)
WEB = ("http://", "https://")
# What says that a file is still the same, by the names that file systems give it in `info`.
MARKS = ("ETag", "etag", "e_tag", "Content-MD5", "content_md5", "Digest", "md5Hash", "md5", "generation", "CRC")
TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "date_time", "created")
# Errors that mean that the other side is not there at all, by name, since each file system brings classes of its own.
GONE = {"ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError", "gaierror"}
BUSY = (429, 500, 502, 503, 504)
# File systems with one stream or connection for all of their files: of two threads that read at once, each would get
# bytes of the other's file. (zip has one stream too, which Python's zipfile guards.)
ONE_AT_A_TIME = {"tar", "libarchive", "ftp", "sftp", "ssh"}
ARCHIVES = {"zip", "tar", "libarchive"}
NO_SUCH_FILE = "no such file"


class FileInfo(NamedTuple):
    """What a file system tells of a file: its size in bytes (None where it does not say), time (ns) and a mark."""

    size: int | None
    mtime: int
    mark: int


class Place(NamedTuple):
    """Where a URL leads: the file system, the path in it, and what a thread holds while it asks that file system."""

    system: Any
    path: str
    turn: AbstractContextManager[Any]


def is_url(path: str) -> bool:
    """Tell whether a path is one that fsspec opens, such as ``s3://bucket/file``."""
    return "://" in path


def local_path(path: str) -> str:
    """Return a path with ``file://`` taken away, which then is no URL any more; others as they are."""
    for scheme in ("file://", "local://"):
        if path.startswith(scheme) and "::" not in path:
            return path.removeprefix(scheme)
    return path


def join(root: str, name: str) -> str:
    """Return the URL of a name below a root; what a chained URL's first part names lies in what its rest opens."""
    first, chain, rest = root.partition("::")
    protocol, _, inner = first.partition("://")
    inner = inner.rstrip("/") + "/" if inner else ""
    return f"{protocol}://{inner}{quote(name) if first.startswith(WEB) else name}{chain}{rest}"


def parent(url: str) -> str:
    """Return the URL of the folder that a URL's file lies in."""
    first, chain, rest = url.partition("::")
    protocol, _, inner = first.partition("?")[0].partition("://")
    return f"{protocol}://{inner.rpartition('/')[0]}{chain}{rest}"


def last_part(path: str) -> str:
    """Return the file's name in a path or URL."""
    first = path.partition("::")[0]
    first = first.partition("?")[0] if first.startswith(WEB) else first
    return first.rstrip("/").rpartition("/")[2]


def read(
    url: str, name: str = "", *, start: int | None = None, end: int | None = None, most: int | None = None
) -> bytes:
    """Return the content of a file or a range of it.

    Parameters
    ----------
    url : str
        Of the file, or of a folder if there is a name.
    name : str
        Relative to the folder.
    start, end : int, optional
        Bytes [start, end) alone; one request where the file system has those.
    most : int, optional
        Larger files are refused, before they are read where their size is told.

    Raises
    ------
    ImageError
        No such file, too large, or not to be had; the message has no name, which the caller knows best.
    DataError
        The other side cannot be reached at all, although it was asked again.
    """
    system, path, turn = _located(url, name)

    def content() -> bytes:
        if start is not None:
            return system.cat_file(path, start=start, end=end)
        size = None if most is None else _checked_size(system.info(path), most)
        if size is not None or most is None:
            return system.cat_file(path)
        with system.open(path, "rb") as file:
            return _read_stream(file, most + 1)

    found = bytes(_asked(url, turn, content))
    if most is not None and len(found) > most:
        raise ImageError(f"the file has more than max_bytes={most} bytes")
    return found


def _read_stream(file: Any, most: int) -> bytes:
    """Return what a stream of unknown size holds, but no more than so many bytes; a read may give less than asked."""
    parts, left = [], most
    while left > 0 and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return a small file, such as a table of boxes, from a local path or a URL; ImageError where it cannot be had."""
    if is_url(str(path)):
        return read(str(path))
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(NO_SUCH_FILE if isinstance(error, FileNotFoundError) else str(error)) from error


def info(url: str, name: str = "") -> FileInfo:
    """Return what the file system tells of a file; raises as `read` does."""
    system, path, turn = _located(url, name)
    return _file_info(_asked(url, turn, lambda: system.info(path)))


def _located(url: str, name: str) -> Place:
    """Return where a name below a URL is."""
    place = filesystem(url)
    if not name:
        return place
    folder = place.path.rstrip("/") + "/" if place.path else ""
    return place._replace(path=folder + (quote(name) if url.startswith(WEB) else name))


def list_files(root: str) -> dict[str, FileInfo]:
    """Return all files below a URL by their name relative to it, sorted.

    Hidden files and folders are left out. A web server is asked page by page, and pages above the root are not.

    Raises
    ------
    UsageError, DataError
        There is nothing below the root, or it cannot be reached.
    """
    system, path, turn = filesystem(root)
    if hasattr(system, "invalidate_cache"):
        with turn:
            system.invalidate_cache()

    def found() -> dict[str, Any]:
        return dict(_pages(system, path)) if root.startswith(WEB) else system.find(path, detail=True)

    try:
        entries = _asked(root, turn, found)
    except ImageError as error:
        raise UsageError(f"cannot list {root!r}: {error}") from error
    prefix = path.rstrip("/") + "/" if path.strip("/") else ""
    names = {}
    for full, entry in entries.items():
        if not full.startswith(prefix):
            continue
        name = unquote(full[len(prefix) :]) if root.startswith(WEB) else full[len(prefix) :].lstrip("/")
        if name and not any(_is_hidden(part) for part in name.split("/")):
            names[name] = _file_info(entry)
    return dict(sorted(names.items()))


def check_name(name: str, root: str) -> None:
    """Raise ImageError for a name that is none below a root: absolute, another URL, or one that climbs out of it."""
    parts = unquote(name).replace("\\", "/").split("/")
    if name.startswith("/") or "://" in name or "::" in name or ".." in parts:
        raise ImageError(f"{name}: leads out of the root {root}; give a root that holds all images")


def protocols_of(url: str) -> set[str]:
    """Return the protocols of a URL and of all that it is chained to."""
    return {link.partition("://")[0] for link in url.split("::")}


@lru_cache(maxsize=64)
def _filesystem_of_process(url: str, process: int) -> Place:
    import fsspec

    protocols = protocols_of(url)
    alone = bool(protocols & ONE_AT_A_TIME)
    try:
        # Who takes turns has a file system of its own: fsspec would share one among URLs, and each has its own lock.
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=alone)
        if protocols & ARCHIVES:
            # Reads the table of contents, before another thread could see half of it.
            system.exists("")
        return Place(system, path, threading.Lock() if alone else nullcontext())
    except ImportError as error:
        raise UsageError(f"cannot open {url!r}: {error}; install that package beside fluoroscope") from error
    except FileNotFoundError as error:
        raise UsageError(f"cannot open {url!r}: no such file {str(error.filename or error)!r}") from error
    except Exception as error:  # each file system brings errors of its own, such as BadZipFile
        message = f"cannot open {url!r}: {_reason(error)}; write it as fsspec does, such as s3://BUCKET/FOLDER"
        raise UsageError(message) from error


def filesystem(url: str) -> Place:
    """Return fsspec's file system of a URL and the path in it; one a process, because handles do not survive a fork.

    Whoever asks it for anything holds the place's turn meanwhile.
    """
    return _filesystem_of_process(url, os.getpid())


def forget_filesystems() -> None:
    """Open file systems anew when they are next used: an archive may have been replaced since."""
    _filesystem_of_process.cache_clear()


def _asked(url: str, turn: AbstractContextManager[Any], question: Callable[[], Result]) -> Result:
    """Return an answer, asking again where the connection failed or the server was busy."""
    waits = list(PATIENCE)
    while True:
        try:
            with turn:
                return question()
        except ImageError:
            raise
        except Exception as error:  # each file system brings errors of its own
            gone = _is_gone(error)
            if waits and (gone or getattr(error, "status", None) in BUSY):
                time.sleep(waits.pop(0))
            elif gone:
                raise DataError(
                    f"{url!r} cannot be reached: {_reason(error)}; what was done is kept, so begin again when it can"
                ) from error
            else:
                raise ImageError(_reason(error)) from error


def _is_gone(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, is a connection that failed rather than an answer."""
    while error is not None:
        if any(base.__name__ in GONE for base in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException) -> str:
    # fsspec says "not found" of whatever a web server answered; what it was stands behind that.
    behind = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(behind, "status", None)
    if isinstance(error, FileNotFoundError) and status in (None, 404) and not _is_gone(error):
        return NO_SUCH_FILE
    if status is not None:
        return f"the server answered {status} {getattr(behind, 'message', '')}".strip()
    if isinstance(error, IsADirectoryError):
        return "is not a file"
    return str(behind).strip().splitlines()[0] if str(behind).strip() else type(behind).__name__


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part != "..") or part == "__MACOSX"


def _pages(system: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files that a web server's pages of links name, from the root downwards and each page once."""
    root = root.rstrip("/") + "/"
    waiting, seen = [root], {root}
    while waiting:
        page = waiting.pop()
        try:
            entries = system.ls(page, detail=True)
        except FileNotFoundError as error:
            if page == root or _is_gone(error):
                raise
            # Also how fsspec reports a page without any link, an empty folder.
            log.warning("the folder %s is listed by the page above it, but the server has no page for it", page)
            continue
        for entry in entries:
            name = entry["name"]
            if not name.startswith(root) or "?" in name or "#" in name or ".." in unquote(name).split("/"):
                continue
            if entry["type"] != "directory":
                yield name, entry
            elif name not in seen:
                seen.add(name)
                waiting.append(name)


def _checked_size(entry: dict[str, Any], most: int) -> int | None:
    if entry.get("type") == "directory":
        raise ImageError("is not a file")
    size = entry.get("size")
    if size is not None and size > most:
        raise ImageError(f"the file has {size} bytes, more than max_bytes={most}")
    return size


def _file_info(entry: dict[str, Any]) -> FileInfo:
    marks = repr([(name, str(entry[name])) for name in MARKS if entry.get(name)])
    mark = int.from_bytes(hashlib.blake2b(marks.encode(), digest_size=8).digest(), "big") if marks != "[]" else 0
    times = [_nanoseconds(entry[name]) for name in TIMES if entry.get(name)]
    return FileInfo(entry.get("size"), next((time for time in times if time), 0), mark)


def _nanoseconds(when: Any) -> int:
    """Return a time in any form that file systems tell it, as nanoseconds since the epoch; 0 where it is none."""
    from email.utils import parsedate_to_datetime

    try:
        if isinstance(when, tuple | list):
            when = datetime(*when)
        elif isinstance(when, str):
            when = parsedate_to_datetime(when) if "," in when else datetime.fromisoformat(when)
        seconds = when.timestamp() if isinstance(when, datetime) else float(when)
        return int(seconds * 1_000_000) * 1000
    except (ValueError, TypeError, OverflowError, OSError):
        return 0
