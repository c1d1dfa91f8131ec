"""Rows of keyed arrays as features of a data set: aligned to its order, what is missing named and never filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.arrays.array_snapshot import ArraySnapshot
from engine.dataset import Dataset


@dataclass(frozen=True)
class Features:
    """Embeddings of a data set's samples.

    Parameters
    ----------
    values : ndarray, (m, dim)
    rows : ndarray of int64, (m,)
        Positions in the data set, ascending.
    keys : ndarray of uint8, (m, 16)
    missing : ndarray of object
        Ids of samples that have such content but no row (not embedded yet, or failed), or no such content.
    """

    values: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    missing: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class StoredRows:
    """Rows of a keyed array that belong to a data set's samples, read when they are asked for.

    Parameters
    ----------
    array : ArraySnapshot
    stored : ndarray of int64, (m,)
        Row numbers in the array.
    rows : ndarray of int64, (m,)
        Positions in the data set, ascending.
    missing : ndarray of object
        Ids of samples without a row.
    """

    def __init__(self, array: ArraySnapshot, stored: np.ndarray, rows: np.ndarray, missing: np.ndarray) -> None:
        self.array, self.rows, self.missing = array, rows, missing
        self._stored = stored

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all rows together."""
        return (len(self), *self.array.form.row_shape)

    @property
    def ndim(self) -> int:
        """How many axes `shape` has."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype as stored: uint8 pixels, float16 embeddings and tokens."""
        return self.array.form.dtype

    @property
    def keys(self) -> np.ndarray:
        """Keys of the rows, (m, 16) uint8."""
        return self.array.keys[self._stored]

    def take(self, positions: np.ndarray) -> StoredRows:
        """Return some of these rows, (k,) positions among them, without reading them."""
        return StoredRows(self.array, self._stored[positions], self.rows[positions], self.missing)

    def dask(self, chunk_rows: int = 4096) -> Any:
        """Return the rows as a dask array, read from the cache chunk by chunk where it is computed."""
        import dask.array

        return dask.array.from_array(self, chunks=(chunk_rows, *self.array.form.row_shape), name=False)

    def __getitem__(self, which: int | slice | Sequence[int] | np.ndarray | tuple[Any, ...]) -> np.ndarray:
        """Return the payload of one row (an int) or of several (slice, positions or mask); each is checked.

        Of a tuple, as dask and NumPy give, the first part chooses rows and the others what is taken of each.
        """
        if isinstance(which, tuple):
            first, *rest = which
            chosen = self[first]
            return chosen[tuple(rest)] if isinstance(first, int | np.integer) else chosen[(slice(None), *rest)]
        if isinstance(which, int | np.integer):
            return self.array.read(self._stored[which : which + 1] if which != -1 else self._stored[-1:])[0]
        return self.array.read(self._stored[which])


def align(dataset: Dataset, keys: np.ndarray, array: ArraySnapshot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row numbers in the snapshot, data set positions, and the ids of samples without a row."""
    found = array.find(keys)
    has_row = (found >= 0) & keys.any(axis=1)
    return found[has_row], np.flatnonzero(has_row), dataset.ids[~has_row]


def normalized(values: np.ndarray) -> np.ndarray:
    """Return rows (m, dim) scaled to Euclidean length one; rows of zeros stay."""
    lengths = np.linalg.norm(values.astype(np.float64, copy=False), axis=1, keepdims=True)
    return (values / np.where(lengths > 0, lengths, 1.0)).astype(values.dtype)
