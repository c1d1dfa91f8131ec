"""A reserved run of addresses into which files are mapped side by side, so that many files read as one array.

Comes in: a size, then files and the offsets at which they are to appear. Goes out: NumPy arrays over the whole run. No
file descriptor is kept, everything is read-only, and the run is given back when the last array over it is gone. A file
that was shortened behind our back would kill the process at the first touch of a lost page (SIGBUS); `first_lost`
asks the kernel beforehand, many pages a call, and cannot be killed by the answer. An unlinked file stays whole for as
long as it is mapped.

Linux only; `supported` tells. Python's own `mmap` cannot place a file at a given address, hence the calls to the C
library.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from functools import cache
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
FAILED = ctypes.c_void_p(-1).value
# The kernel takes at most so many pieces a call (UIO_MAXIOV).
MOST_PIECES = 1024
# The usual limit of the kernel where it does not say, and the share of it that is left to all others.
USUAL_MAP_LIMIT = 65530
LEFT_TO_OTHERS = 16384

# Where files are mapped, by the start of each range. Ranges are given back whenever their last array goes, so nothing
# here may wait for a lock.
_mapped: dict[int, set[int]] = {}


class NoAddresses(Exception):
    """The system gives no (more) addresses or maps; another way of reading has to do."""


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.restype = pointer
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    library.munmap.argtypes = [pointer, size]
    library.process_vm_readv.restype = ctypes.c_ssize_t
    library.process_vm_readv.argtypes = [number, pointer, ctypes.c_ulong, pointer, ctypes.c_ulong, ctypes.c_ulong]
    return library


@cache
def supported() -> bool:
    """Tell whether this system can place files side by side and say of a page whether it can be read."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return False
    try:
        probe = np.zeros(1, np.uint8)
        # Some containers forbid the call that looks before it touches.
        return _readable(np.array([[probe.ctypes.data, 1]], np.uint64)) == 1
    except (AttributeError, OSError):
        return False


@cache
def map_limit() -> int:
    """Return how many maps this process should make at most."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        limit = USUAL_MAP_LIMIT
    return max(limit - LEFT_TO_OTHERS, limit // 2)


class AddressRange:
    """Reserved addresses that hold nothing until files are mapped into them.

    Parameters
    ----------
    size : int
        Bytes, a multiple of the page size. Reserving costs no memory.

    Raises
    ------
    NoAddresses
        The system refuses (a limit on the address space).
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        start = _library().mmap(None, size, PROT_NONE, flags, -1, 0)
        if start == FAILED:
            raise NoAddresses(os.strerror(ctypes.get_errno()))
        self.start, self.size = int(start), size
        self._offsets = _mapped[self.start] = set[int]()
        given_back = weakref.finalize(self, _give_back, self.start, size)
        given_back.atexit = False  # threads that outlive the interpreter may still be reading

    def map_file(self, offset: int, descriptor: int, size: int) -> None:
        """Let an open file's first bytes appear at an offset, in place of what was mapped there; both page-aligned.

        Raises
        ------
        NoAddresses
            The process has as many maps as it may have.
        OSError
            The file cannot be mapped.
        """
        if not (offset >= 0 and offset % PAGE == 0 and offset + size <= self.size):
            raise ValueError(f"{size} bytes at {offset} lie outside {self.size} reserved ones, or off the pages")
        if offset not in self._offsets and sum(map(len, list(_mapped.values()))) >= map_limit():
            raise NoAddresses(f"{map_limit():,} files are mapped already")
        at = _library().mmap(self.start + offset, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, descriptor, 0)
        if at == FAILED:
            number = ctypes.get_errno()
            if number == errno.ENOMEM:
                raise NoAddresses(os.strerror(number))
            raise OSError(number, os.strerror(number))
        self._offsets.add(offset)

    def array(self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        """Return a read-only array over the range from its start; touching what no file is mapped to kills."""
        return np.asarray(_Window(self, dtype, shape, strides))

    def first_lost(self, offsets: np.ndarray) -> int | None:
        """Return the position of the first offset, (n,) int64, whose page has no file behind it (any more), or None."""
        pieces = np.ones((len(offsets), 2), np.uint64)
        pieces[:, 0] = offsets
        pieces[:, 0] += np.uint64(self.start)
        for first in range(0, len(pieces), MOST_PIECES):
            some = pieces[first : first + MOST_PIECES]
            count = _readable(some)
            if count < len(some):
                return first + count
        return None


class _Window:
    """What NumPy makes an array of; the array holds it, and it holds the range."""

    def __init__(self, held: AddressRange, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self._held = held
        self.__array_interface__ = {
            "version": 3,
            "typestr": dtype.str,
            "shape": shape,
            "strides": strides,
            "data": (held.start, True),
        }


def _readable(pieces: np.ndarray) -> int:
    """Return how many pieces of this process's memory, (n, 2) uint64 address and length 1, can be read in a row."""
    into = np.empty(len(pieces), np.uint8)
    target = np.array([into.ctypes.data, into.nbytes], np.uint64)
    count = _library().process_vm_readv(os.getpid(), target.ctypes.data, 1, pieces.ctypes.data, len(pieces), 0)
    if count < 0:
        number = ctypes.get_errno()
        if number != errno.EFAULT:
            raise OSError(number, os.strerror(number))
        return 0
    return int(count)


def _give_back(start: int, size: int) -> None:
    # Forgotten first: another thread may be given the same addresses as soon as they are free.
    _mapped.pop(start, None)
    _library().munmap(start, size)
