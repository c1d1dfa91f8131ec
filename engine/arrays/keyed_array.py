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
  shows that one, under other row numbers. Who keeps row numbers keeps the `snapshot` that gave them.
- Temporary files lie under ``<cache>/tmp``, in a folder that is the lock holder's alone and swept by the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays import array_folder, array_format
from engine.arrays.array_commit import ChunkStart, checked_rows, commit_rows, stale_metadata
from engine.arrays.array_format import CHECK, DAMAGED, KEY, METADATA, ArrayFormat
from engine.arrays.array_snapshot import ArraySnapshot, Generation
from engine.arrays.row_lookup import RowLookup, first_occurrences
from engine.arrays.storage import NewFile, Storage, storage_of
from engine.errors import CacheError
from engine.keys import KEY_BYTES


class KeyedArray:
    """One keyed array of a cache; use `KeyedArray.open` or `KeyedArray.create`.

    Reading is safe from several threads and beside any number of writers; `refresh` shows what they have added.
    """

    def __init__(self, storage: Storage, kind: str, name: str) -> None:
        self._storage, self._kind, self._name = storage, kind, name
        self._folder = array_folder.array_name(kind, name)
        self._group: bytes | None = None
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

    def snapshot(self) -> ArraySnapshot:
        """Return the rows known so far; their numbers stay what they are, also when this handle is refreshed."""
        return ArraySnapshot(self._storage, self._folder, self._known)

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
        """See `ArraySnapshot.attributes`."""
        return self.snapshot().attributes

    @property
    def folder(self) -> Path:
        """See `ArraySnapshot.folder`."""
        return self.snapshot().folder

    @property
    def place(self) -> str:
        """Where the array is, for messages."""
        return self._storage.place(self._folder)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """See `ArraySnapshot.find`; the numbers hold until the next `refresh`."""
        return self._known.lookup.find(keys)

    def has(self, key: bytes) -> bool:
        """Tell whether there is a row of a key (yet); for one key this costs much less than `find`."""
        return self._known.lookup.find_one(key) >= 0

    def read(self, rows: np.ndarray, *, verify: bool = True) -> np.ndarray:
        """See `ArraySnapshot.read`."""
        return self.snapshot().read(rows, verify=verify)

    def read_all(self, *, verify: bool = True) -> np.ndarray:
        """See `ArraySnapshot.read_all`."""
        return self.snapshot().read_all(verify=verify)

    def chunks(self, *, verify: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """See `ArraySnapshot.chunks`."""
        return self.snapshot().chunks(verify=verify)

    def refresh(self) -> None:
        """Take in the rows that were committed since, by reading only what was added.

        Where the array was rebuilt since, or removed and made anew, everything is read anew, and rows have other
        numbers than before.

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
                if added is None:
                    self._group = None
                elif self._is_still(content):
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
        if self._group is None or form != self.form:
            parts = (self._storage.chunks(f"{self._folder}/{part}", form, part) for part in (form.payload, CHECK))
            self._known = Generation(form, RowLookup(), *parts)
        self._group = content

    def _added_keys(self) -> tuple[np.ndarray | None, int]:
        """Return the keys that were added since, with their rows mapped, and how many rows the metadata promise.

        The last chunk that has known keys is read again. Where it has others, this is another array of the same name
        (the old one was removed), and there are None.
        """
        form, keys = self.form, self.keys
        promised = array_folder.promised_rows(self._storage, f"{self._folder}/{KEY}")
        number = max(len(keys) - 1, 0) // form.chunk_rows
        known = keys[number * form.chunk_rows :]
        chunks = list(array_folder.read_keys(self._storage, form, number, promised))
        found = np.concatenate(chunks) if chunks else np.empty((0, KEY_BYTES), np.uint8)
        if not np.array_equal(found[: len(known)], known):
            return None, promised
        added = found[len(known) :]
        if len(added):
            for part in (self._known.payload, self._known.checks):
                part.extend(len(keys) + len(added))
        return added, promised

    def _is_still(self, content: bytes) -> bool:
        """Tell whether the array is the one whose group metadata were read, and not one swapped in since."""
        return not self._storage.shared or (array_folder.read_group(self._storage, self._kind, self._name) == content)

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
