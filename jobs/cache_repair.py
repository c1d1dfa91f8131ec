"""`fluoro cache verify --repair`: drop what is damaged and, where data set and model are named, compute it again.

Comes in: a damaged cache. Goes out: one whose every row is as it was written. Exactly the dropped rows are computed, in
the batches in which they were computed first, so that they come out the same; without a data set and a model, the
commands that do it are printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from engine.arrays.row_lookup import RowLookup
from engine.errors import UsageError
from engine.upkeep import usage
from engine.upkeep.repair import RepairedArray, repair_cache, write_parents
from jobs.known_runs import KnownRuns, known_runs
from jobs.progress import Progress

if TYPE_CHECKING:
    from engine.dataset import Dataset
    from engine.encoder import Encoder
    from jobs.cache import VerifyConfig

COLUMNS = ["array", "rows", "keys found", "dropped", "unnamed", "recomputed"]


@dataclass(frozen=True)
class Repaired:
    """What was repaired.

    Parameters
    ----------
    cache : Path
    arrays : DataFrame
        The damaged arrays: rows now, rows whose key was found again, dropped rows that samples use, dropped rows that
        no sample table names, rows computed again.
    removed_tables, removed_indexes : list of str
        Removed, since they were damaged or over rows with other numbers.
    commands : list of str
        What makes whole what was not computed at once.
    failures : DataFrame
        Samples that could not be computed again: id, uri, what, reason.
    """

    cache: Path
    arrays: pd.DataFrame
    removed_tables: list[str]
    removed_indexes: list[str]
    commands: list[str]
    failures: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["id", "uri", "what", "reason"]))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the repaired arrays as a table."""
        return {"Repaired": self.arrays} if len(self.arrays) else {}

    def lines(self) -> Iterator[str]:
        """Return what was done, and what is left to do."""
        if len(self.arrays) and self.arrays["unnamed"].sum():
            yield (
                f"{self.arrays['unnamed'].sum():,} dropped rows are named by no sample table (prompts, for example): "
                "they are computed when they are asked for again"
            )
        if self.removed_tables:
            yield f"removed damaged sample tables, which `fluoro embed` writes anew: {', '.join(self.removed_tables)}"
        if self.removed_indexes:
            yield f"removed indexes that no longer fit their rows: {', '.join(self.removed_indexes)}"
        if not (len(self.arrays) or self.removed_tables or self.removed_indexes):
            yield f"nothing in {self.cache} is damaged"
        if self.commands:
            yield "to make the cache whole:"
            yield from (f"  {command}" for command in self.commands)


@dataclass(frozen=True)
class _Sources:
    """What the rows can be computed again from."""

    dataset: Dataset
    encoder: Encoder


def repair(config: VerifyConfig, cache: Path, *, progress: Progress) -> Repaired:
    """Repair a cache on a local disk.

    Raises
    ------
    UsageError
        A data set without a model, or a model without a data set.
    CacheError
        Something cannot be written, or is of a newer version.
    """
    if (config.dataset is None) != (config.model is None):
        raise UsageError("recomputing needs both, --dataset and --model; without both, the commands are printed")
    write_parents(cache)  # so that it can be opened
    runs = known_runs(cache / "runs")
    sources = _open(config, cache)
    told = dict(runs.descriptions)
    if sources:
        told[sources.encoder.id] = sources.encoder.description
    with progress.step("repair"):
        done = repair_cache(cache, told, _keys_of(sources, cache) if sources else None)
    recomputed, failures = _recompute(done.arrays, sources, runs, cache, progress) if sources else ({}, None)
    rows = []
    for array in done.arrays:
        count = recomputed.get(_label(array), 0)
        if not array.lost:
            rows.append((_label(array), array.rows + count, array.rescued, len(array.dropped), array.unnamed, count))
    table = pd.DataFrame(rows, columns=COLUMNS)
    commands = [*_embed_commands(done.arrays, recomputed, runs, cache), *_index_commands(done.indexes, cache)]
    found = Repaired(cache, table, done.tables, done.indexes, commands)
    return found if failures is None else Repaired(cache, table, done.tables, done.indexes, commands, failures)


def _open(config: VerifyConfig, cache: Path) -> _Sources | None:
    if config.dataset is None or config.model is None:
        return None
    from engine.precision import load_for  # torch, which a repair without recomputing does not need
    from engine.sources import open_dataset

    dataset = open_dataset(config.dataset, **config.data)
    # Not compared: its rows were there, and those that are left decide which precision that was.
    encoder = load_for(
        config.model, cache, device=config.device, precision=config.precision, decoder=config.decoder, check=False
    )
    return _Sources(dataset, encoder)


def _keys_of(sources: _Sources, cache: Path) -> Mapping[str, np.ndarray]:
    """Return the keys of a data set's images and texts, read where no table knows them."""
    from engine.cache import Cache

    opened = Cache(cache)
    images, texts = opened.image_keys(sources.dataset), opened.text_keys(sources.dataset)
    return {"key": images[images.any(axis=1)], "text_key": texts[texts.any(axis=1)]}


def _recompute(
    arrays: list[RepairedArray], sources: _Sources, runs: KnownRuns, cache: Path, progress: Progress
) -> tuple[dict[str, int], pd.DataFrame]:
    """Compute the dropped rows of one encoder again; return rows by array, and the samples that failed."""
    from engine.cache import Cache
    from engine.sample_keys import SampleKeys

    encoder, dataset, opened = sources.encoder, sources.dataset, Cache(cache)
    columns = {"key": opened.image_keys(dataset), "text_key": opened.text_keys(dataset)}
    recomputed: dict[str, int] = {}
    failures: list[pd.DataFrame] = []
    images = False
    for array in arrays:
        what = _product(array, encoder)
        if what is None or not (len(array.dropped) or array.unnamed):
            continue
        column = columns[usage.COLUMN_OF_KIND[array.kind]]
        chosen = np.flatnonzero(column.any(axis=1)) if array.unnamed else _among(column, array.dropped)
        plan = runs.plans.get((encoder.id, dataset.schema, what), {})
        report = opened.embed(
            dataset.take(chosen),
            encoder,
            [what],
            batch_size=plan.get("batch_size"),
            compiled=plan.get("compiled"),
            progress=progress,
        )
        recomputed[_label(array)] = report.computed[what]
        failures.append(report.failures)
        images = images or array.kind != "text"
    if images:
        # Embedding some samples has told the table that the others were not there.
        keys = SampleKeys(opened.storage)
        keys.save(dataset, keys.scan(dataset))
    return recomputed, pd.concat(failures, ignore_index=True) if failures else pd.DataFrame()


def _among(column: np.ndarray, keys: np.ndarray) -> np.ndarray:
    lookup = RowLookup()
    lookup.add(keys)
    return np.flatnonzero(lookup.find(column) >= 0)


def _product(array: RepairedArray, encoder: Any) -> str | None:
    """Return what an encoder computes for an array, None where the array is another encoder's."""
    if array.kind == "pixels":
        return "pixels" if array.name == encoder.preprocess.id else None
    name, _, layer = array.name.partition("@")
    if name != encoder.id:
        return None
    return f"tokens@{layer}" if array.kind == "tokens" else array.kind


def _embed_commands(
    arrays: list[RepairedArray], recomputed: Mapping[str, int], runs: KnownRuns, cache: Path
) -> Iterator[str]:
    """Yield one command a data set and encoder of which rows are still missing."""
    tables = usage.sample_tables(cache)
    wanted: dict[tuple[str, str], list[str]] = {}
    for array in arrays:
        if not len(array.dropped) or _label(array) in recomputed:
            continue
        encoder, _, layer = array.name.partition("@")
        if array.kind == "pixels":
            encoder = _encoder_with(array.name, runs) or array.name
        what = f"tokens@{layer}" if array.kind == "tokens" else array.kind
        for table in tables:
            if len(_among(usage.keys_in(table.table[usage.COLUMN_OF_KIND[array.kind]]), array.dropped)):
                wanted.setdefault((table.schema, encoder), []).append(what)
    for (schema, encoder), whats in wanted.items():
        yield runs.embed_command(cache, schema, encoder, whats)


def _encoder_with(preprocess: str, runs: KnownRuns) -> str | None:
    for name, description in runs.descriptions.items():
        if description.get("preprocess", {}).get("id") == preprocess:
            return name
    return None


def _index_commands(indexes: list[str], cache: Path) -> Iterator[str]:
    for name in indexes:
        encoder, kind, how = name.rsplit("-", 2)
        yield f"fluoro index --cache {cache} --encoder {encoder} --kind {kind} --how {how}"


def _label(array: RepairedArray) -> str:
    return f"{array.kind}/{array.name}"
