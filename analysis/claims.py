"""The study's three claims, each with a test of its own (arXiv 2506.14136): what it says, counted, with intervals.

In come truth, scores and decisions of the settings on test, and patients; out go tables, one figure a row, from which
`analysis.claim_verdicts` draws its sentences.

1. *Zero-shot over-predicts every label.* `over_prediction`: how often each label is said over how often it occurs,
   under every family of thresholds. A label is over-predicted where the interval of (said rate - prevalence) lies
   above 0.
2. *Fine-tuning improves distinct diseases.* `subset_scores` on images with one finding: do the finding's scores stand
   out there, from those of the other findings?
3. *The linear probe finds overlapping features.* `subset_scores` on images with several findings: are all of them
   found?

For 2 and 3 the label No Finding takes no part: what is asked is which findings an image has, among images that have
some. LRAP says so image by image (with one finding it is the mean reciprocal rank), and rises with knowing how frequent
findings are, which the prevalence ranking beside it shows; macro-AUROC compares the images of a label with the others
of the subset, and does not. Each setting stands beside trivial baselines and beside the null of truth dealt out to
other patients of the subset (`analysis.nulls`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.bootstrap import (
    Bootstrap,
    bootstrap_metrics,
    group_codes,
    group_sums,
    percentile_ends,
    resample_counts,
)
from analysis.comparison import paired_differences
from analysis.metrics import Prediction, check_decisions, check_truth, divide
from analysis.nulls import permuted_metrics
from engine.errors import DataError, UsageError

DISTINCT, OVERLAPPING = "one finding", "several findings"
SUBSETS = (DISTINCT, OVERLAPPING)
SUBSET_METRICS = ("lrap", "auroc_macro", "map", "f1_macro", "exact_match")
# Test images below which a subset is counted and not scored.
LEAST_IMAGES = 10


class SubsetScores(NamedTuple):
    """Figures of one subset of the images.

    Parameters
    ----------
    images, patients : int
    table : DataFrame
        setting, metric, value, low, high, null, null_low, null_high, p: one row a setting (baselines among them,
        without nulls) and metric. Empty where there are fewer than `LEAST_IMAGES` images, or fewer than two patients.
    differences : DataFrame
        As of `analysis.comparison.paired_differences`, of the pairs that the claim is about.
    """

    images: int
    patients: int
    table: pd.DataFrame
    differences: pd.DataFrame


def over_prediction(
    y: np.ndarray,
    decisions: Mapping[tuple[str, str], np.ndarray],
    groups: np.ndarray,
    *,
    label_names: Sequence[str],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how often each label is said over how often it occurs, for settings under families of thresholds.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
        Truth on test.
    decisions : mapping of (setting, family) to ndarray of bool, (n, L)
    groups : ndarray, (n,)
        Patients, which are resampled.
    label_names : sequence of str, length L
    replicates, seed, level

    Returns
    -------
    DataFrame
        setting, family, label (None: all labels together), said and true (rates; labels an image where all together),
        ratio (said / true; NaN where nothing is true), low, high (its interval, over the replicates in which it is
        defined), excess (said - true), excess_low, excess_high, verdict ("over", "under" or "not told apart", by the
        interval of the excess; "undefined" with one patient).
    """
    truth = check_truth(y)
    if len(groups) != len(truth) or len(label_names) != truth.shape[1]:
        raise DataError(f"{len(groups)} groups and {len(label_names)} names for truth of shape {truth.shape}")
    if not decisions:
        raise UsageError("no decisions to count; give at least one setting")
    codes, counts = resample_counts(groups, replicates, seed)
    group_count = counts.shape[1]
    images = np.bincount(codes, minlength=group_count).astype(np.float64)
    true, true_drawn = _rates(truth, codes, counts, images)
    rows = []
    for (setting, family), given in decisions.items():
        said, said_drawn = _rates(check_decisions(truth, given), codes, counts, images)
        ratio, ratio_drawn = divide(said, true, np.nan), divide(said_drawn, true_drawn, np.nan)
        ratio_ends = percentile_ends(ratio_drawn, level, axis=0)
        excess_ends = percentile_ends(said_drawn - true_drawn, level, axis=0)
        for place, label in enumerate([None, *label_names]):
            ends = [float(end[place]) if group_count > 1 else float("nan") for end in (*ratio_ends, *excess_ends)]
            rows.append(
                {
                    "setting": setting,
                    "family": family,
                    "label": label,
                    "said": float(said[place]),
                    "true": float(true[place]),
                    "ratio": float(ratio[place]),
                    "low": ends[0],
                    "high": ends[1],
                    "excess": float(said[place] - true[place]),
                    "excess_low": ends[2],
                    "excess_high": ends[3],
                    "verdict": _verdict(ends[2], ends[3]),
                }
            )
    return pd.DataFrame(rows)


def over_prediction_counts(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each setting and family how many labels are over-predicted.

    Returns
    -------
    DataFrame
        setting, family, labels, over, under, ratio, low, high (of all labels together), holds (every label is
        over-predicted).
    """
    rows = []
    for (setting, family), part in table.groupby(["setting", "family"], sort=False):
        overall, each = part[part["label"].isna()].iloc[0], part[part["label"].notna()]
        over, under = int((each["verdict"] == "over").sum()), int((each["verdict"] == "under").sum())
        row = {"setting": setting, "family": family, "labels": len(each), "over": over, "under": under}
        row |= {name: overall[name] for name in ("ratio", "low", "high")}
        rows.append(row | {"holds": over == len(each)})
    return pd.DataFrame(rows)


def subset_rows(y: np.ndarray, label_names: Sequence[str], subset: str, nothing: str | None) -> np.ndarray:
    """Return which images have one finding or several, (n,) bool.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    label_names : sequence of str, length L
    subset : "one finding" or "several findings"
    nothing : str or None
        The label that says that there is no finding.
    """
    if subset not in SUBSETS:
        raise UsageError(f"unknown subset {subset!r}; known are {', '.join(SUBSETS)}")
    findings = check_truth(y)[:, [name != nothing for name in label_names]].sum(axis=1)
    return findings == 1 if subset == DISTINCT else findings > 1


def subset_scores(
    y: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    pairs: Sequence[tuple[str, str]],
    *,
    label_names: Sequence[str],
    subset: str,
    nothing: str | None,
    baselines: Sequence[str] = (),
    replicates: int = 1000,
    permutations: int = 200,
    seed: int = 0,
) -> SubsetScores:
    """Score settings on the images with one or with several findings, findings only.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    predictions : mapping of setting name to Prediction
        On the same n samples.
    groups : ndarray, (n,)
    pairs : sequence of (setting, other)
        Whose differences the claim is about.
    label_names : sequence of str, length L
    subset, nothing
        As for `subset_rows`.
    baselines : sequence of str
        Which predictions are trivial baselines; they have no null.
    replicates, permutations, seed
    """
    truth = check_truth(y)
    rows = np.flatnonzero(subset_rows(truth, label_names, subset, nothing))
    patients = np.asarray(groups)[rows]
    count = group_codes(patients)[1] if len(rows) else 0
    if len(rows) < LEAST_IMAGES or count < 2:
        return SubsetScores(len(rows), count, pd.DataFrame(), pd.DataFrame())
    columns = np.flatnonzero([name != nothing for name in label_names])
    names = tuple(name for name in label_names if name != nothing)
    part = truth[np.ix_(rows, columns)]
    kept = {
        name: Prediction(each.scores[np.ix_(rows, columns)], each.decisions[np.ix_(rows, columns)])
        for name, each in predictions.items()
    }
    drawn = bootstrap_metrics(part, kept, patients, label_names=names, replicates=replicates, seed=seed)
    learnt = {name: each for name, each in kept.items() if name not in baselines}
    nulls = permuted_metrics(part, learnt, patients, label_names=names, permutations=permutations, seed=seed)
    lines = []
    for setting in kept:
        for metric in SUBSET_METRICS:
            value, low, high, _ = drawn.interval(setting, metric)
            line = {"setting": setting, "metric": metric, "value": value, "low": low, "high": high}
            if setting in learnt:
                null = nulls.null(setting, metric)
                line |= {"null": null.value, "null_low": null.low, "null_high": null.high, "p": null.p}
            lines.append(line)
    return SubsetScores(len(rows), count, pd.DataFrame(lines), _differences(drawn, pairs))


def _differences(drawn: Bootstrap, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    known = [pair for pair in pairs if set(pair) <= set(drawn.settings)]
    return paired_differences(drawn, SUBSET_METRICS, pairs=known) if known else pd.DataFrame()


def _rates(
    values: np.ndarray, codes: np.ndarray, counts: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rate of each column, all together first, (1 + L,), and under each resample, (R, 1 + L)."""
    table = np.column_stack([values.sum(axis=1), values]).astype(np.float64)
    return table.mean(axis=0), (counts @ group_sums(table, codes, len(images))) / (counts @ images)[:, None]


def _verdict(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return "undefined"
    return "over" if low > 0 else "under" if high < 0 else "not told apart"
