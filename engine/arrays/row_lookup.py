"""Which row a key has: the keys as they were added, and sorted runs over them that grow without being built anew.

A run is one sorted array of 64-bit words: the first bits of each key with the key's row number in place of the last
ones. So it sorts as plain numbers do, takes 8 bytes a row beside the key's own 16, and finds a key in one search; the
few that share their first bits are told apart by the keys themselves. Added keys become a new run at the first look-up
after, and runs of similar size are merged, so that n keys lie in about log(n) runs and a look-up under a lock costs
what was added since, not all that is there.
"""

from __future__ import annotations

import struct
import threading
from typing import NamedTuple

import numpy as np

from engine.keys import KEY_BYTES

ABSENT = -1
# Questions are answered so many at a time, so that a look-up of millions needs no more memory than its answer.
QUESTIONS_AT_ONCE = 1 << 16
_TWO_WORDS = struct.Struct("<2Q")


class _Run(NamedTuple):
    """Consecutive rows sorted by their keys.

    Parameters
    ----------
    start : int
        Number of the first row.
    bits : int
        Low bits of each word that hold the row number, counted from `start`.
    words : ndarray of uint64, (n,)
        Ascending.
    """

    start: int
    bits: int
    words: np.ndarray


class RowLookup:
    """Row numbers by key; keys are numbered in the order in which they are added.

    A look-up in one thread while another adds sees the state before or after, never between.
    """

    def __init__(self) -> None:
        self._room = np.zeros((0, 2), np.uint64)
        self._count = 0
        self._runs: tuple[_Run, ...] = ()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> np.ndarray:
        """All keys, (n, 16) uint8, read-only; those that are added later are in another view."""
        count = self._count
        keys = self._room[:count].view(np.uint8).reshape(count, KEY_BYTES)
        keys.flags.writeable = False
        return keys

    def add(self, keys: np.ndarray) -> None:
        """Add keys, (n, 16) uint8, none of which is there yet; they get the next row numbers."""
        with self._lock:
            count = self._count + len(keys)
            if count > len(self._room):
                # A quarter more, so that adding little to much mostly costs little; untouched room takes no memory.
                room = np.empty((count + count // 4, 2), np.uint64)
                room[: self._count] = self._room[: self._count]
                self._room = room
            self._room[self._count : count] = _words(keys)
            self._count = count

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows of keys, (m, 16) uint8, as (m,) int64; -1 where there is none."""
        found = np.full(len(keys), ABSENT, np.int64)
        runs, room = self._sorted_runs()
        for start in range(0, len(keys), QUESTIONS_AT_ONCE):
            some = _words(keys[start : start + QUESTIONS_AT_ONCE])
            # Sorted questions walk through a run in order, which the processor's cache rewards.
            order = _order(some)
            asked = some.take(order, axis=0)
            answer = np.full(len(some), ABSENT, np.int64)
            left = np.arange(len(some))
            for run in runs:
                rows = _find_in(run, room, asked if len(left) == len(asked) else asked.take(left, axis=0))
                answer[left] = rows
                left = left[rows == ABSENT]
                if not len(left):
                    break
            found[start + order] = answer
        return found

    def find_one(self, key: bytes) -> int:
        """Return the row of one key, -1 where there is none: as `find`, without its arrays."""
        head, tail = _TWO_WORDS.unpack(key)
        runs, room = self._sorted_runs()
        for run in runs:
            first_bits = head >> run.bits
            position = int(run.words.searchsorted(np.uint64(first_bits << run.bits)))
            # Keys may share their first bits: step on until these end.
            while position < len(run.words) and (word := int(run.words[position])) >> run.bits == first_bits:
                row = run.start + (word & ((1 << run.bits) - 1))
                if room[row, 0] == head and room[row, 1] == tail:
                    return row
                position += 1
        return ABSENT

    def _sorted_runs(self) -> tuple[tuple[_Run, ...], np.ndarray]:
        """Return runs over all keys added so far, and the keys as words."""
        with self._lock:
            covered = self._runs[-1].start + len(self._runs[-1].words) if self._runs else 0
            if covered < self._count:
                runs = [*self._runs, _run_over(self._room, covered, self._count)]
                while len(runs) > 1 and len(runs[-2].words) <= 2 * len(runs[-1].words):
                    right, left = runs.pop(), runs.pop()
                    runs.append(_merged(left, right))
                self._runs = tuple(runs)
            return self._runs, self._room


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Return the positions, ascending, at which each of the keys, (n, 16) uint8, stands for the first time."""
    words = _words(keys)
    bits = _bits_for(len(words))
    packed = np.sort(_packed(words, bits))
    alike = (packed[1:] >> np.uint64(bits)) == (packed[:-1] >> np.uint64(bits))
    first = np.ones(len(words), bool)
    if alike.any():
        # Only keys that share their first bits with another can stand twice; these are compared as a whole.
        shared = np.r_[alike, False] | np.r_[False, alike]
        positions = np.sort((packed[shared] & _mask(bits)).astype(np.int64))
        some = words[positions]
        order = np.lexsort((some[:, 1], some[:, 0]))
        again = np.r_[False, (some[order[1:]] == some[order[:-1]]).all(axis=1)]
        first[positions[order[again]]] = False
    return np.flatnonzero(first)


def _words(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view("<u8").reshape(len(keys), 2)


def _bits_for(count: int) -> int:
    return max(count - 1, 0).bit_length()


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _packed(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the first words of keys, (n, 2) uint64, with each one's position in place of the last bits."""
    packed = words[:, 0] & ~_mask(bits)
    packed |= np.arange(len(words), dtype=np.uint64)
    return packed


def _order(words: np.ndarray) -> np.ndarray:
    """Return positions that sort keys, (m, 2) uint64, by their first bits."""
    bits = _bits_for(len(words))
    packed = _packed(words, bits)
    packed.sort()
    return (packed & _mask(bits)).astype(np.int64)


def _run_over(room: np.ndarray, start: int, stop: int) -> _Run:
    bits = _bits_for(stop - start)
    packed = _packed(room[start:stop], bits)
    packed.sort()
    return _Run(start, bits, packed)


def _merged(left: _Run, right: _Run) -> _Run:
    """Return one run of two neighbouring ones."""
    size = len(left.words)
    bits = _bits_for(size + len(right.words))
    words = np.concatenate([left.words, right.words])
    for some, run, before in ((words[:size], left, 0), (words[size:], right, size)):
        rows = (some & _mask(run.bits)) + np.uint64(before)
        some &= ~_mask(bits)
        some |= rows
    # Two ascending runs, but for keys alike in the bits that are left: the stable sort merges them in one pass.
    words.sort(kind="stable")
    return _Run(left.start, bits, words)


def _find_in(run: _Run, room: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the rows of keys, (m, 2) uint64 sorted by their first bits, in one run; -1 where it has none."""
    heads, tail = asked[:, 0] & ~_mask(run.bits), np.uint64(1 << run.bits)
    answer = np.full(len(asked), ABSENT, np.int64)
    position = np.searchsorted(run.words, heads)
    found = run.words.take(position, mode="clip")
    # Beyond the last word stands, clipped, that one itself; its first bits are lower than those that are asked for.
    left = np.flatnonzero((found ^ heads) < tail)
    position, found = position[left], found[left]
    while len(left):
        rows = (found & _mask(run.bits)).astype(np.int64) + run.start
        hit = (room[rows] == asked[left]).all(axis=1)
        answer[left[hit]] = rows[hit]
        # Keys may share their first bits: step on until these end.
        left, position = left[~hit], position[~hit] + 1
        found = run.words.take(position, mode="clip")
        same = ((found ^ heads[left]) < tail) & (position < len(run.words))
        left, position, found = left[same], position[same], found[same]
    return answer
