"""Which row a key has: sorted runs of keys that grow without being built anew.

A run holds keys sorted by their first 64 bits. Added keys become a new run, and runs of similar size are merged, so
that n keys lie in about log(n) runs and a look-up under a lock costs what was added since, not all that is there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ABSENT = -1


class _Run(NamedTuple):
    """Keys sorted by their first words: (n,) uint64 first and second words, and their row numbers."""

    first: np.ndarray
    second: np.ndarray
    rows: np.ndarray


class RowLookup:
    """Row numbers by key; keys are numbered in the order in which they are added.

    A look-up in one thread while another adds sees the state before or after, never between.
    """

    def __init__(self) -> None:
        self._runs: tuple[_Run, ...] = ()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, keys: np.ndarray) -> None:
        """Add keys, (n, 16) uint8, none of which is there yet; they get the next row numbers."""
        if not len(keys):
            return
        words = _words(keys)
        runs = [*self._runs, _sorted(words[:, 0], words[:, 1], np.arange(self._count, self._count + len(keys)))]
        while len(runs) > 1 and len(runs[-2].rows) <= 2 * len(runs[-1].rows):
            right, left = runs.pop(), runs.pop()
            runs.append(_sorted(*(np.concatenate(pair) for pair in zip(left, right, strict=True))))
        self._count += len(keys)
        self._runs = tuple(runs)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows of keys, (m, 16) uint8, as (m,) int64; -1 where there is none."""
        found = np.full(len(keys), ABSENT, np.int64)
        if not len(keys):
            return found
        words = _words(keys)
        for run in self._runs:
            open_ = np.flatnonzero(found == ABSENT)
            if not len(open_):
                break
            found[open_] = _find_in(run, words[open_])
        return found


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Return the positions, ascending, at which each of the keys, (n, 16) uint8, stands for the first time."""
    if not len(keys):
        return np.empty(0, np.int64)
    words = _words(keys)
    order = np.lexsort((words[:, 1], words[:, 0]))
    ordered = words[order]
    fresh = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
    return np.sort(order[fresh])


def _words(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view("<u8")


def _sorted(first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> _Run:
    order = np.argsort(first, kind="stable")
    return _Run(first[order], second[order], rows[order])


def _find_in(run: _Run, words: np.ndarray) -> np.ndarray:
    # Sorted questions walk through the run in order, which the processor's cache rewards.
    order = np.argsort(words[:, 0], kind="stable")
    first, second = words[order, 0], words[order, 1]
    position = np.searchsorted(run.first, first)
    answer = np.full(len(words), ABSENT, np.int64)
    asked = np.arange(len(words))
    while len(asked):
        # Keys may share their first word: step on until the word ends.
        inside = position < len(run.first)
        asked, position = asked[inside], position[inside]
        same = run.first[position] == first[asked]
        asked, position = asked[same], position[same]
        hit = run.second[position] == second[asked]
        answer[asked[hit]] = run.rows[position[hit]]
        asked, position = asked[~hit], position[~hit] + 1
    found = np.empty_like(answer)
    found[order] = answer
    return found
