"""Putting a finished folder in the place of another, so that a kill at any moment leaves one of the two there.

Where the system can exchange two names at once (Linux, most local file systems) the place is never empty. Elsewhere the
old folder is renamed aside first; a process killed between the two renames leaves the new one finished beside it, and
`finish_swap`, which whoever next takes the lock calls, puts it in place. The caller holds the lock of the place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from engine.arrays.array_format import STORE
from engine.arrays.durable import make_folder, sync_folder, write_error

NEW, OLD = "new", "old"
RENAME_EXCHANGE = 2
AT_FDCWD = -100
CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def swap_scratch(cache: Path, kind: str, name: str) -> Path:
    """Return the folder in which a successor of an array is built; nobody sweeps it but `finish_swap`."""
    return cache / "tmp" / "upkeep" / kind / name


def settle(cache: Path, kind: str, name: str) -> None:
    """Put an array in place that a killed process has left beside it, before somebody makes another one."""
    scratch = swap_scratch(cache, kind, name)
    if scratch.exists():
        shutil.rmtree(finish_swap(scratch, cache / STORE / kind / name))


def finish_swap(scratch: Path, place: Path) -> Path:
    """Finish what a killed process has left, and return the scratch folder, made and empty."""
    if (scratch / OLD).exists() and not place.exists():
        _rename(scratch / (NEW if (scratch / NEW).exists() else OLD), place)
        sync_folder(place.parent)
    if scratch.exists():
        shutil.rmtree(scratch)
    make_folder(scratch)
    return scratch


def swap_in(scratch: Path, place: Path) -> None:
    """Put ``scratch/new``, finished and synced, where `place` is, and delete what was there and the scratch folder.

    Raises
    ------
    CacheError
        The folders cannot be renamed; what was there is there.
    """
    if not _exchanged(scratch / NEW, place):
        _rename(place, scratch / OLD)
        sync_folder(scratch)
        _rename(scratch / NEW, place)
    sync_folder(place.parent)
    shutil.rmtree(scratch)


def remove_folder(scratch: Path, place: Path) -> None:
    """Delete a folder: gone at once for those who look for it, and in peace for those who have it open."""
    # Not called OLD: that name asks for being put back.
    _rename(place, scratch / "removed")
    sync_folder(place.parent)
    shutil.rmtree(scratch)


def _rename(old: Path, new: Path) -> None:
    try:
        os.rename(old, new)
    except OSError as error:
        raise write_error(error, new) from error


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux") or not hasattr(library, "renameat2"):
        return False
    if library.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise write_error(OSError(number, os.strerror(number)), two)
