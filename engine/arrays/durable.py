"""Files that are there whole or not at all, also after a power cut; and one clear error for a full disk.

A file is written under a scratch folder on the same file system, synced, renamed to its place, and the folder that now
names it is synced. Scratch files never lie among the data, so whoever lists the data sees finished files only.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from engine.errors import CacheError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NewFile: TypeAlias = tuple[Path, Iterable[bytes | np.ndarray]]

# Files written at once. Most of that is waiting for the disk, which writes down several syncs as one.
WRITERS = 8
_numbers = itertools.count()


def write_whole(path: Path, parts: Iterable[bytes | np.ndarray], scratch: Path) -> None:
    """Put a file in place by rename, replacing the one that may be there; readers of the old one keep it whole.

    Parameters
    ----------
    path : Path
        Its folder must exist. Call `sync_folder` on that folder to make the rename itself durable.
    parts : iterable of bytes or C-contiguous arrays
        Written one after the other.
    scratch : Path
        Existing folder on the same file system; holds the file while it is written.

    Raises
    ------
    CacheError
        The disk is full (named with path and bytes) or the folder cannot be written. Nothing has changed then.
    """
    _place(_written(path, parts, scratch), path)


def write_with(path: Path, write: Callable[[BinaryIO], object], scratch: Path) -> None:
    """Put a file in place as `write_whole` does, its content written by a function that is given the open file.

    Raises
    ------
    CacheError
        As `write_whole`.
    """
    temporary = scratch / f"{path.name}.{os.getpid()}-{next(_numbers)}.partial"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's writer turns a failed write into an error of its own, behind which the system's stands.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise write_error(cause, path) from error
    _place(temporary, path)


def write_in_steps(steps: Iterable[Iterable[NewFile]], scratch: Path, lazily: Iterable[NewFile] = ()) -> None:
    """Put files in place as `write_whole` does, in their order; those of one step are durable before the next appears.

    Files of all steps are written and synced beside one another, whatever their order: one sync after the other would
    wait for the disk each time, and leave it idle in between.

    Parameters
    ----------
    steps : iterable of iterables of (path, parts)
        Taken as they are written, so that generators keep only a few files in memory.
    scratch : Path
    lazily : iterable of (path, parts)
        Files that follow after all steps. Their contents are synced and their names are not: after a power cut the
        files before them may be there instead.

    Raises
    ------
    CacheError
        As `write_whole`; the files before the one that failed are in place, those after it are not.
    """
    streams = [*steps, lazily]
    waiting = [deque[tuple[Path, Future[Path]]]() for _ in streams]
    running: deque[Future[Path]] = deque()
    folders = dict[Path, None]()

    def place_first(files: deque[tuple[Path, Future[Path]]]) -> None:
        path, written = files[0]
        _place(written.result(), path)
        files.popleft()
        folders[path.parent] = None

    # Made anew each time: threads do not survive a fork, and starting some costs less than one sync.
    with ThreadPoolExecutor(WRITERS, "writing") as pool:
        try:
            for step, (path, parts) in _in_turns(streams):
                running.append(pool.submit(_written, path, parts, scratch))
                waiting[step].append((path, running[-1]))
                if len(running) > WRITERS:
                    running.popleft().result()
                while waiting[0] and waiting[0][0][1].done():
                    place_first(waiting[0])
            for files in waiting[:-1]:
                while files:
                    place_first(files)
                _sync_all(folders)
            while waiting[-1]:
                place_first(waiting[-1])
        finally:
            for _, written in itertools.chain(*waiting):
                if not written.cancel() and written.exception() is None:
                    written.result().unlink(missing_ok=True)


def _in_turns(streams: Iterable[Iterable[NewFile]]) -> Iterator[tuple[int, NewFile]]:
    """Yield the files of several streams one from each in turn, with the stream's number."""
    left = list(enumerate(map(iter, streams)))
    while left:
        for number, stream in list(left):
            file = next(stream, None)
            if file is None:
                left.remove((number, stream))
            else:
                yield number, file


def _sync_all(folders: dict[Path, None]) -> None:
    for folder in folders:
        sync_folder(folder)
    folders.clear()


def _written(path: Path, parts: Iterable[bytes | np.ndarray], scratch: Path) -> Path:
    """Return a synced file in the scratch folder with the content that belongs at a path."""
    buffers = [_bytes_of(part) for part in parts]
    byte_count = sum(len(buffer) for buffer in buffers)
    temporary = scratch / f"{path.name}.{os.getpid()}-{next(_numbers)}.partial"
    try:
        with open(temporary, "wb", buffering=0) as file:
            for buffer in buffers:
                _write_all(file, buffer)
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, path, byte_count) from error
    return temporary


def _place(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, path) from error


def _write_all(file: io.FileIO, buffer: memoryview) -> None:
    while len(buffer):
        buffer = buffer[file.write(buffer) :]


def _bytes_of(part: bytes | np.ndarray) -> memoryview:
    if isinstance(part, bytes):
        return memoryview(part)
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def write_error(error: OSError, path: Path, byte_count: int | None = None, *, at_least: bool = False) -> CacheError:
    """Return the `CacheError` that tells a user what an `OSError` while writing means and what to do.

    Parameters
    ----------
    byte_count : int, optional
        What was to be written; with `at_least` what had been written by then.
    """
    amount = "data" if byte_count is None else f"{byte_count:,} bytes"
    if error.errno in FULL_DISK:
        amount = f"more than the {amount} that fit" if at_least else amount
        return CacheError(
            f"no space left while writing {amount} to {path} ({os.strerror(error.errno)}); what was committed before "
            "is valid: free some space or move the cache, then run the same command again and it goes on from there"
        )
    return CacheError(f"cannot write {amount} to {path}: {error.strerror or error}; check the folder and its rights")


def write_plainly(path: Path, content: bytes, mode: str = "wb") -> None:
    """Write or append ("ab") to a small file that need not be whole after a kill; CacheError where the disk is full."""
    try:
        with open(path, mode) as file:
            file.write(content)
    except OSError as error:
        raise write_error(error, path, len(content)) from error


def sync_folder(folder: Path) -> None:
    """Make the renames and new files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; CacheError naming it where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
