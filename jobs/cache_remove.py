"""`fluoro cache rm` and `fluoro cache forget`: an encoder goes, or a patient.

Comes in: what is to go. Goes out: first what that is, in rows and bytes, and a question where there is a terminal to
ask; then the cache without it, and what remains elsewhere, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from engine.arrays.storage import storage_of
from engine.errors import UsageError
from engine.upkeep.forget import Forgetting, forget, plan_forgetting
from engine.upkeep.removal import Removal, parts_of, remove_parts
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes
from jobs.run_forgetting import Names, clean_runs

SHOWN = 20


class Confirmed(CacheOptions):
    """Fields of the verbs that delete."""

    yes: bool = Field(False, description="do not ask")
    dry_run: bool = Field(False, description="only say what would go")


class RmConfig(Confirmed):
    """What `fluoro cache rm` needs."""

    encoder: str = Field(description="id of the encoder, or of the preprocessing whose pixels go")


class ForgetConfig(Confirmed):
    """What `fluoro cache forget` needs."""

    dataset: str = Field(description="name or schema string of the data set, as `fluoro cache ls` prints them")
    group: list[str] = Field(default_factory=list, description="patients to forget")
    id: list[str] = Field(default_factory=list, description="single samples to forget")
    runs: list[Path] = Field(default_factory=list, description="further folders of runs, outside the cache")

    @model_validator(mode="after")
    def _asked(self) -> ForgetConfig:
        if not (self.group or self.id):
            raise ValueError("nobody to forget; give --group PATIENT or --id SAMPLE, each as often as wanted")
        return self


@dataclass(frozen=True)
class Removed:
    """What was removed, or would be.

    Parameters
    ----------
    encoder : str
    parts : DataFrame
        Columns part, rows, bytes.
    bytes : int
    done : bool
        False after a dry run.
    """

    encoder: str
    parts: pd.DataFrame
    bytes: int
    done: bool

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the parts."""
        return {self.encoder: self.parts.assign(bytes=[spoken_bytes(size) for size in self.parts["bytes"]])}

    def lines(self) -> Iterator[str]:
        """Return what was freed."""
        yield f"{spoken_bytes(self.bytes)} {'freed' if self.done else 'would be freed; nothing was changed'}"


def rm(config: RmConfig) -> Removed:
    """Remove an encoder with all its arrays and indexes.

    Raises
    ------
    UsageError
        No such encoder, or nobody to ask and --yes not given.
    """
    cache = storage_of(config.cache).local_folder()
    found = parts_of(cache, config.encoder)
    rows = [(f"{kind}/{name}", count, size) for kind, name, count, size in found.arrays]
    rows += [(f"indexes/{name}", 0, size) for name, size in found.indexes]
    table = pd.DataFrame(rows, columns=["part", "rows", "bytes"])
    if not config.dry_run:
        _confirm(config, _question(found, config.encoder))
        remove_parts(cache, found)
    return Removed(config.encoder, table, found.bytes, not config.dry_run)


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, or would be.

    Parameters
    ----------
    samples : list of str
    rows : DataFrame
        Columns array, rows.
    indexes : list of str
        Removed; a command builds each again.
    records : int
        Entries taken out of the records of runs.
    figures, reports : list of Path
        Deleted pictures, and reports that were built again.
    remaining : list of str
        What stays, and why or what to do about it.
    done : bool
        False after a dry run.
    """

    samples: list[str]
    rows: pd.DataFrame
    indexes: list[str]
    records: int
    figures: list[Path]
    reports: list[Path]
    remaining: list[str] = field(default_factory=list)
    done: bool = True

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the rows by array."""
        return {"Rows": self.rows} if len(self.rows) else {}

    def lines(self) -> Iterator[str]:
        """Return what went and what stays."""
        gone = "" if self.done else "would be "
        yield f"{len(self.samples):,} samples {gone}forgotten: {_some(self.samples)}"
        if self.indexes:
            yield f"indexes {gone}removed, which hold vectors; `fluoro index` builds them: {', '.join(self.indexes)}"
        if self.records or self.figures:
            yield f"runs: {self.records:,} records {gone}taken out, {len(self.figures):,} figures {gone}deleted"
        for report in self.reports:
            yield f"report {gone}built again without them: {report}"
        if self.remaining:
            yield "what remains:"
            yield from (f"  {each}" for each in self.remaining)
        if not self.done:
            yield "nothing was changed"


def forget_samples(config: ForgetConfig, *, progress: Progress | None = None) -> Forgotten:
    """Forget patients or samples.

    Raises
    ------
    UsageError
        No such data set, patient or sample, or nobody to ask and --yes not given.
    CacheError
        Something in the cache is damaged, so that nobody can tell who uses what.
    """
    progress = progress or Progress()
    cache = storage_of(config.cache).local_folder()
    with progress.step("look"):
        plan = plan_forgetting(cache, config.dataset, groups=config.group, samples=config.id)
    names = _names(plan, config)
    if not config.dry_run:
        _confirm(
            config,
            f"forget {len(plan.samples):,} samples, {_some(plan.samples)}, with {sum(plan.rows.values()):,} rows?",
        )
    roots = [cache / "runs", *config.runs]
    # Runs first and the sample tables last: by those the same command finds what a killed one has left.
    with progress.step("runs"):
        cleaned = clean_runs(roots, names, dry_run=config.dry_run)
    if not config.dry_run:
        with progress.step("rows"):
            forget(cache, plan)
    rows = [(f"{kind}/{name}", count) for (kind, name), count in plan.rows.items()]
    table = pd.DataFrame(rows, columns=["array", "rows"])
    remaining = [*plan.shared, *cleaned.remaining, *_advice(plan, cache)]
    return Forgotten(
        plan.samples,
        table,
        plan.indexes,
        cleaned.records,
        cleaned.figures,
        cleaned.reports,
        remaining,
        not config.dry_run,
    )


def _names(plan: Forgetting, config: ForgetConfig) -> Names:
    samples = pa.array(plan.samples, pa.large_string())
    uris: set[str] = set()
    for each in plan.tables:
        uris |= set(each.table.filter(pc.is_in(each.table["id"], value_set=samples))["uri"].to_pylist()) - {""}
    return Names(
        frozenset([*plan.samples, *uris]), frozenset(config.group), frozenset(each.schema for each in plan.tables)
    )


def _advice(plan: Forgetting, cache: Path) -> Iterator[str]:
    """Yield what no cache can know."""
    schemas = ", ".join(sorted({each.schema for each in plan.tables}))
    yield f"the images and texts themselves: as long as {schemas} holds them, the next `fluoro embed` adds them again"
    yield (
        "rows of earlier versions of their files, which nobody can tell from others: "
        f"`fluoro cache compact --unused --cache {cache}` drops what no sample uses"
    )
    yield "exports, and runs outside the cache (name their folders with --runs)"


def _question(found: Removal, encoder: str) -> str:
    rows = sum(max(count, 0) for _, _, count, _ in found.arrays)
    what = f"{len(found.arrays)} arrays with {rows:,} rows and {len(found.indexes)} indexes"
    return f"remove {encoder}: {what}, {spoken_bytes(found.bytes)}?"


def _confirm(config: Confirmed, question: str) -> None:
    """Ask on a terminal; elsewhere --yes must be given."""
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask on: add --yes, or --dry-run to see what would go")
    import click

    if not click.confirm(question, err=True):
        raise UsageError("nothing was changed")


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
