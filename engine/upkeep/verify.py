"""Verifying a whole cache: metadata of store and kinds, every keyed array, sample tables and indexes.

Comes in: a cache, wherever it lies. Goes out: how much was looked at, and all damage. Nothing is written and no lock is
taken, so it runs beside jobs and on read-only media. A cache whose own metadata is damaged cannot be opened by a job;
it can be verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from engine.arrays import array_folder, array_format
from engine.arrays.array_format import METADATA, PARTS, STORE
from engine.arrays.array_verify import Damage, inspect_array
from engine.arrays.file_digest import seal_is_whole
from engine.arrays.storage import Storage, storage_of
from engine.errors import CacheError
from engine.index import IndexInfo
from engine.sample_table import read_parquet

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what was wrong.

    Parameters
    ----------
    arrays, rows : int
    bytes : int
        Payload read.
    damage : list of Damage
    """

    arrays: int
    rows: int
    bytes: int
    damage: list[Damage]


def verify_cache(cache: str | os.PathLike[str] | Storage, progress: Progress | None = None) -> Verification:
    """Look at everything in a cache.

    Parameters
    ----------
    cache : path, URL or Storage
    progress : callable(name, done, total), optional

    Raises
    ------
    CacheError
        Something was written by a newer format version, or the place cannot list what it has (some web servers).
    """
    storage = storage_of(cache)
    arrays = array_folders(storage)
    rows = size = 0
    damage = list(_wrong_parents(storage, arrays))
    for number, (kind, name) in enumerate(arrays):
        found = inspect_array(storage, kind, name)
        # Nothing at all is left of one that was removed since the arrays were listed.
        if found.form is not None or storage.names(array_folder.array_name(kind, name)):
            damage += found.damage
        rows += len(found.keys)
        size += len(found.keys) * (found.form.row_bytes if found.form else 0)
        if progress is not None:
            progress("verify", number + 1, len(arrays))
    damage += wrong_tables(storage)
    damage += wrong_indexes(storage)
    return Verification(len(arrays), rows, size, damage)


def array_folders(cache: str | os.PathLike[str] | Storage) -> list[tuple[str, str]]:
    """Return (kind, name) of all folders that hold or held an array, also of those whose zarr.json is lost."""
    storage = storage_of(cache)
    return sorted(
        (kind, name)
        for kind in PARTS
        for name in storage.names(f"{STORE}/{kind}")
        if name != METADATA and storage.names(array_folder.array_name(kind, name))
    )


def parent_files(arrays: list[tuple[str, str]]) -> list[str]:
    """Return the zarr.json of the store and of its kinds, which must be there where there are arrays."""
    folders = [STORE, *(f"{STORE}/{kind}" for kind in sorted({kind for kind, _ in arrays}))] if arrays else []
    return [f"{folder}/{METADATA}" for folder in folders]


def _wrong_parents(storage: Storage, arrays: list[tuple[str, str]]) -> Iterator[Damage]:
    expected = array_format.document_bytes(array_format.parent_document())
    for name in parent_files(arrays):
        try:
            content = storage.read(name)
        except FileNotFoundError:
            yield Damage(name, "", -1, "", "it is lost")
            continue
        except CacheError as error:
            yield Damage(name, "", -1, "", str(error))
            continue
        if content != expected:
            _refuse_newer(content, name, storage, arrays)
            yield Damage(name, "", -1, "", "it differs from what a cache of this version has")


def _refuse_newer(content: bytes, name: str, storage: Storage, arrays: list[tuple[str, str]]) -> None:
    """Raise for a newer version, unless an array says by its digest that the cache is of ours."""
    path = Path(storage.place(name))
    try:
        version = json.loads(content)["attributes"]["format_version"]
        array_format.check_version(version, path)
    except (ValueError, TypeError, KeyError):
        return
    except CacheError:
        for kind, array in arrays:
            try:
                array_format.parse_group(array_folder.read_group(storage, kind, array), path)
            except CacheError:
                continue
            return
        raise


def wrong_tables(cache: str | os.PathLike[str] | Storage) -> Iterator[Damage]:
    """Yield the damaged sample tables."""
    storage = storage_of(cache)
    for name in storage.names("datasets"):
        if not name.endswith(".parquet"):
            continue
        label = f"datasets/{name}"
        try:
            with storage.reading(label) as path:
                if seal_is_whole(path) is False:
                    yield Damage(label, "", -1, "", "its bytes do not match the digest in it")
                    continue
                read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            yield Damage(label, "", -1, "", f"it cannot be read: {error}")


def wrong_indexes(cache: str | os.PathLike[str] | Storage) -> Iterator[Damage]:
    """Yield the damaged indexes, and those over rows that the cache no longer has in this order."""
    storage = storage_of(cache)
    there = [name for name in storage.names("indexes") if name.endswith((".json", ".faiss"))]
    for stem in sorted({name.rpartition(".")[0] for name in there}):
        document, file = f"indexes/{stem}.json", f"indexes/{stem}.faiss"
        try:
            with storage.reading(document) as path:
                info = IndexInfo.read(path)
        except CacheError as error:
            if "newer version" in str(error):
                raise
            yield Damage(document, "", -1, "", str(error))
            continue
        with storage.reading(file) as path:
            problem = info.damage_of(path)
        if problem:
            yield Damage(file, "", -1, "", problem)
        elif info.name != stem or not _has_rows(storage, info):
            problem = f"it was built over other rows than {info.kind}/{info.encoder} has, and is not used any more"
            yield Damage(document, "", -1, "", problem)


def _has_rows(storage: Storage, info: IndexInfo) -> bool:
    """Tell whether an index is over the array as it is numbered now; damage of the array itself is said elsewhere."""
    name = f"{array_folder.array_name(info.kind, info.encoder)}/{METADATA}"
    try:
        return array_format.parse_group(storage.read(name), Path(name)).generation == info.generation
    except FileNotFoundError:
        return False
    except CacheError:
        return True
