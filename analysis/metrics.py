"""The study's multi-label metrics as sums over samples, so that a bootstrap is a matrix product.

In come truth (n, L), scores (n, L) and decisions (n, L); out go the metrics of the study and of a sound account of it.
Every metric is written once, for a matrix of sample weights (n, R): one column of ones is the plain metric, R columns
of resample counts are R bootstrap replicates. LRAP, coverage error, exact match and Hamming loss are means of values a
sample; F1, precision and recall need sums of true and false positives; AUROC and average precision need sums of weights
between the scores of the positives.

Definitions follow scikit-learn (to 1e-12, ties included), with three choices said here. A label without positives has
precision, recall and F1 of 0 (``zero_division=0``) and stays in macro-F1, as in the study. Its AUROC and average
precision are NaN, and it is left out of their macro means, whose number of labels is reported beside them. A sample
without positives has LRAP 1 and coverage 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from engine.errors import DataError

OVERALL_METRICS = ("f1_macro", "f1_micro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro", "hamming")
LABEL_METRICS = ("precision", "recall", "f1", "auroc", "ap", "prevalence", "predicted_rate", "positives")
LOWER_IS_BETTER = frozenset({"coverage_error", "hamming"})

# Cells of the (samples, labels, labels) comparison that LRAP holds in memory at once.
_COMPARISON_CELLS = 1 << 24


class Prediction(NamedTuple):
    """What a setting says about n samples: scores (n, L) float and decisions (n, L) bool."""

    scores: np.ndarray
    decisions: np.ndarray


class WeightedMetrics(NamedTuple):
    """Metrics under R columns of sample weights.

    overall : dict of metric name to (R,) float64
    per_label : dict of metric name to (R, L) float64
    """

    overall: dict[str, np.ndarray]
    per_label: dict[str, np.ndarray]


def check_truth(y: np.ndarray) -> np.ndarray:
    """Return the truth (n, L) as bool; DataError where it is not a table of 0 and 1."""
    truth = np.asarray(y)
    if truth.ndim != 2:
        raise DataError(f"labels must be a table (samples, labels), got shape {truth.shape}")
    if truth.dtype != bool:
        if not np.isin(truth, (0, 1)).all():
            unusual = np.unique(truth[~np.isin(truth, (0, 1))])[:5]
            raise DataError(
                f"labels must be 0 or 1, found {unusual.tolist()}; map uncertain and blank values to 0 first"
            )
        truth = truth.astype(bool)
    return truth


def check_scores(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the scores as float64; DataError where their shape is not the truth's or a value is not finite."""
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != truth.shape:
        raise DataError(f"scores have shape {values.shape}, the labels {truth.shape}; they must be equal")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"{(~np.isfinite(values)).sum()} scores are not finite, first {values[row, column]} at row {row}, label "
            f"{column}; look for overflow or a division by zero where they were made"
        )
    return values


def check_decisions(truth: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Return the decisions as bool; DataError where their shape is not the truth's."""
    decided = np.asarray(decisions)
    if decided.shape != truth.shape:
        raise DataError(f"decisions have shape {decided.shape}, the labels {truth.shape}; they must be equal")
    return decided.astype(bool)


def lrap_samples(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the label ranking average precision of each sample.

    For each positive label: the share of positives among the labels that score at least as high; then the mean over the
    sample's positives. Their mean is scikit-learn's ``label_ranking_average_precision_score``.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    scores : ndarray of float, (n, L)

    Returns
    -------
    ndarray of float64, (n,)
        1 where a sample has no positive label, or only positive ones.
    """
    truth = check_truth(y)
    values = check_scores(truth, scores)
    count, labels = truth.shape
    result = np.ones(count)
    block = max(1, _COMPARISON_CELLS // max(1, labels * labels))
    for start in range(0, count, block):
        part, positive = values[start : start + block], truth[start : start + block]
        as_high = part[:, None, :] >= part[:, :, None]
        rank = as_high.sum(axis=2)
        rank_among_positives = (as_high & positive[:, None, :]).sum(axis=2)
        positives = positive.sum(axis=1)
        mean = (rank_among_positives / rank * positive).sum(axis=1) / np.maximum(positives, 1)
        result[start : start + block] = np.where(positives == 0, 1.0, mean)
    return result


def coverage_samples(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return how far down each sample's ranking one must go to cover its positives, as scikit-learn's coverage error.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    scores : ndarray of float, (n, L)

    Returns
    -------
    ndarray of float64, (n,)
        Number of labels that score at least as high as the lowest positive; 0 for a sample without positives.
    """
    truth = check_truth(y)
    values = check_scores(truth, scores)
    lowest_positive = np.where(truth, values, np.inf).min(axis=1, initial=np.inf)
    return (values >= lowest_positive[:, None]).sum(axis=1).astype(np.float64)


def exact_match_samples(y: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Return for each sample 1.0 where all its labels are decided rightly (subset accuracy), else 0.0; (n,)."""
    truth = check_truth(y)
    return (truth == check_decisions(truth, decisions)).all(axis=1).astype(np.float64)


def hamming_samples(y: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Return for each sample the share of its labels that are decided wrongly; (n,) float64."""
    truth = check_truth(y)
    return (truth != check_decisions(truth, decisions)).mean(axis=1)


def confusion_samples(y: np.ndarray, decisions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives of each sample and label, three (n, L) bool arrays."""
    truth = check_truth(y)
    decided = check_decisions(truth, decisions)
    return truth & decided, ~truth & decided, truth & ~decided


def divide(numerator: np.ndarray, denominator: np.ndarray, empty: float) -> np.ndarray:
    """Return the quotient, and `empty` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    result = np.full(numerator.shape, empty, dtype=np.float64)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)


def precision_recall_f1(
    true_positives: np.ndarray, false_positives: np.ndarray, false_negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 from counts of any equal shape, 0 where a ratio is 0/0 (``zero_division=0``)."""
    predicted, positive = true_positives + false_positives, true_positives + false_negatives
    return (
        divide(true_positives, predicted, 0.0),
        divide(true_positives, positive, 0.0),
        divide(2.0 * true_positives, predicted + positive, 0.0),
    )


def ranking_of_label(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision of one label under R columns of weights.

    Both depend on the weights only through their sums over the samples that lie at, and between, the distinct scores of
    the positives. Those sums are one sparse product; cumulative sums over the k distinct scores do the rest.

    Parameters
    ----------
    positive : ndarray of bool, (n,)
    scores : ndarray of float64, (n,)
    weights : ndarray of float64, (n, R), not negative

    Returns
    -------
    auroc, average_precision : ndarray of float64, (R,)
        As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` with ``sample_weight``; NaN where the
        weights leave no positive (both) or no negative (AUROC).
    """
    levels = np.unique(scores[positive])
    level_count, replicates = len(levels), weights.shape[1]
    if not level_count:
        return np.full(replicates, np.nan), np.full(replicates, np.nan)
    # Three rows a level, from the highest score down: negatives just above it, negatives tied with it, positives at it.
    place = np.searchsorted(levels, scores)
    tied = levels[np.minimum(place, level_count - 1)] == scores
    rows = np.where(tied, 3 * (level_count - 1 - place) + 1 + positive, 3 * (level_count - place))
    used = np.flatnonzero(rows < 3 * level_count)
    selector = sparse.csr_matrix((np.ones(len(used)), (rows[used], used)), shape=(3 * level_count, len(scores)))
    sums = selector @ weights
    above, tied_negatives, positives = sums[0::3], sums[1::3], sums[2::3]

    true_positives = np.cumsum(positives, axis=0)
    false_positives = np.cumsum(above, axis=0) + np.cumsum(tied_negatives, axis=0)
    all_positives = true_positives[-1]
    all_negatives = weights[~positive].sum(axis=0)
    beaten = (positives * (all_negatives - false_positives + 0.5 * tied_negatives)).sum(axis=0)
    precision = divide(true_positives, true_positives + false_positives, 0.0)
    return (
        divide(beaten, all_positives * all_negatives, np.nan),
        divide((positives * precision).sum(axis=0), all_positives, np.nan),
    )


def weighted_metrics(y: np.ndarray, prediction: Prediction, weights: np.ndarray) -> WeightedMetrics:
    """Return all metrics under R columns of sample weights.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    prediction : Prediction
    weights : ndarray, (n, R)
        Not negative. A column of ones gives the plain metrics, a column of resample counts those of that resample.

    Returns
    -------
    WeightedMetrics
        ``prevalence`` and ``predicted_rate`` are weighted shares of samples, ``positives`` the weight of the positives.
        Macro means of AUROC and AP skip labels that are NaN under that column; where all are, so is the mean.
    """
    truth = check_truth(y)
    scores = check_scores(truth, prediction.scores)
    columns = np.asarray(weights, dtype=np.float64)
    if columns.ndim != 2 or len(columns) != len(truth):
        raise DataError(f"weights must have shape ({len(truth)}, replicates), got {columns.shape}")
    labels = truth.shape[1]
    true_positive, false_positive, false_negative = confusion_samples(truth, prediction.decisions)
    statistics = np.column_stack(
        [
            exact_match_samples(truth, prediction.decisions),
            lrap_samples(truth, scores),
            coverage_samples(truth, scores),
            true_positive,
            false_positive,
            false_negative,
        ]
    ).astype(np.float64)
    sums = columns.T @ statistics
    total = columns.sum(axis=0)
    means = divide(sums[:, :3], total[:, None], np.nan)
    tp, fp, fn = (sums[:, 3 + part * labels : 3 + (part + 1) * labels] for part in range(3))
    precision, recall, f1 = precision_recall_f1(tp, fp, fn)
    f1_micro = precision_recall_f1(tp.sum(axis=1), fp.sum(axis=1), fn.sum(axis=1))[2]

    auroc, average_precision = np.empty_like(f1), np.empty_like(f1)
    for label in range(labels):
        auroc[:, label], average_precision[:, label] = ranking_of_label(truth[:, label], scores[:, label], columns)
    return WeightedMetrics(
        overall={
            "f1_macro": f1.mean(axis=1),
            "f1_micro": f1_micro,
            "exact_match": means[:, 0],
            "lrap": means[:, 1],
            "coverage_error": means[:, 2],
            "map": mean_of_defined(average_precision),
            "auroc_macro": mean_of_defined(auroc),
            "hamming": divide((fp + fn).sum(axis=1), total * labels, np.nan),
        },
        per_label={
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "auroc": auroc,
            "ap": average_precision,
            "prevalence": divide(tp + fn, total[:, None], np.nan),
            "predicted_rate": divide(tp + fp, total[:, None], np.nan),
            "positives": tp + fn,
        },
    )


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of the values that are not NaN; NaN where none is."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1), np.nan)


def summary(y: np.ndarray, scores: np.ndarray, decisions: np.ndarray) -> dict:
    """Return all metrics of one setting.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    scores : ndarray of float, (n, L)
    decisions : ndarray of bool, (n, L)

    Returns
    -------
    dict
        ``overall`` {metric: float} with `OVERALL_METRICS`; ``per_label`` {metric: (L,) float64} with `LABEL_METRICS`;
        ``labels_counted`` {"map", "auroc_macro": how many labels their mean is over}; ``n`` samples;
        ``labels_per_sample`` mean number of positives (the best possible coverage error);
        ``predicted_per_sample`` mean number of labels said.
    """
    truth = check_truth(y)
    if not len(truth):
        raise DataError("no samples to score; look at the split and at the list of failures")
    result = weighted_metrics(truth, Prediction(scores, decisions), np.ones((len(truth), 1)))
    per_label = {name: values[0] for name, values in result.per_label.items()}
    return {
        "overall": {name: float(values[0]) for name, values in result.overall.items()},
        "per_label": per_label,
        "labels_counted": {
            "map": int(np.isfinite(per_label["ap"]).sum()),
            "auroc_macro": int(np.isfinite(per_label["auroc"]).sum()),
        },
        "n": len(truth),
        "labels_per_sample": float(truth.sum(axis=1).mean()),
        "predicted_per_sample": float(np.asarray(decisions, dtype=bool).sum(axis=1).mean()),
    }


def auroc(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the AUROC of each label, (L,) float64; NaN for labels without positives or without negatives."""
    return _ranking(y, scores)[0]


def average_precision(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each label, (L,) float64; NaN for labels without positives."""
    return _ranking(y, scores)[1]


def _ranking(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth = check_truth(y)
    values = check_scores(truth, scores)
    ones = np.ones((len(truth), 1))
    pairs = [ranking_of_label(truth[:, label], values[:, label], ones) for label in range(truth.shape[1])]
    return np.array([pair[0][0] for pair in pairs]), np.array([pair[1][0] for pair in pairs])
