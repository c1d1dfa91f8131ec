"""Bootstrap intervals by patient: what the numbers would be had other patients come.

In come truth, groups and the predictions of one or several settings; out go all metrics with percentile intervals, and
differences between settings from the same resamples (so they are paired). Groups, not images, are drawn with
replacement, because two images of one patient are not two pieces of evidence. Thresholds and heads are held fixed: the
intervals speak of the test sample, not of training.

A resample is a count for each group, so R replicates of every metric are products with one weight matrix
(`analysis.metrics.weighted_metrics`), and nothing is resampled in a loop.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 (clusters) and 13 (percentile
interval).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from analysis.metrics import LABEL_METRICS, OVERALL_METRICS, Prediction, check_truth, weighted_metrics
from engine.errors import DataError, UsageError

# Cells of the weight matrix (samples, replicates) held at once; 32 MB as float64.
_WEIGHT_CELLS = 1 << 22


class Interval(NamedTuple):
    """A value with its percentile interval.

    ``replicates`` counts the resamples in which the value is defined: a label with one positive is absent from a third
    of them. Ends are NaN where no interval can be drawn (one group, or nothing defined).
    """

    value: float
    low: float
    high: float
    replicates: int


class MeanIntervals(NamedTuple):
    """Means of q columns: value, low and high (q,) float64, and the means of each resample (R, q) float64."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    replicates: np.ndarray


@dataclass(frozen=True)
class Bootstrap:
    """All metrics of S settings under the same resamples.

    Parameters
    ----------
    settings : tuple of str, length S
    label_names : tuple of str, length L
    columns : tuple of (metric, label name or None), length M
    values : ndarray of float64, (S, M)
        Metrics of the data as they are.
    replicates : ndarray of float64, (S, R, M)
    samples, groups : int
    level : float
        Confidence level of the intervals, such as 0.95.
    """

    settings: tuple[str, ...]
    label_names: tuple[str, ...]
    columns: tuple[tuple[str, str | None], ...]
    values: np.ndarray
    replicates: np.ndarray
    samples: int
    groups: int
    level: float

    def interval(self, setting: str, metric: str, label: str | None = None) -> Interval:
        """Return one metric of one setting; UsageError for an unknown name."""
        row, column = self._setting(setting), self._column(metric, label)
        return self._interval(self.values[row, column], self.replicates[row, :, column])

    def difference(self, setting: str, other: str, metric: str, label: str | None = None) -> Interval:
        """Return `setting` minus `other`, both scored on each resample together."""
        row, other_row, column = self._setting(setting), self._setting(other), self._column(metric, label)
        replicates = self.replicates[row, :, column] - self.replicates[other_row, :, column]
        return self._interval(self.values[row, column] - self.values[other_row, column], replicates)

    def table(self) -> pd.DataFrame:
        """Return one row a setting, metric and label: setting, metric, label, value, low, high, n, replicates."""
        lows, highs = percentile_ends(self.replicates, self.level, axis=1)
        if self.groups < 2:
            lows, highs = np.full_like(lows, np.nan), np.full_like(highs, np.nan)
        defined = np.isfinite(self.replicates).sum(axis=1)
        rows = [
            (setting, metric, label, self.values[s, c], lows[s, c], highs[s, c], self.samples, int(defined[s, c]))
            for s, setting in enumerate(self.settings)
            for c, (metric, label) in enumerate(self.columns)
        ]
        names = ["setting", "metric", "label", "value", "low", "high", "n", "replicates"]
        return pd.DataFrame(rows, columns=names)

    def _interval(self, value: float, replicates: np.ndarray) -> Interval:
        low, high = (float(end) if self.groups > 1 else float("nan") for end in percentile_ends(replicates, self.level))
        return Interval(float(value), low, high, int(np.isfinite(replicates).sum()))

    def _setting(self, name: str) -> int:
        if name not in self.settings:
            raise UsageError(f"no setting {name!r} in this bootstrap; there are {', '.join(self.settings)}")
        return self.settings.index(name)

    def _column(self, metric: str, label: str | None) -> int:
        if (metric, label) not in self.columns:
            of = "overall" if label is None else f"of label {label!r}"
            known = OVERALL_METRICS if label is None else LABEL_METRICS
            raise UsageError(f"no metric {metric!r} {of}; metrics are {', '.join(known)}")
        return self.columns.index((metric, label))


def resample_counts(groups: np.ndarray, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many groups as there are, with replacement, `replicates` times.

    Parameters
    ----------
    groups : ndarray, (n,)
        Group (patient) of each sample.
    replicates : int
    seed : int

    Returns
    -------
    codes : ndarray of int64, (n,)
        Number of each sample's group, 0 to G - 1 in sorted order.
    counts : ndarray of int32, (R, G)
        How often each group was drawn; every row sums to G.
    """
    codes = pd.factorize(np.asarray(groups), sort=True)[0]
    if (codes < 0).any():
        raise DataError(f"{(codes < 0).sum()} samples have no group; a bootstrap by patient needs one for each")
    if replicates < 1:
        raise UsageError(f"{replicates} bootstrap replicates asked for; at least 1 is needed (1000 is usual)")
    group_count = int(codes.max()) + 1 if len(codes) else 0
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = np.empty((replicates, group_count), dtype=np.int32)
    for row in range(replicates):
        drawn = generator.integers(0, max(1, group_count), size=group_count)
        counts[row] = np.bincount(drawn, minlength=group_count)
    return codes.astype(np.int64), counts


def bootstrap_metrics(
    y: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    *,
    label_names: tuple[str, ...],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Bootstrap:
    """Score several settings, with all metrics, on the data and on the same resamples of its groups.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    predictions : mapping of setting name to Prediction
        Settings and trivial baselines alike, on the same n samples.
    groups : ndarray, (n,)
        Patient or study of each sample.
    label_names : tuple of str, length L
    replicates, seed, level
        Number of resamples R, their seed, and the confidence level.

    Returns
    -------
    Bootstrap
        In a resample without a positive of some label, that label's AUROC and AP are undefined and their macro means
        are over the other labels, while its F1 counts as 0, as in the metrics themselves.
    """
    truth = check_truth(y)
    if not len(truth):
        raise DataError("no samples to score; look at the split and at the list of failures")
    if len(groups) != len(truth):
        raise DataError(f"{len(groups)} groups for {len(truth)} samples; give one group a sample")
    if len(label_names) != truth.shape[1]:
        raise DataError(f"{len(label_names)} label names for {truth.shape[1]} label columns")
    if not 0 < level < 1:
        raise UsageError(f"confidence level {level} is not between 0 and 1; 0.95 is usual")
    codes, counts = resample_counts(groups, replicates, seed)
    values = np.stack([_metrics_of(truth, each, np.ones((len(truth), 1)))[0] for each in predictions.values()])
    drawn = np.empty((len(predictions), replicates, values.shape[1]))
    block = max(1, _WEIGHT_CELLS // len(truth))
    for start in range(0, replicates, block):
        weights = counts[start : start + block].T[codes].astype(np.float64)
        # Thin products: BLAS threads cost more in waiting for each other than they save.
        with threadpool_limits(1, user_api="blas"):
            for row, prediction in enumerate(predictions.values()):
                drawn[row, start : start + block] = _metrics_of(truth, prediction, weights)
    columns: list[tuple[str, str | None]] = [(metric, None) for metric in OVERALL_METRICS]
    columns += [(metric, label) for metric in LABEL_METRICS for label in label_names]
    return Bootstrap(
        settings=tuple(predictions),
        label_names=tuple(label_names),
        columns=tuple(columns),
        values=values,
        replicates=drawn,
        samples=len(truth),
        groups=counts.shape[1],
        level=level,
    )


def _metrics_of(truth: np.ndarray, prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    """Return all metrics under R columns of weights, (R, M), in the order of `Bootstrap.columns`."""
    result = weighted_metrics(truth, prediction, weights)
    overall = np.column_stack([result.overall[metric] for metric in OVERALL_METRICS])
    return np.concatenate([overall, *(result.per_label[metric] for metric in LABEL_METRICS)], axis=1)


def clustered_bootstrap(
    statistics: np.ndarray, groups: np.ndarray, *, replicates: int = 1000, seed: int = 0, level: float = 0.95
) -> MeanIntervals:
    """Return means of per-sample statistics with intervals by group, for heatmap scores and the like.

    Parameters
    ----------
    statistics : ndarray of float, (n, q)
        One column a statistic; NaN where a sample has none. A difference of two columns gives a paired interval.
    groups : ndarray, (n,)
    replicates, seed, level
        As in `bootstrap_metrics`.

    Returns
    -------
    MeanIntervals
        Ends are NaN for a column with fewer than two groups that have a value.
    """
    values = np.asarray(statistics, dtype=np.float64)
    if values.ndim != 2 or len(values) != len(groups):
        raise DataError(f"statistics of shape {values.shape} for {len(groups)} groups; expected (samples, statistics)")
    codes, counts = resample_counts(groups, replicates, seed)
    defined = ~np.isnan(values)
    group_count, columns = counts.shape[1], values.shape[1]
    sums, numbers = np.zeros((group_count, columns)), np.zeros((group_count, columns))
    np.add.at(sums, codes, np.where(defined, values, 0.0))
    np.add.at(numbers, codes, defined)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ sums) / (counts @ numbers)
        value = sums.sum(axis=0) / numbers.sum(axis=0)
    low, high = percentile_ends(means, level, axis=0)
    alone = (numbers > 0).sum(axis=0) < 2
    return MeanIntervals(value, np.where(alone, np.nan, low), np.where(alone, np.nan, high), means)


def percentile_ends(replicates: np.ndarray, level: float, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the percentile interval over an axis, of the values that are not NaN; NaN where none is."""
    tail = (1.0 - level) / 2.0
    undefined = np.isnan(replicates).all(axis=axis)
    filled = np.where(np.expand_dims(undefined, axis), 0.0, replicates)
    low, high = np.nanquantile(filled, [tail, 1.0 - tail], axis=axis)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)
