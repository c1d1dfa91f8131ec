"""Which samples use which rows: the sample tables of a cache, read together.

Comes in: a cache. Goes out: its tables, and the keys that they name. Rows that no table names may still be in use:
prompts, imported embeddings, and arrays that are read by key. A damaged table names nothing and says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine import sample_table
from engine.arrays.file_digest import seal_is_whole
from engine.arrays.row_lookup import first_occurrences
from engine.errors import UsageError
from engine.keys import KEY_BYTES

# Column of a table that names the rows of each kind of array.
COLUMN_OF_KIND = {"image": "key", "pixels": "key", "tokens": "key", "text": "text_key"}


@dataclass(frozen=True)
class SampleTable:
    """One sample table.

    Parameters
    ----------
    path : Path
    schema : str
        The data set's schema string.
    table : pyarrow.Table
        Columns of `engine.sample_table`; no rows where the file is damaged.
    sound : bool
    """

    path: Path
    schema: str
    table: pa.Table
    sound: bool

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.path.stem


def sample_tables(cache: Path) -> list[SampleTable]:
    """Return all sample tables of a cache."""
    found = []
    for path in sorted((cache / "datasets").glob("*.parquet")):
        sound = seal_is_whole(path) is not False
        table = sample_table.load_table(path) if sound else sample_table.COLUMNS.empty_table()
        notes = table.schema.metadata or {}
        found.append(SampleTable(path, notes.get(sample_table.SCHEMA_NOTE, b"").decode(), table, sound))
    return found


def tables_of(cache: Path, dataset: str) -> list[SampleTable]:
    """Return the tables of a data set, by its name or its schema string.

    Raises
    ------
    UsageError
        There is none; those there are, are named.
    """
    there = sample_tables(cache)
    found = [each for each in there if dataset in (each.name, each.schema)]
    if not found:
        known = "; ".join(f"{each.name} ({each.schema})" if each.schema else each.name for each in there)
        raise UsageError(
            f"the cache {cache} has no sample table of the data set {dataset!r}; "
            + (f"it has those of {known}" if known else "it has none: `fluoro embed` writes one")
        )
    return found


def one_table_of(cache: Path, dataset: str) -> SampleTable:
    """Return the table of a data set where there is exactly one; UsageError naming them where there are several."""
    found = tables_of(cache, dataset)
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise UsageError(f"the cache {cache} has several sample tables of {dataset!r}; name one of {names}")
    return found[0]


def keys_in(column: pa.ChunkedArray) -> np.ndarray:
    """Return the keys of a binary column that are there, (m, 16) uint8, in its order."""
    there = column.filter(pc.equal(pc.binary_length(column), KEY_BYTES))
    parts = [_bytes_of(chunk) for chunk in there.chunks if len(chunk)]
    return np.concatenate(parts) if parts else np.empty((0, KEY_BYTES), np.uint8)


def used_keys(tables: Iterable[SampleTable], kind: str, *, last_scan_only: bool = False) -> np.ndarray:
    """Return the different keys that tables name for a kind of array, (m, 16) uint8.

    Parameters
    ----------
    tables : iterable of SampleTable
    kind : "image", "text", "pixels" or "tokens"
    last_scan_only : bool
        Leave out samples that their data set did not hold when it was last embedded.
    """
    column = COLUMN_OF_KIND[kind]
    chosen = [each.table.filter(each.table["in_last_scan"]) if last_scan_only else each.table for each in tables]
    parts = [keys_in(table[column]) for table in chosen]
    keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *parts])
    return keys[first_occurrences(keys)]


def _bytes_of(chunk: pa.BinaryArray) -> np.ndarray:
    """Return an Arrow array of 16-byte values as (n, 16) uint8."""
    _, offsets, data = chunk.buffers()
    first = np.frombuffer(offsets, np.int32)[chunk.offset]
    return np.frombuffer(data, np.uint8)[first : first + KEY_BYTES * len(chunk)].reshape(-1, KEY_BYTES)
