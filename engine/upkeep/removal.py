"""Removing an encoder: its arrays of all kinds, and the indexes over them.

Comes in: a cache and an id. Goes out: what would go, with its bytes, and then the cache without it. The folder of an
array is renamed away first, so it is gone at once for those who look for it, while those who have it open read on.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from engine.arrays import array_folder, folder_swap
from engine.arrays.array_format import STORE
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.storage import LocalStorage
from engine.errors import CacheError, UsageError
from engine.upkeep.rebuild import finish_leftovers, holding
from engine.upkeep.repair import remove_index
from engine.upkeep.verify import array_folders


@dataclass(frozen=True)
class Removal:
    """What belongs to an id.

    Parameters
    ----------
    arrays : list of (kind, name, rows, bytes)
        Rows are -1 where the array is too damaged to tell.
    indexes : list of (name, bytes)
    """

    arrays: list[tuple[str, str, int, int]]
    indexes: list[tuple[str, int]]

    @property
    def bytes(self) -> int:
        """On disk, all together."""
        return sum(part[-1] for part in self.arrays) + sum(size for _, size in self.indexes)


def parts_of(cache: Path, name: str) -> Removal:
    """Return what belongs to the id of an encoder or of a preprocessing (pixels).

    Raises
    ------
    UsageError
        Nothing of that name is in the cache; the nearest names are named.
    """
    finish_leftovers(cache)
    there = array_folders(cache)
    arrays = [
        (kind, found, _rows(cache, kind, found), folder_bytes(cache / STORE / kind / found))
        for kind, found in there
        if owner_of(kind, found) == name
    ]
    indexes = [
        (path.stem, sum(_bytes(path.with_suffix(suffix)) for suffix in (".faiss", ".json")))
        for path in _index_files(cache)
        if path.stem.rsplit("-", 2)[0] == name
    ]
    if not arrays and not indexes:
        known = sorted({owner_of(*each) for each in there})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise UsageError(
            f"the cache {cache} has nothing of {name!r}; it has {', '.join(near)}" if near else f"{cache} has no arrays"
        )
    return Removal(arrays, indexes)


def remove_parts(cache: Path, removal: Removal) -> None:
    """Remove them; a killed removal is gone on with by the same call.

    Raises
    ------
    CacheError
        A folder cannot be renamed or deleted.
    """
    for name, _ in removal.indexes:
        remove_index(cache, name)
    for kind, name, _, _ in removal.arrays:
        with holding(cache, kind, name) as scratch:
            folder = cache / STORE / kind / name
            LocalStorage(cache).drop(array_folder.scratch_name(kind, name))
            if folder.exists():
                folder_swap.remove_folder(scratch, folder)


def owner_of(kind: str, name: str) -> str:
    """Return the id of the encoder or preprocessing that an array belongs to."""
    return name.rpartition("@")[0] if kind == "tokens" else name


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder, those that vanish meanwhile left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        total += sum(_bytes(Path(parent) / name) for name in names)
    return total


def _rows(cache: Path, kind: str, name: str) -> int:
    try:
        return len(KeyedArray.open(cache, kind, name))
    except CacheError:
        return -1


def _bytes(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _index_files(cache: Path) -> list[Path]:
    """Return the JSON path of every index, also of one of which only the other file is left."""
    found = [path for path in (cache / "indexes").glob("*") if path.suffix in (".json", ".faiss")]
    return sorted({path.with_suffix(".json") for path in found})
