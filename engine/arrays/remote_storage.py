"""A cache on anything that fsspec opens: in memory, on an object store, on a web server, in an archive.

Comes in: a URL, or the path of an archive. Goes out: the `Storage` of `storage` over whole files. Object stores
and memory replace a file whole, which is all that a commit needs, but they have no lock between processes: one process
writes. Archives and web servers are read-only. Reading an array lists no folder, since plain web servers list none:
chunk numbers follow from the metadata.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from engine import remote_files
from engine.arrays.array_format import DAMAGED, METADATA, STORE, ArrayFormat
from engine.arrays.chunks import Chunks, RecentChunks
from engine.arrays.durable import write_error
from engine.errors import CacheError, DataError, ImageError
from engine.remote_files import Place

if TYPE_CHECKING:
    from engine.arrays.storage import NewFile

ARCHIVE_SUFFIXES = {".zip": "zip", ".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
WEB = {"http", "https"}
READ_ONLY = remote_files.ARCHIVES | WEB | {"github", "git", "gist", "jlab", "jupyter", "reference", "data"}
# What web servers answer that have no page for a folder: forbidden, not found, not allowed.
NO_LISTING = (403, 404, 405)
REQUESTS_AT_ONCE = 8
HELD_BYTES = 1 << 28

_locks: dict[tuple[str, str], threading.Lock] = {}


def is_archive(path: str) -> bool:
    """Tell whether a path names an archive by its suffix."""
    return _archive_protocol(path) is not None


def _archive_protocol(path: str) -> str | None:
    return next((protocol for suffix, protocol in ARCHIVE_SUFFIXES.items() if path.lower().endswith(suffix)), None)


def _chained(address: str) -> str:
    """Return a URL as fsspec chains them: ``zip:///path/cache.zip`` and paths name the archive itself here."""
    protocol, found, path = address.partition("://")
    if not found:
        return f"{_archive_protocol(address)}://::file://{Path(address).expanduser().absolute()}"
    if protocol in remote_files.ARCHIVES and "::" not in address:
        return f"{protocol}://::file://{path}"
    return address


class RemoteStorage:
    """Files by name in one of fsspec's file systems; can be sent to other processes, where it is opened anew.

    Parameters
    ----------
    address : str
        A URL or the path of an archive.

    Raises
    ------
    UsageError
        It cannot be opened: no such archive, or a library that it needs is not installed.
    """

    shared = False

    def __init__(self, address: str) -> None:
        self.address, self._url, self._top = address, _chained(address), ""
        protocols = remote_files.protocols_of(self._url)
        self.writable = not protocols & READ_ONLY
        in_archive = bool(protocols & remote_files.ARCHIVES)
        self._is_web = bool(protocols & WEB) and not in_archive
        self._made: set[str] = set()
        remote_files.filesystem(self._url)
        if in_archive:
            self._enter_only_folder()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.address,)

    def _enter_only_folder(self) -> None:
        """Go where an archive holds the cache's folder instead of what is in it."""
        tops = self.names("")
        if STORE not in tops and len(tops) == 1 and self.exists(f"{tops[0]}/{STORE}/{METADATA}"):
            self._top = f"{tops[0]}/"

    def _located(self, name: str) -> Place:
        place = remote_files.filesystem(self._url)
        name = quote(self._top + name) if self._is_web else self._top + name
        return place._replace(path=f"{place.path.rstrip('/')}/{name}" if place.path.strip("/") else name)

    def place(self, name: str) -> str:
        """See `Storage.place`."""
        return f"{self.address.rstrip('/')}/{name}"

    # -- Reading -----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        try:
            return remote_files.read(self._url, self._top + name)
        except (ImageError, DataError) as error:
            if str(error) == remote_files.NO_SUCH_FILE:
                raise FileNotFoundError(self.place(name)) from None
            raise CacheError(f"{self.place(name)} cannot be read: {error}") from error

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Storage.read_many`: several requests at once."""

        def content(name: str) -> bytes | None:
            try:
                return self.read(name)
            except FileNotFoundError:
                return None

        if len(names) == 1:
            return [content(names[0])]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, "fetching") as pool:
            contents = list(pool.map(content, names))
        return contents[: contents.index(None) + 1] if None in contents else contents

    def names(self, folder: str) -> list[str]:
        """See `Storage.names`."""
        found = self._listed(folder)
        if not found and self._is_web and METADATA not in self._listed(STORE) and self.exists(f"{STORE}/{METADATA}"):
            raise CacheError(
                f"the server of {self.address} does not list its folders, so nobody can tell what is cached there; "
                "name the encoder, or the model and its --precision"
            )
        return found

    def _listed(self, folder: str) -> list[str]:
        system, path, turn = self._located(folder)
        try:
            with turn:
                found = system.ls(path.rstrip("/") + "/" if self._is_web else path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # each file system has its own
            if self._is_web and getattr(error, "status", None) in NO_LISTING:
                return []
            raise CacheError(f"{self.place(folder)} cannot be listed ({type(error).__name__}: {error})") from error
        # A file is listed as itself.
        below = {entry.rstrip("/") for entry in found} - {path.rstrip("/")}
        return sorted(unquote(entry.rpartition("/")[2]) for entry in below)

    def exists(self, name: str) -> bool:
        """See `Storage.exists`; for files only."""
        try:
            self.read(name)
        except FileNotFoundError:
            return False
        return True

    def chunks(self, folder: str, form: ArrayFormat, part: str) -> Chunks:
        """See `Storage.chunks`: fetched whole, the last used ones kept."""
        size, dtype = form.chunk_file_bytes(part), form.part_dtype(part)

        def load(number: int) -> np.ndarray:
            name = f"{folder}/{form.chunk_file(part, number)}"
            try:
                content = self.read(name)
            except FileNotFoundError:
                raise CacheError(f"chunk file {self.place(name)} cannot be read (there is none); {DAMAGED}") from None
            if len(content) != size:
                raise CacheError(f"{self.place(name)} has {len(content):,} bytes instead of {size:,}; {DAMAGED}")
            return np.frombuffer(content, dtype).reshape(form.chunk_rows, *form.part_shape(part))

        return RecentChunks(form.chunk_rows, load, most=max(HELD_BYTES // size, 2))

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """See `Storage.reading`: a temporary copy."""
        with _temporary_folder() as folder:
            path = folder / name.rpartition("/")[2]
            with suppress(FileNotFoundError):
                path.write_bytes(self.read(name))
            yield path

    def local_folder(self) -> Path:
        """See `Storage.local_folder`."""
        raise CacheError(
            f"the cache {self.address} is not a folder of this machine, which this needs; copy it to one and name that"
        )

    # -- Writing -----------------------------------------------------------------------------------------------------

    def version(self, name: str) -> tuple[int, ...] | None:
        """See `Storage.version`: arrays are neither removed nor rebuilt here."""
        return None

    def check_writable(self) -> None:
        """See `Storage.check_writable`."""
        if not self.writable:
            raise CacheError(
                f"the cache {self.address} is read-only, as archives and web servers are; name a folder to write to, "
                "such as a copy of it"
            )

    def put(self, steps: Iterable[Iterable[NewFile]], scratch: str, lazily: Iterable[NewFile] = ()) -> None:
        """See `Storage.put`; how durable a file is is the file system's affair."""
        self.check_writable()
        for name, parts in itertools.chain(itertools.chain.from_iterable(steps), lazily):
            system, path, turn = self._located(name)
            content = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)
            folder = path.rpartition("/")[0]
            try:
                with turn:
                    if folder not in self._made:
                        system.makedirs(folder, exist_ok=True)
                        self._made.add(folder)
                    system.pipe_file(path, content)
            except Exception as error:  # each file system has its own
                raise CacheError(
                    f"cannot write {len(content):,} bytes to {self.place(name)} ({type(error).__name__}: {error}); "
                    "what was committed before is valid"
                ) from error

    def put_folder(self, folder: str, files: Sequence[NewFile], scratch: str) -> None:
        """See `Storage.put_folder`."""
        self.put([[(f"{folder}/{name}", parts) for name, parts in files]], scratch)

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self.check_writable()
        system, path, turn = self._located(name)
        try:
            with turn:
                system.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:  # each file system has its own
            raise CacheError(f"cannot remove {self.place(name)} ({type(error).__name__}: {error})") from error

    def make_folder(self, folder: str) -> None:
        """See `Storage.make_folder`: folders come with their files."""

    def sweep(self, scratch: str) -> None:
        """See `Storage.sweep`: nothing is ever unfinished here."""

    def drop(self, scratch: str) -> None:
        """See `Storage.drop`."""

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Storage.lock`: against the threads of this process only."""
        self.check_writable()
        with _locks.setdefault((self._url, name), threading.Lock()):
            yield

    @contextmanager
    def writing(self, name: str, scratch: str) -> Iterator[Path]:
        """See `Storage.writing`."""
        self.check_writable()
        with _temporary_folder() as folder:
            path = folder / name.rpartition("/")[2]
            try:
                yield path
                content = path.read_bytes()
            except OSError as error:
                raise write_error(error, path) from error
            self.put([[(name, [content])]], scratch)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fluoroscope-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
