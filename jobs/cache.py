"""`fluoro cache ls` and `fluoro cache verify`: what is cached, and whether it is as it was written.

A repair is `jobs.cache_repair`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from engine.arrays.array_format import STORE
from engine.arrays.array_verify import Damage
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.storage import LocalStorage, Storage, storage_of
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.last_use import last_use
from engine.sample_table import read_parquet, table_name
from engine.upkeep.removal import folder_bytes
from engine.upkeep.verify import verify_cache
from jobs import cache_repair
from jobs.cache_repair import Repaired
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes, spoken_rate, spoken_time

DAMAGED = "damaged: fluoro cache verify"
DAMAGE_SHOWN = 20
DAMAGE_COLUMNS = ("array", "part", "chunk", "rows", "problem")
NEXT_STEP = (
    "`fluoro cache verify --repair` drops exactly these rows and keeps all others; with --dataset and --model it "
    "computes them again at once, without it prints the commands that do."
)
LOST = (
    "What is left has lost its description: name its model, whose id is the array's name (--dataset DATASET --model "
    "MODEL), and its rows are kept; or remove it with `fluoro cache rm`. An array in the folder of another one is to "
    "be renamed to what its attributes say."
)


class ListConfig(CacheOptions):
    """What `fluoro cache ls` needs."""


class VerifyConfig(CacheOptions):
    """What `fluoro cache verify` needs."""

    repair: bool = Field(False, description="drop what is damaged, and compute it again where it is told from what")
    dataset: str | None = Field(None, description="data set whose rows are computed again; its schema string")
    data: dict[str, Any] = Field(default_factory=dict, description="options of the data set")
    model: str | None = Field(None, description="model that computes them")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="numbers the model computes in")
    decoder: Literal["exact", "fast"] = Field("exact", description="as the rows were computed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Listing:
    """What a cache holds.

    Parameters
    ----------
    cache : str
        A path or a URL.
    bytes : int
        On disk, all in all; elsewhere than in a folder that of the arrays' chunks alone.
    arrays : DataFrame
        Columns kind, name, rows, row, dtype, bytes (on disk), model (its name in the encoder's description), last use
        (to the hour; reading and writing).
    datasets : DataFrame
        Columns name, samples, schema.
    indexes : list of str
    """

    cache: str
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
    storage, rows = cache.storage, []
    folder = cache.path if isinstance(storage, LocalStorage) else None
    for kind, name in cache.arrays():
        used = last_use(folder, kind, name) if folder else None
        size = folder_bytes(folder / STORE / kind / name) if folder else 0
        try:
            array = KeyedArray.open(storage, kind, name)  # not by the cache, for which that would be a use
        except CacheError:
            rows.append((kind, name, 0, "", "", size, DAMAGED, _moment(used)))
            continue
        form, shape = array.form, " x ".join(map(str, array.form.row_shape))
        model = form.description.get("name", "")
        size = size if folder else form.bytes_of(len(array))
        rows.append((kind, name, len(array), shape, str(form.dtype), size, model, _moment(used)))
    arrays = pd.DataFrame(rows, columns=["kind", "name", "rows", "row", "dtype", "bytes", "model", "last use"])
    size = folder_bytes(folder) if folder else int(arrays["bytes"].sum())
    return Listing(cache.address, size, arrays, _datasets(storage), _stems(storage, "indexes", ".faiss"))


def _moment(seconds: float | None) -> str:
    """Return a time as people write it, "" where it is not known."""
    return "" if seconds is None else datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True)
class Verified:
    """What was checked, and all damage found.

    Parameters
    ----------
    cache : str
        A path or a URL.
    arrays, rows : int
    bytes : int
        Payload read.
    seconds : float
    damage : DataFrame
        Columns array, part, chunk, rows, problem.
    next_step : str
        What to do about it.
    """

    cache: str
    arrays: int
    rows: int
    bytes: int
    seconds: float
    damage: pd.DataFrame = field(compare=False)
    next_step: str = ""

    @property
    def exit_status(self) -> int:
        """1 where there is damage."""
        return 1 if len(self.damage) else 0

    def lines(self) -> Iterator[str]:
        """Return what was checked and found."""
        rate = spoken_rate(self.bytes / max(self.seconds, 1e-6) / 2**20)
        yield (
            f"{self.arrays} arrays, {self.rows:,} rows, {spoken_bytes(self.bytes)} checked in "
            f"{spoken_time(self.seconds)} ({rate} MB/s): {len(self.damage) or 'no'} damage"
        )
        if len(self.damage):
            yield f"{len(self.damage)} places of the cache {self.cache} are damaged:"
            for row in self.damage.head(DAMAGE_SHOWN).to_dict("records"):
                yield f"  {_sentence(Damage(**row))}"
            if len(self.damage) > DAMAGE_SHOWN:
                yield f"  and {len(self.damage) - DAMAGE_SHOWN:,} more (--json lists all)"
            yield self.next_step


class DamagedCache(CacheError):
    """A cache in which damage was found; `result` says all of it."""

    def __init__(self, result: Verified) -> None:
        super().__init__("\n".join(list(result.lines())[1:]))
        self.result = result


def check(config: VerifyConfig, *, progress: Progress | None = None) -> Verified:
    """Check every row, chunk file and metadata file, sample tables and indexes; return the damage as a table."""
    progress = progress or Progress()
    # Not a Cache: one whose own metadata are damaged cannot be opened.
    storage, start = storage_of(config.cache), time.perf_counter()
    with progress.step("verify", unit="arrays") as step:
        found = verify_cache(storage, lambda name, done, total: step.update(done, total))
    table = pd.DataFrame([item.as_dict() for item in found.damage], columns=list(DAMAGE_COLUMNS))
    seconds = time.perf_counter() - start
    return Verified(
        storage.address, found.arrays, found.rows, found.bytes, seconds, table, NEXT_STEP if len(table) else ""
    )


def verify(config: VerifyConfig, *, progress: Progress | None = None) -> Verified | Repaired:
    """Check everything; with ``repair``, drop what is damaged and compute it again.

    Raises
    ------
    UsageError
        No such folder, or a data set or a model is named without what else recomputing needs.
    DamagedCache
        There is damage (left): named by array, chunk and rows.
    """
    progress, storage = progress or Progress(), storage_of(config.cache)
    if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
        raise UsageError(f"there is no cache to verify in {storage.address}: no such folder; name another with --cache")
    if not config.repair:
        named = [name for name in ("dataset", "model") if getattr(config, name) is not None]
        if named:
            raise UsageError(f"--{named[0]} says from what damaged rows are computed again; add --repair")
        result = check(config, progress=progress)
        if len(result.damage):
            raise DamagedCache(result)
        return result
    repaired = cache_repair.repair(config, storage.local_folder(), progress=progress)
    left = check(config, progress=progress)
    if len(left.damage):
        raise DamagedCache(
            replace(left, next_step="\n".join(["Everything else is repaired.", *repaired.lines(), LOST]))
        )
    return repaired


def tell(config: VerifyConfig, *, progress: Progress | None = None) -> Verified | Repaired:
    """Do what `verify` does, and return damage as a result with exit status 1, so that --json lists it."""
    try:
        return verify(config, progress=progress)
    except DamagedCache as error:
        return error.result


def _sentence(damage: Damage) -> str:
    where = f"{damage.array}/{damage.part}" if damage.part else damage.array
    chunk = f", chunk {damage.chunk}" if damage.chunk >= 0 else ""
    return f"{where}{chunk}{f', rows {damage.rows}' if damage.rows else ''}: {damage.problem}"


def _stems(storage: Storage, folder: str, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in storage.names(folder) if name.endswith(suffix)]


def _datasets(storage: Storage) -> pd.DataFrame:
    rows = []
    for name in _stems(storage, "datasets", ".parquet"):
        try:
            with storage.reading(table_name(name)) as path:
                table = read_parquet(path, ["in_last_scan"])
                samples = int(np.sum(table["in_last_scan"].to_numpy()))
        except (OSError, ValueError, KeyError):
            continue
        schema = (table.schema.metadata or {}).get(b"fluoroscope.schema", b"").decode()
        rows.append((name, samples, schema))
    return pd.DataFrame(rows, columns=["name", "samples", "schema"])
