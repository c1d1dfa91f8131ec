"""How far apart classes lie in embedding space: inter, intra, their ratio, and the ratio when labels mean nothing.

In come embeddings (n, d) and one class for each sample (the first positive label in the study's order); out go the
study's three figures, the distance of every pair of classes, a null from permuted labels and intervals by patient.

The study (arXiv 2506.14136) reads a ratio above 1 as separation. But a class of one image has its centroid at distance
0 from itself and far from the others, so small classes alone raise the ratio: with labels permuted and class sizes like
the study's it is about 0.89, not 0. `permuted_null` says what it is for the data at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from analysis.bootstrap import Interval, percentile_ends, resample_counts
from analysis.space.centroids import inter_intra_ratio, permuted_geometry, weighted_geometry
from analysis.space.rows import rows_of
from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError

NO_CLASS = -1
# Resamples or permutations in one product.
_AT_A_TIME = 200


@dataclass(frozen=True)
class Distances:
    """Distances between and within classes.

    Parameters
    ----------
    inter : float
        Mean over pairs of classes of the Euclidean distance between their centroids; NaN with fewer than two classes.
    intra : float
        Mean over classes of the mean Euclidean distance to the class's centroid (0 for a class of one).
    ratio : float
        inter / intra; NaN where either is undefined or intra is 0.
    counts : ndarray of int64, (L,)
        Samples a class. Classes without samples take no part.
    intra_of_class : ndarray of float64, (L,)
        NaN for classes without samples.
    between : ndarray of float64, (L, L)
        Distance of each pair of centroids, 0 on the diagonal, NaN where a class has no samples.
    """

    inter: float
    intra: float
    ratio: float
    counts: np.ndarray
    intra_of_class: np.ndarray
    between: np.ndarray

    @property
    def singletons(self) -> int:
        """Number of classes with one sample, whose intra distance is 0 by construction."""
        return int((self.counts == 1).sum())


class Null(NamedTuple):
    """The ratio under permuted labels.

    ``value`` is its mean, ``low`` and ``high`` the ends of its percentile range, ``p`` the share of permutations with a
    ratio at least as high as the observed one (the observed one counted in), ``ratios`` all of them, (P,).
    """

    value: float
    low: float
    high: float
    p: float
    ratios: np.ndarray


def first_positive(y: np.ndarray) -> np.ndarray:
    """Return for each row of truth (n, L) the number of its first positive label, -1 where it has none; (n,) int64."""
    truth = np.asarray(y) == 1
    return np.where(truth.any(axis=1), truth.argmax(axis=1), NO_CLASS).astype(np.int64)


def class_distances(
    features: np.ndarray, first_label: np.ndarray, *, classes: int | None = None, normalize: bool = False
) -> Distances:
    """Return inter, intra and ratio as the study computes them.

    Parameters
    ----------
    features : ndarray of float, (n, d)
        Embeddings; un-normalised ones for the study's own figures.
    first_label : ndarray of int, (n,)
        Class of each sample, 0 to L - 1; -1 leaves the sample out.
    classes : int, optional
        L; by default the highest class present plus one.
    normalize : bool
        Bring every embedding to length 1 first (``protocol: sound``), so that brightness of an image's vector, which
        cosine similarity never sees, does not pass for distance between diseases.

    Raises
    ------
    DataError
        Where shapes differ, a class is out of range or no sample has a class.
    """
    values, labels, number = _check(features, first_label, classes, normalize)
    counts = np.bincount(labels, minlength=number)
    centroids = _centroids(values, labels, number, counts)
    to_centroid = np.linalg.norm(values - centroids[labels], axis=1)
    with np.errstate(invalid="ignore"):
        intra_of_class = np.bincount(labels, weights=to_centroid, minlength=number) / counts
    between = np.full((number, number), np.nan)
    present = np.flatnonzero(counts)
    for label in present:
        between[label, present] = np.linalg.norm(centroids[present] - centroids[label], axis=1)
    pairs = between[np.ix_(present, present)][np.triu_indices(len(present), k=1)]
    inter = float(pairs.mean()) if len(pairs) else float("nan")
    intra = float(intra_of_class[present].mean())
    return Distances(inter, intra, _ratio(inter, intra), counts.astype(np.int64), intra_of_class, between)


def permuted_null(
    features: np.ndarray,
    first_label: np.ndarray,
    *,
    permutations: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = False,
    device: str = "cpu",
) -> Null:
    """Return the distribution of the ratio when classes of the same sizes are given to samples at random.

    Parameters
    ----------
    features, first_label, normalize
        As in `class_distances`.
    permutations : int
    seed : int
    level : float
        Share of permutations between ``low`` and ``high``.
    device : str
        Where the permuted sums are made.
    """
    if permutations < 1:
        raise UsageError(f"{permutations} permutations asked for; at least 1 is needed (1000 is usual)")
    values, labels, number = _check(features, first_label, None, normalize)
    observed = class_distances(values, labels).ratio
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = rows_of(values, device=device)
    ratios = np.empty(permutations)
    for first in range(0, permutations, _AT_A_TIME):
        orders = np.stack([generator.permutation(len(labels)) for _ in range(min(_AT_A_TIME, permutations - first))])
        geometry = permuted_geometry(rows, labels, number, orders)
        ratios[first : first + len(orders)] = inter_intra_ratio(geometry)[2]
    low, high = percentile_ends(ratios, level)
    p = (1 + int((ratios >= observed).sum())) / (1 + permutations) if np.isfinite(observed) else float("nan")
    return Null(
        float(np.nanmean(ratios)) if np.isfinite(ratios).any() else float("nan"), float(low), float(high), p, ratios
    )


def bootstrap_distances(
    features: np.ndarray,
    first_label: np.ndarray,
    groups: np.ndarray,
    *,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = False,
    device: str = "cpu",
) -> dict[str, Interval]:
    """Return "inter", "intra" and "ratio" with percentile intervals, groups drawn with replacement.

    Copies of one sample pull its class's centroid to themselves, so the replicates' intra lies a little below the
    value, the more the smaller the classes; the intervals show spread, and `permuted_null` is the test.

    Parameters
    ----------
    features, first_label, normalize
        As in `class_distances`.
    groups : ndarray, (n,)
    replicates, seed, level
        As in `analysis.bootstrap.bootstrap_metrics`.
    device : str
        Where the resampled sums are made.
    """
    value = class_distances(features, first_label, normalize=normalize)
    codes, resamples = resample_counts(groups, replicates, seed)
    kept = np.asarray(first_label) != NO_CLASS
    values, labels, number = _check(features, first_label, None, normalize)
    codes = codes[kept]
    rows = rows_of(values, device=device)
    drawn = np.empty((replicates, 3))
    for first in range(0, replicates, _AT_A_TIME):
        weights = resamples[first : first + _AT_A_TIME].T[codes]
        geometry = weighted_geometry(rows, labels, number, weights)
        drawn[first : first + _AT_A_TIME] = np.stack(inter_intra_ratio(geometry), axis=1)
    low, high = percentile_ends(drawn, level, axis=0)
    if len(np.unique(codes)) < 2:
        low, high = np.full(3, np.nan), np.full(3, np.nan)
    defined = np.isfinite(drawn).sum(axis=0)
    point = (value.inter, value.intra, value.ratio)
    return {
        name: Interval(point[i], float(low[i]), float(high[i]), int(defined[i]))
        for i, name in enumerate(("inter", "intra", "ratio"))
    }


def _check(
    features: np.ndarray, first_label: np.ndarray, classes: int | None, normalize: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the samples that have a class: their embeddings as float64, their classes, and the number of classes."""
    values = normalise_rows(features) if normalize else np.asarray(features, dtype=np.float64)
    labels = np.asarray(first_label)
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise DataError(f"embeddings of shape {values.shape} and classes of shape {labels.shape} do not fit together")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"classes must be whole numbers (the first positive label), got {labels.dtype}")
    kept = labels != NO_CLASS
    if not kept.any():
        raise DataError("no sample has a class; distances need at least one positive label")
    number = int(labels.max()) + 1 if classes is None else classes
    if labels[kept].min() < 0 or labels.max() >= number:
        raise DataError(f"classes lie between {labels[kept].min()} and {labels.max()}, expected 0 to {number - 1}")
    return values[kept], labels[kept].astype(np.int64), number


def _centroids(values: np.ndarray, labels: np.ndarray, number: int, counts: np.ndarray) -> np.ndarray:
    """Return the mean of each class, (L, d); 0 for classes without samples."""
    # A sparse product: a thin dense one costs more in threads that wait for each other than in arithmetic.
    every = np.ones(len(labels))
    membership = sparse.csr_matrix((every, (labels, np.arange(len(labels)))), shape=(number, len(labels)))
    return (membership @ values) / np.where(counts > 0, counts, 1.0)[:, None]


def _ratio(inter: float, intra: float) -> float:
    return inter / intra if intra > 0 else float("nan")
