"""Repair: damaged rows are dropped, all others stay, and it is said which keys have to be computed again.

Comes in: a cache with damage. Goes out: one without, and for each array what became of it. A row whose key is damaged
but whose payload and check are not gets its key back where a sample table (or another row: swapped chunk files) names a
key that fits: the check binds both. Metadata are made again from the description. Sample tables and indexes that are
damaged, or indexes over rows that are numbered otherwise now, are removed: both can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.arrays import array_format
from engine.arrays.array_format import CHECK, STORE, ArrayFormat
from engine.arrays.array_verify import Damage, inspect_array, inspect_rows
from engine.arrays.durable import sync_folder, write_whole
from engine.arrays.lock import record_lock
from engine.arrays.row_check import row_checks
from engine.arrays.row_lookup import RowLookup, first_occurrences
from engine.arrays.storage import LocalStorage
from engine.errors import CacheError
from engine.keys import KEY_BYTES
from engine.upkeep import usage
from engine.upkeep.descriptions import Description, recovered_format
from engine.upkeep.rebuild import finish_leftovers, holding, rebuild
from engine.upkeep.verify import array_folders, parent_files, wrong_indexes, wrong_tables


@dataclass(frozen=True)
class RepairedArray:
    """What became of one damaged array.

    Parameters
    ----------
    kind, name : str
    damage : list of Damage
        What was found.
    rows : int
        That it has now.
    rescued : int
        Rows whose key was damaged and is known again.
    dropped : ndarray of uint8, (m, 16)
        Keys of the dropped rows that sample tables name: what to compute again.
    unnamed : int
        Dropped rows that no table names (prompts, imported rows, keys beyond recognition).
    lost : bool
        Nothing says any more what the array is, or it is another one, so it was left as it is.
    """

    kind: str
    name: str
    damage: list[Damage]
    rows: int
    rescued: int
    dropped: np.ndarray
    unnamed: int
    lost: bool = False


@dataclass(frozen=True)
class Repair:
    """What was done to a cache.

    Parameters
    ----------
    arrays : list of RepairedArray
        The damaged ones.
    tables, indexes : list of str
        Names of those that were removed.
    """

    arrays: list[RepairedArray]
    tables: list[str]
    indexes: list[str]


def repair_cache(
    cache: Path, told: Mapping[str, Description] | None = None, known: Mapping[str, np.ndarray] | None = None
) -> Repair:
    """Repair everything that is damaged.

    Parameters
    ----------
    cache : Path
    told : mapping of encoder id to description, optional
        For arrays whose zarr.json is unreadable.
    known : mapping of "key" or "text_key" to ndarray of uint8, (m, 16), optional
        Keys of images and of texts that may have been there, beside those that the sample tables name.

    Raises
    ------
    CacheError
        Something was written by a newer format version, or the cache cannot be written. What was repaired stays so.
    """
    finish_leftovers(cache)
    tables = usage.sample_tables(cache)
    arrays = []
    for kind, name in array_folders(cache):
        keys = usage.used_keys(tables, kind)
        if known is not None:
            keys = np.concatenate([keys, known[usage.COLUMN_OF_KIND[kind]]])
            keys = keys[first_occurrences(keys)]
        repaired = repair_array(cache, kind, name, keys, told or {})
        if repaired is not None:
            arrays.append(repaired)
    write_parents(cache)
    return Repair(arrays, _remove_tables(cache), remove_stale_indexes(cache))


def repair_array(
    cache: Path, kind: str, name: str, known: np.ndarray, told: Mapping[str, Description]
) -> RepairedArray | None:
    """Repair one array under its lock; None where nothing is wrong.

    Parameters
    ----------
    known : ndarray of uint8, (m, 16)
        Keys that sample tables name for this kind.
    told : mapping of encoder id to description
    """
    if not inspect_array(cache, kind, name).damage:
        return None
    folder = cache / STORE / kind / name
    with holding(cache, kind, name) as scratch:
        found = inspect_array(cache, kind, name)
        form, keys, sound, damage = found.form, found.keys, found.sound, found.damage
        if not damage:
            return None
        misplaced = form is not None and (form.kind, form.name) != (kind, name)
        if form is None or misplaced:
            # Rows of another encoder must not come to stand under this one's name.
            form = None if misplaced else recovered_format(cache, kind, name, told)
            if form is None:
                return RepairedArray(kind, name, damage, 0, 0, np.empty((0, KEY_BYTES), np.uint8), 0, lost=True)
            keys, sound, further = inspect_rows(LocalStorage(cache), form)
            damage = damage + further
        stored = keys
        keys, sound = _rescued(folder, form, keys, sound, known)
        rescued = np.flatnonzero((keys != stored).any(axis=1))
        rows = np.flatnonzero(sound)
        renumbered = len(rescued) > 0 or not np.array_equal(rows, np.arange(len(rows)))
        rebuild(folder, form, rows, keys[rows], scratch, renumbered=renumbered or len(rows) < len(keys))
        gone = _dropped(stored[~sound], known, keys[rows])
    return RepairedArray(kind, name, damage, len(rows), len(rescued), gone, max(int((~sound).sum()) - len(gone), 0))


def _dropped(keys: np.ndarray, known: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return those of the keys of dropped rows that tables name and no row that is left has."""
    keys = keys[first_occurrences(keys)]
    for others, wanted in ((known, True), (left, False)):
        lookup = RowLookup()
        lookup.add(others[first_occurrences(others)])
        keys = keys[(lookup.find(keys) >= 0) == wanted]
    return keys


def _rescued(
    folder: Path, form: ArrayFormat, keys: np.ndarray, sound: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and soundness, with the keys of rows whose payload and check are whole found among candidates.

    A check is a sum over the words of key and payload, so check minus payload is the key's own sum, by which the key is
    looked up.
    """
    candidates = np.concatenate([known, keys[~sound & keys.any(axis=1)]])
    taken = RowLookup()
    taken.add(keys[sound])
    candidates = candidates[first_occurrences(candidates)]
    candidates = candidates[taken.find(candidates) < 0]
    if not len(candidates) or sound.all():
        return keys, sound
    sums = row_checks(candidates, np.empty((len(candidates), 0), np.uint8))
    order = np.argsort(sums)
    keys, sound, free = keys.copy(), sound.copy(), np.ones(len(candidates), bool)
    for number in np.unique(np.flatnonzero(~sound) // form.chunk_rows):
        rows = np.arange(number * form.chunk_rows, min((number + 1) * form.chunk_rows, len(keys)))
        rows = rows[~sound[rows]]
        read = [_chunk(folder, form, part, int(number)) for part in (form.payload, CHECK)]
        if read[0] is None or read[1] is None:
            continue
        inside = rows - number * form.chunk_rows
        without_key = row_checks(np.zeros((len(rows), KEY_BYTES), np.uint8), read[0][inside])
        # Both sides hold the sum's constant part once.
        wanted = (
            read[1][inside] - without_key + row_checks(np.zeros((1, KEY_BYTES), np.uint8), np.empty((1, 0), np.uint8))
        )
        place = order[np.minimum(np.searchsorted(sums, wanted, sorter=order), len(order) - 1)]
        for row, candidate in zip(rows[sums[place] == wanted], place[sums[place] == wanted], strict=True):
            if free[candidate]:
                free[candidate] = False
                keys[row], sound[row] = candidates[candidate], True
    return keys, sound


def _chunk(folder: Path, form: ArrayFormat, part: str, number: int) -> np.ndarray | None:
    """Return a chunk of payload or checks, None where its file is lost or shortened."""
    try:
        content = np.fromfile(folder / part / form.chunk_file(part, number), form.part_dtype(part))
        return content.reshape(form.chunk_rows, *form.part_shape(part))
    except (OSError, ValueError):
        return None


def write_parents(cache: Path) -> None:
    """Write the zarr.json of the store and its kinds again where they are not what they should be."""
    expected = array_format.document_bytes(array_format.parent_document())
    paths = [cache / name for name in parent_files(array_folders(cache))]
    if all(path.is_file() and path.read_bytes() == expected for path in paths):
        return
    storage, scratch = LocalStorage(cache), "tmp/parents"
    with storage.lock("locks/parents.lock"):
        storage.sweep(scratch)
        for path in paths:
            write_whole(path, [expected], cache / scratch)
            sync_folder(path.parent)
        storage.drop(scratch)


def _remove_tables(cache: Path) -> list[str]:
    removed = []
    for damage in list(wrong_tables(cache)):
        path = cache / damage.array
        with record_lock(cache / "locks" / "datasets" / f"{path.stem}.lock"):
            if damage in wrong_tables(cache):  # and not written anew meanwhile
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
        removed.append(path.stem)
    return removed


def remove_stale_indexes(cache: Path) -> list[str]:
    """Remove indexes that are damaged or over rows that are numbered otherwise now; return their names."""
    removed = []
    for damage in list(wrong_indexes(cache)):
        remove_index(cache, Path(damage.array).stem)
        removed.append(Path(damage.array).stem)
    return removed


def remove_index(cache: Path, name: str) -> None:
    """Remove an index: first the JSON that makes it one."""
    path = cache / "indexes" / f"{name}.json"
    with record_lock(cache / "locks" / "indexes" / f"{name}.lock"):
        for each in (path, path.with_name(f"{name}.faiss")):
            try:
                each.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(f"cannot remove {each}: {error.strerror}; check the folder's rights") from error
        sync_folder(path.parent)
