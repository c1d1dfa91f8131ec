"""AUROC and average precision under many columns of weights at once.

One column of truth (n,) and scores (n,) and weights (n, R) come in; AUROC and average precision (R,) go out, exact with
ties. Both need, at each distinct score of the positives, the weight of the positives and of the negatives that score at
least as high. Two ways lead there. *Cumulative sums* over the sorted samples serve a few columns of weights. For the
thousands of columns of a bootstrap, `RankingPlan` cuts the sorted positives into runs of some levels; what a run adds
is a small matrix of counts (levels, patients in the run), the same for every column of weights, so that all columns
together are a few matrix products with a carried sum between them: about the levels of a run in multiplications a
sample and column, where a whole triangular matrix would need as many as there are positives.

Definitions are scikit-learn's: ``roc_auc_score`` (a tie counts half) and ``average_precision_score`` (a step function,
no interpolation), with ``sample_weight``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis.metrics.arrays import (
    Array,
    alike,
    as_numpy,
    check_scores,
    check_truth,
    divide,
    floats,
    is_tensor,
    like,
    namespace,
)

# Levels of a run. Fewer make more and smaller products, more make larger ones with more zeros; flat from 16 to 32.
RUN_LEVELS = 32
# Columns of weights from which products are faster than cumulative sums.
MANY_COLUMNS = 32
# Largest sum of whole numbers, and of halves, that float32 still holds exactly.
_EXACT_FLOAT32 = 1 << 23


def _metrics(wrong_pairs: Array, precisions: Array, positives: Array, negatives: Array) -> tuple[Array, Array]:
    """Return AUROC and average precision from sums over all levels; NaN where they are undefined."""
    pairs = positives * negatives
    return divide(pairs - wrong_pairs, pairs, float("nan")), divide(precisions, positives, float("nan"))


def ranking_of_label(positive: Array, scores: Array, weights: Array) -> tuple[Array, Array]:
    """Return AUROC and average precision of one label under R columns of weights.

    Parameters
    ----------
    positive : array of bool, (n,)
    scores : array of float64, (n,)
    weights : array of float, (n, R), not negative

    Returns
    -------
    auroc, average_precision : array of float64, (R,)
        As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` with ``sample_weight``; NaN where the
        weights leave no positive (both) or no negative (AUROC).
    """
    if weights.shape[1] >= MANY_COLUMNS:
        plan = RankingPlan(as_numpy(positive), as_numpy(scores), np.arange(len(scores)))
        return plan.evaluate(weights, floats(weights[~positive]).sum(axis=0))
    xp = namespace(scores)
    order = xp.argsort(-scores)
    ranked, columns = scores[order], floats(weights[order])
    hits = positive[order][:, None]
    nothing = xp.zeros_like(columns[:1])
    # The last sample of each run of equal scores, where the sums are those of the level.
    ends = xp.concatenate([ranked[1:] != ranked[:-1], ranked[-1:] == ranked[-1:]])
    true = xp.concatenate([nothing, xp.cumsum(xp.where(hits, columns, 0.0), axis=0)[ends]])
    false = xp.concatenate([nothing, xp.cumsum(xp.where(hits, 0.0, columns), axis=0)[ends]])
    positives = true[1:] - true[:-1]
    wrong_pairs = (positives * (false[1:] + false[:-1])).sum(axis=0) / 2
    return _metrics(wrong_pairs, _precisions(positives, true[1:], false[1:]), true[-1], false[-1])


class _Run(NamedTuple):
    """Some levels of a ranking, K, with the samples that count first at one of them.

    positives, negatives : ndarray of int, (p,), (q,)
        Rows of the weights that have such samples.
    hits : ndarray of float32, (2, K, p)
        Positives at each level; and at or above it, within the run.
    misses : ndarray of float32, (1 or 2, K, q)
        Negatives at or above each level, within the run; and, where negatives tie with positives, the same with those
        that tie at the level counted half.
    most : float
        Number of positives times negatives: with the squared largest weight, a bound for sums over their pairs.
    """

    positives: np.ndarray
    negatives: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    most: float


class RankingPlan:
    """The sums that a label's ranking needs, laid out once for any number of columns of weights.

    Parameters
    ----------
    positive : ndarray of bool, (n,)
    scores : ndarray of float64, (n,)
    codes : ndarray of int, (n,)
        Row of the weights that each sample has, such as its patient.
    """

    def __init__(self, positive: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> None:
        self._runs: list[_Run] = []
        levels = np.unique(scores[positive])
        if not len(levels):
            return
        # Place of a sample: the first level, from the highest down, at which it counts; those below all have none.
        ascending = np.searchsorted(levels, scores, side="right") - 1
        used = np.flatnonzero(ascending >= 0)
        place = len(levels) - 1 - ascending[used]
        order = np.argsort(place, kind="stable")
        used, place = used[order], place[order]
        tied = levels[len(levels) - 1 - place] == scores[used]
        starts = np.arange(0, len(levels), RUN_LEVELS)
        ends = np.append(starts[1:], len(levels))
        for first, end, *inside in zip(starts, ends, *np.searchsorted(place, [starts, ends]), strict=True):
            samples, here, tie = (part[slice(*inside)] for part in (used, place - first, tied))
            hit = positive[samples]
            at, into = _counted(codes[samples[hit]], here[hit], end - first)
            below, other = _counted(codes[samples[~hit]], here[~hit], end - first)
            misses = [below.cumsum(axis=0)]
            half = ~hit & tie
            if half.any():
                halves = np.zeros_like(below)
                np.add.at(halves, (here[half], np.searchsorted(other, codes[samples[half]])), 0.5)
                misses.append(misses[0] - halves)
            hits = np.stack([at, at.cumsum(axis=0)])
            self._runs.append(
                _Run(into, other, _float32(hits), _float32(np.stack(misses)), float(hit.sum()) * float((~hit).sum()))
            )

    def evaluate(
        self, weights: Array, negatives: Array, largest: float = float("inf"), *, precision: bool = True
    ) -> tuple[Array, Array]:
        """Return AUROC and average precision, (R,) float64 each.

        Parameters
        ----------
        weights : array of float32 or float64, (G, R)
            float32 where `exact_in_float32` allows it: half the time, the same result.
        negatives : array of float64, (R,)
            Weight of all negatives.
        largest : float
            The largest weight, where all are whole numbers: sums that it keeps small are taken in float32.
        precision : bool
            Whether average precision is wanted; NaN where it is not.
        """
        wrong_pairs, precisions = 0.0 * negatives, 0.0 * negatives
        true, false = 0.0 * negatives, 0.0 * negatives
        for run in self._runs:
            hits = _product(run.hits, weights, run.positives)
            misses = _product(run.misses, weights, run.negatives)
            at, above = hits[0], misses[-1]
            if run.most * largest**2 >= _EXACT_FLOAT32:
                at, above = floats(at), floats(above)
            # Pairs within the run, and those of its positives with all negatives before it.
            wrong_pairs += (at * above).sum(axis=0)
            wrong_pairs += false * floats(hits[1, -1])
            if precision:
                precisions += _precisions(hits[0], hits[1] + true, misses[0] + false)
            true = true + hits[1, -1]
            false = false + misses[0, -1]
        auroc, average_precision = _metrics(wrong_pairs, precisions, true, negatives)
        return auroc, average_precision if precision else float("nan") * average_precision


def _counted(rows: np.ndarray, levels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many samples each level and row of weights has, (count, rows that have any), and which rows."""
    present, column = np.unique(rows, return_inverse=True)
    table = np.bincount(levels * len(present) + column, minlength=count * len(present))
    return table.reshape(count, len(present)).astype(np.float64), present


def _float32(counts: np.ndarray) -> np.ndarray:
    """Return counts and halves of counts, which float32 holds exactly."""
    return counts.astype(np.float32)


def _product(matrix: np.ndarray, weights: Array, rows: np.ndarray) -> Array:
    """Return the matrix (a, K, p) times the rows of the weights, (a, K, R) in the weights' dtype."""
    counts = like(weights, matrix.reshape(matrix.shape[0] * matrix.shape[1], matrix.shape[2]))
    counts = counts.to(weights.dtype) if is_tensor(counts) else counts.astype(weights.dtype, copy=False)
    places = like(weights, rows)
    chosen = weights.index_select(0, places) if is_tensor(weights) else weights.take(places, axis=0)
    return (counts @ chosen).reshape(matrix.shape[0], matrix.shape[1], weights.shape[1])


def _precisions(at: Array, true: Array, false: Array) -> Array:
    """Return the sum over levels (K, R) of the weight of the positives there times the precision, (R,) float64.

    Where nothing weighs at or above a level, nothing is at it either, and the smallest divisor gives 0.
    """
    return (floats(at) * (floats(true) / (true + false).clip(min=1e-300))).sum(axis=0)


def exact_in_float32(weights: Array, samples: int) -> bool:
    """Return whether sums over so many samples of these weights (G, R) are exact in float32: whole and not large."""
    if not len(weights):
        return True
    xp = namespace(weights)
    return bool((weights == xp.floor(weights)).all()) and float(weights.max()) * samples < _EXACT_FLOAT32


def auroc(y: Array, scores: Array) -> Array:
    """Return the AUROC of each label, (L,) float64; NaN for labels without positives or without negatives."""
    return _rankings(y, scores)[0]


def average_precision(y: Array, scores: Array) -> Array:
    """Return the average precision of each label, (L,) float64; NaN for labels without positives."""
    return _rankings(y, scores)[1]


def auroc_micro(y: Array, scores: Array) -> Array:
    """Return the AUROC of all (sample, label) cells as one ranking, () float64; NaN without positives or negatives."""
    y, scores = alike(y, scores)
    truth = check_truth(y)
    values = check_scores(truth, scores)
    return ranking_of_label(truth.reshape(-1), values.reshape(-1), _ones(values.reshape(-1)))[0][0]


def _rankings(y: Array, scores: Array) -> tuple[Array, Array]:
    y, scores = alike(y, scores)
    truth = check_truth(y)
    values = check_scores(truth, scores)
    xp = namespace(truth)
    pairs = [ranking_of_label(truth[:, k], values[:, k], _ones(values[:, k])) for k in range(truth.shape[1])]
    if not pairs:
        return floats(values.sum(axis=0)), floats(values.sum(axis=0))
    return xp.concatenate([pair[0] for pair in pairs]), xp.concatenate([pair[1] for pair in pairs])


def _ones(values: Array) -> Array:
    return namespace(values).ones_like(values)[:, None]
