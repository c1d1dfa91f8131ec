"""Reading chunk files by mapping them: memory speed for scans and for random rows.

A chunk that is full never changes; the short last one is replaced by rename when rows are added, so a map of it is
good for the rows it had and is opened again for later ones. A map holds a file descriptor, therefore only the most
recently used ones stay open. Maps are read-only and files are never truncated, so a map never faults.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from engine.array_format import DAMAGED, ArrayFormat
from engine.errors import CacheError

MOST_OPEN = 128


class ChunkMap:
    """The chunk files of one array of a keyed array.

    Parameters
    ----------
    folder : Path
        The Zarr array's folder.
    form : ArrayFormat
    part : str
        Name of the array in its group.
    """

    def __init__(self, folder: Path, form: ArrayFormat, part: str) -> None:
        self._folder, self._form, self._part = folder, form, part
        self._maps: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()
        self._lock = threading.Lock()

    def chunk(self, number: int, rows: int) -> np.ndarray:
        """Return the first rows of a chunk as a read-only array, valid for as long as it is held.

        Raises
        ------
        CacheError
            The file is missing or has another size than its rows need.
        """
        with self._lock:
            mapped, known = self._maps.get(number, (None, 0))
            if mapped is None or known < rows:
                mapped = self._open(number)
                self._maps[number] = (mapped, rows)
                while len(self._maps) > MOST_OPEN:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(number)
        return mapped[:rows]

    def gather(self, rows: np.ndarray, count: int, out: np.ndarray) -> None:
        """Copy rows, (m,) int64 in any order, into out, (m, ...); `count` is how many rows the array has."""
        if not len(rows):
            return
        chunk_rows = self._form.chunk_rows
        ascending = bool((rows[1:] >= rows[:-1]).all())
        order = None if ascending else np.argsort(rows, kind="stable")
        ordered = rows if order is None else rows[order]
        numbers = ordered // chunk_rows
        starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            number = int(numbers[start])
            chunk = self.chunk(number, min(chunk_rows, count - number * chunk_rows))
            inside = ordered[start:stop] - number * chunk_rows
            if inside[-1] - inside[0] == len(inside) - 1 and ascending and _consecutive(inside):
                out[start:stop] = chunk[inside[0] : inside[-1] + 1]
            elif order is None:
                np.take(chunk, inside, axis=0, out=out[start:stop], mode="clip")
            else:
                out[order[start:stop]] = chunk[inside]

    def _open(self, number: int) -> np.ndarray:
        path = self._folder / self._form.chunk_file(self._part, number)
        shape = (self._form.chunk_rows, *self._form.part_shape(self._part))
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                expected = self._form.chunk_file_bytes(self._part)
                if found != expected:
                    raise CacheError(f"{path} has {found:,} bytes instead of {expected:,}; {DAMAGED}")
                return np.memmap(file, self._form.part_dtype(self._part), "r", shape=shape).view(np.ndarray)
        except OSError as error:
            raise CacheError(f"chunk file {path} cannot be read ({error.strerror}); {DAMAGED}") from error


def _consecutive(rows: np.ndarray) -> bool:
    return len(rows) < 2 or bool((np.diff(rows) == 1).all())
