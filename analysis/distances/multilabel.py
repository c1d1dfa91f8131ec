"""Distances that fit several labels a sample, and that class sizes alone cannot make: label by label, and by overlap.

In come embeddings and 0/1 labels (n, L); out go measures with intervals by patient and the null of label rows exchanged
between patients, so that which labels occur together stays as it is.

The study's ratio takes the first positive label for a sample's only one, and counts the distance of two centroids even
where it is nothing but the error of means over few samples: centroids of n and m samples of one and the same cloud of
total variance s^2 lie sqrt(s^2 (1 / n + 1 / m)) apart. Here distances are therefore mean squares over pairs of samples
of different patients, whose expectation does not depend on class sizes.

**Label by label** (`label_separation`). Of a label's positives P and negatives N (all others, whatever else they have)
let A, B+ and B- be the mean squared distance of pairs across, within P and within N. With means m+ and m- and total
variances s+^2 and s-^2, E A = |m+ - m-|^2 + s+^2 + s-^2, E B+ = 2 s+^2 and E B- = 2 s-^2. So

    shift^2 = A - (B+ + B-) / 2      estimates |m+ - m-|^2 without bias: 0 on average if the label means nothing,
    variance = (B+ + B-) / 4         is the mean of both sides' variances, each with the same weight at any prevalence,
    separation = shift^2 / variance  is a Fisher ratio of the label (a squared standardised mean difference).

All may be a little below 0 by chance. A is the energy distance with squares instead of distances (Szekely and Rizzo,
Energy statistics, 2013); the sums need no pairs, as the sum of |x - y|^2 follows from sums of x and |x|^2.

**By overlap** (`overlap_distances`). Two samples' label sets overlap by Jaccard's index J, intersection over union (1
for two empty sets). Pairs with the same set (J = 1), with some labels in common, and with none have root mean square
distances "rms_same", "rms_partial" and "rms_disjoint"; "overlap_contrast" is 1 - (rms_same / rms_disjoint)^2, the share
of the squared distance between unlike samples that is missing between like ones; "overlap_slope" is minus the slope of
a straight line of squared distance over J across all pairs, over the mean squared distance: it uses partial overlaps
too. Both are 0 on average if labels mean nothing. An effect brings pairs that share labels nearer: "rms_same" and
"rms_partial" are tested towards less, the others towards more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from analysis.space.centroids import ClassSums, permuted_sums, weighted_sums
from analysis.space.measures import Better, Measure, measure
from analysis.space.neighbours import jaccard
from analysis.space.patient_pairs import PatientPairs
from analysis.space.resampling import group_codes, permuted_rows, resample_weights
from analysis.space.rows import Rows, Shifted, rows_of
from engine.errors import DataError

_OVERLAP: tuple[tuple[str, Better], ...] = (
    ("rms_same", "lower"),
    ("rms_partial", "lower"),
    ("rms_disjoint", "higher"),
    ("overlap_contrast", "higher"),
    ("overlap_slope", "higher"),
)
# Vector sums held at once, in bytes.
_MEMORY = 256 << 20


def label_separation(
    features: Any,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    label_names: tuple[str, ...],
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = False,
    device: str = "cpu",
) -> list[Measure]:
    """Return "separation" of each label, and its mean over labels (label None).

    Parameters
    ----------
    features : array-like, (n, d)
        Anything that `analysis.space.rows.rows_of` reads, also dask arrays.
    y : ndarray of 0/1, (n, L)
    groups : ndarray, (n,), optional

    Returns
    -------
    list of Measure
        A label with positives or negatives of fewer than two patients has no value and says so; it takes no part in the
        mean.

    Raises
    ------
    DataError
        Shapes that do not fit, values that are not finite, no label with positives and negatives of two patients each.
    """
    rows, truth, codes = _checked(features, y, groups, label_names, normalize, device)
    positives = truth.sum(axis=0)
    patients = [
        [len(np.unique(codes[truth[:, column] == side])) for side in (1, 0)] for column in range(truth.shape[1])
    ]
    able = np.array([min(both) >= 2 for both in patients], dtype=bool)
    if not able.any():
        raise DataError(
            f"none of the labels {', '.join(label_names)} has two positive and two negative patients among "
            f"{len(truth)} samples; separation is about pairs on both sides"
        )
    columns = np.flatnonzero(able)
    some_truth = np.ascontiguousarray(truth[:, columns])
    members = [np.arange(len(truth)), *(np.flatnonzero(column) for column in some_truth.T)]
    indicator = np.column_stack([np.ones(len(truth), dtype=np.uint8), some_truth])
    weights = resample_weights(codes, replicates, seed)
    within = PatientPairs(rows, codes)
    found = _by_parts(
        lambda some: separations(
            weighted_sums(rows, members, weights[:, some]), _weighted_sides(within, some_truth, weights[:, some])
        ),
        replicates + 1, len(members), rows,
    )  # fmt: skip
    null = None
    if permutations:
        orders = permuted_rows(codes, permutations, seed)
        null = _by_parts(
            lambda some: separations(
                permuted_sums(rows, indicator, orders[some]), _permuted_sides(within, some_truth, orders[some])
            ),
            permutations, len(members), rows,
        )  # fmt: skip
    result = [
        measure(
            "separation", float(_mean(found[:1])[0]), drawn=_mean(found[1:]) if replicates else None,
            null=None if null is None else _mean(null), better="higher", level=level, samples=len(truth),
            groups=len(np.unique(codes)), note=_left_out(label_names, able),
        )
    ]  # fmt: skip
    for column, name in enumerate(label_names):
        count = int(positives[column])
        if not able[column]:
            side = "positives" if patients[column][0] < 2 else "negatives"
            note = f"{name!r} has {side} of fewer than two patients, so there are no pairs"
            result.append(measure("separation", np.nan, label=name, samples=count, note=note))
            continue
        at = int(np.flatnonzero(columns == column)[0])
        result.append(
            measure(
                "separation", float(found[0, at]), label=name, drawn=found[1:, at] if replicates else None,
                null=None if null is None else null[:, at], better="higher", level=level, samples=count,
                groups=len(np.unique(codes[truth[:, column] == 1])),
                note="" if np.isfinite(found[0, at]) else "undefined: no spread within either side",
            )
        )  # fmt: skip
    return result


class _Sides(NamedTuple):
    """Of pairs within patients, by label: numbers and summed squares of pairs of two positives, two negatives, of both.

    Each (R, L) float64; a pair counts once.
    """

    positives: np.ndarray
    negatives: np.ndarray
    mixed: np.ndarray
    positive_squares: np.ndarray
    negative_squares: np.ndarray
    mixed_squares: np.ndarray


def _weighted_sides(within: PatientPairs, truth: np.ndarray, weights: np.ndarray) -> _Sides:
    one, other = truth[within.first].astype(np.float64), truth[within.second].astype(np.float64)
    kinds = (one * other, (1 - one) * (1 - other), np.abs(one - other))
    pairs = within.weights(weights)
    return _Sides(*(pairs.T @ kind for kind in kinds), *((pairs * within.squares[:, None]).T @ kind for kind in kinds))


def _permuted_sides(within: PatientPairs, truth: np.ndarray, orders: np.ndarray) -> _Sides:
    found = np.zeros((6, len(orders), truth.shape[1]))
    for row, order in enumerate(orders if len(within) else ()):
        one, other = truth[order[within.first]].astype(np.float64), truth[order[within.second]].astype(np.float64)
        for number, kind in enumerate((one * other, (1 - one) * (1 - other), np.abs(one - other))):
            found[number, row], found[number + 3, row] = kind.sum(axis=0), within.squares @ kind
    return _Sides(*found)


def separations(sums: ClassSums, within: _Sides) -> np.ndarray:
    """Return the separation of every label, (R, L) float64, from sums over all samples (first) and its positives.

    ``within`` are the pairs of one patient, which take no part.
    """
    whole, positive = slice(0, 1), slice(1, None)
    mass, second, squares = (each[:, positive] for each in (sums.mass, sums.mass_of_squares, sums.squares))
    vectors = sums.vectors[:, positive]
    other_mass = sums.mass[:, whole] - mass
    other_second = sums.mass_of_squares[:, whole] - second
    other_squares, other_vectors = sums.squares[:, whole] - squares, sums.vectors[:, whole] - vectors
    inside = _mean_of_pairs(mass, second, squares, vectors, within.positives, within.positive_squares)
    outside = _mean_of_pairs(
        other_mass, other_second, other_squares, other_vectors, within.negatives, within.negative_squares
    )
    products = (vectors * other_vectors).sum(dim=2).cpu().numpy()
    totals = squares * other_mass + other_squares * mass - 2 * products - within.mixed_squares
    with np.errstate(invalid="ignore", divide="ignore"):
        across = totals / (mass * other_mass - within.mixed)
        variance = (inside + outside) / 4
        return np.where(variance > 0, (across - 2 * variance) / variance, np.nan)


def overlap_distances(
    features: Any,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    label_names: tuple[str, ...],
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = False,
    device: str = "cpu",
) -> list[Measure]:
    """Return distances of pairs by the overlap of their label sets, see the module's head.

    Parameters
    ----------
    features, y, groups
        As in `label_separation`.

    Returns
    -------
    list of Measure
        "rms_same", "rms_partial", "rms_disjoint", "overlap_contrast", "overlap_slope"; NaN with a note where there is
        no such pair.
    """
    rows, truth, codes = _checked(features, y, groups, label_names, normalize, device)
    if codes.max() < 1:
        raise DataError(f"distances of pairs need at least 2 patients, got 1 with {len(truth)} samples")
    sets, own = np.unique(truth, axis=0, return_inverse=True)
    own = own.reshape(-1)
    overlap = jaccard(sets)
    members = [np.flatnonzero(own == number) for number in range(len(sets))]
    weights = resample_weights(codes, replicates, seed)
    within = PatientPairs(rows, codes)
    found = _by_parts(
        lambda some: _overlap_figures(
            weighted_sums(rows, members, weights[:, some]),
            overlap,
            _weighted_kinds(within, own, overlap, weights[:, some]),
        ),
        replicates + 1, len(members), rows,
    )  # fmt: skip
    null = None
    if permutations:
        orders = permuted_rows(codes, permutations, seed)
        indicator = (own[:, None] == np.arange(len(sets))).astype(np.uint8)
        null = _by_parts(
            lambda some: _overlap_figures(
                permuted_sums(rows, indicator, orders[some]), overlap,
                _permuted_kinds(within, own, overlap, orders[some]),
            ),
            permutations, len(members), rows,
        )  # fmt: skip
    return [
        measure(
            name, float(found[0, column]), drawn=found[1:, column] if replicates else None,
            null=None if null is None else null[:, column], better=better, level=level, samples=len(truth),
            groups=len(np.unique(codes)),
            note="" if np.isfinite(found[0, column]) else _no_pairs(name, len(sets)),
        )
        for column, (name, better) in enumerate(_OVERLAP)
    ]  # fmt: skip


def _kinds(overlap: np.ndarray) -> np.ndarray:
    """Return what is summed over pairs of an overlap J: same, some and no labels, J and J^2, in a new last axis."""
    return np.stack([overlap == 1, (overlap > 0) & (overlap < 1), overlap == 0, overlap, overlap**2], axis=-1) * 1.0


def _weighted_kinds(
    within: PatientPairs, own: np.ndarray, overlap: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums over pairs within patients, of kinds alone and times squared distances, (R, 5) each."""
    kinds = _kinds(overlap[own[within.first], own[within.second]])
    pairs = within.weights(weights).T
    return pairs @ kinds, pairs @ (kinds * within.squares[:, None])


def _permuted_kinds(
    within: PatientPairs, own: np.ndarray, overlap: np.ndarray, orders: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    found = np.zeros((2, len(orders), 5))
    for row, order in enumerate(orders if len(within) else ()):
        kinds = _kinds(overlap[own[order[within.first]], own[order[within.second]]])
        found[0, row], found[1, row] = kinds.sum(axis=0), within.squares @ kinds
    return found[0], found[1]


def _overlap_figures(sums: ClassSums, overlap: np.ndarray, within: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the five figures of each resample or permutation, (R, 5), from sums over each label set."""
    mass = sums.mass
    products = torch.bmm(sums.vectors, sums.vectors.transpose(1, 2)).cpu().numpy()
    crossed = sums.squares[:, :, None] * mass[:, None, :]
    # Over ordered pairs; a sample with itself (and its copies) adds distance 0 and must not be counted.
    totals = np.maximum(crossed + crossed.transpose(0, 2, 1) - 2 * products, 0.0)
    pairs = mass[:, :, None] * mass[:, None, :]
    diagonal = np.arange(mass.shape[1])
    pairs[:, diagonal, diagonal] -= sums.mass_of_squares
    kinds = _kinds(overlap)
    counts = np.einsum("ruv,uvk->rk", pairs, kinds) - 2 * within[0]
    squares = np.einsum("ruv,uvk->rk", totals, kinds) - 2 * within[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts[:, :3] > 0.5, np.maximum(squares[:, :3], 0.0) / counts[:, :3], np.nan)
        number = counts[:, :3].sum(axis=1)
        mean, mean_overlap = squares[:, :3].sum(axis=1) / number, counts[:, 3] / number
        covariance = squares[:, 3] / number - mean * mean_overlap
        variance = counts[:, 4] / number - mean_overlap**2
        slope = np.where((variance > 1e-12) & (mean > 0), -covariance / variance / mean, np.nan)
        contrast = np.where(means[:, 2] > 0, 1 - means[:, 0] / means[:, 2], np.nan)
    return np.column_stack([np.sqrt(means), contrast, slope])


def _mean_of_pairs(
    mass: np.ndarray,
    second: np.ndarray,
    squares: np.ndarray,
    vectors: torch.Tensor,
    less: np.ndarray,
    less_squares: np.ndarray,
) -> np.ndarray:
    """Return mean squared distances over pairs of different patients, (R, L); NaN without a pair."""
    pairs = mass**2 - second - 2 * less
    totals = 2 * (mass * squares - vectors.square().sum(dim=2).cpu().numpy() - less_squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0.5, np.maximum(totals, 0.0) / pairs, np.nan)


def _by_parts(figures: Any, count: int, classes: int, rows: Rows) -> np.ndarray:
    """Return figures of resamples or permutations a part at a time, so that vector sums stay within memory."""
    step = max(1, _MEMORY // (8 * classes * (rows.shape[1] + classes)))
    return np.concatenate([figures(slice(first, min(first + step, count))) for first in range(0, count, step)])


def _checked(
    features: Any, y: np.ndarray, groups: np.ndarray | None, label_names: tuple[str, ...], normalize: bool, device: str
) -> tuple[Rows, np.ndarray, np.ndarray]:
    rows = Shifted(rows_of(features, normalize=normalize, device=device))
    truth = (np.asarray(y) == 1).astype(np.uint8)
    if truth.ndim != 2 or len(truth) != rows.shape[0] or truth.shape[1] != len(label_names):
        raise DataError(
            f"labels of shape {truth.shape} for {rows.shape[0]} embeddings and {len(label_names)} label names; "
            "give one row a sample and one column a label"
        )
    return rows, truth, group_codes(groups, len(truth))


def _mean(values: np.ndarray) -> np.ndarray:
    """Return means over labels (R,), of those that are defined; NaN where none is."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, values, 0.0).sum(axis=1) / defined.sum(axis=1)


def _left_out(names: tuple[str, ...], able: np.ndarray) -> str:
    missing = [name for name, there in zip(names, able, strict=True) if not there]
    return (
        f"mean over {able.sum()} labels, without {', '.join(missing)}" if missing else f"mean over {able.sum()} labels"
    )


def _no_pairs(name: str, sets: int) -> str:
    if sets == 1:
        return "undefined: all samples have the same labels"
    reasons = {
        "rms_same": "no two samples have the same labels",
        "rms_partial": "no two samples share some labels only",
        "rms_disjoint": "every two samples share a label",
    }
    return reasons.get(name, "undefined: too few kinds of pairs")
