"""A cache on anything that fsspec opens: in memory, on an object store, on a web server, in an archive.

Comes in: a URL, or the path of an archive. Goes out: the `Storage` of `engine.storage` over whole files. Object stores
and memory replace a file whole, which is all that a commit needs, but they have no lock between processes: one process
writes. Archives and web servers are read-only. Nothing here has to list folders, since plain web servers list none:
chunk numbers follow from the metadata, and who knows an encoder's id needs no listing.
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

import numpy as np

from engine.array_format import DAMAGED, METADATA, STORE, ArrayFormat
from engine.chunk_map import Chunks, RecentChunks
from engine.errors import CacheError

if TYPE_CHECKING:
    from engine.storage import NewFile

ARCHIVES = {".zip": "zip", ".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
IN_ARCHIVES = {"zip", "tar", "libarchive"}
READ_ONLY = IN_ARCHIVES | {"http", "https", "github", "git", "gist", "jlab", "jupyter", "reference", "data"}
REQUESTS_AT_ONCE = 8
HELD_BYTES = 1 << 28

_locks: dict[tuple[str, str], threading.Lock] = {}


def is_archive(path: str) -> bool:
    """Tell whether a path names an archive by its suffix."""
    return _archive_protocol(path) is not None


def _archive_protocol(path: str) -> str | None:
    return next((protocol for suffix, protocol in ARCHIVES.items() if path.lower().endswith(suffix)), None)


def open_remote(address: str) -> RemoteStorage:
    """Return the storage of a URL or of an archive's path.

    Raises
    ------
    CacheError
        fsspec does not know such URLs, lacks a library for them, or the archive is not there.
    """
    import fsspec

    url = _chained(address)
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CacheError(f"the cache {address} needs another library: {error}") from error
    except (ValueError, OSError) as error:
        raise CacheError(f"the cache {address} cannot be opened: {error}") from error
    protocols = {link.partition("://")[0] for link in url.split("::")}
    return RemoteStorage(address, system, root, protocols)


def _chained(address: str) -> str:
    """Return a URL as fsspec chains them: ``zip:///path/cache.zip`` and paths name the archive itself here."""
    protocol, found, path = address.partition("://")
    if not found:
        return f"{_archive_protocol(address)}://::file://{Path(address).expanduser().absolute()}"
    if protocol in IN_ARCHIVES and "::" not in address:
        return f"{protocol}://::file://{path}"
    return address


class RemoteStorage:
    """Files by name in one of fsspec's file systems.

    Parameters
    ----------
    address : str
        As the user gave it.
    system : fsspec.AbstractFileSystem
    root : str
        The cache's folder in it.
    protocols : set of str
        All that the address chains, such as {"zip", "https"}.
    """

    shared = False

    def __init__(self, address: str, system: Any, root: str, protocols: set[str]) -> None:
        self.address, self.writable = address, not protocols & READ_ONLY
        self._system, self._root = system, root.rstrip("/")
        self._is_web = bool(protocols & {"http", "https"}) and not protocols & IN_ARCHIVES
        # One stream behind all members; the libraries do not promise to share it among threads.
        self._one_at_a_time = threading.Lock() if protocols & IN_ARCHIVES else None
        self._made: set[str] = set()
        if self._one_at_a_time:
            self._enter_only_folder()

    def _enter_only_folder(self) -> None:
        """Go where an archive holds the cache's folder instead of what is in it."""
        tops = self.names("")
        if STORE not in tops and len(tops) == 1 and self.exists(f"{tops[0]}/{STORE}"):
            self._root = self._path(tops[0])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def place(self, name: str) -> str:
        """See `Storage.place`."""
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        try:
            if self._one_at_a_time is None:
                return bytes(self._system.cat_file(self._path(name)))
            with self._one_at_a_time:
                return bytes(self._system.cat_file(self._path(name)))
        except (FileNotFoundError, KeyError, IsADirectoryError):
            raise FileNotFoundError(self.place(name)) from None
        except Exception as error:  # each file system has its own
            raise CacheError(f"{self.place(name)} cannot be read ({type(error).__name__}: {error})") from error

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
                f"the server of {self.address} does not list its folders, so it cannot be told what is cached there; "
                "name the encoder"
            )
        return found

    def _listed(self, folder: str) -> list[str]:
        path = self._path(folder) + ("/" if self._is_web else "")
        try:
            found = self._system.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # each file system has its own
            raise CacheError(f"{self.place(folder)} cannot be listed ({type(error).__name__}: {error})") from error
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in found})

    def exists(self, name: str) -> bool:
        """See `Storage.exists`; on a web server for files only."""
        if not self._is_web:
            return bool(self._system.exists(self._path(name)))
        try:
            self.read(name)
        except FileNotFoundError:
            return False
        return True

    def put(self, steps: Iterable[Iterable[NewFile]], scratch: str, lazily: Iterable[NewFile] = ()) -> None:
        """See `Storage.put`; how durable a file is is the file system's affair."""
        self._refuse_read_only()
        for name, parts in itertools.chain(itertools.chain.from_iterable(steps), lazily):
            path = self._path(name)
            content = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)
            try:
                parent = path.rpartition("/")[0]
                if parent not in self._made:
                    self._system.makedirs(parent, exist_ok=True)
                    self._made.add(parent)
                self._system.pipe_file(path, content)
            except Exception as error:  # each file system has its own
                raise CacheError(
                    f"cannot write {len(content):,} bytes to {self.place(name)} ({type(error).__name__}: {error}); "
                    "what was committed before is valid"
                ) from error

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self._refuse_read_only()
        try:
            self._system.rm_file(self._path(name))
        except FileNotFoundError:
            return
        except Exception as error:  # each file system has its own
            raise CacheError(f"cannot remove {self.place(name)} ({type(error).__name__}: {error})") from error

    def put_folder(self, folder: str, files: Sequence[NewFile], scratch: str) -> None:
        """See `Storage.put_folder`."""
        self.put([[(f"{folder}/{name}", parts) for name, parts in files]], scratch)

    def make_folder(self, folder: str) -> None:
        """See `Storage.make_folder`: folders come with their files."""

    def sweep(self, scratch: str) -> None:
        """See `Storage.sweep`: nothing is ever unfinished here."""

    def drop(self, scratch: str) -> None:
        """See `Storage.drop`."""

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """See `Storage.lock`: against the threads of this process only."""
        self._refuse_read_only()
        with _locks.setdefault((self._root, name), threading.Lock()):
            yield

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

    @contextmanager
    def writing(self, name: str, scratch: str) -> Iterator[Path]:
        """See `Storage.writing`."""
        self._refuse_read_only()
        with _temporary_folder() as folder:
            path = folder / name.rpartition("/")[2]
            yield path
            self.put([[(name, [path.read_bytes()])]], scratch)

    def local_folder(self) -> Path:
        """See `Storage.local_folder`."""
        raise CacheError(
            f"the cache {self.address} is not a folder of this machine, which this needs; copy it to one and name that"
        )

    def _refuse_read_only(self) -> None:
        if not self.writable:
            raise CacheError(
                f"the cache {self.address} is read-only, as archives and web servers are; name a folder to write to, "
                "such as a copy of it"
            )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fluoroscope-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
