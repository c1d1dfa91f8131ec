"""Bootstrap intervals by patient: what the numbers would be had other patients come.

In come truth, groups and the predictions of one or several settings; out go all metrics with percentile intervals, and
differences between settings from the same resamples (so they are paired). Groups, not images, are drawn with
replacement, because two images of one patient are not two pieces of evidence. Thresholds and heads are held fixed: the
intervals speak of the test sample, not of training.

A resample is a count for each group, so R replicates of every metric are products of counts with statistics that are
added up within each group first (`analysis.metrics.MetricPlan`), and nothing is resampled in a loop. Resamples are
drawn and scored in blocks, of which each core has one at a time: memory does not grow with samples times replicates.

Two things would put plain percentile intervals beside what they are of. A label with few positives has none in some
resamples, and a macro mean over the others would be another quantity: there, macro AP and macro AUROC take the label's
value of the sample itself, so that every resample averages the labels that the sample has. And some metrics (`BIASED`)
come out higher or lower in a resample than in the sample it is drawn from: ECE, an absolute value, sees noise upon
noise; AP sees one positive twice; macro F1 loses labels. Their replicates are moved by the bootstrap's estimate of that
bias, until their mean is the value. Such an interval speaks of the metric as it comes out at this number of samples,
bias included: an ECE of 0.03 of few samples can belong to a perfectly calibrated model.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 (clusters), 10 (bias) and 13
(percentile interval).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from analysis.metrics import (
    LABEL_METRICS,
    OVERALL_METRICS,
    MetricPlan,
    Prediction,
    WeightedMetrics,
    check_truth,
    divide,
    mean_of_defined,
)
from analysis.metrics.arrays import as_numpy, is_tensor
from analysis.metrics.ranking import columns_of
from engine.errors import DataError, UsageError
from engine.machine import usable_cores

# Metrics of which a resample's mean is not the sample's value; overall or of a label. All lie between 0 and 1.
BIASED = frozenset({"f1_macro", "map", "ap", "ece"})
# Macro means over the labels for which they are defined, and the metric of a label that they are of.
_MEANS_OF_DEFINED = {"map": "ap", "auroc_macro": "auroc"}
# Cells of a block of resamples (groups, replicates); 32 MB as float64.
_WEIGHT_CELLS = 1 << 22
# Numbers that are sorted by one core; more are worth a thread a core.
_SORTED_ALONE = 1 << 16
# Replicates of a block: fewer make the calls cost more than the sums, more gain nothing.
_BLOCK = (64, 2048)


class Interval(NamedTuple):
    """A value with its percentile interval.

    ``replicates`` counts the resamples in which the value is defined: a label with one positive is absent from a third
    of them. Ends are NaN where no interval can be drawn (one group, or nothing defined).
    """

    value: float
    low: float
    high: float
    replicates: int


class Replicates(NamedTuple):
    """A metric of the data as they are, and of each resample, (R,) float64; moved where the metric is `BIASED`."""

    value: float
    replicates: np.ndarray


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
        As they come out, not moved.
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

    def column(self, setting: str, metric: str, label: str | None = None) -> Replicates:
        """Return one metric of one setting with all its replicates; UsageError for an unknown name."""
        row, column = self._setting(setting), self._column(metric, label)
        value, drawn = float(self.values[row, column]), self.replicates[row, :, column]
        return Replicates(value, drawn + bias_shift(value, drawn) if metric in BIASED else drawn)

    def interval(self, setting: str, metric: str, label: str | None = None) -> Interval:
        """Return one metric of one setting; UsageError for an unknown name."""
        value, drawn = self.column(setting, metric, label)
        low, high, count = self._interval(drawn)
        if metric in BIASED:
            low, high = (float(end) for end in _within(value, low, high))
        return Interval(value, low, high, count)

    def difference(self, setting: str, other: str, metric: str, label: str | None = None) -> Interval:
        """Return `setting` minus `other`, both scored on each resample together."""
        first, second = self.column(setting, metric, label), self.column(other, metric, label)
        return Interval(first.value - second.value, *self._interval(first.replicates - second.replicates))

    def table(self) -> pd.DataFrame:
        """Return one row a setting, metric and label: setting, metric, label, value, low, high, n, replicates."""
        lows, highs = percentile_ends(self.replicates, self.level, axis=1)
        biased = np.flatnonzero([metric in BIASED for metric, _ in self.columns])
        values = self.values[:, biased]
        shift = bias_shift(values, self.replicates[:, :, biased], axis=1)
        lows[:, biased], highs[:, biased] = _within(values, lows[:, biased] + shift, highs[:, biased] + shift)
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

    def _interval(self, replicates: np.ndarray) -> tuple[float, float, int]:
        """Return the ends of the percentile interval, and how many replicates are defined."""
        low, high = (float(end) if self.groups > 1 else float("nan") for end in percentile_ends(replicates, self.level))
        return low, high, int(np.isfinite(replicates).sum())

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


def group_codes(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the number of each sample's group, (n,) int64, 0 to G - 1 in sorted order, and G.

    Raises
    ------
    DataError
        A sample without a group: missing or blank.
    """
    given = np.asarray(groups)
    codes, names = pd.factorize(given, sort=True)
    # A missing value of a pandas column compares to nothing, so blanks are looked for among the names.
    blank = [number for number, name in enumerate(names) if name == ""] if given.dtype.kind in "OUT" else []
    missing = (codes < 0) | np.isin(codes, blank)
    if missing.any():
        raise DataError(f"{missing.sum()} samples have no group; a bootstrap by patient needs one for each")
    return codes.astype(np.int64), int(codes.max()) + 1 if len(codes) else 0


def resample_blocks(group_count: int, replicates: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """Draw as many groups as there are, with replacement, `replicates` times, in blocks of replicates.

    Yields
    ------
    ndarray of int32, (up to `block`, G)
        How often each group was drawn; every row sums to G. The same seed gives the same rows whatever the block.
    """
    if replicates < 1:
        raise UsageError(f"{replicates} bootstrap replicates asked for; at least 1 is needed (1000 is usual)")
    generator = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, replicates, block):
        rows = min(block, replicates - start)
        drawn = generator.integers(0, max(1, group_count), size=(rows, group_count))
        drawn += group_count * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * group_count)
        yield counts.reshape(rows, group_count).astype(np.int32)


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
    codes, group_count = group_codes(groups)
    block = max(1, _WEIGHT_CELLS // max(1, group_count))
    return codes, np.concatenate(list(resample_blocks(group_count, replicates, seed, block)))


def bootstrap_metrics(
    y: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    *,
    label_names: tuple[str, ...],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
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
    device : str
        Where predictions that lie in main memory are scored; tensors are scored where they lie.

    Returns
    -------
    Bootstrap
        In a resample without a positive of some label, that label's AUROC and AP are undefined, and their macro means
        take its value of the sample instead, while its F1 counts as 0, as in the metrics themselves.

    Raises
    ------
    DataError
        No samples, a sample without a group, shapes that differ, scores that are not finite.
    UsageError
        No replicates, or a level that is not between 0 and 1.
    """
    truth = check_truth(y)
    check_options(truth, predictions, groups, label_names, level)
    codes, group_count = group_codes(groups)
    placed = on_device(predictions, device)
    plans = [MetricPlan(truth, each, codes, group_count, label_names) for each in placed.values()]
    values = np.concatenate([metric_columns(plan.evaluate(np.ones((group_count, 1)))) for plan in plans])
    blocks = resample_blocks(group_count, replicates, seed, block_size(group_count, replicates))
    drawn = evaluate_blocks(plans, blocks, replicates)
    hold_means(drawn, values, len(label_names))
    return Bootstrap(
        settings=tuple(predictions),
        label_names=tuple(label_names),
        columns=metric_names(label_names),
        values=values,
        replicates=drawn,
        samples=len(truth),
        groups=group_count,
        level=level,
    )


def on_device(predictions: Mapping[str, Prediction], device: str) -> Mapping[str, Prediction]:
    """Return predictions as tensors on a device; as they are for the processor, and where they are tensors already."""
    if device == "cpu":
        return predictions
    import torch

    def placed(array: Any) -> Any:
        return array if is_tensor(array) else torch.as_tensor(array, device=device)

    return {name: Prediction(placed(each.scores), placed(each.decisions)) for name, each in predictions.items()}


def check_options(
    truth: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    label_names: tuple[str, ...],
    level: float,
) -> None:
    """Raise where samples, groups, label names or the confidence level do not fit; see `bootstrap_metrics`."""
    if not len(truth):
        raise DataError("no samples to score; look at the split and at the list of failures")
    if not predictions:
        raise UsageError("no settings to score; give at least one")
    if len(groups) != len(truth):
        raise DataError(f"{len(groups)} groups for {len(truth)} samples; give one group a sample")
    if len(label_names) != truth.shape[1]:
        raise DataError(f"{len(label_names)} label names for {truth.shape[1]} label columns")
    if not 0 < level < 1:
        raise UsageError(f"confidence level {level} is not between 0 and 1; 0.95 is usual")


def block_size(group_count: int, replicates: int) -> int:
    """Return how many replicates make a block, so that every core gets about as many blocks."""
    most = min(max(_WEIGHT_CELLS // max(1, group_count), _BLOCK[0]), _BLOCK[1])
    rounds = -(-replicates // (most * usable_cores()))
    return max(1, -(-replicates // (max(1, rounds) * usable_cores())))


def evaluate_blocks(plans: list[MetricPlan], blocks: Iterator[np.ndarray], columns: int) -> np.ndarray:
    """Score plans under blocks of weights, one block a core at a time.

    Parameters
    ----------
    plans : list of MetricPlan, length S
        All with the same rows of weights, G.
    blocks : iterator of ndarray, (block, G)
        Weights, not negative; drawn only as they are needed.
    columns : int
        How many rows all blocks have together, R.

    Returns
    -------
    ndarray of float64, (S, R, M)
        In the order of `metric_names`.
    """
    for plan in plans:
        plan.prepare()
    workers = usable_cores()
    scored = np.empty((len(plans), columns, len(OVERALL_METRICS) + len(LABEL_METRICS) * plans[0].labels))

    def score(start: int, block: np.ndarray) -> None:
        weights = columns_of(np.ascontiguousarray(block.T, dtype=np.float64))
        for row, plan in enumerate(plans):
            scored[row, start : start + len(block)] = metric_columns(plan.evaluate(weights))

    # Thin products: BLAS threads cost more in waiting for each other than they save.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[None]] = deque()
        start = 0
        for block in blocks:
            waiting.append(pool.submit(score, start, block))
            start += len(block)
            if len(waiting) > 2 * workers:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    return scored


def hold_means(replicates: np.ndarray, values: np.ndarray, labels: int) -> None:
    """Take macro AP and macro AUROC of each resample over the labels that the sample has, in place.

    Parameters
    ----------
    replicates : ndarray of float64, (S, R, M)
        In the order of `metric_names`. A label that is undefined in a resample enters with its value of the sample; a
        resample without samples stays undefined.
    values : ndarray of float64, (S, M)
        Of the sample itself; labels that are undefined here take no part.
    labels : int
        L.
    """
    for mean, metric in _MEANS_OF_DEFINED.items():
        first = len(OVERALL_METRICS) + LABEL_METRICS.index(metric) * labels
        of_labels = slice(first, first + labels)
        column = OVERALL_METRICS.index(mean)
        for drawn, value in zip(replicates, values[:, of_labels], strict=True):
            lacking = np.isnan(drawn[:, of_labels]) & ~np.isnan(value)
            rows = np.flatnonzero(lacking.any(axis=1) & ~np.isnan(drawn[:, OVERALL_METRICS.index("lrap")]))
            drawn[rows, column] = mean_of_defined(np.where(lacking[rows], value, drawn[rows, of_labels]))


def bias_shift(value: np.ndarray | float, replicates: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return what to add to replicates so that the mean of the defined ones is the value; 0 where there is none."""
    defined = ~np.isnan(replicates)
    mean = divide(np.where(defined, replicates, 0.0).sum(axis=axis), defined.sum(axis=axis), np.nan)
    shift = np.asarray(value, dtype=np.float64) - mean
    return np.where(np.isfinite(shift), shift, 0.0)


def _within(value: np.ndarray | float, low: np.ndarray | float, high: np.ndarray | float) -> tuple[Any, Any]:
    """Return ends cut off at 0 and 1, and put off where replicates so skewed leave out their own mean."""
    return np.minimum(np.clip(low, 0.0, 1.0), value), np.maximum(np.clip(high, 0.0, 1.0), value)


def metric_names(label_names: tuple[str, ...]) -> tuple[tuple[str, str | None], ...]:
    """Return (metric, label or None) of every column of `Bootstrap`, length M."""
    overall: list[tuple[str, str | None]] = [(metric, None) for metric in OVERALL_METRICS]
    return tuple(overall + [(metric, label) for metric in LABEL_METRICS for label in label_names])


def metric_columns(result: WeightedMetrics) -> np.ndarray:
    """Return all metrics under R columns of weights as one table, (R, M), in the order of `metric_names`."""
    overall = np.column_stack([as_numpy(result.overall[metric]) for metric in OVERALL_METRICS])
    return np.concatenate([overall, *(as_numpy(result.per_label[metric]) for metric in LABEL_METRICS)], axis=1)


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
    sums, numbers = (group_sums(each, codes, counts.shape[1]) for each in (np.where(defined, values, 0.0), defined))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ sums) / (counts @ numbers)
        value = sums.sum(axis=0) / numbers.sum(axis=0)
    low, high = percentile_ends(means, level, axis=0)
    alone = (numbers > 0).sum(axis=0) < 2
    return MeanIntervals(value, np.where(alone, np.nan, low), np.where(alone, np.nan, high), means)


def group_sums(values: np.ndarray, codes: np.ndarray, group_count: int) -> np.ndarray:
    """Return the sums over each group's rows, (groups, ...) float64, of values (n, ...) and group codes (n,)."""
    sums = np.zeros((group_count, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums


def percentile_ends(replicates: np.ndarray, level: float, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the percentile interval over an axis, of the values that are not NaN; NaN where none is.

    As ``numpy.nanquantile`` (linear between neighbours), by one sort: NaNs are sorted to the end, and places are
    counted among the values before them.
    """
    tail = (1.0 - level) / 2.0
    ordered = np.ascontiguousarray(np.moveaxis(np.asarray(replicates, dtype=np.float64), axis, -1))
    if np.may_share_memory(ordered, replicates):
        ordered = ordered.copy()
    parts = np.array_split(ordered.reshape(-1, ordered.shape[-1]), usable_cores())
    if ordered.size < _SORTED_ALONE:
        ordered.sort(axis=-1)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: part.sort(axis=-1), parts))
    defined = (~np.isnan(ordered)).sum(axis=-1)
    ends = []
    for share in (tail, 1.0 - tail):
        place = share * np.maximum(defined - 1, 0)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(defined - 1, 0))
        low, high = (np.take_along_axis(ordered, at[..., None], axis=-1)[..., 0] for at in (below, above))
        ends.append(np.where(defined > 0, low + (high - low) * (place - below), np.nan))
    return ends[0], ends[1]
