"""The folder of a keyed array: making it, listing those of a cache, and reading its small files.

Everything here is either read-only or done under the array's lock; see `keyed_array` for the rules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.arrays import array_format, folder_swap
from engine.arrays.array_format import CHECK, DAMAGED, KEY, METADATA, STORE, ArrayFormat
from engine.arrays.storage import LocalStorage, Storage, storage_of
from engine.errors import CacheError
from engine.keys import KEY_BYTES

# Key chunks asked for at once where each request takes its time.
CHUNKS_AT_ONCE = 64


def list_arrays(cache: str | os.PathLike[str] | Storage) -> list[tuple[str, str]]:
    """Return (kind, name) of all keyed arrays of a cache, sorted."""
    storage = storage_of(cache)
    return sorted(
        (kind, name)
        for kind in array_format.PARTS
        for name in storage.names(f"{STORE}/{kind}")
        if name != METADATA and storage.exists(f"{array_name(kind, name)}/{METADATA}")
    )


def array_name(kind: str, name: str) -> str:
    """Return the folder of an array within its cache."""
    return f"{STORE}/{kind}/{name}"


def chunk_name(form: ArrayFormat, part: str, number: int) -> str:
    """Return a chunk file of an array within its cache."""
    return f"{array_name(form.kind, form.name)}/{part}/{form.chunk_file(part, number)}"


def has_array(cache: str | os.PathLike[str] | Storage, kind: str, name: str) -> bool:
    """Tell whether a cache has an array."""
    return storage_of(cache).exists(f"{array_name(kind, name)}/{METADATA}")


def read_group(storage: Storage, kind: str, name: str) -> bytes:
    """Return an array's group metadata as they are stored; CacheError where there is no such array."""
    path = f"{array_name(kind, name)}/{METADATA}"
    try:
        return storage.read(path)
    except FileNotFoundError:
        raise CacheError(f"no array {kind}/{name} in the cache: there is no {storage.place(path)}") from None


def read_format(folder: Path) -> ArrayFormat:
    """Return what the group of a local array says it is; CacheError where there is none, it is newer or damaged."""
    content = read_group(LocalStorage(folder.parent.parent.parent), folder.parent.name, folder.name)
    return array_format.parse_group(content, folder / METADATA)


def promised_rows(storage: Storage, folder: str) -> int:
    """Return the rows that an array's metadata promise; those of a lost zarr.json are rewritten at the next commit."""
    path = f"{folder}/{METADATA}"
    try:
        return int(json.loads(storage.read(path))["shape"][0])
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise CacheError(f"{storage.place(path)} cannot be read ({error!r}); {DAMAGED}") from error


def read_keys(storage: Storage, form: ArrayFormat, first: int, promised: int) -> Iterator[np.ndarray]:
    """Yield the chunks of keys from a chunk on, (rows, 16) uint8, up to the last key that is there.

    Parameters
    ----------
    first : int
        Number of the first chunk.
    promised : int
        Rows of the whole array that are sure to have a key; they are asked for many chunks at once.

    Raises
    ------
    CacheError
        A chunk file has another size than it must, or cannot be read.
    """
    number = first
    while True:
        sure = -(-promised // form.chunk_rows) - number
        numbers = range(number, number + min(max(sure, 1), CHUNKS_AT_ONCE))
        names = [chunk_name(form, KEY, each) for each in numbers]
        for name, content in zip(names, storage.read_many(names), strict=False):
            if content is None:
                return
            if len(content) != form.chunk_file_bytes(KEY):
                raise CacheError(
                    f"{storage.place(name)} has {len(content):,} bytes instead of {form.chunk_file_bytes(KEY):,}; "
                    f"{DAMAGED}"
                )
            keys = np.frombuffer(content, np.uint8).reshape(form.chunk_rows, KEY_BYTES)
            count = count_keys(keys)
            yield keys[:count]
            if count < form.chunk_rows:
                return
            number += 1


def fill_value(dtype: np.dtype) -> float:
    """Return what stands after the last row of a chunk: NaN for floats, 0 for integers."""
    return np.nan if dtype.kind == "f" else 0


def count_keys(keys: np.ndarray) -> int:
    """Return how many rows at the start of a chunk, (n, 16) uint8, have a key."""
    words = np.ascontiguousarray(keys).view(np.uint64)
    present = (words[:, 0] | words[:, 1]) != 0
    return len(keys) if present.all() else int(np.argmin(present))


def lock_name(kind: str, name: str) -> str:
    """Return the name of an array's lock, whose file is never removed."""
    return f"locks/{kind}/{name}.lock"


def scratch_name(kind: str, name: str) -> str:
    """Return the folder of an array's temporary files, which belongs to the holder of its lock."""
    return f"tmp/{kind}/{name}"


def lock_path(cache: Path, kind: str, name: str) -> Path:
    """Return the lock file of an array of a local cache."""
    return cache / lock_name(kind, name)


def scratch_path(cache: Path, kind: str, name: str) -> Path:
    """Return the folder of an array's temporary files in a local cache."""
    return cache / scratch_name(kind, name)


def create_array(storage: Storage, form: ArrayFormat) -> None:
    """Make an empty array where there is none yet."""
    form = replace(form, chunk_rows=array_format.choose_chunk_rows(form.row_bytes))
    with storage.lock(lock_name(form.kind, form.name)):
        scratch = scratch_name(form.kind, form.name)
        storage.sweep(scratch)
        if isinstance(storage, LocalStorage):
            folder_swap.settle(storage.folder, form.kind, form.name)
        if has_array(storage, form.kind, form.name):
            return
        for parent in (STORE, f"{STORE}/{form.kind}"):
            if not storage.exists(f"{parent}/{METADATA}"):
                document = array_format.document_bytes(array_format.parent_document())
                storage.make_folder(parent)
                storage.put([[(f"{parent}/{METADATA}", [document])]], scratch)
        parts = (form.payload, CHECK, KEY)
        documents = [(f"{part}/{METADATA}", form.array_document(part, 0)) for part in parts]
        documents.append((METADATA, form.group_document()))
        files = [(name, [array_format.document_bytes(document)]) for name, document in documents]
        storage.put_folder(array_name(form.kind, form.name), files, scratch)
