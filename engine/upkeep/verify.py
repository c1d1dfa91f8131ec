"""Verifying a whole cache: metadata of store and kinds, every keyed array, sample tables and indexes.

Comes in: the cache's folder. Goes out: how much was looked at, and all damage. Nothing is written and no lock is taken,
so it runs beside jobs and on read-only media. A cache whose own metadata is damaged cannot be opened by a job; it can
be verified.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from engine import array_format
from engine.array_format import METADATA, PARTS, STORE
from engine.array_verify import Damage, inspect_array
from engine.errors import CacheError
from engine.file_digest import seal_is_whole
from engine.index import IndexInfo

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


def verify_cache(cache: Path, progress: Progress | None = None) -> Verification:
    """Look at everything in a cache.

    Parameters
    ----------
    cache : Path
    progress : callable(name, done, total), optional

    Raises
    ------
    CacheError
        Something was written by a newer format version.
    """
    arrays = array_folders(cache)
    rows = size = 0
    damage = list(_wrong_parents(cache, arrays))
    for number, (kind, name) in enumerate(arrays):
        found = inspect_array(cache, kind, name)
        damage += found.damage
        rows += len(found.keys)
        size += len(found.keys) * (found.form.row_bytes if found.form else 0)
        if progress is not None:
            progress("verify", number + 1, len(arrays))
    damage += wrong_tables(cache)
    damage += wrong_indexes(cache)
    return Verification(len(arrays), rows, size, damage)


def array_folders(cache: Path) -> list[tuple[str, str]]:
    """Return (kind, name) of all folders that hold or held an array, also of those whose zarr.json is lost."""
    found = []
    for kind in PARTS:
        folder = cache / STORE / kind
        if folder.is_dir():
            found += [(kind, entry.name) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    return sorted(found)


def parent_files(cache: Path, arrays: list[tuple[str, str]]) -> list[Path]:
    """Return the zarr.json of the store and of its kinds, which must be there where there are arrays."""
    store = cache / STORE
    folders = [store, *(store / kind for kind in sorted({kind for kind, _ in arrays}))] if arrays else []
    return [folder / METADATA for folder in folders]


def _wrong_parents(cache: Path, arrays: list[tuple[str, str]]) -> Iterator[Damage]:
    expected = array_format.document_bytes(array_format.parent_document())
    for path in parent_files(cache, arrays):
        try:
            content = path.read_bytes()
        except OSError as error:
            yield Damage(_label(cache, path), "", -1, "", f"it cannot be read: {error.strerror}")
            continue
        if content != expected:
            _refuse_newer(content, path, cache, arrays)
            yield Damage(_label(cache, path), "", -1, "", "it differs from what a cache of this version has")


def _refuse_newer(content: bytes, path: Path, cache: Path, arrays: list[tuple[str, str]]) -> None:
    """Raise for a newer version, unless an array says by its digest that the cache is of ours."""
    try:
        version = json.loads(content)["attributes"]["format_version"]
        array_format.check_version(version, path)
    except (ValueError, TypeError, KeyError):
        return
    except CacheError:
        for kind, name in arrays:
            try:
                array_format.parse_group((cache / STORE / kind / name / METADATA).read_bytes(), path)
            except (OSError, CacheError):
                continue
            return
        raise


def wrong_tables(cache: Path) -> Iterator[Damage]:
    """Yield the damaged sample tables."""
    for path in sorted((cache / "datasets").glob("*.parquet")):
        try:
            if seal_is_whole(path) is False:
                yield Damage(_label(cache, path), "", -1, "", "its bytes do not match the digest in it")
                continue
            parquet.read_table(path)
        except (OSError, pa.ArrowException) as error:
            yield Damage(_label(cache, path), "", -1, "", f"it cannot be read: {error}")


def wrong_indexes(cache: Path) -> Iterator[Damage]:
    """Yield the damaged indexes, and those over rows that the cache no longer has in this order."""
    folder = cache / "indexes"
    for path in sorted({entry.with_suffix(".json") for entry in folder.glob("*") if _is_index_file(entry)}):
        try:
            info = IndexInfo.read(path)
        except CacheError as error:
            if "newer version" in str(error):
                raise
            yield Damage(_label(cache, path), "", -1, "", str(error))
            continue
        file = path.with_suffix(".faiss")
        if problem := info.damage_of(file):
            yield Damage(_label(cache, file), "", -1, "", problem)
        elif info.name != path.stem or not _has_rows(cache, info):
            problem = f"it was built over other rows than {info.kind}/{info.encoder} has, and is not used any more"
            yield Damage(_label(cache, path), "", -1, "", problem)


def _is_index_file(path: Path) -> bool:
    return path.suffix in (".json", ".faiss")


def _has_rows(cache: Path, info: IndexInfo) -> bool:
    """Tell whether an index is over the array as it is numbered now; damage of the array itself is said elsewhere."""
    path = cache / STORE / info.kind / info.encoder / METADATA
    try:
        return array_format.parse_group(path.read_bytes(), path).generation == info.generation
    except FileNotFoundError:
        return False
    except (OSError, CacheError):
        return True


def _label(cache: Path, path: Path) -> str:
    return path.relative_to(cache).as_posix()
