"""From scores to decisions: fixed, per image, matched to prevalence, or best for F1, chosen on validation only.

In come validation truth and scores; out go thresholds (L,), and decisions (n, L) with a strict ``>``. No function here
that chooses takes test truth, except by a split column of which it reads the validation rows.

`minmax_per_image` is the study's own cut (arXiv 2506.14136): each image's scores are stretched to [0, 1] and cut, so
that every image gets its highest-scoring label and some others whatever the scores say. "Zero-shot predicts every
label" is at least partly made by that.
"""

from __future__ import annotations

import numpy as np

from analysis.metrics import check_scores, check_truth
from engine.errors import DataError, UsageError

RULES = ("fixed", "f1", "prevalence")
MINMAX_EPSILON = 1e-8


def decide(scores: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Return scores (n, L) > thresholds (scalar or (L,)) as bool (n, L); equal to the threshold is no."""
    return np.asarray(scores, dtype=np.float64) > np.asarray(thresholds, dtype=np.float64)


def fixed(labels: int, value: float = 0.5) -> np.ndarray:
    """Return the same threshold for every label, (L,) float64; 0.5 on probabilities."""
    return np.full(labels, value, dtype=np.float64)


def minmax_per_image(scores: np.ndarray, epsilon: float = MINMAX_EPSILON) -> np.ndarray:
    """Return each row of scores (n, L) stretched by its own minimum and maximum: (s - min) / (max - min + epsilon).

    Raises DataError where a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    check_scores(np.zeros(values.shape, dtype=bool), values)
    low = values.min(axis=1, keepdims=True)
    high = values.max(axis=1, keepdims=True)
    return (values - low) / (high - low + epsilon)


def minmax_decisions(scores: np.ndarray, cut: float = 0.5, epsilon: float = MINMAX_EPSILON) -> np.ndarray:
    """Return the study's decisions (n, L): per-image min-max, then a strict ``> cut``."""
    return minmax_per_image(scores, epsilon) > cut


def candidate_thresholds(scores: np.ndarray) -> np.ndarray:
    """Return every threshold that tells n scores (n,) apart differently, from the highest (+inf: none) to -inf (all).

    Between two neighbouring scores it is their middle, or the lower one where no float lies between.
    """
    levels = np.unique(scores)
    middles = levels[:-1] + (levels[1:] - levels[:-1]) / 2
    middles = np.where(middles >= levels[1:], levels[:-1], middles)
    return np.concatenate([[np.inf], middles[::-1], [-np.inf]])


def f1_optimal(val_y: np.ndarray, val_scores: np.ndarray, fallback: float | np.ndarray = np.inf) -> np.ndarray:
    """Return for each label the threshold with the best F1 on validation.

    Parameters
    ----------
    val_y : ndarray of 0/1, (n, L)
    val_scores : ndarray of float, (n, L)
    fallback : float or ndarray (L,)
        Threshold of labels without positives in validation, which every threshold serves equally badly; by default
        such a label is never said.

    Returns
    -------
    ndarray of float64, (L,)
        The highest of the thresholds that share the best F1 (of those, the one that says least). A label whose scores
        are all equal is never said: F1 would choose to say it of everyone, which is how the rule serves any classifier
        that knows nothing (Lipton, Elkan, Naryanaswamy, ECML 2014).
    """
    truth = check_truth(val_y)
    values = check_scores(truth, val_scores)
    result = np.broadcast_to(np.asarray(fallback, dtype=np.float64), truth.shape[1:]).copy()
    for label in range(truth.shape[1]):
        positives = int(truth[:, label].sum())
        if np.ptp(values[:, label]) == 0:
            result[label] = np.inf
            continue
        if not positives:
            continue
        candidates = candidate_thresholds(values[:, label])
        # Counts of scores above each candidate, from the sorted scores of all and of the positives.
        everyone, positive = np.sort(values[:, label]), np.sort(values[truth[:, label], label])
        said = len(everyone) - np.searchsorted(everyone, candidates, side="right")
        right = positives - np.searchsorted(positive, candidates, side="right")
        result[label] = candidates[np.argmax(2.0 * right / (said + positives))]
    return result


def prevalence_matched(val_scores: np.ndarray, prevalence: np.ndarray) -> np.ndarray:
    """Return for each label the threshold that says it as often on validation as it occurs in training.

    Needs no validation truth at all.

    Parameters
    ----------
    val_scores : ndarray of float, (n, L)
    prevalence : ndarray of float, (L,)
        Share of training samples that have the label.

    Returns
    -------
    ndarray of float64, (L,)
        Where ties allow no exact count, the nearest one; of two equally near, the one that says less.
    """
    values = np.asarray(val_scores, dtype=np.float64)
    check_scores(np.zeros(values.shape, dtype=bool), values)
    shares = np.asarray(prevalence, dtype=np.float64)
    if shares.shape != values.shape[1:] or not ((shares >= 0) & (shares <= 1)).all():
        raise DataError(f"prevalence must be {values.shape[1]} shares between 0 and 1, got {shares}")
    result = np.empty(len(shares))
    for label, share in enumerate(shares):
        candidates = candidate_thresholds(values[:, label])
        said = len(values) - np.searchsorted(np.sort(values[:, label]), candidates, side="right")
        result[label] = candidates[np.argmin(np.abs(said - share * len(values)))]
    return result


def choose(
    rule: str,
    val_y: np.ndarray,
    val_scores: np.ndarray,
    *,
    prevalence: np.ndarray | None = None,
    value: float = 0.5,
) -> np.ndarray:
    """Return thresholds (L,) by the name of a rule, from validation truth and scores.

    Parameters
    ----------
    rule : "fixed" | "f1" | "prevalence"
    val_y : ndarray of 0/1, (n, L)
    val_scores : ndarray of float, (n, L)
    prevalence : ndarray (L,), optional
        Training prevalence. Needed by "prevalence"; with "f1" it serves labels without positives in validation.
    value : float
        The threshold of "fixed".

    Raises
    ------
    UsageError
        For an unknown rule, or "prevalence" without a prevalence.
    """
    truth = check_truth(val_y)
    if rule == "fixed":
        return fixed(truth.shape[1], value)
    if rule not in RULES:
        raise UsageError(f"unknown threshold rule {rule!r}; known: {', '.join(RULES)}")
    if not len(truth):
        raise DataError(f"no validation samples to choose thresholds by {rule!r} on; give a val split or use 'fixed'")
    if rule == "f1":
        return f1_optimal(
            truth, val_scores, np.inf if prevalence is None else prevalence_matched(val_scores, prevalence)
        )
    if prevalence is None:
        raise UsageError("threshold rule 'prevalence' needs the training prevalence of each label")
    return prevalence_matched(val_scores, prevalence)


def choose_on_validation(
    rule: str, y: np.ndarray, scores: np.ndarray, split: np.ndarray, *, value: float = 0.5
) -> np.ndarray:
    """Return thresholds (L,) for a whole data set, reading truth of its train and val rows only.

    Parameters
    ----------
    rule : "fixed" | "f1" | "prevalence"
    y : ndarray of 0/1, (n, L)
    scores : ndarray of float, (n, L)
    split : ndarray of str, (n,)
        "train", "val" or "test"; prevalence comes from the train rows, everything else from the val rows.
    value : float
        The threshold of "fixed".
    """
    parts = np.asarray(split, dtype=object)
    train, validation = parts == "train", parts == "val"
    truth = np.asarray(y)
    prevalence = check_truth(truth[train]).mean(axis=0) if train.any() else None
    return choose(rule, truth[validation], np.asarray(scores)[validation], prevalence=prevalence, value=value)
