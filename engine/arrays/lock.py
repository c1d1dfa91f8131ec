"""One short lock a file: POSIX record locks between processes, a thread lock within one.

Record locks (`fcntl.lockf`) and not `flock`: a record lock ends with the process that took it, also when a forked
child lives on. Their two traps are handled here: they do not keep threads of one process apart, and closing any
descriptor of the file drops them; so each lock file is opened by one thread at a time. Lock files are never removed,
or two processes could hold locks on two files of one name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.arrays.durable import make_folder, write_error
from engine.errors import CacheError

log = logging.getLogger(__name__)

_thread_locks: dict[str, threading.Lock] = {}
_registry = threading.Lock()


def _forget_locks_of_parent() -> None:
    """Start a forked child without the thread locks that some thread of its parent may have held."""
    global _registry
    _registry = threading.Lock()
    _thread_locks.clear()


os.register_at_fork(after_in_child=_forget_locks_of_parent)


@contextmanager
def record_lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of a file, made where missing; waits for as long as another holder lives.

    Not reentrant: the one place that locks an array calls nothing that locks it again.

    Raises
    ------
    CacheError
        The lock file cannot be made, or the file system has no record locks.
    """
    make_folder(path.parent)
    name = os.path.realpath(path)
    with _registry:
        thread_lock = _thread_locks.setdefault(name, threading.Lock())
    with thread_lock:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, path) from error
        try:
            _wait_for(descriptor, path)
            yield
        finally:
            os.close(descriptor)


def _wait_for(descriptor: int, path: Path) -> None:
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            log.debug("waiting for the lock %s", path)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise CacheError(
            f"cannot lock {path}: {error.strerror}; the cache needs a file system with POSIX record locks "
            "(a local disk, or a network file system mounted with locks)"
        ) from error
