"""Where a cache lies: named files, each there whole or not at all, on a local disk or on anything that fsspec opens.

`storage_of` makes of a path, a URL or an archive's path what the rest of the engine reads and writes by name, such as
``arrays.zarr/image/<encoder>/key/c.0.0``. A local cache maps its chunk files, is written by any number of processes and
syncs what it promises. Elsewhere (`remote_storage`) files are read whole, one process writes at a time, and
archives and web servers are read-only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from engine.arrays.array_format import ArrayFormat
from engine.arrays.chunk_map import LocalChunks
from engine.arrays.chunks import Chunks
from engine.arrays.durable import make_folder, sync_folder, write_error, write_in_steps
from engine.arrays.lock import record_lock
from engine.errors import CacheError

Part: TypeAlias = bytes | np.ndarray
NewFile: TypeAlias = tuple[str, Sequence[Part]]


class Storage(Protocol):
    """Files by name, with "/" between folders; what every place for a cache must do.

    Parameters
    ----------
    address : str
        As a user would name it: a path or a URL.
    writable : bool
    shared : bool
        Other processes may write here at the same time.
    """

    address: str
    writable: bool
    shared: bool

    def place(self, name: str) -> str:
        """Return a file's name for messages, with the address before it."""

    def read(self, name: str) -> bytes:
        """Return a file's content; FileNotFoundError where there is none, CacheError where it cannot be read."""

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the contents of files up to the first that is not there, which is None and the last; as `read`."""

    def names(self, folder: str) -> list[str]:
        """Return what lies in a folder, sorted; nothing where there is no folder.

        Raises
        ------
        CacheError
            The place cannot list its folders.
        """

    def put(self, steps: Iterable[Iterable[NewFile]], scratch: str, lazily: Iterable[NewFile] = ()) -> None:
        """Write files, each there whole or not at all, in the given order; durable when this returns.

        Parameters
        ----------
        steps : iterable of iterables of (name, parts)
            A step's files appear only when those of the step before are durable, also after a power cut. Their folders
            exist. Parts are bytes or C-contiguous arrays, written one after the other.
        scratch : str
            Folder for what is not finished.
        lazily : iterable of (name, parts)
            Files that follow the steps. After a power cut, those before them may be there instead.

        Raises
        ------
        CacheError
            The disk is full, or the place cannot be written. The files before stay.
        """

    def remove(self, name: str) -> None:
        """Remove a file for certain, also after a power cut; nothing where there is none."""

    def put_folder(self, folder: str, files: Sequence[NewFile], scratch: str) -> None:
        """Write a folder that does not exist yet; the last file is the one by which others see that it exists."""

    def make_folder(self, folder: str) -> None:
        """Make a folder and those it lies in, where places have folders."""

    def sweep(self, scratch: str) -> None:
        """Empty a scratch folder, making it where it does not exist."""

    def drop(self, scratch: str) -> None:
        """Remove a scratch folder with what is in it, if it is there."""

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or, in a local place, a folder of this name."""

    def version(self, name: str) -> tuple[int, ...] | None:
        """Return what tells a file from any that takes its place, also of the same content; None where nothing does."""

    def check_writable(self) -> None:
        """Raise CacheError where nothing can ever be written."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of a name, against all others that write here; CacheError where nothing can be written."""

    def chunks(self, folder: str, form: ArrayFormat, part: str) -> Chunks:
        """Return the chunks of one array of a keyed array, none of them known yet."""

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """Give a local file of a file's content while the context lasts; a path of nothing where there is no file."""

    def writing(self, name: str, scratch: str) -> AbstractContextManager[Path]:
        """Give a local path to write to; what is there when the context ends without an error is put in place.

        The caller holds a lock, so that nobody else writes the same file.
        """

    def local_folder(self) -> Path:
        """Return the folder of a local place; CacheError where it is no local one."""


def storage_of(cache: str | os.PathLike[str] | Storage) -> Storage:
    """Return the storage of a cache.

    Parameters
    ----------
    cache : path, URL or Storage
        A folder; an archive such as ``cache.zip``; or what fsspec opens: ``memory://name``, ``s3://bucket/cache``,
        ``https://host/cache``, ``zip:///path/cache.zip``, ``zip://folder::https://host/cache.zip``.

    Raises
    ------
    UsageError
        The URL cannot be opened.
    """
    if not isinstance(cache, str | os.PathLike):
        return cache
    from engine import remote_files
    from engine.arrays import remote_storage

    text = remote_files.local_path(os.fspath(cache))
    if remote_files.is_url(text) or (remote_storage.is_archive(text) and Path(text).expanduser().is_file()):
        return remote_storage.RemoteStorage(text)
    return LocalStorage(Path(text).expanduser())


class LocalStorage:
    """A folder on a file system with renames, record locks and syncing.

    Parameters
    ----------
    folder : Path
        Made when something is first written.
    """

    writable = shared = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, str(folder)

    def place(self, name: str) -> str:
        """See `Storage.place`."""
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(self.place(name)) from None
        except OSError as error:
            raise CacheError(f"{self.place(name)} cannot be read ({error.strerror})") from error

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Storage.read_many`."""
        contents: list[bytes | None] = []
        for name in names:
            try:
                contents.append(self.read(name))
            except FileNotFoundError:
                return [*contents, None]
        return contents

    def names(self, folder: str) -> list[str]:
        """See `Storage.names`."""
        try:
            return sorted(os.listdir(self.folder / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CacheError(f"{self.place(folder)} cannot be listed ({error.strerror})") from error

    def put(self, steps: Iterable[Iterable[NewFile]], scratch: str, lazily: Iterable[NewFile] = ()) -> None:
        """See `Storage.put`."""
        make_folder(self.folder / scratch)
        paths = (((self.folder / name, parts) for name, parts in files) for files in steps)
        write_in_steps(paths, self.folder / scratch, ((self.folder / name, parts) for name, parts in lazily))

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        path = self.folder / name
        if not path.exists():
            return
        try:
            path.unlink()
        except OSError as error:
            raise write_error(error, path) from error
        sync_folder(path.parent)

    def put_folder(self, folder: str, files: Sequence[NewFile], scratch: str) -> None:
        """See `Storage.put_folder`: built beside and renamed to its place, so that nobody ever sees a part of it."""
        target, new = self.folder / folder, f"{scratch}/new"
        make_folder(target.parent)
        for name, _ in files:
            make_folder((self.folder / new / name).parent)
        self.put([[(f"{new}/{name}", parts) for name, parts in files]], scratch)
        try:
            os.rename(self.folder / new, target)
        except OSError as error:
            raise write_error(error, target) from error
        sync_folder(target.parent)

    def make_folder(self, folder: str) -> None:
        """See `Storage.make_folder`."""
        make_folder(self.folder / folder)

    def sweep(self, scratch: str) -> None:
        """See `Storage.sweep`."""
        make_folder(self.folder / scratch)
        for entry in os.scandir(self.folder / scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def drop(self, scratch: str) -> None:
        """See `Storage.drop`."""
        shutil.rmtree(self.folder / scratch, ignore_errors=True)

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return (self.folder / name).exists()

    def version(self, name: str) -> tuple[int, ...] | None:
        """See `Storage.version`."""
        try:
            status = os.stat(self.folder / name)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def check_writable(self) -> None:
        """See `Storage.check_writable`: whether this folder can be written shows when it is."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """See `Storage.lock`: a record lock, against all processes."""
        return record_lock(self.folder / name)

    def chunks(self, folder: str, form: ArrayFormat, part: str) -> Chunks:
        """See `Storage.chunks`: maps."""
        return LocalChunks(self.folder / folder, form, part)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """See `Storage.reading`: the file itself."""
        yield self.folder / name

    @contextmanager
    def writing(self, name: str, scratch: str) -> Iterator[Path]:
        """See `Storage.writing`; CacheError where the disk is full."""
        target, folder = self.folder / name, self.folder / scratch
        make_folder(target.parent)
        make_folder(folder)
        temporary = folder / f"{target.name}.partial"
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except OSError as error:
            written = temporary.stat().st_size if temporary.exists() else 0
            raise write_error(error, target, written, at_least=True) from error
        finally:
            temporary.unlink(missing_ok=True)

    def local_folder(self) -> Path:
        """See `Storage.local_folder`."""
        return self.folder
