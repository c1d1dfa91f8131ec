"""A payload, its keys and a checksum a row, in Zarr v3: the one idea under the whole cache.

Rows come in as keys and payload, and go out by row number. The rules (who may write when, and what a reader may count
on):

- Everything that writes happens under the array's lock, after reading the metadata and the keys again.
- A commit leaves out keys that another writer has stored since, fills the short last chunk (replaced whole, by
  rename), then goes on in new chunks: for each chunk the payload, then the checks, then the keys. **A row exists when
  its key is there**; a commit that dies in between leaves bytes that nobody counts and the next commit overwrites.
- Each file is synced before its rename, and the folders of payload and checks before the keys are written, so the same
  holds after a power cut. What `append` has returned for is on the disk.
- The shapes in Zarr's metadata follow the keys at the end of each commit. They may lag behind after a kill and never
  run ahead, so plain Zarr readers see whole rows only, and fewer keys than the shape says means damage.
- Readers take no lock: they read keys first and payload after, by mapping the chunk files.
- Temporary files lie under ``<cache>/tmp``, in a folder that is the lock holder's alone and swept by the next one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine import array_folder, array_format
from engine.array_format import CHECK, DAMAGED, KEY, METADATA, STORE, ArrayFormat
from engine.chunk_map import ChunkMap
from engine.durable import sync_folder, write_whole
from engine.errors import CacheError
from engine.keys import KEY_BYTES
from engine.lock import record_lock
from engine.row_check import row_checks
from engine.row_lookup import RowLookup, first_occurrences


class KeyedArray:
    """One keyed array of a cache; use `KeyedArray.open` or `KeyedArray.create`.

    Reading is safe from several threads and beside any number of writers; `refresh` shows what they have added.
    """

    def __init__(self, cache: Path, form: ArrayFormat) -> None:
        self._cache = cache
        self.folder = cache / STORE / form.kind / form.name
        self._reset(form)

    @classmethod
    def open(cls, cache: Path, kind: str, name: str) -> KeyedArray:
        """Open an array for reading and appending.

        Parameters
        ----------
        cache : Path
            The cache's folder.
        kind : "image", "text", "pixels" or "tokens"
        name : str
            Id of the encoder (tokens: ``<encoder>@<layer>``) or of the preprocessing.

        Raises
        ------
        CacheError
            There is no such array, it was written by a newer format version, or it is damaged.
        """
        array = cls(cache, array_folder.read_format(cache / STORE / kind / name))
        array.refresh()
        return array

    @classmethod
    def create(
        cls, cache: Path, kind: str, name: str, row_shape: tuple[int, ...], description: Mapping[str, Any]
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
        folder = cache / STORE / kind / name
        if not (folder / METADATA).exists():
            form = ArrayFormat(
                kind, name, tuple(int(size) for size in row_shape), 1, array_format.plain_json(description)
            )
            array_folder.create_array(cache, folder, form)
        array = cls.open(cache, kind, name)
        if array.form.row_shape != tuple(row_shape):
            raise CacheError(
                f"{array.folder} holds rows of shape {array.form.row_shape}, not {tuple(row_shape)}; two encoders must "
                "not share the id"
            )
        return array

    def _reset(self, form: ArrayFormat) -> None:
        self.form = form
        self._keys = np.empty((0, KEY_BYTES), np.uint8)
        self._lookup = RowLookup()
        self._payload = ChunkMap(self.folder / form.payload, form, form.payload)
        self._checks = ChunkMap(self.folder / CHECK, form, CHECK)

    # -- Reading ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> np.ndarray:
        """Keys of all rows known so far, (rows, 16) uint8."""
        return self._keys

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group, the description among them."""
        return dict(self.form.group_document()["attributes"])

    def refresh(self) -> None:
        """Take in the rows that were committed since, by reading only what was added.

        Raises
        ------
        CacheError
            Keys are missing that must be there.
        """
        form = array_folder.read_format(self.folder)
        if form != self.form:
            self._reset(form)
        promised = array_folder.promised_rows(self.folder / KEY, form)
        number, known = divmod(len(self), form.chunk_rows)
        added = []
        while (chunk := array_folder.read_keys(self.folder / KEY, form, number)) is not None:
            count = array_folder.count_keys(chunk)
            added.append(chunk[known:count])
            if count < form.chunk_rows:
                break
            number, known = number + 1, 0
        if added:
            self._learn(np.concatenate(added))
        if len(self) < promised:
            raise CacheError(
                f"{self.folder} has {len(self):,} keys, its metadata promise {promised:,} rows: chunk "
                f"{len(self) // form.chunk_rows} of the keys is missing or damaged; {DAMAGED}"
            )

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row numbers of keys, (m, 16) uint8, as (m,) int64; -1 where there is no row (yet)."""
        return self._lookup.find(keys)

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
        count = len(self)
        if len(rows) and not (rows.min() >= 0 and rows.max() < count):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked of {count} in {self.folder}")
        values = np.empty((len(rows), *self.form.row_shape), self.form.dtype)
        self._payload.gather(rows, count, values)
        if verify:
            checks = np.empty(len(rows), np.uint64)
            self._checks.gather(rows, count, checks)
            self._compare(rows, self._keys[rows], values, checks)
        return values

    def read_all(self, *, verify: bool = True) -> np.ndarray:
        """Return the payload of all rows, (rows, *row_shape)."""
        return self.read(np.arange(len(self)), verify=verify)

    def chunks(self, *, verify: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row number and the payload of each chunk, mapped and not copied."""
        count, chunk_rows = len(self), self.form.chunk_rows
        for start in range(0, count, chunk_rows):
            rows = np.arange(start, min(start + chunk_rows, count))
            values = self._payload.chunk(start // chunk_rows, len(rows))
            if verify:
                self._compare(rows, self._keys[rows], values, self._checks.chunk(start // chunk_rows, len(rows)))
            yield start, values

    def _compare(self, rows: np.ndarray, keys: np.ndarray, values: np.ndarray, checks: np.ndarray) -> None:
        wrong = rows[row_checks(keys, values) != checks]
        if len(wrong):
            raise CacheError(
                f"{len(wrong):,} of {len(rows):,} rows read from {self.folder} do not match their checks, the first is "
                f"row {wrong[0]} in chunk {wrong[0] // self.form.chunk_rows}; {DAMAGED}"
            )

    def _learn(self, keys: np.ndarray) -> None:
        self._lookup.add(keys)
        self._keys = np.concatenate([self._keys, keys])

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
        keys, payload = self._checked(keys, payload)
        with record_lock(self._lock):
            scratch = array_folder.swept(self._scratch)
            self.refresh()
            fresh = first_occurrences(keys)
            fresh = fresh[self.find(keys[fresh]) < 0]
            if len(fresh) < len(keys):
                keys, payload = keys[fresh], payload[fresh]
            if len(fresh):
                self._commit(keys, payload, scratch)
            self._write_metadata(scratch)
        return len(fresh)

    def finish(self) -> None:
        """Make the metadata exact and remove leftovers of killed writers; a job calls it at its end.

        Writes nothing where nothing is amiss, so that a complete cache may be read-only.
        """
        self.refresh()
        if not self._stale_metadata() and not self._scratch.exists():
            return
        with record_lock(self._lock):
            scratch = array_folder.swept(self._scratch)
            self.refresh()
            self._write_metadata(scratch)
            shutil.rmtree(scratch, ignore_errors=True)

    @property
    def _lock(self) -> Path:
        return array_folder.lock_path(self._cache, self.form.kind, self.form.name)

    @property
    def _scratch(self) -> Path:
        return array_folder.scratch_path(self._cache, self.form.kind, self.form.name)

    def _checked(self, keys: np.ndarray, payload: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        form = self.form
        if keys.dtype != np.uint8 or keys.shape != (len(payload), KEY_BYTES):
            raise CacheError(f"keys of {form.name} must be uint8 ({len(payload)}, 16), not {keys.dtype} {keys.shape}")
        if payload.dtype != form.dtype or payload.shape[1:] != form.row_shape:
            raise CacheError(
                f"rows of {form.name} must be {form.dtype} {form.row_shape}, not {payload.dtype} {payload.shape[1:]}"
            )
        if not keys.any(axis=1).all():
            raise CacheError(f"a row of {form.name} has the key of nothing, all zeros; keys come from engine.keys")
        if form.dtype.kind == "f" and not np.isfinite(payload).all():
            raise CacheError(f"rows of {form.name} hold NaN or infinity; such a sample is a failure and is not stored")
        return np.ascontiguousarray(keys), np.ascontiguousarray(payload)

    def _commit(self, keys: np.ndarray, payload: np.ndarray, scratch: Path) -> None:
        """Write the payload of all chunks that get rows, then their checks, then their keys, each durable before."""
        form, chunk_rows = self.form, self.form.chunk_rows
        rows = {form.payload: payload, CHECK: row_checks(keys, payload), KEY: keys}
        maps = {form.payload: self._payload, CHECK: self._checks}
        first, offset = divmod(len(self), chunk_rows)
        for part in (form.payload, CHECK, KEY):
            folder, shape, dtype = self.folder / part, form.part_shape(part), form.part_dtype(part)
            for start in range(-offset, len(keys), chunk_rows):
                number = first + (start + offset) // chunk_rows
                some = rows[part][max(start, 0) : start + chunk_rows]
                free = chunk_rows - max(-start, 0) - len(some)
                pieces = [some, np.full((free, *shape), array_folder.fill_value(dtype), dtype)]
                if start < 0:
                    old = self._keys[start:] if part == KEY else maps[part].chunk(number, offset)
                    pieces.insert(0, old)
                write_whole(folder / form.chunk_file(part, number), pieces, scratch)
                if part == KEY:  # key chunks appear strictly in order: a row is there only if all before it are
                    sync_folder(folder)
            if part != KEY:
                sync_folder(folder)
        self._learn(keys)

    def _write_metadata(self, scratch: Path) -> None:
        """Bring the arrays' shapes up to the keys: payload and checks before the keys, as a plain reader needs it."""
        for path, document in self._stale_metadata():
            write_whole(path, [document], scratch)

    def _stale_metadata(self) -> list[tuple[Path, bytes]]:
        """Return the metadata files that do not say what they should, with what they should say."""
        stale = []
        for part in (self.form.payload, CHECK, KEY):
            path = self.folder / part / METADATA
            document = array_format.document_bytes(self.form.array_document(part, len(self)))
            if not path.exists() or path.read_bytes() != document:
                stale.append((path, document))
        return stale
