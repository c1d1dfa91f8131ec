"""`fluoro compare`: set finished runs side by side, on the same samples, with paired intervals.

Comes in: run folders that `study`, `zeroshot`, `probe` or `finetune` left (their ``scores.npz``). Goes out: each
setting's metrics, and the difference of each two with interval and corrected p-value, from resamples of the patients in
which both are scored. Nothing is computed again: no data, model or cache is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis.bootstrap import bootstrap_metrics
from analysis.comparison import paired_differences, too_few_replicates
from analysis.metrics import OVERALL_METRICS, Prediction
from analysis.run_record import RunRecord, Scores, read_run
from engine.errors import DataError, UsageError
from engine.tables import offer
from jobs.config import JobConfig
from jobs.metric_tables import overall_table

METRICS = ("f1_macro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro")
IDS_SHOWN = 3
# Verbs whose runs never keep scores, whatever their version.
UNSCORED = ("distances", "cam", "cam-check", "cam-sweep", "embed", "finetune average", "finetune wise")


class Config(JobConfig):
    """What `fluoro compare` needs."""

    runs: list[Path] = Field(description="run folders; the first is what the others are held against")
    protocol: Literal["sound", "paper"] | None = Field(
        None, description="compare settings of this protocol only; all that the runs have if empty"
    )
    metrics: list[str] = Field(list(METRICS), min_length=1, description="overall metrics that are compared")
    common: bool = Field(False, description="compare on the samples that all runs have")
    against: str | None = Field(None, description="compare each setting with this one only; with each other if empty")
    replicates: int = Field(10_000, ge=100, description="bootstrap replicates, by patient")
    seed: int = Field(0, description="seed of resampling")


@dataclass(frozen=True)
class Compared:
    """Settings of several runs on the same samples.

    Parameters
    ----------
    samples, groups : int
        Test samples that all runs share, and their patients.
    left_out : int
        Samples of some runs that others lack (with ``common``).
    metrics : DataFrame
        One row a setting, metric and label: value, low, high, n, replicates.
    differences : DataFrame
        `analysis.comparison.paired_differences`.
    """

    samples: int
    groups: int
    left_out: int
    replicates: int
    metrics: pd.DataFrame = field(compare=False)
    differences: pd.DataFrame = field(compare=False)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the settings side by side, and their differences."""
        shown = self.differences.drop(columns=["label", "replicates"])
        return {
            "On the test split, with 95 % intervals by patient": overall_table(self.metrics),
            "Paired differences; p_holm and better hold for all of these together": shown,
        }

    def lines(self) -> Iterator[str]:
        """Return what was compared."""
        yield f"{self.samples:,} samples of {self.groups:,} patients, {self.replicates:,} resamples"
        if few := too_few_replicates(self.differences):
            yield few
        if self.left_out:
            yield f"{self.left_out:,} samples are left out, because not all runs have them"


@dataclass(frozen=True)
class _Entry:
    """One setting of one run."""

    record: RunRecord
    scores: Scores
    place: int

    @property
    def setting(self) -> str:
        return self.scores.settings[self.place]

    @property
    def protocol(self) -> str:
        return self.scores.protocols[self.place]


def run(config: Config) -> Compared:
    """Compare runs.

    Raises
    ------
    UsageError
        A folder that is no run or kept no scores, fewer than two settings, unknown metrics.
    DataError
        Runs tested on different samples, labels or truths, or without patients.
    """
    unknown = [name for name in config.metrics if name not in OVERALL_METRICS]
    if unknown:
        raise UsageError(f"unknown metric {unknown[0]!r}; {offer(unknown[0], OVERALL_METRICS)}")
    records = [read_run(folder) for folder in config.runs]
    entries = _entries(records, config.protocol)
    names = _unique_names(entries)
    if len(names) < 2:
        raise UsageError(f"only {names[0]!r} to compare; give another run")
    if config.against is not None and config.against not in names:
        raise UsageError(f"no setting {config.against!r} in these runs; {offer(config.against, names)}")
    labels = _labels(records)
    ids, left_out = _shared_ids(entries, config.common)
    truth, groups = _truth(entries, ids, labels), _groups(entries, ids)
    predictions = {}
    for name, entry in zip(names, entries, strict=True):
        rows = _rows(entry.scores, ids)
        scores = entry.scores
        predictions[name] = Prediction(scores.values[entry.place][rows], scores.decisions[entry.place][rows])
    bootstrap = bootstrap_metrics(
        truth, predictions, groups, label_names=labels, replicates=config.replicates, seed=config.seed
    )
    pairs = None
    if config.against is not None:
        pairs = [(name, config.against) for name in names if name != config.against]
    return Compared(
        samples=len(ids),
        groups=bootstrap.groups,
        left_out=left_out,
        replicates=config.replicates,
        metrics=bootstrap.table(),
        differences=paired_differences(bootstrap, config.metrics, pairs=pairs),
    )


def _entries(records: list[RunRecord], protocol: str | None) -> list[_Entry]:
    entries = []
    for record in records:
        scores = record.scores
        if scores is None:
            verb = str(record.provenance.get("verb", ""))
            if verb in UNSCORED:
                raise UsageError(
                    f"{record.folder} is a run of `fluoro {verb.replace('-', ' ')}`, which scores no samples; give "
                    "runs of study, zeroshot, probe or finetune"
                )
            raise UsageError(
                f"{record.folder} kept no scores (scores.npz); run it again with this version, or give another run"
            )
        places = [place for place, name in enumerate(scores.protocols) if protocol in (None, name)]
        if not places:
            has = ", ".join(sorted(set(scores.protocols)))
            raise UsageError(f"{record.folder} has no setting of the protocol {protocol!r}, only of {has}")
        entries += [_Entry(record, scores, place) for place in places]
    return entries


def _unique_names(entries: list[_Entry]) -> list[str]:
    """Return a name for each setting: its own, with protocol, folder or path where needed to tell them apart."""
    folders = [entry.record.folder for entry in entries]
    ways = (
        [entry.setting for entry in entries],
        [f"{entry.setting} ({entry.protocol})" for entry in entries],
        [f"{folder.name}: {entry.setting}" for folder, entry in zip(folders, entries, strict=True)],
        [f"{folder.name}: {entry.setting} ({entry.protocol})" for folder, entry in zip(folders, entries, strict=True)],
        [f"{folder}: {entry.setting} ({entry.protocol})" for folder, entry in zip(folders, entries, strict=True)],
    )
    for names in ways:
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in ways[-1] if ways[-1].count(name) > 1)
    raise UsageError(f"{twice} is given twice; give each run once")


def _labels(records: list[RunRecord]) -> tuple[str, ...]:
    """Return the labels, which must be the same in all runs."""
    first = records[0]
    for record in records[1:]:
        if record.label_names != first.label_names:
            differing = sorted(set(first.label_names) ^ set(record.label_names)) or ["their order"]
            raise DataError(
                f"{first.folder} and {record.folder} score different labels ({', '.join(differing[:5])}); "
                "compare runs with the same labels"
            )
    return tuple(first.label_names)


def _shared_ids(entries: list[_Entry], common: bool) -> tuple[np.ndarray, int]:
    """Return the sample ids that all runs have, in the first one's order, and how many others there are."""
    first = entries[0]
    ids = first.scores.ids
    everything = set(ids.tolist())
    for entry in entries[1:]:
        others = set(entry.scores.ids.tolist())
        here, there = sorted(set(ids.tolist()) - others), sorted(others - set(first.scores.ids.tolist()))
        if (here or there) and not common:
            some = ", ".join((here + there)[:IDS_SHOWN])
            raise DataError(
                f"{first.record.folder} ({len(ids):,} samples) and {entry.record.folder} ({len(others):,}) were tested "
                f"on different samples: {len(here):,} only in the first, {len(there):,} only in the second (such as "
                f"{some}); compare on the {len(ids) - len(here):,} that both have with --common"
            )
        everything |= others
        ids = ids[np.isin(ids, list(others))]
    if not len(ids):
        raise DataError("the runs have no test sample in common; compare runs of one data set and split")
    return ids, len(everything) - len(ids)


def _rows(scores: Scores, ids: np.ndarray) -> np.ndarray:
    """Return the row of each id in a run's arrays."""
    order = np.argsort(scores.ids)
    return order[np.searchsorted(scores.ids, ids, sorter=order)]


def _truth(entries: list[_Entry], ids: np.ndarray, labels: tuple[str, ...]) -> np.ndarray:
    """Return the truth, which must be the same in all runs."""
    first = entries[0]
    truth = first.scores.truth[_rows(first.scores, ids)]
    for entry in entries[1:]:
        differing = truth != entry.scores.truth[_rows(entry.scores, ids)]
        if differing.any():
            row, column = np.argwhere(differing)[0]
            raise DataError(
                f"{first.record.folder} and {entry.record.folder} hold different truths for "
                f"{differing.any(axis=1).sum():,} of {len(ids):,} samples, first {ids[row]} on {labels[column]!r}; "
                "one of them was made with other labels: run it again"
            )
    return truth


def _groups(entries: list[_Entry], ids: np.ndarray) -> np.ndarray:
    """Return the patients, from the first run that kept them."""
    for entry in entries:
        if entry.scores.groups is not None:
            return entry.scores.groups[_rows(entry.scores, ids)]
    raise DataError(
        f"{entries[0].record.folder} did not keep which patient a sample is of, without which intervals would be too "
        "narrow; run it again with this version"
    )
