"""All metrics of one setting under many columns of sample weights at once, so that a bootstrap is a matrix product.

In come truth (n, L), scores and decisions (n, L) and weights (n, R); out goes every metric under every column. One
column of ones is the plain metric, a column of resample counts one bootstrap replicate, a column of 0 and 1 a subgroup.
LRAP, coverage error, ranking loss, exact match and Brier score are means of values a sample; F1, precision and recall
need sums of true and false positives; ECE sums over bins; AUROC and average precision sums down the ranking
(`analysis.metrics.ranking`). All are laid out once in a `MetricPlan`, added up within each patient first.

Definitions follow scikit-learn (to 1e-12, ties included), with choices said here. A label without positives has
precision, recall and F1 of 0 (``zero_division=0``) and stays in macro-F1, as in the study. Its AUROC and average
precision are NaN, and it is left out of their macro means, whose number of labels is reported beside them. A sample
without positives has LRAP 1 and coverage 0. Brier score and ECE are NaN where scores are not probabilities (a single
one outside [0, 1] tells). Over-prediction is the predicted rate over the prevalence, overall the labels said over the
labels there are; NaN without positives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from analysis.metrics import calibration, samples
from analysis.metrics.arrays import (
    Array,
    alike,
    as_numpy,
    check_decisions,
    check_scores,
    check_truth,
    divide,
    floats,
    is_tensor,
    like,
    mean_of_defined,
    namespace,
)
from analysis.metrics.ranking import MANY_COLUMNS, Columns, RankingPlan, columns_of, ranking_of_label
from engine.errors import DataError

OVERALL_METRICS = (
    "f1_macro",
    "f1_micro",
    "exact_match",
    "lrap",
    "coverage_error",
    "map",
    "auroc_macro",
    "hamming",
    "auroc_micro",
    "ranking_loss",
    "brier",
    "ece",
    "over_prediction",
)
LABEL_METRICS = (
    "precision",
    "recall",
    "f1",
    "auroc",
    "ap",
    "prevalence",
    "predicted_rate",
    "positives",
    "brier",
    "ece",
    "over_prediction",
)
LOWER_IS_BETTER = frozenset({"coverage_error", "hamming", "ranking_loss", "brier", "ece"})


class Prediction(NamedTuple):
    """What a setting says about n samples: scores (n, L) float and decisions (n, L) bool."""

    scores: np.ndarray
    decisions: np.ndarray


class WeightedMetrics(NamedTuple):
    """Metrics under R columns of sample weights.

    overall : dict of metric name to (R,) float64
    per_label : dict of metric name to (R, L) float64
    """

    overall: dict[str, Any]
    per_label: dict[str, Any]


def precision_recall_f1(
    true_positives: Array, false_positives: Array, false_negatives: Array
) -> tuple[Array, Array, Array]:
    """Return precision, recall and F1 from counts of any equal shape, 0 where a ratio is 0/0 (``zero_division=0``)."""
    predicted, positive = true_positives + false_positives, true_positives + false_negatives
    return (
        divide(true_positives, predicted, 0.0),
        divide(true_positives, positive, 0.0),
        divide(2.0 * true_positives, predicted + positive, 0.0),
    )


class MetricPlan:
    """One setting's statistics, laid out for any number of columns of weights.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    prediction : Prediction
        NumPy arrays or tensors; the metrics are computed where they lie.
    codes : ndarray of int, (n,), optional
        Row of the weights that each sample has, such as the number of its patient; its own by default.
    rows : int, optional
        Rows of the weights, G; as many as there are samples by default.
    label_names : tuple of str, optional
        What labels are called in errors.

    Raises
    ------
    DataError
        Shapes that differ, labels other than 0 and 1, scores that are not finite.
    """

    def __init__(
        self,
        y: Array,
        prediction: Prediction,
        codes: np.ndarray | None = None,
        rows: int | None = None,
        label_names: tuple[str, ...] | None = None,
    ) -> None:
        y, scores, decisions = alike(y, *prediction)
        self._truth = check_truth(y)
        self._scores = check_scores(self._truth, scores, label_names)
        self._decisions = check_decisions(self._truth, decisions)
        self.samples, self.labels = self._truth.shape
        self._codes = np.arange(self.samples) if codes is None else codes
        self._rows = self.samples if rows is None else rows
        self.probabilities = calibration.are_probabilities(self._scores)
        self._statistics = self._by_row(self._sample_statistics())
        self._gaps: Array = None
        self._member: Array = None
        if self.probabilities:
            self._gaps, self._member = (like(self._scores, array) for array in self._calibration_sums())
        self._rankings: list[RankingPlan] = []

    def evaluate(self, weights: Array | Columns) -> WeightedMetrics:
        """Return all metrics under columns of weights (G, R), not negative, or `Columns` that plans share; float64."""
        if not isinstance(weights, Columns):
            weights = like(self._scores, weights)
            if weights.ndim != 2 or len(weights) != self._rows:
                raise DataError(f"weights must have shape ({self._rows}, replicates), got {tuple(weights.shape)}")
            weights = columns_of(weights)
        columns = like(self._scores, weights.wide)
        labels = self.labels
        sums = columns.T @ self._statistics
        total = sums[:, 0]
        means = divide(sums[:, 1:5], total[:, None], float("nan"))
        tp, fp, fn, negatives, squared = (sums[:, 5 + part * labels : 5 + (part + 1) * labels] for part in range(5))
        # 0/0 is 0 where a label is never said or never there, and nothing where there is no sample at all.
        blank = divide(total - total, total, float("nan"))
        precision, recall, f1 = (part + blank[:, None] for part in precision_recall_f1(tp, fp, fn))
        f1_micro = precision_recall_f1(tp.sum(axis=1), fp.sum(axis=1), fn.sum(axis=1))[2] + blank
        positives, predicted = tp + fn, tp + fp
        auroc, average_precision, auroc_micro = self._ranked(weights, negatives)
        nothing = float("nan") * positives
        brier = divide(squared, total[:, None], float("nan")) if self.probabilities else nothing
        ece = nothing
        if self.probabilities:
            xp = namespace(columns)
            ece = divide(xp.abs(columns.T @ self._gaps) @ self._member, total[:, None], float("nan"))
        return WeightedMetrics(
            overall={
                "f1_macro": _mean(f1),
                "f1_micro": f1_micro,
                "exact_match": means[:, 0],
                "lrap": means[:, 1],
                "coverage_error": means[:, 2],
                "map": mean_of_defined(average_precision),
                "auroc_macro": mean_of_defined(auroc),
                "hamming": divide((fp + fn).sum(axis=1), total * labels, float("nan")),
                "auroc_micro": auroc_micro,
                "ranking_loss": means[:, 3],
                "brier": _mean(brier),
                "ece": _mean(ece),
                "over_prediction": divide(predicted.sum(axis=1), positives.sum(axis=1), float("nan")),
            },
            per_label={
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "auroc": auroc,
                "ap": average_precision,
                "prevalence": divide(positives, total[:, None], float("nan")),
                "predicted_rate": divide(predicted, total[:, None], float("nan")),
                "positives": positives,
                "brier": brier,
                "ece": ece,
                "over_prediction": divide(predicted, positives, float("nan")),
            },
        )

    def prepare(self) -> None:
        """Lay out the rankings now, before threads share the plan."""
        if self._rankings:
            return
        truth, scores = as_numpy(self._truth), as_numpy(self._scores)
        plans = [RankingPlan(truth[:, label], scores[:, label], self._codes) for label in range(self.labels)]
        # All cells as one ranking; a cell has its sample's weight.
        plans.append(RankingPlan(truth.ravel(), scores.ravel(), np.repeat(self._codes, self.labels)))
        self._rankings = plans

    def _ranked(self, weights: Columns, negatives: Array) -> tuple[Array, Array, Array]:
        """Return AUROC and average precision (R, L), and micro-AUROC (R,), given the negatives' weights (R, L)."""
        xp = namespace(negatives)
        if weights.wide.shape[1] < MANY_COLUMNS:
            columns = like(self._scores, weights.wide)
            by_sample = columns[like(columns, self._codes)]
            cells = (
                xp.repeat_interleave(by_sample, self.labels, 0) if xp is not np else by_sample.repeat(self.labels, 0)
            )
            pairs = [
                ranking_of_label(self._truth[:, label], self._scores[:, label], by_sample)
                for label in range(self.labels)
            ]
            micro = ranking_of_label(self._truth.reshape(-1), self._scores.reshape(-1), cells)[0]
        else:
            self.prepare()
            # Each cell counts in the micro ranking, so that sums reach samples x labels.
            exact, largest = weights.exact(self.samples * max(1, self.labels))
            exact = like(self._scores, exact)
            pairs = [
                plan.evaluate(exact, negatives[:, label], largest) for label, plan in enumerate(self._rankings[:-1])
            ]
            micro = self._rankings[-1].evaluate(exact, negatives.sum(axis=1), largest, precision=False)[0]
        if not pairs:
            return negatives, negatives, micro
        return xp.stack([pair[0] for pair in pairs], axis=1), xp.stack([pair[1] for pair in pairs], axis=1), micro

    def _sample_statistics(self) -> Array:
        """Return the summands: 1, exact match, LRAP, coverage, ranking loss, TP, FP, FN, negatives, squared errors.

        Negatives are summed by themselves: all less the positives would leave what rounding leaves where there is none.
        """
        truth, scores, decisions = self._truth, self._scores, self._decisions
        xp = namespace(truth)
        single = [
            xp.ones_like(floats(truth.sum(axis=1))),
            samples.exact_match_samples(truth, decisions),
            samples.lrap_samples(truth, scores),
            samples.coverage_samples(truth, scores),
            samples.ranking_loss_samples(truth, scores),
        ]
        tables = [floats(part) for part in (*samples.confusion_samples(truth, decisions), ~truth)]
        if self.probabilities:
            tables.append((scores - floats(truth)) ** 2)
        return xp.concatenate([xp.stack(single, axis=1), *tables], axis=1)

    def _calibration_sums(self) -> tuple[np.ndarray, np.ndarray]:
        return calibration.calibration_sums(as_numpy(self._truth), as_numpy(self._scores), self._codes, self._rows)

    def _by_row(self, statistics: Array) -> Array:
        """Add up the samples that share a row of the weights, (G, q)."""
        if is_tensor(statistics):
            zeros = statistics.new_zeros((self._rows, statistics.shape[1]))
            return zeros.index_add_(0, like(statistics, self._codes), statistics)
        summed = np.zeros((self._rows, statistics.shape[1]))
        np.add.at(summed, self._codes, statistics)
        return summed


def weighted_metrics(y: Array, prediction: Prediction, weights: Array) -> WeightedMetrics:
    """Return all metrics under R columns of sample weights.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    prediction : Prediction
    weights : array, (n, R)
        Not negative. A column of ones gives the plain metrics, a column of resample counts those of that resample.

    Returns
    -------
    WeightedMetrics
        ``prevalence`` and ``predicted_rate`` are weighted shares of samples, ``positives`` the weight of the positives.
        Macro means of AUROC and AP skip labels that are NaN under that column; where all are, so is the mean. All but
        ``positives`` is NaN under a column of zeros.
    """
    return MetricPlan(y, prediction).evaluate(weights)


def summary(y: Array, scores: Array, decisions: Array, label_names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return all metrics of one setting.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    scores : array of float, (n, L)
    decisions : array of bool, (n, L)
    label_names : tuple of str, optional
        What labels are called in errors.

    Returns
    -------
    dict
        ``overall`` {metric: float} with `OVERALL_METRICS`; ``per_label`` {metric: (L,) float64} with `LABEL_METRICS`;
        ``labels_counted`` {"map", "auroc_macro": how many labels their mean is over}; ``n`` samples;
        ``labels_per_sample`` mean number of positives (the best possible coverage error);
        ``predicted_per_sample`` mean number of labels said; ``probabilities``, whether the scores are some.
    """
    truth = check_truth(y)
    if not len(truth):
        raise DataError("no samples to score; look at the split and at the list of failures")
    plan = MetricPlan(truth, Prediction(scores, decisions), label_names=label_names)
    result = plan.evaluate(np.ones((plan.samples, 1)))
    per_label = {name: values[0] for name, values in result.per_label.items()}
    return {
        "overall": {name: float(values[0]) for name, values in result.overall.items()},
        "per_label": per_label,
        "labels_counted": {
            "map": int((per_label["ap"] == per_label["ap"]).sum()),
            "auroc_macro": int((per_label["auroc"] == per_label["auroc"]).sum()),
        },
        "n": plan.samples,
        "labels_per_sample": float(per_label["positives"].sum() / plan.samples),
        "predicted_per_sample": float(per_label["predicted_rate"].sum()),
        "probabilities": plan.probabilities,
    }


def _mean(table: Array) -> Array:
    """Return the mean over labels, of none of them NaN."""
    return divide(table.sum(axis=1), namespace(table).ones_like(table).sum(axis=1), float("nan"))
