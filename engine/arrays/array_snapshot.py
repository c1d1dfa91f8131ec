"""The rows of a keyed array as a handle knew them at one moment: what everybody holds who keeps row numbers.

Comes in: one generation of an array, its keys looked up and its chunk files mapped. Goes out: row numbers of keys, and
payload by row number. A row number means something within one generation only: compaction and forgetting renumber rows,
and the handle that gave the number takes the new ones in at its next refresh. A snapshot never does: its numbers mean
the same rows, with the same keys, for as long as it is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.arrays.array_format import DAMAGED, ArrayFormat
from engine.arrays.chunks import Chunks
from engine.arrays.row_blocks import in_blocks
from engine.arrays.row_check import row_checks
from engine.arrays.row_lookup import ABSENT, RowLookup
from engine.arrays.storage import Storage
from engine.errors import CacheError


class Generation(NamedTuple):
    """What a handle has learned of one generation of an array; rows are added to it, and none of them ever changes."""

    form: ArrayFormat
    lookup: RowLookup
    payload: Chunks
    checks: Chunks


class ArraySnapshot:
    """The rows of an array as they were; from `KeyedArray.snapshot` or `engine.cache.Cache.array`.

    Reading is safe from several threads and beside any number of writers.
    """

    def __init__(self, storage: Storage, folder: str, known: Generation) -> None:
        self._storage, self._folder, self._known = storage, folder, known
        self._count = len(known.lookup)

    def __len__(self) -> int:
        return self._count

    @property
    def form(self) -> ArrayFormat:
        """Everything that is fixed about the array."""
        return self._known.form

    @property
    def keys(self) -> np.ndarray:
        """Keys of all rows, (rows, 16) uint8, read-only."""
        return self._known.lookup.keys[: self._count]

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group, the description among them."""
        return dict(self.form.group_document()["attributes"])

    @property
    def folder(self) -> Path:
        """The array's folder; CacheError where the cache is not a folder of this machine."""
        return self._storage.local_folder() / self._folder

    @property
    def place(self) -> str:
        """Where the array is, for messages."""
        return self._storage.place(self._folder)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row numbers of keys, (m, 16) uint8, as (m,) int64; -1 where there is no row (yet)."""
        found = self._known.lookup.find(keys)
        found[found >= self._count] = ABSENT
        return found

    def read(self, rows: np.ndarray, *, verify: bool = True) -> np.ndarray:
        """Return the payload of some rows.

        Parameters
        ----------
        rows : ndarray of int, (m,)
            Row numbers in any order, repeated ones allowed.
        verify : bool
            Compare each row with its check, which costs about as much as the copy.

        Returns
        -------
        ndarray, (m, *row_shape)

        Raises
        ------
        CacheError
            A row is damaged or its chunk file is missing.
        IndexError
            A row number outside the array.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < self._count):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked of {self._count} in {self.place}")
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all()):
            return self._read(range(int(rows[0]), int(rows[-1]) + 1), verify)
        return self._read(rows, verify)

    def read_all(self, *, verify: bool = True) -> np.ndarray:
        """Return the payload of all rows, (rows, *row_shape)."""
        return self._read(range(self._count), verify)

    def chunks(self, *, verify: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row number and the payload of each chunk, mapped and not copied."""
        known, keys, chunk_rows = self._known, self.keys, self.form.chunk_rows
        for start in range(0, len(keys), chunk_rows):
            some = keys[start : start + chunk_rows]
            values = known.payload.chunk(start // chunk_rows, len(some))
            if verify:
                wrong = row_checks(some, values) != known.checks.chunk(start // chunk_rows, len(some))
                self._refuse(start + np.flatnonzero(wrong), len(some))
            yield start, values

    def _read(self, rows: np.ndarray | range, verify: bool) -> np.ndarray:
        """Return the payload of rows, in blocks."""
        known, keys = self._known, self.keys
        values = np.empty((len(rows), *known.form.row_shape), known.form.dtype)

        def read_block(block: slice) -> np.ndarray:
            some, out = rows[block], values[block]
            checks = np.empty(len(some), np.uint64)
            for chunks, into in ((known.payload, out), (known.checks, checks))[: 1 + verify]:
                if isinstance(some, range):
                    chunks.copy(some.start, into)
                else:
                    chunks.gather(some, into)
            if not verify:
                return np.empty(0, np.int64)
            these = keys[some.start : some.stop] if isinstance(some, range) else keys[some]
            return np.asarray(some)[row_checks(these, out) != checks]

        wrong = in_blocks(read_block, len(rows), known.form.row_bytes)
        if wrong:
            self._refuse(np.concatenate(wrong), len(rows))
        return values

    def _refuse(self, wrong: np.ndarray, count: int) -> None:
        """Raise where rows do not match their checks."""
        if len(wrong):
            raise CacheError(
                f"{len(wrong):,} of {count:,} rows read from {self.place} do not match their checks, the first is "
                f"row {wrong[0]} in chunk {wrong[0] // self.form.chunk_rows}; {DAMAGED}"
            )
