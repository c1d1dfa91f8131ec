"""Metrics that are means of one value a sample: LRAP, coverage, ranking loss, exact match, Hamming loss.

Truth (n, L) with scores or decisions (n, L) come in, NumPy or torch; a value for each sample goes out. Because the
metric is their mean, a bootstrap of it is a product of resample counts with these values.
"""

from __future__ import annotations

from analysis.metrics.arrays import Array, alike, check_decisions, check_scores, check_truth, divide, floats, namespace

# Cells of the (samples, labels, labels) comparison that LRAP and ranking loss hold in memory at once.
_COMPARISON_CELLS = 1 << 24


def lrap_samples(y: Array, scores: Array) -> Array:
    """Return the label ranking average precision of each sample.

    For each positive label: the share of positives among the labels that score at least as high; then the mean over the
    sample's positives. Their mean is scikit-learn's ``label_ranking_average_precision_score``.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    scores : array of float, (n, L)

    Returns
    -------
    array of float64, (n,)
        1 where a sample has no positive label, or only positive ones.
    """
    truth, values = _checked(y, scores)
    xp = namespace(truth)
    parts = []
    for part, positive in _blocks(truth, values):
        as_high = part[:, None, :] >= part[:, :, None]
        rank = as_high.sum(axis=2)
        rank_among_positives = (as_high & positive[:, None, :]).sum(axis=2)
        shares = floats(rank_among_positives) / floats(rank)
        parts.append(divide((shares * positive).sum(axis=1), positive.sum(axis=1), 1.0))
    return xp.concatenate(parts)


def ranking_loss_samples(y: Array, scores: Array) -> Array:
    """Return the share of each sample's (positive, negative) pairs of labels that are not in the right order.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    scores : array of float, (n, L)

    Returns
    -------
    array of float64, (n,)
        A tie counts as wrong, as in scikit-learn's ``label_ranking_loss``; 0 for a sample without positives or
        without negatives.
    """
    truth, values = _checked(y, scores)
    xp = namespace(truth)
    parts = []
    for part, positive in _blocks(truth, values):
        wrong = (part[:, None, :] >= part[:, :, None]) & positive[:, :, None] & ~positive[:, None, :]
        positives = positive.sum(axis=1)
        parts.append(divide(wrong.sum(axis=2).sum(axis=1), positives * (truth.shape[1] - positives), 0.0))
    return xp.concatenate(parts)


def coverage_samples(y: Array, scores: Array) -> Array:
    """Return how far down each sample's ranking one must go to cover its positives, as scikit-learn's coverage error.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    scores : array of float, (n, L)

    Returns
    -------
    array of float64, (n,)
        Number of labels that score at least as high as the lowest positive; 0 for a sample without positives.
    """
    truth, values = _checked(y, scores)
    xp = namespace(truth)
    if not truth.shape[1]:
        return floats(truth.sum(axis=1))
    lowest_positive = xp.amin(xp.where(truth, values, float("inf")), axis=1)
    return floats((values >= lowest_positive[:, None]).sum(axis=1))


def exact_match_samples(y: Array, decisions: Array) -> Array:
    """Return for each sample 1.0 where all its labels are decided rightly (subset accuracy), else 0.0; (n,)."""
    truth, decided = _decided(y, decisions)
    return floats((truth == decided).all(axis=1))


def hamming_samples(y: Array, decisions: Array) -> Array:
    """Return for each sample the share of its labels that are decided wrongly; (n,) float64."""
    truth, decided = _decided(y, decisions)
    return floats(truth != decided).mean(axis=1)


def confusion_samples(y: Array, decisions: Array) -> tuple[Array, Array, Array]:
    """Return true positives, false positives and false negatives of each sample and label, three (n, L) bool arrays."""
    truth, decided = _decided(y, decisions)
    return truth & decided, ~truth & decided, truth & ~decided


def _checked(y: Array, scores: Array) -> tuple[Array, Array]:
    y, scores = alike(y, scores)
    truth = check_truth(y)
    return truth, check_scores(truth, scores)


def _decided(y: Array, decisions: Array) -> tuple[Array, Array]:
    y, decisions = alike(y, decisions)
    truth = check_truth(y)
    return truth, check_decisions(truth, decisions)


def _blocks(truth: Array, values: Array) -> list[tuple[Array, Array]]:
    """Return (scores, truth) of blocks of samples whose comparisons fit the budget; one empty block of no samples."""
    count, labels = truth.shape
    step = max(1, _COMPARISON_CELLS // max(1, labels * labels))
    return [(values[start : start + step], truth[start : start + step]) for start in range(0, max(count, 1), step)]
