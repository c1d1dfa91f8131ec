"""A payload, its keys and a checksum a row, in Zarr v3: the one idea under the whole cache.

Rows come in as keys and payload, and go out by row number. The rules (who may write when, and what a reader may count
on):

- Everything that writes happens under the array's lock, after reading the metadata and the keys again.
- A commit leaves out keys that another writer has stored since, fills the short last chunk (replaced whole, by
  rename), then goes on in new chunks: for each chunk the payload, then the checks, then the keys. **A row exists when
  its key is there**; a commit that dies in between leaves bytes that nobody counts and the next commit overwrites.
- Each file is synced before its rename, and the folders of payload and checks before the keys appear, so the same holds
  after a power cut. What `append` has returned for is on the disk. Files of one step are synced several at once.
- The shapes in Zarr's metadata follow the keys at the end of each commit. They may lag behind after a kill and never
  run ahead, so plain Zarr readers see whole rows only, and fewer keys than the shape says means damage.
- Readers take no lock: they read keys first and payload after. On a local disk all chunk files of the rows they know
  are mapped, so who has an array open keeps reading it whole while another generation of it is swapped in; `refresh`
  shows that one.
- Temporary files lie under ``<cache>/tmp``, in a folder that is the lock holder's alone and swept by the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.arrays import array_folder, array_format
from engine.arrays.array_commit import ChunkStart, checked_rows, commit_rows, stale_metadata
from engine.arrays.array_format import CHECK, DAMAGED, KEY, METADATA, ArrayFormat
from engine.arrays.chunks import Chunks
from engine.arrays.row_blocks import in_blocks
from engine.arrays.row_check import row_checks
from engine.arrays.row_lookup import RowLookup, first_occurrences
from engine.arrays.storage import NewFile, Storage, storage_of
from engine.errors import CacheError
from engine.keys import KEY_BYTES


class _Known(NamedTuple):
    """What a handle knows of one generation of an array; a reader takes it as a whole."""

    form: ArrayFormat
    lookup: RowLookup
    payload: Chunks
    checks: Chunks


class KeyedArray:
    """One keyed array of a cache; use `KeyedArray.open` or `KeyedArray.create`.

    Reading is safe from several threads and beside any number of writers; `refresh` shows what they have added.
    """

    def __init__(self, storage: Storage, kind: str, name: str) -> None:
        self._storage, self._kind, self._name = storage, kind, name
        self._folder = array_folder.array_name(kind, name)
        self._group = b""
        self._refreshing = threading.Lock()
        self._learn_format(array_folder.read_group(storage, kind, name))

    @classmethod
    def open(cls, cache: str | os.PathLike[str] | Storage, kind: str, name: str) -> KeyedArray:
        """Open an array for reading and appending.

        Parameters
        ----------
        cache : path, URL or Storage
            See `storage_of`.
        kind : "image", "text", "pixels" or "tokens"
        name : str
            Id of the encoder (tokens: ``<encoder>@<layer>``) or of the preprocessing.

        Raises
        ------
        CacheError
            There is no such array, it was written by a newer format version, or it is damaged.
        """
        array = cls(storage_of(cache), kind, name)
        array.refresh()
        return array

    @classmethod
    def create(
        cls,
        cache: str | os.PathLike[str] | Storage,
        kind: str,
        name: str,
        row_shape: tuple[int, ...],
        description: Mapping[str, Any],
    ) -> KeyedArray:
        """Create an array, or open the one that is there.

        Parameters
        ----------
        row_shape : tuple of int
            Shape of one row's payload; its dtype and dimension names follow from the kind.
        description : mapping
            What makes the rows, as JSON values; kept in the group's attributes.

        Raises
        ------
        CacheError
            The array is there with rows of another shape, or cannot be written.
        """
        if not name or name.startswith(".") or "/" in name:
            raise CacheError(f"{name!r} cannot name an array of the cache; use letters, digits, '-', '_', '.' and '@'")
        storage = storage_of(cache)
        if not array_folder.has_array(storage, kind, name):
            form = ArrayFormat(
                kind, name, tuple(int(size) for size in row_shape), 1, array_format.plain_json(description)
            )
            array_folder.create_array(storage, form)
        array = cls.open(storage, kind, name)
        if array.form.row_shape != tuple(row_shape):
            raise CacheError(
                f"{array.place} holds rows of shape {array.form.row_shape}, not {tuple(row_shape)}; two encoders must "
                "not share the id"
            )
        return array

    # -- Reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._known.lookup)

    @property
    def form(self) -> ArrayFormat:
        """Everything that is fixed about the array."""
        return self._known.form

    @property
    def keys(self) -> np.ndarray:
        """Keys of all rows known so far, (rows, 16) uint8, read-only."""
        return self._known.lookup.keys

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

    def refresh(self) -> None:
        """Take in the rows that were committed since, by reading only what was added.

        Where the array was rebuilt since, everything is read anew, and rows have other numbers than before.

        Raises
        ------
        CacheError
            Keys are missing that must be there.
        """
        with self._refreshing:
            while True:
                content = array_folder.read_group(self._storage, self._kind, self._name)
                try:
                    self._learn_format(content)
                    added, promised = self._added_keys()
                except CacheError:
                    if self._is_still(content):
                        raise
                    continue
                if self._is_still(content):
                    break
            self._known.lookup.add(added)
        if len(self) < promised:
            raise CacheError(
                f"{self.place} has {len(self):,} keys, its metadata promise {promised:,} rows: chunk "
                f"{len(self) // self.form.chunk_rows} of the keys is missing or damaged; {DAMAGED}"
            )

    def _learn_format(self, content: bytes) -> None:
        """Start over where the group's metadata are others than before."""
        if content == self._group:
            return
        form = array_format.parse_group(content, Path(self._storage.place(f"{self._folder}/{METADATA}")))
        if not self._group or form != self.form:
            parts = (self._storage.chunks(f"{self._folder}/{part}", form, part) for part in (form.payload, CHECK))
            self._known = _Known(form, RowLookup(), *parts)
        self._group = content

    def _added_keys(self) -> tuple[np.ndarray, int]:
        """Return the keys that were added since, with their rows mapped, and how many rows the metadata promise."""
        form, count = self.form, len(self)
        promised = array_folder.promised_rows(self._storage, f"{self._folder}/{KEY}")
        number, known = divmod(count, form.chunk_rows)
        chunks = list(array_folder.read_keys(self._storage, form, number, promised))
        added = np.concatenate(chunks)[known:] if chunks else np.empty((0, KEY_BYTES), np.uint8)
        if len(added):
            for part in (self._known.payload, self._known.checks):
                part.extend(count + len(added))
        return added, promised

    def _is_still(self, content: bytes) -> bool:
        """Tell whether the array is the one whose group metadata were read, and not one swapped in since."""
        return not self._storage.shared or (array_folder.read_group(self._storage, self._kind, self._name) == content)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row numbers of keys, (m, 16) uint8, as (m,) int64; -1 where there is no row (yet)."""
        return self._known.lookup.find(keys)

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
        known, rows = self._known, np.asarray(rows, np.int64)
        count = len(known.lookup)
        if len(rows) and not (rows.min() >= 0 and rows.max() < count):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked of {count} in {self.place}")
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all()):
            return self._read(known, range(int(rows[0]), int(rows[-1]) + 1), verify)
        return self._read(known, rows, verify)

    def read_all(self, *, verify: bool = True) -> np.ndarray:
        """Return the payload of all rows, (rows, *row_shape)."""
        known = self._known
        return self._read(known, range(len(known.lookup)), verify)

    def chunks(self, *, verify: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row number and the payload of each chunk, mapped and not copied."""
        known, keys, chunk_rows = self._known, self._known.lookup.keys, self._known.form.chunk_rows
        for start in range(0, len(keys), chunk_rows):
            some = keys[start : start + chunk_rows]
            values = known.payload.chunk(start // chunk_rows, len(some))
            if verify:
                wrong = row_checks(some, values) != known.checks.chunk(start // chunk_rows, len(some))
                self._refuse(start + np.flatnonzero(wrong), len(some))
            yield start, values

    def _read(self, known: _Known, rows: np.ndarray | range, verify: bool) -> np.ndarray:
        """Return the payload of rows, in blocks."""
        form, keys = known.form, known.lookup.keys
        values = np.empty((len(rows), *form.row_shape), form.dtype)

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

        wrong = in_blocks(read_block, len(rows), form.row_bytes)
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

    # -- Writing ---------------------------------------------------------------------------------------------------

    def append(self, keys: np.ndarray, payload: np.ndarray) -> int:
        """Commit rows whose keys are not there yet, durably, in the given order.

        Parameters
        ----------
        keys : ndarray of uint8, (n, 16)
            A key that stands twice is stored once, with its first payload.
        payload : ndarray, (n, *row_shape)
            Of the array's dtype, finite.

        Returns
        -------
        int
            Rows added.

        Raises
        ------
        CacheError
            The disk is full or the cache cannot be written; the rows committed before stay valid.
        """
        keys, payload = checked_rows(self.form, keys, payload)
        with self._storage.lock(self._lock):
            self._storage.sweep(self._scratch)
            self.refresh()
            fresh = first_occurrences(keys)
            fresh = fresh[self.find(keys[fresh]) < 0]
            if len(fresh) < len(keys):
                keys, payload = keys[fresh], payload[fresh]
            if len(fresh):
                commit_rows(self._storage, self.form, len(self), self._chunk_starts(), keys, payload)
                self.refresh()
            else:
                self._storage.put([], self._scratch, self._stale_metadata())
        return len(fresh)

    def finish(self) -> None:
        """Make the metadata exact and remove leftovers of killed writers; a job calls it at its end.

        Writes nothing where nothing is amiss, so that a complete cache may be read-only.
        """
        self.refresh()
        if not self._storage.writable:
            return
        if not self._stale_metadata() and not self._storage.exists(self._scratch):
            return
        with self._storage.lock(self._lock):
            self._storage.sweep(self._scratch)
            self.refresh()
            self._storage.put([], self._scratch, self._stale_metadata())
            self._storage.drop(self._scratch)

    def _stale_metadata(self) -> list[NewFile]:
        return stale_metadata(self._storage, self.form, len(self))

    def _chunk_starts(self) -> dict[str, ChunkStart]:
        """Return what gives the rows that stand in a chunk, for each part."""
        known, keys = self._known, self.keys

        def key_rows(number: int, rows: int) -> np.ndarray:
            start = number * known.form.chunk_rows
            return keys[start : start + rows]

        return {known.form.payload: known.payload.chunk, CHECK: known.checks.chunk, KEY: key_rows}

    @property
    def _lock(self) -> str:
        return array_folder.lock_name(self._kind, self._name)

    @property
    def _scratch(self) -> str:
        return array_folder.scratch_name(self._kind, self._name)
