"""Looking at the images of a data set without reading them: which are known by key, which are new, which are absent.

Comes in: a data set and its sample table. Goes out: a `Scan`. The key of an image comes from the table where size,
mtime, ctime and inode are as they were (as git's index does it). A file that was touched within a moment of the scan
that read it may have changed again under the same time stamps, so such an entry is not trusted but read again;
``rehash`` trusts none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.dataset import BulkReader, Dataset, Fingerprint, Reader
from engine.errors import ImageError
from engine.keys import KEY_BYTES

FINGERPRINT = ("size", "mtime", "ctime", "inode")
# Time stamps come from a clock that ticks every few milliseconds, on some file systems every one or two seconds.
MOMENT = 50_000_000
COARSE_MOMENT = 2_000_000_000
# Names that are Python objects at once: more would cost memory for each sample of a large data set.
NAMES_AT_ONCE = 8192


@dataclass
class Scan:
    """What is known of the images of one data set.

    Parameters
    ----------
    started : int
        Nanoseconds since the epoch at which the looking began.
    keys : ndarray of uint8, (n, 16)
        Zeros where the key is not known (yet), or the sample has no image.
    known : ndarray of bool, (n,)
    fingerprints : ndarray of uint64, (n, 4)
        Size, mtime, ctime, inode; zeros where there is none.
    scanned : ndarray of int64, (n,)
        When the content behind each key was read, nanoseconds; 0 where it was not.
    failures : dict of int to str
        Why the image at a position cannot even be looked at.
    """

    started: int
    keys: np.ndarray
    known: np.ndarray
    fingerprints: np.ndarray
    scanned: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int) -> Scan:
        """Return a scan of so many samples that knows nothing."""
        return cls(
            time.time_ns(),
            np.zeros((count, KEY_BYTES), np.uint8),
            np.zeros(count, bool),
            np.zeros((count, len(FINGERPRINT)), np.uint64),
            np.zeros(count, np.int64),
        )

    def learn(self, position: int, key: bytes, fingerprint: Fingerprint | None, read_at: int) -> None:
        """Note the key of an image whose content was read at a time, and its fingerprint from just before."""
        self.keys[position] = np.frombuffer(key, np.uint8)
        self.known[position] = True
        self.scanned[position] = read_at
        if fingerprint is not None:
            self.fingerprints[position] = _words(fingerprint)


def scan_dataset(dataset: Dataset, table: pa.Table, *, rehash: bool = False) -> Scan:
    """Look at each image without reading it and take the keys of unchanged ones from the table.

    Parameters
    ----------
    dataset : Dataset
    table : Table
        From `engine.sample_table.load_table`.
    rehash : bool
        Trust no entry, so that all content is read.
    """
    scan = Scan.empty(len(dataset))
    uris = names_of(dataset, "uri")
    for start, some in in_blocks(uris):
        fingerprints, failures = _look(dataset.reader, some)
        scan.fingerprints[start : start + len(some)] = fingerprints
        scan.failures.update({start + place: reason for place, reason in failures.items()})
    if not rehash and len(table):
        _recognise(scan, uris, table)
    return scan


def names_of(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """Return a text column as Arrow strings, so that a large data set does not become as many Python objects."""
    return pa.chunked_array([pa.array(dataset.samples[column], pa.large_string())])


def in_blocks(names: pa.ChunkedArray) -> Iterator[tuple[int, list[str]]]:
    """Yield the position of the first and the names themselves of one block after the other."""
    for start in range(0, len(names), NAMES_AT_ONCE):
        yield start, names.slice(start, NAMES_AT_ONCE).to_pylist()


def find_names(names: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """Return where each name stands among others for the last time, (n,) int64; -1 where it does not."""
    if len(names) == len(among) and names.equals(among) and len(pc.unique(among)) == len(among):
        return np.arange(len(names))
    backwards = among.take(pa.array(np.arange(len(among) - 1, -1, -1)))
    found = pc.index_in(names, value_set=backwards).combine_chunks()
    places = np.asarray(found.fill_null(-1)).astype(np.int64)
    return np.where(places >= 0, len(among) - 1 - places, -1)


def _look(reader: Reader, uris: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Return fingerprints, zeros where there is none, and why some cannot be had."""
    if isinstance(reader, BulkReader):
        return reader.fingerprints(uris)
    found = np.zeros((len(uris), len(FINGERPRINT)), np.uint64)
    failures = {}
    for position, uri in enumerate(uris):
        if not uri:
            continue
        try:
            fingerprint = reader.fingerprint(uri)
        except ImageError as error:
            failures[position] = str(error)
            continue
        if fingerprint is not None:
            found[position] = _words(fingerprint)
    return found, failures


def _words(fingerprint: Fingerprint) -> tuple[int, ...]:
    """Return a fingerprint as unsigned 64-bit numbers; times before 1970 are negative."""
    return tuple(value & (2**64 - 1) for value in fingerprint)


def _recognise(scan: Scan, uris: pa.ChunkedArray, table: pa.Table) -> None:
    entries = find_names(uris, table["uri"])
    candidates = np.flatnonzero(scan.fingerprints.any(axis=1) & (entries >= 0))
    recorded = np.stack([table[name].to_numpy() for name in FINGERPRINT], axis=1)
    keys, has_key = keys_of_column(table["key"])
    scanned = table["scanned"].to_numpy()
    entries = entries[candidates]
    times = recorded[entries, 1:3].astype(np.int64)
    moment = np.where(times % 1_000_000_000 == 0, COARSE_MOMENT, MOMENT)
    settled = (times + moment < scanned[entries, None]).all(axis=1)
    same = (recorded[entries] == scan.fingerprints[candidates]).all(axis=1) & settled & has_key[entries]
    positions, entries = candidates[same], entries[same]
    scan.keys[positions] = keys[entries]
    scan.scanned[positions] = scanned[entries]
    scan.known[positions] = True


def keys_of_column(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's column of keys as (n, 16) uint8, and which of them are there, (n,) bool."""
    there = np.asarray(pc.equal(pc.binary_length(column), KEY_BYTES).fill_null(False).combine_chunks())
    keys = np.zeros((len(column), KEY_BYTES), np.uint8)
    packed = column.filter(pa.array(there)).cast(pa.binary(KEY_BYTES)).combine_chunks()
    if len(packed):
        values = np.frombuffer(packed.buffers()[1], np.uint8)[packed.offset * KEY_BYTES :]
        keys[there] = values[: len(packed) * KEY_BYTES].reshape(-1, KEY_BYTES)
    return keys, there
