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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine import array_folder, array_format
from engine.array_format import CHECK, DAMAGED, KEY, METADATA, ArrayFormat
from engine.chunk_map import Chunks, spans
from engine.errors import CacheError
from engine.keys import KEY_BYTES
from engine.row_check import all_finite, row_checks
from engine.row_lookup import RowLookup, first_occurrences
from engine.storage import NewFile, Storage, storage_of

# Rows are copied and checked in blocks that the processor's cache holds, large reads by several threads.
BLOCK_BYTES = 1 << 22
BYTES_FOR_THREADS = 1 << 25
MOST_THREADS = 4

Result = TypeVar("Result")


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
            See `engine.storage.storage_of`.
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
        step = _block_rows(form)

        def read_block(start: int) -> np.ndarray:
            some, out = rows[start : start + step], values[start : start + step]
            checks = np.empty(len(some), np.uint64)
            for chunks, into in ((known.payload, out), (known.checks, checks))[: 1 + verify]:
                if isinstance(some, range):
                    chunks.copy(some.start, into)
                else:
                    chunks.gather(some, into)
            if not verify:
                return checks[:0].astype(np.int64)
            these = keys[some.start : some.stop] if isinstance(some, range) else keys[some]
            return np.asarray(some)[row_checks(these, out) != checks]

        wrong = _in_blocks(read_block, len(rows), form)
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
        keys, payload = self._checked(keys, payload)
        with self._storage.lock(self._lock):
            self._storage.sweep(self._scratch)
            self.refresh()
            fresh = first_occurrences(keys)
            fresh = fresh[self.find(keys[fresh]) < 0]
            if len(fresh) < len(keys):
                keys, payload = keys[fresh], payload[fresh]
            if len(fresh):
                self._commit(keys, payload)
                self.refresh()
            else:
                self._storage.put([], self._scratch, self._stale_metadata(len(self)))
        return len(fresh)

    def finish(self) -> None:
        """Make the metadata exact and remove leftovers of killed writers; a job calls it at its end.

        Writes nothing where nothing is amiss, so that a complete cache may be read-only.
        """
        self.refresh()
        if not self._storage.writable:
            return
        if not self._stale_metadata(len(self)) and not self._storage.exists(self._scratch):
            return
        with self._storage.lock(self._lock):
            self._storage.sweep(self._scratch)
            self.refresh()
            self._storage.put([], self._scratch, self._stale_metadata(len(self)))
            self._storage.drop(self._scratch)

    @property
    def _lock(self) -> str:
        return array_folder.lock_name(self._kind, self._name)

    @property
    def _scratch(self) -> str:
        return array_folder.scratch_name(self._kind, self._name)

    def _checked(self, keys: np.ndarray, payload: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and payload, contiguous; CacheError where these are no rows of this array."""
        form = self.form
        if keys.dtype != np.uint8 or keys.shape != (len(payload), KEY_BYTES):
            raise CacheError(f"keys of {form.name} must be uint8 ({len(payload)}, 16), not {keys.dtype} {keys.shape}")
        if payload.dtype != form.dtype or payload.shape[1:] != form.row_shape:
            raise CacheError(
                f"rows of {form.name} must be {form.dtype} {form.row_shape}, not {payload.dtype} {payload.shape[1:]}"
            )
        keys, payload = np.ascontiguousarray(keys), np.ascontiguousarray(payload)
        if array_folder.count_keys(keys) < len(keys):
            raise CacheError(f"a row of {form.name} has the key of nothing, all zeros; keys come from engine.keys")
        step = _block_rows(form)
        if not all(_in_blocks(lambda start: all_finite(payload[start : start + step]), len(keys), form)):
            raise CacheError(f"rows of {form.name} hold NaN or infinity; such a sample is a failure and is not stored")
        return keys, payload

    def _commit(self, keys: np.ndarray, payload: np.ndarray) -> None:
        """Write the payload and checks of all chunks that get rows, then their keys, then what tells plain readers."""
        known, count, added = self._known, len(self), len(keys)
        places = list(spans(count, added, known.form.chunk_rows))
        checks = np.empty(added, np.uint64)

        def payload_and_checks() -> Iterator[NewFile]:
            for place in places:
                some = place[2]
                # Computed here, while the files before are on their way to the disk.
                checks[some] = row_checks(keys[some], payload[some])
                yield self._chunk_file(known.form.payload, known.payload, payload, *place)
            for place in places:
                yield self._chunk_file(CHECK, known.checks, checks, *place)

        # Where a power cut has lost an earlier chunk of keys and kept a later one, that one must not count again.
        after = known.form.chunk_file(KEY, -(-(count + added) // known.form.chunk_rows))
        self._storage.remove(f"{self._folder}/{KEY}/{after}")
        keys_of_chunks = (self._chunk_file(KEY, None, keys, *place) for place in places)
        self._storage.put([payload_and_checks(), keys_of_chunks], self._scratch, self._stale_metadata(count + added))

    def _chunk_file(
        self, part: str, old: Chunks | None, rows: np.ndarray, number: int, inside: slice, some: slice
    ) -> NewFile:
        """Return a chunk file: the rows that it has already, some of the new rows, and what stands after the last."""
        form, pieces = self.form, [rows[some]]
        if inside.start:
            kept = self.keys[number * form.chunk_rows :] if old is None else old.chunk(number, inside.start)
            pieces.insert(0, kept)
        if inside.stop < form.chunk_rows:
            shape, dtype = form.part_shape(part), form.part_dtype(part)
            free = form.chunk_rows - inside.stop
            pieces.append(np.full((free, *shape), array_folder.fill_value(dtype), dtype))
        return f"{self._folder}/{part}/{form.chunk_file(part, number)}", pieces

    def _stale_metadata(self, rows: int) -> list[NewFile]:
        """Return the metadata files that do not promise these rows, with what they should say.

        Payload and checks come before the keys, as a plain reader needs it.
        """
        stale: list[NewFile] = []
        for part in (self.form.payload, CHECK, KEY):
            name = f"{self._folder}/{part}/{METADATA}"
            document = array_format.document_bytes(self.form.array_document(part, rows))
            if self._storage.read_many([name]) != [document]:
                stale.append((name, [document]))
        return stale


def _block_rows(form: ArrayFormat) -> int:
    return max(1, BLOCK_BYTES // max(form.row_bytes, 1))


def _in_blocks(work: Callable[[int], Result], count: int, form: ArrayFormat) -> list[Result]:
    """Call with the first row of each block of rows, in several threads where it is much; return the results."""
    starts = range(0, count, _block_rows(form))
    if count * form.row_bytes < BYTES_FOR_THREADS:
        return list(map(work, starts))
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "rows") as pool:
        return list(pool.map(work, starts))
