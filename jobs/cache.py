"""`fluoro cache ls` and `fluoro cache verify`: what is cached, and whether it is as it was written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet

from engine.array_verify import Damage, verify_array
from engine.cache import Cache
from engine.errors import CacheError
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes, spoken_rate, spoken_time

DAMAGE_SHOWN = 20


class ListConfig(CacheOptions):
    """What `fluoro cache ls` needs."""


class VerifyConfig(CacheOptions):
    """What `fluoro cache verify` needs."""


@dataclass(frozen=True)
class Listing:
    """What a cache holds.

    Parameters
    ----------
    cache : Path
    bytes : int
        On disk, all in all.
    arrays : DataFrame
        Columns kind, name, rows, row, dtype, bytes (on disk), model (its name in the encoder's description).
    datasets : DataFrame
        Columns name, samples, schema.
    indexes : list of str
    """

    cache: Path
    bytes: int
    arrays: pd.DataFrame = field(compare=False)
    datasets: pd.DataFrame = field(compare=False)
    indexes: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return arrays and data sets as tables."""
        shown = self.arrays.assign(bytes=[spoken_bytes(count) for count in self.arrays["bytes"]])
        tables = {"Arrays": shown, "Data sets": self.datasets}
        return {title: table for title, table in tables.items() if len(table)}

    def lines(self) -> Iterator[str]:
        """Return the rest as sentences."""
        if self.indexes:
            yield f"indexes: {', '.join(self.indexes)}"
        yield f"{spoken_bytes(self.bytes)} in {self.cache}" if self.bytes else f"nothing is cached in {self.cache}"


def ls(config: ListConfig) -> Listing:
    """List the arrays, data sets and indexes of a cache."""
    cache = Cache(config.cache)
    rows = []
    for kind, name in cache.arrays():
        array = cache.array(kind, name)
        form, described = array.form, array.form.description
        shape = " x ".join(map(str, form.row_shape))
        rows.append((kind, name, len(array), shape, str(form.dtype), _size(array.folder), described.get("name", "")))
    return Listing(
        cache.path,
        _size(cache.path),
        pd.DataFrame(rows, columns=["kind", "name", "rows", "row", "dtype", "bytes", "model"]),
        _datasets(cache.datasets_path),
        sorted(path.stem for path in cache.indexes_path.glob("*.faiss")),
    )


@dataclass(frozen=True)
class Verified:
    """What was checked, and all damage found.

    Parameters
    ----------
    arrays, rows : int
    bytes : int
        Payload read.
    seconds : float
    damage : DataFrame
        Columns array, part, chunk, rows, problem.
    """

    cache: Path
    arrays: int
    rows: int
    bytes: int
    seconds: float
    damage: pd.DataFrame = field(compare=False)

    def lines(self) -> Iterator[str]:
        """Return what was checked."""
        rate = spoken_rate(self.bytes / max(self.seconds, 1e-6) / 2**20)
        yield (
            f"{self.arrays} arrays, {self.rows:,} rows, {spoken_bytes(self.bytes)} checked in "
            f"{spoken_time(self.seconds)} ({rate} MB/s): {len(self.damage) or 'no'} damage"
        )


def check(config: VerifyConfig, *, progress: Progress | None = None) -> Verified:
    """Check every row, chunk file and metadata file; return the damage as a table."""
    progress = progress or Progress()
    cache, start = Cache(config.cache), time.perf_counter()
    found: list[Damage] = []
    rows = size = 0
    arrays = cache.arrays()
    with progress.step("verify", total=len(arrays), unit="arrays") as step:
        for kind, name in arrays:
            count, damage = verify_array(cache.path, kind, name)
            found += damage
            rows += count
            if not any(item.part == "" for item in damage):
                size += count * _row_bytes(cache, kind, name)
            step.advance()
    table = pd.DataFrame([item.as_dict() for item in found], columns=["array", "part", "chunk", "rows", "problem"])
    return Verified(cache.path, len(arrays), rows, size, time.perf_counter() - start, table)


def verify(config: VerifyConfig, *, progress: Progress | None = None) -> Verified:
    """Check everything.

    Raises
    ------
    CacheError
        There is damage: named by array, chunk and rows.
    """
    result = check(config, progress=progress)
    if len(result.damage):
        shown = [_sentence(Damage(**row)) for row in result.damage.head(DAMAGE_SHOWN).to_dict("records")]
        more = len(result.damage) - DAMAGE_SHOWN
        raise CacheError(
            f"{len(result.damage)} places of the cache {result.cache} are damaged:\n  "
            + "\n  ".join([*shown, *([f"and {more:,} more"] if more > 0 else [])])
            + "\nMove the folder of a damaged array away and embed again: what is missing is computed anew."
        )
    return result


def _sentence(damage: Damage) -> str:
    where = f"{damage.array}/{damage.part}" if damage.part else damage.array
    chunk = f", chunk {damage.chunk}" if damage.chunk >= 0 else ""
    return f"{where}{chunk}{f', rows {damage.rows}' if damage.rows else ''}: {damage.problem}"


def _row_bytes(cache: Cache, kind: str, name: str) -> int:
    try:
        return cache.array(kind, name).form.row_bytes
    except CacheError:
        return 0


def _datasets(folder: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = parquet.read_table(path, columns=["in_last_scan"])
        except (OSError, ValueError):
            continue
        schema = (table.schema.metadata or {}).get(b"fluoroscope.schema", b"").decode()
        rows.append((path.stem, int(np.sum(table["in_last_scan"].to_numpy())), schema))
    return pd.DataFrame(rows, columns=["name", "samples", "schema"])


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # a temporary file that was renamed meanwhile
    return total
