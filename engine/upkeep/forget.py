"""Forgetting a patient or a sample: their rows, their entries in indexes and tables.

Comes in: sample tables and which of their samples to forget. Goes out: first a plan, which names what goes and what has
to stay since others use the same content; then a cache without it. Order makes it safe against a kill: indexes (they
hold vectors) go first, then rows, and last the tables' entries, by which the same command finds again what is left.
Rebuilt arrays hold nothing of the dropped rows, not even behind their last row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.arrays import array_folder
from engine.arrays.array_format import STORE
from engine.arrays.array_verify import inspect_array
from engine.arrays.row_lookup import RowLookup, first_occurrences
from engine.arrays.storage import LocalStorage
from engine.errors import CacheError, UsageError
from engine.keys import KEY_BYTES
from engine.sample_table import put_table
from engine.upkeep import usage
from engine.upkeep.rebuild import REPAIR, finish_leftovers, holding, rebuild
from engine.upkeep.repair import remove_index
from engine.upkeep.usage import COLUMN_OF_KIND, SampleTable
from engine.upkeep.verify import array_folders

NAMES_SHOWN = 5


@dataclass(frozen=True)
class Forgetting:
    """What is to be forgotten.

    Parameters
    ----------
    tables : list of SampleTable
        Those that name the samples.
    samples : list of str
        Their ids.
    groups : list of str
        The patients that are forgotten as a whole.
    keys : dict of "key" or "text_key" to ndarray of uint8, (m, 16)
        Of images and texts that only they have.
    rows : dict of (kind, name) to int
        Rows that go, by array.
    indexes : list of str
        Indexes over these arrays, which go as a whole.
    shared : list of str
        Contents that stay, each with the samples that use them too, as sentences.
    """

    tables: list[SampleTable]
    samples: list[str]
    groups: list[str]
    keys: dict[str, np.ndarray]
    rows: dict[tuple[str, str], int]
    indexes: list[str]
    shared: list[str]


def plan_forgetting(
    cache: Path, dataset: str, *, groups: Sequence[str] = (), samples: Sequence[str] = ()
) -> Forgetting:
    """Find what belongs to patients or samples of a data set, and to nobody else in any table of the cache.

    Parameters
    ----------
    cache : Path
    dataset : str
        Name or schema string of the data set, as `fluoro cache ls` prints them; its files are not needed.
    groups : sequence of str
        Patients.
    samples : sequence of str
        Ids of single samples.

    Raises
    ------
    UsageError
        No such table, patient or sample; the nearest are named.
    CacheError
        A table is damaged, so nobody can tell who else uses a row; or an array is.
    """
    finish_leftovers(cache)
    everything = usage.sample_tables(cache)
    damaged = [each.path.name for each in everything if not each.sound]
    if damaged:
        raise CacheError(
            f"the sample tables {', '.join(damaged)} are damaged, so nobody can tell who else uses a row; {REPAIR}"
        )
    tables = usage.tables_of(cache, dataset)
    chosen = {each.name: _chosen(each.table, groups, samples) for each in tables}
    _check_found(tables, "group", groups)
    _check_found(tables, "id", samples)
    keys, shared = {}, []
    for column in ("key", "text_key"):
        theirs = [usage.keys_in(each.table.filter(chosen[each.name])[column]) for each in tables]
        others = [
            (each, each.table.filter(pc.invert(chosen[each.name])) if each.name in chosen else each.table)
            for each in everything
        ]
        keys[column], said = _only_theirs(np.concatenate(theirs), others, column)
        shared += said
    rows = {
        (kind, name): count
        for kind, name in array_folders(cache)
        if (count := _rows_with(cache, kind, name, keys[COLUMN_OF_KIND[kind]]))
    }
    indexes = [
        path.stem
        for path in sorted((cache / "indexes").glob("*.faiss"))
        if any(path.stem.rsplit("-", 2)[:2] == [name, kind] for kind, name in rows)
    ]
    ids = pa.concat_arrays(
        [chunk for each in tables for chunk in each.table.filter(chosen[each.name])["id"].chunks]
        or [pa.array([], pa.large_string())]
    )
    return Forgetting(tables, sorted(set(ids.to_pylist())), list(groups), keys, rows, indexes, shared)


def forget(cache: Path, plan: Forgetting) -> None:
    """Carry a plan out; killed at any moment, the same command finds and forgets the rest."""
    for name in plan.indexes:
        remove_index(cache, name)
    for kind, name in plan.rows:
        _drop_rows(cache, kind, name, plan.keys[COLUMN_OF_KIND[kind]])
    for each in plan.tables:
        _drop_samples(cache, each, plan)


def _chosen(table: pa.Table, groups: Sequence[str], samples: Sequence[str]) -> pa.Array:
    """Return a mask of the samples to forget."""
    by_group = pc.is_in(table["group"], value_set=pa.array(list(groups), pa.large_string()))
    by_id = pc.is_in(table["id"], value_set=pa.array(list(samples), pa.large_string()))
    return pc.or_(by_group, by_id)


def _check_found(tables: Sequence[SampleTable], column: str, wanted: Sequence[str]) -> None:
    """Raise UsageError for a name that no table has."""
    for name in wanted:
        if not any(pc.any(pc.equal(each.table[column], name)).as_py() for each in tables):
            known = [str(value) for each in tables for value in pc.unique(each.table[column]).to_pylist()]
            near = difflib.get_close_matches(name, known[:50_000], n=3)
            what = "patient (group)" if column == "group" else "sample"
            said = f"; nearest: {', '.join(near)}" if near else ""
            raise UsageError(f"no {what} {name!r} in {', '.join(each.name for each in tables)}{said}")


def _only_theirs(
    theirs: np.ndarray, others: Iterable[tuple[SampleTable, pa.Table]], column: str
) -> tuple[np.ndarray, list[str]]:
    """Return the keys that no other sample has, and who has the rest."""
    theirs = theirs[first_occurrences(theirs)]
    lookup = RowLookup()
    lookup.add(theirs)
    alone, shared = np.ones(len(theirs), bool), []
    what = "image" if column == "key" else "text"
    for each, rest in others:
        rest = rest.filter(pc.equal(pc.binary_length(rest[column]), KEY_BYTES))
        found = lookup.find(usage.keys_in(rest[column]))
        if not (found >= 0).any():
            continue
        alone[found[found >= 0]] = False
        holders = [str(name) for name in rest["id"].filter(pa.array(found >= 0)).slice(0, NAMES_SHOWN).to_pylist()]
        count = int((found >= 0).sum())
        more = f" and {count - len(holders):,} more" if count > len(holders) else ""
        rows = len(np.unique(found[found >= 0]))
        shared.append(f"{rows:,} {what} rows stay, which {', '.join(holders)}{more} of {each.name} have too")
    return theirs[alone], shared


def _rows_with(cache: Path, kind: str, name: str, keys: np.ndarray) -> int:
    found = inspect_array(cache, kind, name)
    if found.damage:
        raise CacheError(f"{kind}/{name} is damaged ({found.damage[0].problem}); {REPAIR}, forget then")
    return int((_places(found.keys, keys) >= 0).sum())


def _places(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    lookup = RowLookup()
    lookup.add(wanted)
    return lookup.find(keys)


def _drop_rows(cache: Path, kind: str, name: str, keys: np.ndarray) -> None:
    with holding(cache, kind, name) as scratch:
        found = inspect_array(cache, kind, name)
        rows = np.flatnonzero(found.sound & (_places(found.keys, keys) < 0))
        if found.form is None or found.damage:
            raise CacheError(f"{kind}/{name} is damaged; {REPAIR}, forget then")
        # What a killed writer has left may be theirs too.
        LocalStorage(cache).drop(array_folder.scratch_name(kind, name))
        if len(rows) < len(found.keys):
            rebuild(cache / STORE / kind / name, found.form, rows, found.keys[rows], scratch, renumbered=True)


def _drop_samples(cache: Path, each: SampleTable, plan: Forgetting) -> None:
    """Write a table without the forgotten samples, as it is now."""
    storage = LocalStorage(cache)
    with storage.lock(f"locks/datasets/{each.name}.lock"):
        now = next((table for table in usage.sample_tables(cache) if table.name == each.name), None)
        if now is None:
            return
        left = now.table.filter(pc.invert(_chosen(now.table, plan.groups, plan.samples)))
        put_table(storage, each.name, left)
