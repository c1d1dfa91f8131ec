"""Computed rows on their way into keyed arrays: claimed once, kept as float16, committed by size and by time.

Comes in: keys and rows in the order in which they were computed. Goes out: commits, and a tally of what was stored and
what failed. Computing a row and committing it are apart, so that an error or Ctrl-C can still commit what is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.arrays import array_folder
from engine.arrays.keyed_array import KeyedArray
from engine.keys import KEY_BYTES

COMMIT_BYTES = 64 << 20
# Of these rows two lots may be lost to a kill, one being written and one waiting for it: a minute with batches of 10 s.
COMMIT_SECONDS = 20.0
HALF_MAX = 65504.0


@dataclass
class Tally:
    """What an extraction has done so far.

    Parameters
    ----------
    computed : dict of str to int
        Rows added, by product.
    opened : int
        Images read from their source.
    failed_positions, failed_keys : dict to (what, reason)
        Failures by position in the data set (the content is not known) or by key (all samples with that content).
    seconds : dict of str to float
        Time that the driving thread spent waiting for "decode", in "encode" and in "store": the largest is the limit.
    """

    computed: dict[str, int] = field(default_factory=dict)
    opened: int = 0
    failed_positions: dict[int, tuple[str, str]] = field(default_factory=dict)
    failed_keys: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "encode": 0.0, "store": 0.0})

    def fail(self, key: bytes, what: str, reason: str) -> None:
        """Note that a product of some content could not be had; several products of one content make one failure."""
        before = self.failed_keys.get(key)
        self.failed_keys[key] = (f"{before[0]},{what}", before[1]) if before else (what, reason)

    def include(self, other: Tally) -> None:
        """Add what another process did."""
        for what, count in other.computed.items():
            self.computed[what] = self.computed.get(what, 0) + count
        self.opened += other.opened
        self.failed_positions.update(other.failed_positions)
        self.failed_keys.update(other.failed_keys)
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds


class RowBuffer:
    """Rows of one product between computing and committing.

    Parameters
    ----------
    cache : path, URL or Storage
    what : str
        The product.
    kind, name : str
        Its keyed array, made with the first row's shape where it does not exist.
    description : mapping
        For the array's attributes.
    """

    def __init__(self, cache: Any, what: str, kind: str, name: str, description: Mapping[str, Any]) -> None:
        self.what, self.kind, self.name = what, kind, name
        self._cache, self._description = cache, description
        # Pairs, and let go of only when they are known to be stored: Ctrl-C may come between any two steps.
        self._rows: list[tuple[bytes, np.ndarray]] = []
        self._leaving = 0
        self._taken: set[bytes] = set()
        self.array: KeyedArray | None = None
        if array_folder.has_array(cache, kind, name):
            self.array = KeyedArray.open(cache, kind, name)

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """Tell of keys, (m, 16) uint8, which have no committed row."""
        return np.ones(len(keys), bool) if self.array is None else self.array.find(keys) < 0

    def lacks_one(self, key: bytes) -> bool:
        """Tell of one key whether it has no committed row."""
        return self.array is None or not self.array.has(key)

    def take(self, key: bytes, *, known: bool = False) -> bool:
        """Claim a key for computing; False where it is stored or was claimed before.

        `known` says that it was looked up already; a row that another writer has stored since is left out by `commit`.
        """
        if key in self._taken or not (known or self.lacks_one(key)):
            return False
        self._taken.add(key)
        return True

    def add(self, key: bytes, row: np.ndarray) -> None:
        """Keep a computed row until it is committed."""
        self._rows.append((key, row))

    def __len__(self) -> int:
        return len(self._rows) - self._leaving

    @property
    def nbytes(self) -> int:
        """Bytes waiting, without those handed over."""
        return len(self) * self._rows[-1][1].nbytes if len(self) else 0

    @property
    def row_bytes(self) -> int:
        """Payload bytes of a stored row, 0 as long as there is no array."""
        return self.array.form.row_bytes if self.array is not None else 0

    def hand_over(self) -> int:
        """Set the waiting rows aside for `commit` and return how many; further ones can be added meanwhile."""
        self._leaving = len(self._rows)
        return self._leaving

    def commit(self, count: int) -> int:
        """Store the first rows; return how many were added: those that somebody has stored before are left out."""
        leaving = self._rows[:count]
        if not leaving:
            return 0
        if self.array is None:
            shape = leaving[0][1].shape
            self.array = KeyedArray.create(self._cache, self.kind, self.name, shape, self._description)
        keys = np.frombuffer(b"".join(key for key, _ in leaving), np.uint8).reshape(-1, KEY_BYTES)
        return self.array.append(keys, np.stack([row for _, row in leaving]))

    def forget_committed(self) -> None:
        """Let go of the rows that were handed over and stored; from now on the array knows their keys."""
        count, self._leaving = self._leaving, 0
        self._taken.difference_update(key for key, _ in self._rows[:count])
        del self._rows[:count]

    def finish(self) -> None:
        """Make the array's metadata exact."""
        if self.array is not None:
            self.array.finish()


@dataclass
class CommitPolicy:
    """When computed rows are committed.

    Parameters
    ----------
    rows : int, optional
        As soon as a product has so many waiting; by default when 64 MiB wait.
    seconds : float
        And at least this often.
    """

    rows: int | None = None
    seconds: float = COMMIT_SECONDS
    clock: Callable[[], float] = time.monotonic
    on_commit: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._last = self.clock()

    def due(self, buffers: Sequence[RowBuffer]) -> bool:
        """Tell whether it is time."""
        if self.clock() - self._last >= self.seconds:
            return any(len(buffer) for buffer in buffers)
        if self.rows is not None:
            return any(len(buffer) >= self.rows for buffer in buffers)
        return any(buffer.nbytes >= COMMIT_BYTES for buffer in buffers)

    def begun(self) -> None:
        """Note that a commit begins now."""
        self._last = self.clock()


def to_half(values: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """Return embeddings as float16, and the rows that cannot be stored with the reason.

    Parameters
    ----------
    values : ndarray of float32, (n, ...)
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    wrong = np.flatnonzero(~np.isfinite(half).all(axis=tuple(range(1, half.ndim))))
    reasons = {}
    for row in wrong:
        finite = bool(np.isfinite(values[row]).all())
        reasons[int(row)] = (
            f"the embedding has a value of {np.abs(values[row]).max():.4g}, beyond float16 (at most {HALF_MAX:.0f})"
            if finite
            else "the embedding holds NaN or infinity"
        )
    return half, reasons
