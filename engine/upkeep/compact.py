"""Compaction: arrays without holes, doubles and, if asked for, without the rows that no sample uses any more.

Comes in: a cache and what may go. Goes out: the same arrays with the other rows, in their order, under new numbers;
indexes over the old numbers are removed. With `dry_run` it is only said what would go. Rows that no sample table names
may still be wanted (prompts, imported embeddings, arrays used without a data set), so they go on request only.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.arrays import array_folder
from engine.arrays.array_format import CHECK, KEY, STORE, ArrayFormat
from engine.arrays.array_verify import DOUBLES, HOLES, chunk_numbers, inspect_array
from engine.arrays.row_lookup import RowLookup
from engine.arrays.storage import LocalStorage
from engine.errors import CacheError, UsageError
from engine.upkeep import usage
from engine.upkeep.rebuild import REPAIR, finish_leftovers, holding, rebuild
from engine.upkeep.repair import remove_stale_indexes
from engine.upkeep.verify import array_folders


@dataclass(frozen=True)
class CompactedArray:
    """What went, or would go, from one array.

    Parameters
    ----------
    kind, name : str
    rows : int
        That stay.
    unused : int
        Rows that no sample uses any more.
    doubles, holes : int
    bytes : int
        Freed on disk, with chunk files that a killed writer has left.
    """

    kind: str
    name: str
    rows: int
    unused: int
    doubles: int
    holes: int
    bytes: int


def compact_cache(
    cache: Path, *, unused: bool = False, removed: bool = False, texts: bool = False, dry_run: bool = False
) -> tuple[list[CompactedArray], list[str]]:
    """Compact all arrays of a cache.

    Parameters
    ----------
    cache : Path
    unused : bool
        Drop image, pixel and token rows that no sample table names.
    removed : bool
        Also those that only samples name which their data set did not hold when it was last embedded.
    texts : bool
        With `unused` or `removed`: text rows too, prompts among them.
    dry_run : bool
        Change nothing.

    Returns
    -------
    arrays : list of CompactedArray
        Those from which something goes.
    indexes : list of str
        Names of the indexes that were removed.

    Raises
    ------
    CacheError
        An array is damaged, or the cache cannot be written. Arrays that were compacted before stay so.
    UsageError
        Nothing says which rows are used.
    """
    if not dry_run:
        finish_leftovers(cache)
    tables = usage.sample_tables(cache)
    dropping = unused or removed
    if dropping:
        _check_tables(cache, tables)
    found = []
    for kind, name in array_folders(cache):
        used = None
        if dropping and (kind != "text" or texts):
            used = usage.used_keys(tables, kind, last_scan_only=removed)
        compacted = compact_array(cache, kind, name, used, dry_run=dry_run)
        if compacted is not None:
            found.append(compacted)
    return found, [] if dry_run else remove_stale_indexes(cache)


def compact_array(
    cache: Path, kind: str, name: str, used: np.ndarray | None = None, *, dry_run: bool = False
) -> CompactedArray | None:
    """Compact one array under its lock; None where nothing goes.

    Parameters
    ----------
    used : ndarray of uint8, (m, 16), optional
        Keys that stay; all of them unless given.
    """
    folder = cache / STORE / kind / name
    with nullcontext(Path()) if dry_run else holding(cache, kind, name) as scratch:
        found = inspect_array(cache, kind, name)
        problems = [damage for damage in found.damage if damage.problem not in (HOLES, DOUBLES)]
        if problems or found.form is None:
            raise CacheError(f"{kind}/{name} is damaged ({problems[0].problem}); {REPAIR}, compact it then")
        kept = found.sound.copy()
        if used is not None:
            lookup = RowLookup()
            lookup.add(used)
            kept &= lookup.find(found.keys) >= 0
        rows = np.flatnonzero(kept)
        holes = int((~found.keys.any(axis=1)).sum())
        unused = int((found.sound & ~kept).sum())
        freed = _bytes_without(cache, found.form, len(rows))
        compacted = CompactedArray(
            kind, name, len(rows), unused, len(found.keys) - holes - int(found.sound.sum()), holes, freed
        )
        if len(rows) == len(found.keys) and not freed:
            return None
        if not dry_run:
            LocalStorage(cache).drop(array_folder.scratch_name(kind, name))
            rebuild(folder, found.form, rows, found.keys[rows], scratch, renumbered=len(rows) < len(found.keys))
        return compacted


def _bytes_without(cache: Path, form: ArrayFormat, rows: int) -> int:
    """Return the bytes of the chunk files that an array of so many rows does not need."""
    needed = -(-rows // form.chunk_rows)
    return sum(
        form.chunk_file_bytes(part)
        * sum(number >= needed for number in chunk_numbers(LocalStorage(cache), form, part)[0])
        for part in (form.payload, CHECK, KEY)
    )


def _check_tables(cache: Path, tables: list[usage.SampleTable]) -> None:
    damaged = [each.path.name for each in tables if not each.sound]
    if damaged:
        raise CacheError(
            f"the sample tables {', '.join(damaged)} of {cache} are damaged, so nobody can tell which rows are used; "
            "`fluoro cache verify --repair` removes them and `fluoro embed` writes them anew"
        )
    if not tables:
        raise UsageError(
            f"the cache {cache} has no sample table, so every row would count as unused; embed the data sets that are "
            "to stay first (what is there is not computed again), or remove an encoder with `fluoro cache rm`"
        )
