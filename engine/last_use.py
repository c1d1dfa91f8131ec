"""When an array was last used, so that `fluoro cache ls` can tell what may go.

A job that opens an array to read it touches one small file beside the array's lock, at most once an hour. A cache that
cannot be written, or is no folder of this machine, is read without such a mark.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from engine.arrays import array_folder
from engine.arrays.array_format import KEY, STORE
from engine.arrays.storage import LocalStorage, Storage

SECONDS_BETWEEN_MARKS = 3600.0


def mark_use(storage: Storage, kind: str, name: str) -> None:
    """Note that an array is used now."""
    if not isinstance(storage, LocalStorage):
        return
    path = _mark(storage.folder, kind, name)
    with contextlib.suppress(OSError):  # a mark is not worth an error
        if not path.exists() or time.time() - path.stat().st_mtime > SECONDS_BETWEEN_MARKS:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def last_use(cache: Path, kind: str, name: str) -> float | None:
    """Return when an array in a folder was last read or written, in seconds since the epoch; None if nobody knows."""
    times = []
    for path in (_mark(cache, kind, name), cache / STORE / kind / name / KEY):
        with contextlib.suppress(OSError):
            times.append(os.stat(path).st_mtime)
    return max(times, default=None)


def _mark(cache: Path, kind: str, name: str) -> Path:
    # Not the lock file itself: to open and close that one would drop a lock that this process holds.
    return (cache / array_folder.lock_name(kind, name)).with_suffix(".used")
