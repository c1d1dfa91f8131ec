"""Centroids and the spread around them: the study's distances, Davies-Bouldin and the Fisher ratio, all from one pass.

In come embeddings, in memory or in blocks (a dask array over the cache), and a class for each sample; out go measures
with intervals by patient and the null of labels exchanged between patients.

* inter, intra, ratio: as in `analysis.distances.study`.
* Davies-Bouldin: mean over classes of the worst (width_i + width_j) / distance_ij, a width being the mean distance to
  the centroid; lower is better separated (Davies and Bouldin, A cluster separation measure, 1979; as in scikit-learn,
  except that two classes with one centroid are infinitely badly separated, where scikit-learn skips the pair).
* Fisher ratio: trace of the between-class scatter over that of the within-class scatter (Fukunaga, Introduction to
  statistical pattern recognition, 1990, 10.2). It is the Calinski-Harabasz score times (L - 1) / (n - L).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.space.centroids import (
    ClassGeometry,
    inter_intra_ratio,
    permuted_geometry,
    plain_geometry,
    weighted_geometry,
)
from analysis.space.classes import checked_classes, class_name
from analysis.space.measures import Better, Measure, measure
from analysis.space.resampling import group_codes, permuted_rows, resample_weights
from analysis.space.rows import Chosen, Rows, precision_of, rows_of

FIGURES: tuple[tuple[str, Better], ...] = (
    ("inter", "higher"),
    ("intra", "lower"),
    ("ratio", "higher"),
    ("davies_bouldin", "lower"),
    ("fisher_ratio", "higher"),
)
_AT_A_TIME = 200


def centroid_measures(
    features: Any,
    classes: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = False,
    device: str = "cpu",
) -> list[Measure]:
    """Return "inter", "intra", "ratio", "davies_bouldin" and "fisher_ratio".

    Parameters
    ----------
    features : array-like, (n, d)
        Anything that `analysis.space.rows.rows_of` reads; nothing but blocks of it is held in memory.
    classes : ndarray of int, (n,)
        -1 leaves a sample out.
    groups : ndarray, (n,), optional
    class_names : tuple of str, optional

    Raises
    ------
    DataError
        Fewer than two classes, values that are not finite.
    """
    rows: Rows = rows_of(features, normalize=normalize, device=device, dtype=precision_of(features))
    labels, kept = checked_classes(rows, classes, at_least=2, names=class_names)
    codes = group_codes(groups, len(labels))
    if len(kept) < len(labels):
        rows, labels, codes = Chosen(rows, kept), labels[kept], np.unique(codes[kept], return_inverse=True)[1]
    present, dense = np.unique(labels, return_inverse=True)
    number = len(present)
    geometry = plain_geometry(rows, dense, number)
    value = centroid_figures(geometry)[0]
    drawn = null = None
    if replicates:
        weights = resample_weights(codes, replicates, seed)[:, 1:]
        some = (weights[:, first : first + _AT_A_TIME] for first in range(0, replicates, _AT_A_TIME))
        drawn = np.concatenate([centroid_figures(weighted_geometry(rows, dense, number, part)) for part in some])
    if permutations:
        orders = permuted_rows(codes, permutations, seed)
        parts = (orders[first : first + _AT_A_TIME] for first in range(0, permutations, _AT_A_TIME))
        null = np.concatenate([centroid_figures(permuted_geometry(rows, dense, number, part)) for part in parts])
    groups_in_all = int(codes.max()) + 1
    notes = _notes(geometry, [class_name(int(label), class_names) for label in present])
    return [
        measure(
            name, value[column], drawn=None if drawn is None else drawn[:, column],
            null=None if null is None else null[:, column], better=better, centred=True, level=level,
            samples=len(labels), groups=groups_in_all, note=notes.get(name, ""),
        )
        for column, (name, better) in enumerate(FIGURES)
    ]  # fmt: skip


def centroid_figures(geometry: ClassGeometry) -> np.ndarray:
    """Return the five figures of each resample or permutation, (R, 5) float64; NaN where one is undefined."""
    inter, intra, ratio = inter_intra_ratio(geometry)
    return np.stack([inter, intra, ratio, davies_bouldin(geometry), fisher_ratio(geometry)], axis=1)


def davies_bouldin(geometry: ClassGeometry) -> np.ndarray:
    """Return the Davies-Bouldin index of each resample, (R,); infinite where two classes have one centroid."""
    present = ~np.isnan(geometry.widths)
    widths = np.where(present, geometry.widths, 0.0)
    pairs = present[:, :, None] & present[:, None, :] & ~np.eye(present.shape[1], dtype=bool)
    apart = np.where(pairs, geometry.between, 1.0)
    both = widths[:, :, None] + widths[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        badness = np.where(apart > 0, both / apart, np.inf)
    worst = np.where(pairs, badness, -np.inf).max(axis=2)
    number = present.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(number > 1, np.where(present, worst, 0.0).sum(axis=1) / number, np.nan)


def fisher_ratio(geometry: ClassGeometry) -> np.ndarray:
    """Return the trace of between-class over within-class scatter of each resample, (R,).

    Between-class scatter around the overall mean is the sum over pairs of n_i n_j |c_i - c_j|^2 / n.
    """
    counts = geometry.counts
    squares = np.where(np.isnan(geometry.between), 0.0, geometry.between) ** 2
    between = np.einsum("ri,rij,rj->r", counts, squares, counts) / (2 * counts.sum(axis=1))
    within = geometry.scatter.sum(axis=1)
    present = (counts > 0).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((present > 1) & (within > 0), between / within, np.nan)


def _notes(geometry: ClassGeometry, names: list[str]) -> dict[str, str]:
    """Say what is infinite, undefined or 0 by construction, with the classes' names."""
    notes = {}
    counts = geometry.counts[0]
    alone = [name for name, count in zip(names, counts, strict=True) if count == 1]
    if alone:
        shown = ", ".join(alone)
        notes["intra"] = notes["ratio"] = notes["davies_bouldin"] = f"width 0 by construction, one sample: {shown}"
    upper = np.triu_indices(len(names), k=1)
    same = np.flatnonzero(geometry.between[0][upper] == 0)
    if len(same):
        pairs = ", ".join(f"{names[upper[0][pair]]} and {names[upper[1][pair]]}" for pair in same[:3])
        notes["davies_bouldin"] = f"infinite: the same centroid for {pairs}"
    if not geometry.scatter[0].sum() > 0:
        notes["fisher_ratio"] = "undefined: no spread within classes"
    if not np.nanmean(geometry.widths[0]) > 0:
        notes["ratio"] = "undefined: no spread within classes"
    return notes
