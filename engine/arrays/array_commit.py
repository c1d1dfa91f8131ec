"""What a commit writes: chunk files of payload, checks and keys, in the order that lets rows exist whole or not at all.

Comes in: new rows, none of which is there yet, and what stands in the short last chunk. Goes out: files, handed to the
storage in steps; a step's files appear only when those of the step before are durable. The caller holds the array's
lock; see `keyed_array` for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from engine.arrays import array_folder, array_format
from engine.arrays.array_format import CHECK, KEY, METADATA, ArrayFormat
from engine.arrays.chunks import spans
from engine.arrays.row_blocks import in_blocks
from engine.arrays.row_check import all_finite, row_checks
from engine.arrays.storage import NewFile, Storage
from engine.errors import CacheError
from engine.keys import KEY_BYTES

ChunkStart: TypeAlias = Callable[[int, int], np.ndarray]


def checked_rows(form: ArrayFormat, keys: np.ndarray, payload: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and payload, contiguous; CacheError where these are no rows of the array."""
    if keys.dtype != np.uint8 or keys.shape != (len(payload), KEY_BYTES):
        raise CacheError(f"keys of {form.name} must be uint8 ({len(payload)}, 16), not {keys.dtype} {keys.shape}")
    if payload.dtype != form.dtype or payload.shape[1:] != form.row_shape:
        raise CacheError(
            f"rows of {form.name} must be {form.dtype} {form.row_shape}, not {payload.dtype} {payload.shape[1:]}"
        )
    keys, payload = np.ascontiguousarray(keys), np.ascontiguousarray(payload)
    if array_folder.count_keys(keys) < len(keys):
        raise CacheError(f"a row of {form.name} has the key of nothing, all zeros; keys come from engine.keys")
    if not all(in_blocks(lambda block: all_finite(payload[block]), len(keys), form.row_bytes)):
        raise CacheError(f"rows of {form.name} hold NaN or infinity; such a sample is a failure and is not stored")
    return keys, payload


def commit_rows(
    storage: Storage,
    form: ArrayFormat,
    count: int,
    there: Mapping[str, ChunkStart],
    keys: np.ndarray,
    payload: np.ndarray,
) -> None:
    """Write the payload and checks of all chunks that get rows, then their keys, then what tells plain readers.

    Parameters
    ----------
    count : int
        Rows that are there.
    there : mapping of part to callable(number, rows)
        Return the first rows of a chunk as they are.
    keys, payload : ndarray, (n, 16) and (n, *row_shape)
        From `checked_rows`.

    Raises
    ------
    CacheError
        The disk is full or the cache cannot be written; no row was added that was not whole.
    """
    places = list(spans(count, len(keys), form.chunk_rows))
    checks = np.empty(len(keys), np.uint64)

    def chunk_file(part: str, rows: np.ndarray, number: int, inside: slice, some: slice) -> NewFile:
        """Return the rows that a chunk has already, some of the new rows, and what stands after the last."""
        pieces = [rows[some]]
        if inside.start:
            pieces.insert(0, there[part](number, inside.start))
        if inside.stop < form.chunk_rows:
            shape, dtype = form.part_shape(part), form.part_dtype(part)
            free = form.chunk_rows - inside.stop
            pieces.append(np.full((free, *shape), array_folder.fill_value(dtype), dtype))
        return array_folder.chunk_name(form, part, number), pieces

    def payload_and_checks() -> Iterator[NewFile]:
        for place in places:
            some = place[2]
            # Computed here, while the files before are on their way to the disk.
            checks[some] = row_checks(keys[some], payload[some])
            yield chunk_file(form.payload, payload, *place)
            yield chunk_file(CHECK, checks, *place)

    rows = count + len(keys)
    # Where a power cut has lost an earlier chunk of keys and kept a later one, that one must not count again.
    storage.remove(array_folder.chunk_name(form, KEY, -(-rows // form.chunk_rows)))
    key_files = (chunk_file(KEY, keys, *place) for place in places)
    scratch = array_folder.scratch_name(form.kind, form.name)
    storage.put([payload_and_checks(), key_files], scratch, stale_metadata(storage, form, rows))


def stale_metadata(storage: Storage, form: ArrayFormat, rows: int) -> list[NewFile]:
    """Return the metadata files that do not promise these rows, with what they should say.

    Payload and checks come before the keys, as a plain reader needs it.
    """
    stale: list[NewFile] = []
    for part in (form.payload, CHECK, KEY):
        name = f"{array_folder.array_name(form.kind, form.name)}/{part}/{METADATA}"
        document = array_format.document_bytes(form.array_document(part, rows))
        if storage.read_many([name]) != [document]:
            stale.append((name, [document]))
    return stale
