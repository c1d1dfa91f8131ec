"""Killing a process between any two of its file operations, with a reader in another process all along.

The child counts its renames, links, removals, new folders and written pieces, and sends itself SIGKILL at the one that
it is told: nothing is cleaned up, as at a power cut (but for what the system had not written yet).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays import durable, folder_swap
from engine.arrays.array_folder import list_arrays
from engine.arrays.keyed_array import KeyedArray
from engine.errors import CacheError

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend the test's time on imports
OPERATIONS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir")
Payloads = dict[tuple[str, str], dict[bytes, bytes]]


def killed_at(step: int, operation: Callable[[], Any], counted: Sequence[str] = OPERATIONS) -> bool:
    """Run an operation in a process that is killed before its file operation number `step`; tell whether it was."""
    child = FORK.Process(target=_run_until, args=(step, operation, counted))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), f"the operation failed by itself, see above (step {step})"
    return child.exitcode != 0


def _run_until(step: int, operation: Callable[[], Any], names: Sequence[str]) -> None:
    left = step

    def count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            count()
            return real(*arguments, **options)

        return run

    def write_in_halves(file: Any, buffer: memoryview) -> None:
        file.write(buffer[: len(buffer) // 2])
        count()
        file.write(buffer[len(buffer) // 2 :])

    for name in names:
        setattr(os, name, counted(getattr(os, name)))
    if names == OPERATIONS:
        folder_swap._exchanged = counted(folder_swap._exchanged)
        durable._write_all = write_in_halves
    operation()


@contextmanager
def reader_beside(cache: Path, expected: Payloads, may_lack: set[bytes] = frozenset()) -> Iterator[None]:
    """Read a cache in another process for as long as the context lasts.

    It opens arrays anew all the time, and keeps those that it opened first, with and without taking in what is new;
    every key that it finds must have the payload of `expected`. Keys in `may_lack` are not read: they are damaged.
    """
    stop, ready = FORK.Event(), FORK.Event()
    reader = FORK.Process(target=_read_on, args=(cache, expected, may_lack, stop, ready))
    reader.start()
    assert ready.wait(30), "the reader did not come up"
    try:
        yield
    finally:
        stop.set()
        reader.join()
    assert reader.exitcode == 0, "the reader saw something wrong, see above"


def _read_on(cache: Path, expected: Payloads, may_lack: set[bytes], stop: Any, ready: Any) -> None:
    held = {name: KeyedArray.open(cache, *name) for name in list_arrays(cache)}
    kept = {name: KeyedArray.open(cache, *name) for name in list_arrays(cache)}
    ready.set()
    while True:
        last = stop.is_set()
        for name in list_arrays(cache):
            if name not in held:  # a job has made it meanwhile
                held[name], kept[name] = KeyedArray.open(cache, *name), KeyedArray.open(cache, *name)
        for name, array in held.items():
            _check(array, expected[name], may_lack)  # as it was, also when it is removed meanwhile
            try:
                kept[name].refresh()
                _check(kept[name], expected[name], may_lack)
                _check(KeyedArray.open(cache, *name), expected[name], may_lack)
            except CacheError as error:
                if "no array" not in str(error):
                    raise
        if last:
            return
        time.sleep(0.001)


def _check(array: KeyedArray, expected: dict[bytes, bytes], may_lack: set[bytes]) -> None:
    keys = [key.tobytes() for key in array.keys]
    rows = [row for row, key in enumerate(keys) if key not in may_lack]
    for row, values in zip(rows, array.read(np.array(rows, np.int64)), strict=True):
        assert values.tobytes() == expected[keys[row]], f"row {row} of {array.place} has another payload than its key"
