"""What every metric would be did a setting know nothing of the image it speaks of: truth dealt out to other patients.

In come truth, predictions and patients; out go all metrics under permutations, their range, and how many permutations
reach the value observed. The predictions stay as they are, and whole label sets are dealt out, so that prevalences, the
number of labels said and what occurs together are those of the data: a metric above this null owes something to the
image itself, which a metric above chance (0.5 for AUROC) need not show where patients have several images.

Patients' blocks of truth are exchanged among patients with equally many images (all of them where each has one), since
two images of one patient share their labels. A patient with a number of images that nobody else has keeps his own.
Source: Ernst, Permutation Methods, Statistical Science 2004; Phipson and Smyth 2010 for the one that is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.bootstrap import group_codes, metric_columns, metric_names, percentile_ends
from analysis.metrics import LOWER_IS_BETTER, MetricPlan, Prediction, check_truth
from engine.errors import DataError, UsageError


class MetricNull(NamedTuple):
    """A metric's null: mean, ends of its range, and the share of permutations at least as good as the observed value.

    ``p`` counts the observed value in, and is NaN where the metric is undefined. "As good" is as low for metrics of
    which less is better, as high for all others.
    """

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Nulls:
    """All metrics of S settings under the same P permutations.

    Parameters
    ----------
    settings : tuple of str, length S
    columns : tuple of (metric, label name or None), length M
    values : ndarray of float64, (S, M)
        With the truth as it is.
    permuted : ndarray of float64, (S, P, M)
    level : float
        Share of permutations within a range.
    """

    settings: tuple[str, ...]
    columns: tuple[tuple[str, str | None], ...]
    values: np.ndarray
    permuted: np.ndarray
    level: float

    def null(self, setting: str, metric: str, label: str | None = None) -> MetricNull:
        """Return one metric's null; UsageError for a setting or metric that is not here."""
        if setting not in self.settings or (metric, label) not in self.columns:
            raise UsageError(f"no null of {metric!r} for {setting!r}; settings are {', '.join(self.settings)}")
        row, column = self.settings.index(setting), self.columns.index((metric, label))
        value, drawn = self.values[row, column], self.permuted[row, :, column]
        defined = drawn[np.isfinite(drawn)]
        if not len(defined) or not np.isfinite(value):
            return MetricNull(*(float("nan"),) * 4)
        low, high = percentile_ends(defined, self.level)
        # Equal up to rounding counts as reached.
        reached = defined <= value + 1e-12 if metric in LOWER_IS_BETTER else defined >= value - 1e-12
        p_value = (1 + int(reached.sum())) / (1 + len(defined))
        return MetricNull(float(defined.mean()), float(low), float(high), p_value)


def permuted_metrics(
    y: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    *,
    label_names: tuple[str, ...],
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Nulls:
    """Score settings against truth dealt out to other patients.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    predictions : mapping of setting name to Prediction
    groups : ndarray, (n,)
        Patient of each sample.
    label_names : tuple of str, length L
    permutations, seed, level

    Raises
    ------
    UsageError
        No permutations, or no settings.
    DataError
        Lengths that differ, a sample without a patient.
    """
    truth = check_truth(y)
    if permutations < 1 or not predictions:
        raise UsageError(f"{permutations} permutations of {len(predictions)} settings; at least 1 of each is needed")
    if len(groups) != len(truth):
        raise DataError(f"{len(groups)} groups for {len(truth)} samples; give one group a sample")

    def scored(truth: np.ndarray) -> np.ndarray:
        plans = [MetricPlan(truth, each, label_names=label_names) for each in predictions.values()]
        return np.concatenate([metric_columns(plan.evaluate(np.ones((len(truth), 1)))) for plan in plans])

    drawn = [scored(truth[order]) for order in permuted_rows(groups, permutations, seed)]
    return Nulls(tuple(predictions), metric_names(label_names), scored(truth), np.stack(drawn, axis=1), level)


def permuted_rows(groups: np.ndarray, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Yield for each permutation the row whose truth each sample gets, (n,) int64.

    A patient gets all rows of one patient with as many, in their order.
    """
    codes, group_count = group_codes(groups)
    rows_of = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes, minlength=group_count))[:-1])
    blocks: dict[int, list[np.ndarray]] = {}
    for rows in rows_of:
        blocks.setdefault(len(rows), []).append(rows)
    tables = [np.stack(same) for same in blocks.values()]
    generator = np.random.Generator(np.random.PCG64(seed))
    for _ in range(permutations):
        order = np.empty(len(codes), dtype=np.int64)
        for table in tables:
            order[table] = table[generator.permutation(len(table))]
        yield order
