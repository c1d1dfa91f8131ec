"""The folder of a keyed array: making it, listing those of a cache, and reading its small files.

Everything here is either read-only or done under the array's lock; see `engine.keyed_array` for the rules.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine import array_format
from engine.array_format import CHECK, DAMAGED, KEY, METADATA, STORE, ArrayFormat
from engine.durable import make_folder, sync_folder, write_error, write_whole
from engine.errors import CacheError
from engine.keys import KEY_BYTES
from engine.lock import record_lock


def list_arrays(cache: Path) -> list[tuple[str, str]]:
    """Return (kind, name) of all keyed arrays of a cache, sorted."""
    found = []
    for kind in array_format.PARTS:
        folder = cache / STORE / kind
        if folder.is_dir():
            found += [(kind, entry.name) for entry in os.scandir(folder) if (Path(entry.path) / METADATA).is_file()]
    return sorted(found)


def read_format(folder: Path) -> ArrayFormat:
    """Return what an array's group says it is; CacheError where there is none, it is newer or damaged."""
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(
            f"no array {folder.parent.name}/{folder.name} in the cache: {path}: {error.strerror}"
        ) from error
    return array_format.parse_group(content, path)


def promised_rows(folder: Path, form: ArrayFormat) -> int:
    """Return the rows that an array's metadata promise; those of a lost zarr.json are rewritten at the next commit."""
    try:
        return int(json.loads((folder / METADATA).read_bytes())["shape"][0])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CacheError(f"{folder / METADATA} cannot be read ({error!r}); {DAMAGED}") from error


def read_keys(folder: Path, form: ArrayFormat, number: int) -> np.ndarray | None:
    """Return a chunk of keys, (chunk_rows, 16) uint8, zeros after the last row; None where there is no such chunk."""
    path = folder / form.chunk_file(KEY, number)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"chunk file {path} cannot be read ({error.strerror}); {DAMAGED}") from error
    if len(content) != form.chunk_file_bytes(KEY):
        raise CacheError(f"{path} has {len(content):,} bytes instead of {form.chunk_file_bytes(KEY):,}; {DAMAGED}")
    return np.frombuffer(content, np.uint8).reshape(form.chunk_rows, KEY_BYTES)


def fill_value(dtype: np.dtype) -> float:
    """Return what stands after the last row of a chunk: NaN for floats, 0 for integers."""
    return np.nan if dtype.kind == "f" else 0


def count_keys(keys: np.ndarray) -> int:
    """Return how many rows at the start of a chunk have a key."""
    present = np.asarray(keys.any(axis=1))
    return len(keys) if present.all() else int(np.argmin(present))


def lock_path(cache: Path, kind: str, name: str) -> Path:
    """Return the lock file of an array, which is never removed."""
    return cache / "locks" / kind / f"{name}.lock"


def scratch_path(cache: Path, kind: str, name: str) -> Path:
    """Return the folder of an array's temporary files, which belongs to the holder of its lock."""
    return cache / "tmp" / kind / name


def swept(scratch: Path) -> Path:
    """Return a scratch folder without what a killed holder of the lock has left in it."""
    make_folder(scratch)
    for entry in os.scandir(scratch):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    return scratch


def create_array(cache: Path, folder: Path, form: ArrayFormat) -> None:
    """Build an empty array beside and rename it to its place, so that nobody ever sees a part of one."""
    form = replace(form, chunk_rows=array_format.choose_chunk_rows(form.row_bytes))
    with record_lock(lock_path(cache, form.kind, form.name)):
        scratch = swept(scratch_path(cache, form.kind, form.name))
        if (folder / METADATA).exists():
            return
        for parent in (folder.parent.parent, folder.parent):
            make_folder(parent)
            if not (parent / METADATA).exists():
                write_whole(parent / METADATA, [array_format.document_bytes(array_format.parent_document())], scratch)
                sync_folder(parent)
        new = scratch / "new"
        for part in (form.payload, CHECK, KEY):
            make_folder(new / part)
            document = array_format.document_bytes(form.array_document(part, 0))
            write_whole(new / part / METADATA, [document], scratch)
            sync_folder(new / part)
        write_whole(new / METADATA, [array_format.document_bytes(form.group_document())], scratch)
        sync_folder(new)
        try:
            os.rename(new, folder)
        except OSError as error:
            raise write_error(error, folder) from error
        sync_folder(folder.parent)
