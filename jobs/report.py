"""`fluoro report RUN...`: build a run's report again, or one that compares several runs, from their results alone.

Comes in: run folders that `fluoro study` wrote. Goes out: ``report.html``, ``report.md`` and tables. No data, model or
cache is needed, and nothing is computed but, for several runs, the paired differences of their stored scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import Field

from analysis import report, run_record
from analysis.report import comparison
from engine.errors import DataError, UsageError
from jobs import compare, runs
from jobs.config import JobConfig

COMPARISON = Path("comparison")


class Config(JobConfig):
    """What `fluoro report` needs."""

    runs: list[Path] = Field(
        min_length=1, description="run folders that `fluoro study` wrote; several give one comparison"
    )
    shareable: bool = Field(False, description="leave out images, texts, sample ids and paths")
    replicates: int = Field(10_000, ge=100, description="bootstrap replicates of a comparison, by patient")
    seed: int = Field(0, description="seed of a comparison's resampling")


@dataclass(frozen=True)
class Result:
    """Where the report lies."""

    report: Path

    def lines(self) -> Iterator[str]:
        """Return the path."""
        yield str(self.report)


def run(config: Config, *, out: Path | None = None) -> Result:
    """Build the report.

    Parameters
    ----------
    config : Config
    out : Path, optional
        Folder to write to. For one run its own folder (``shareable`` in it with that option), for several
        ``comparison`` in the current folder unless given.

    Raises
    ------
    UsageError
        A folder is no run, or the output folder holds something else.
    DataError
        A shareable report would still name a sample.
    """
    if len(config.runs) == 1:
        if out is not None:
            _check_folder(out, config.runs)
        return Result(report.render_report(config.runs[0], shareable=config.shareable, out=out))
    records = [run_record.read_run(folder) for folder in config.runs]
    place = out or COMPARISON
    _check_folder(place, config.runs)
    return Result(comparison.render_comparison(records, _paired(config, records), place, shareable=config.shareable))


def _paired(config: Config, records: list[run_record.RunRecord]) -> comparison.Paired:
    """Return the paired differences between all settings, runs called as on the page, or why there are none."""
    folders = [record.folder.resolve() for record in records]
    called = dict(zip(map(str, folders), comparison.run_names(records), strict=True))

    def named(text: str) -> str:
        for folder in sorted(called, key=len, reverse=True):  # one's path may begin another's
            text = text.replace(folder, called[folder])
        return text

    try:
        found = compare.run(compare.Config(runs=folders, replicates=config.replicates, seed=config.seed))
    except (DataError, UsageError) as reason:
        return comparison.Paired(pd.DataFrame(), f"No paired differences: {named(str(reason))}.")
    differences = found.differences.copy()
    for column in ("setting", "other", "better"):
        differences[column] = differences[column].map(named)
    note = (
        f"Paired differences on the same {found.samples:,} test images of {found.groups:,} patients, "
        f"{found.replicates:,} resamples by patient."
    )
    return comparison.Paired(differences, note)


def _check_folder(out: Path, asked: list[Path]) -> None:
    """Refuse a folder that holds a run's record or anything but an earlier report."""
    if not out.exists() or not any(out.iterdir()):
        return
    if runs.is_run(out) or out.resolve() in {folder.resolve() for folder in asked}:
        raise UsageError(f"{out} is a run's own folder, whose report would be replaced; give another one with --out")
    strange = [path.name for path in out.iterdir() if path.name not in ("report.html", "report.md", "tables")]
    if strange:
        raise UsageError(f"{out} holds {strange[0]!r}, which is no part of a report; give another folder with --out")
