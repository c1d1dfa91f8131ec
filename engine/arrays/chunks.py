"""The rows of an array of a keyed array, chunk by chunk: what every way of reading them gives, and the plainest way.

`chunk_map` maps local files side by side; `RecentChunks` here loads chunks one by one, from wherever they are,
and keeps the last used ones.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

MOST_RECENT = 128


class Chunks(Protocol):
    """The rows of one array of a keyed array, chunk by chunk on disk, for several readers at once."""

    def extend(self, count: int) -> None:
        """Take in that there are `count` rows now; what cannot be read is an error when it is asked for, not here.

        Raises
        ------
        CacheError
            The array was rebuilt meanwhile; the rows that were known before stay what they are.
        """

    def chunk(self, number: int, rows: int) -> np.ndarray:
        """Return the first rows of a chunk as a read-only array, valid for as long as it is held.

        Raises
        ------
        CacheError
            The file is missing or has another size than its rows need.
        """

    def copy(self, start: int, out: np.ndarray) -> None:
        """Copy consecutive rows from row `start` on into out, (m, ...); errors as `chunk`."""

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows, (m,) int64 in any order, into out, (m, ...); errors as `chunk`."""


class RecentChunks:
    """The chunks that were used last, loaded one by one.

    Parameters
    ----------
    chunk_rows : int
    load : callable(number)
        Return a whole chunk, (chunk_rows, ...).
    confirm : callable(number), optional
        Called before a chunk that was loaded earlier is used again; raises where it must not be.
    most : int
        Chunks held at once.
    """

    def __init__(
        self,
        chunk_rows: int,
        load: Callable[[int], np.ndarray],
        confirm: Callable[[int], None] | None = None,
        most: int = MOST_RECENT,
    ) -> None:
        self._chunk_rows, self._load, self._confirm, self._most = chunk_rows, load, confirm, most
        self._count = 0
        self._loaded: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()

    def extend(self, count: int) -> None:
        """See `Chunks.extend`; the chunk that was short is loaded again when rows are asked that it lacked."""
        self._count = count

    def chunk(self, number: int, rows: int) -> np.ndarray:
        """See `Chunks.chunk`."""
        with self._lock:
            loaded, known = self._loaded.get(number, (None, 0))
        if loaded is None or known < rows:
            # Not under the lock: several threads may wait for several chunks.
            known = max(self._count - number * self._chunk_rows, rows)
            loaded = self._load(number)
        elif self._confirm is not None:
            self._confirm(number)
        with self._lock:
            self._loaded[number] = (loaded, known)
            self._loaded.move_to_end(number)
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
        return loaded[:rows]

    def copy(self, start: int, out: np.ndarray) -> None:
        """See `Chunks.copy`."""
        for number, inside, into in spans(start, len(out), self._chunk_rows):
            out[into] = self.chunk(number, inside.stop)[inside]

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Chunks.gather`."""
        if not len(rows):
            return
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        numbers = ordered // self._chunk_rows
        starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            number = int(numbers[start])
            inside = ordered[start:stop] - number * self._chunk_rows
            out[order[start:stop]] = self.chunk(number, int(inside[-1]) + 1)[inside]


def spans(start: int, count: int, chunk_rows: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the chunks of consecutive rows: number, which of its rows, and where these stand among all."""
    stop = start + count
    while start < stop:
        number, first = divmod(start, chunk_rows)
        some = min(chunk_rows - first, stop - start)
        into = start + count - stop
        yield number, slice(first, first + some), slice(into, into + some)
        start += some
