"""What would the study have concluded, had it cut its scores otherwise? Decisions under four families of thresholds.

Truth, scores of some settings for all samples and the split column come in; a table of decision metrics and
over-prediction on test goes out, one row a family, setting and metric, and which setting each family calls better.
Scores, and all that ranks by them (AUROC, AP, LRAP, coverage), are the same under every family: what changes from row
to row is made by the threshold alone.

- ``fixed``: above 0.5; means something for probabilities only, and the table says whether the scores are some
- ``minmax``: each image's scores stretched to [0, 1], then above 0.5, as in the study (arXiv 2506.14136)
- ``prevalence``: each label said as often on validation as it occurs in training
- ``f1``: each label's best F1 on validation

Thresholds come from the train and validation rows only (`analysis.thresholds.choose_on_validation`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis import thresholds
from analysis.bootstrap import bootstrap_metrics
from analysis.metrics import LOWER_IS_BETTER, Prediction, check_scores, check_truth
from analysis.metrics.calibration import are_probabilities
from engine.errors import DataError, UsageError

FAMILIES = ("fixed", "minmax", "prevalence", "f1")
DECISION_METRICS = ("f1_macro", "f1_micro", "exact_match", "hamming", "over_prediction")
CUT = 0.5


def family_decisions(family: str, y: np.ndarray, scores: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Return the decisions of one family for all samples, (n, L) bool.

    Parameters
    ----------
    family : "fixed" | "minmax" | "prevalence" | "f1"
    y : ndarray of 0/1, (n, L)
        Of which test rows are never read.
    scores : ndarray of float, (n, L)
    split : ndarray of str, (n,)

    Raises
    ------
    UsageError
        An unknown family.
    DataError
        No validation samples where the family chooses on them.
    """
    if family not in FAMILIES:
        raise UsageError(f"unknown family of thresholds {family!r}; known: {', '.join(FAMILIES)}")
    if family == "minmax":
        return thresholds.minmax_decisions(scores, CUT)
    chosen = thresholds.choose_on_validation(family, y, scores, split, value=CUT)
    return thresholds.decide(scores, chosen)


def threshold_families(
    y: np.ndarray,
    scores: Mapping[str, np.ndarray],
    split: np.ndarray,
    groups: np.ndarray,
    *,
    label_names: tuple[str, ...],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Score the decisions of every setting under every family, on the test rows.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    scores : mapping of setting to ndarray of float, (n, L)
        Of all samples, train and validation among them.
    split : ndarray of str, (n,)
        "train", "val", "test" or "".
    groups : ndarray, (n,)
    label_names : tuple of str, length L
    replicates, seed, level
        Of the bootstrap by patient.

    Returns
    -------
    DataFrame
        family, setting, metric (`DECISION_METRICS`), value, low, high, probabilities (whether the setting's scores are
        some), rank (1 is best, ties share the better rank; over-prediction is ranked by how far its logarithm is from
        0, the value of a setting that says as much as there is).
    """
    truth, parts = check_truth(y), np.asarray(split, dtype=object)
    if len(parts) != len(truth):
        raise DataError(f"{len(parts)} values of the split for {len(truth)} samples; give one a sample")
    test = parts == "test"
    predictions = {}
    for name, values in scores.items():
        checked = check_scores(truth, values, label_names)
        for family in FAMILIES:
            said = family_decisions(family, truth, checked, parts)
            predictions[f"{family}\n{name}"] = Prediction(checked[test], said[test])
    drawn = bootstrap_metrics(
        truth[test],
        predictions,
        np.asarray(groups)[test],
        label_names=label_names,
        replicates=replicates,
        seed=seed,
        level=level,
    )
    rows = []
    for family in FAMILIES:
        for metric in DECISION_METRICS:
            found = {name: drawn.interval(f"{family}\n{name}", metric) for name in scores}
            badness = pd.Series({name: _badness(metric, interval.value) for name, interval in found.items()})
            rank = badness.rank(method="min")
            for name, interval in found.items():
                rows.append(
                    {
                        "family": family,
                        "setting": name,
                        "metric": metric,
                        "value": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                        "probabilities": are_probabilities(np.asarray(scores[name])),
                        "rank": rank[name],
                    }
                )
    return pd.DataFrame(rows)


def conclusions(table: pd.DataFrame) -> pd.DataFrame:
    """Return the order of the settings that each family leads to.

    Parameters
    ----------
    table : DataFrame
        Of `threshold_families`.

    Returns
    -------
    DataFrame
        metric, family, order (such as "tuned > probe = zero-shot", best first), changes (whether another family of
        the same metric leads to another order).
    """
    rows = []
    for metric, of_metric in table.groupby("metric", sort=False):
        orders = {}
        for family, part in of_metric.groupby("family", sort=False):
            by_rank = part.dropna(subset=["rank"]).groupby("rank", sort=True)["setting"]
            orders[str(family)] = " > ".join(" = ".join(names) for _, names in by_rank)
        differ = len(set(orders.values())) > 1
        rows += [
            {"metric": metric, "family": name, "order": order, "changes": differ} for name, order in orders.items()
        ]
    return pd.DataFrame(rows, columns=["metric", "family", "order", "changes"])


def _badness(metric: str, value: float) -> float:
    """Return a number that is smaller for the better value; NaN where there is none."""
    if metric == "over_prediction":
        return abs(float(np.log(value))) if value > 0 else (float("inf") if value == 0 else float("nan"))
    return value if metric in LOWER_IS_BETTER else -value
