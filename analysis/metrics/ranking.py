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
RUN_LEVELS = 24
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
    nothing = xp.zeros_like(columns.sum(axis=0))[None]
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
    at : ndarray of float32, (K, p), or None
        Positives at each level; None where row k of the weights is level k's only positive.
    hits : ndarray of float32, (K, p)
        Positives at or above each level, within the run.
    misses : ndarray of float32, (K, q) or (2 K, q)
        Negatives at or above each level, within the run; and, where negatives tie with positives, the same with those
        that tie at the level counted half.
    most : float
        Number of positives times negatives: with the squared largest weight, a bound for sums over their pairs.
    """

    positives: np.ndarray
    negatives: np.ndarray
    at: np.ndarray | None
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
            alone = at.shape[0] == at.shape[1] and (at.max(axis=0) == 1).all() and (at.sum(axis=1) == 1).all()
            if alone:
                into, at = into[at.argmax(axis=1)], np.eye(len(at))
            # Counts and halves of counts, which float32 holds exactly.
            wide, hits, missed = (part.astype(np.float32) for part in (at, at.cumsum(axis=0), np.concatenate(misses)))
            most = float(hit.sum()) * float((~hit).sum())
            self._runs.append(_Run(into, other, None if alone else wide, hits, missed, most))

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
            positives = _rows(weights, run.positives)
            at = positives if run.at is None else _as_weights(run.at, weights) @ positives
            misses = _as_weights(run.misses, weights) @ _rows(weights, run.negatives)
            below, above = misses[: len(at)], misses[-len(at) :]
            counted = at
            if run.most * largest**2 >= _EXACT_FLOAT32:
                counted, above = floats(at), floats(above)
            # Pairs within the run, and those of its positives with all negatives before it.
            wrong_pairs += (counted * above).sum(axis=0)
            wrong_pairs += false * at.sum(axis=0)
            if precision:
                precisions += _precisions(at, _as_weights(run.hits, weights) @ positives + true, below + false)
            true = true + at.sum(axis=0)
            false = false + below[-1]
        auroc, average_precision = _metrics(wrong_pairs, precisions, true, negatives)
        return auroc, average_precision if precision else float("nan") * average_precision


def _counted(rows: np.ndarray, levels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many samples each level and row of weights has, (count, rows that have any), and which rows."""
    present, column = np.unique(rows, return_inverse=True)
    table = np.bincount(levels * len(present) + column, minlength=count * len(present))
    return table.reshape(count, len(present)).astype(np.float64), present


def _as_weights(matrix: np.ndarray, weights: Array) -> Array:
    """Return the matrix as the weights are: of their kind, device and dtype."""
    array = like(weights, matrix)
    return array.to(weights.dtype) if is_tensor(array) else array.astype(weights.dtype, copy=False)


def _rows(weights: Array, rows: np.ndarray) -> Array:
    """Return rows of the weights; these ways are several times faster than indexing."""
    places = like(weights, rows)
    return weights.index_select(0, places) if is_tensor(weights) else weights.take(places, axis=0)


def _precisions(at: Array, true: Array, false: Array) -> Array:
    """Return the sum over levels (K, R) of the weight of the positives there times the precision, (R,) float64.

    Where nothing weighs at or above a level, nothing is at it either, and the smallest divisor gives 0.
    """
    return (floats(at) * (floats(true) / (true + false).clip(min=1e-300))).sum(axis=0)


class Columns(NamedTuple):
    """Weights (G, R) in the precisions that sums over them need.

    wide : array of float64
    narrow : array of float32, or None
        None where not all weights are whole numbers.
    largest : float
        The largest weight.
    """

    wide: Array
    narrow: Array
    largest: float

    def exact(self, samples: int) -> tuple[Array, float]:
        """Return weights in which sums over so many samples are exact, and the largest, infinite where none are."""
        if self.narrow is None or self.largest * samples >= _EXACT_FLOAT32:
            return self.wide, float("inf")
        return self.narrow, self.largest


def columns_of(weights: Array) -> Columns:
    """Return weights (G, R) of any dtype, not negative, in the precisions that sums need."""
    xp = namespace(weights)
    wide = floats(weights)
    largest = float(wide.max()) if len(wide) and wide.shape[1] else 0.0
    narrow = weights.to(xp.float32) if is_tensor(weights) else weights.astype(np.float32)
    whole = largest < _EXACT_FLOAT32 and bool((wide == xp.round(wide)).all())
    return Columns(wide, narrow if whole else None, largest)


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
