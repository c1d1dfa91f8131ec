"""Nearest neighbours: do they share labels (purity), and are some samples everybody's neighbour (hubness)?

In come embeddings (n, d), labels and patients; out go the k nearest neighbours of every sample, exact, and measures on
them with intervals and nulls.

* kNN purity: the share of a sample's k neighbours that have its class; of a label, the share of its positives'
  neighbours that are positive too; of label sets, the neighbours' mean Jaccard overlap.
* k-occurrence N_k: how many samples have this one among their k neighbours; its mean is k. Its skewness is hubness; a
  sample with N_k = 0 is an anti-hub, one with N_k more than twice the standard deviation above k a hub (Radovanovic,
  Nanopoulos and Ivanovic, Hubs in space, 2010).

Neighbours of the same patient are left out where patients are known: that two images of one patient are alike says
nothing about a disease. Intervals draw patients as those who ask, with the collection that is searched held fixed:
in a resample with copies everybody would be his own copy's neighbour.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from analysis.space.classes import checked_classes, class_name
from analysis.space.measures import Measure, measure
from analysis.space.pairwise import Points, sweep
from analysis.space.resampling import group_codes, permuted_rows, resample_weights
from engine.errors import DataError, UsageError

HUB_DEVIATIONS = 2.0
# Columns of a tile of which the nearest is looked at first.
_TOGETHER = 16


class Nearest:
    """Consumer that keeps each sample's k nearest others.

    Parameters
    ----------
    k : int
    codes : ndarray of int, (n,)
        Groups; samples of one group are not each other's neighbours.
    device : str or torch.device

    Raises
    ------
    UsageError
        k below 1, or larger than the number of samples that the largest group leaves.
    """

    squared = True

    def __init__(self, k: int, codes: np.ndarray, device: Any = "cpu") -> None:
        sizes = np.bincount(codes)
        available = len(codes) - int(sizes.max())
        if k < 1:
            raise UsageError(f"{k} neighbours asked for; at least 1 is needed (10 is usual)")
        if k > available:
            of = " of other patients" if sizes.max() > 1 else ""
            raise UsageError(
                f"{k} neighbours asked for, but among {len(codes)} samples some have only {available} others{of}; "
                f"choose k up to {available}" + ("" if available else ", which needs more samples or patients")
            )
        self.k = k
        self._grouped = bool(sizes.max() > 1)
        self._codes = torch.from_numpy(codes).to(device)
        self.rows = torch.empty((len(codes), k), dtype=torch.int64, device=device)
        self.squares = torch.empty((len(codes), k), dtype=torch.float32, device=device)
        self.bytes_a_row = 12 * k
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, rows: slice, columns: slice, tile: torch.Tensor, both: bool) -> None:
        """Keep the nearest of a tile's columns, and of its rows, beside those kept before."""
        barred = self._barred(rows, columns, tile.device)
        before = tile[barred]
        tile[barred] = torch.inf
        self._add(rows, columns, tile)
        if both:
            self._add(columns, rows, tile.T)
        tile[barred] = before

    def _add(self, rows: slice, columns: slice, tile: torch.Tensor) -> None:
        together = math.gcd(tile.shape[1], _TOGETHER)
        while together > 1 and tile.shape[1] < self.k * together:
            together //= 2
        least = _least(tile, together)
        if rows.start in self._kept:
            near, at = self._kept[rows.start]
            limits = near.amax(dim=1)
        else:
            near = tile.new_full((len(tile), self.k), torch.inf)
            at = self.rows.new_zeros(near.shape)
            limits = near[:, 0]
            if least.shape[1] >= self.k:
                # So many columns are no farther than the k-th of the least ones.
                limits = torch.topk(least, self.k, dim=1, largest=False, sorted=False).values.amax(dim=1)
                limits = torch.nextafter(limits, torch.full_like(limits, torch.inf))
        row, column, value = _below(tile, least, limits)
        if len(row):
            # The new ones stand behind those kept, each row's side by side.
            counts = torch.bincount(row, minlength=len(near))
            place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row] + self.k
            missing = (0, int(counts.max()))
            near = torch.nn.functional.pad(near, missing, value=torch.inf)
            at = torch.nn.functional.pad(at, missing)
            near[row, place], at[row, place] = value, column + columns.start
            near, chosen = torch.topk(near, self.k, dim=1, largest=False, sorted=False)
            at = at.gather(1, chosen)
        self._kept[rows.start] = near, at

    def finish(self, rows: slice) -> None:
        """Sort the neighbours of some rows: nearest first, of equally near ones the first."""
        near, at = self._kept.pop(rows.start)
        at, order = at.sort(dim=1)
        near, by_distance = near.gather(1, order).sort(dim=1, stable=True)
        self.rows[rows], self.squares[rows] = at.gather(1, by_distance), near

    def _barred(self, rows: slice, columns: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places in a tile of pairs that are no neighbours: of one group, or a sample with itself."""
        if self._grouped:
            one, other = self._codes[rows], self._codes[columns]
            i, j = torch.isin(one, other).nonzero()[:, 0], torch.isin(other, one).nonzero()[:, 0]
            of_i, of_j = (one[i][:, None] == other[j]).nonzero(as_tuple=True)
            return i[of_i], j[of_j]
        first = max(rows.start, columns.start)
        same = torch.arange(first, max(first, min(rows.stop, columns.stop)), device=device)
        return same - rows.start, same - columns.start


def _least(tile: torch.Tensor, together: int) -> torch.Tensor:
    """Return the smallest of every so many columns of a tile (b, c), (b, c / together).

    Column j stands for j, j + c / together, ...: minima over columns far apart are quicker than over neighbouring ones.
    """
    apart = tile.shape[1] // together
    if tile.is_contiguous():
        return tile.unflatten(1, (together, apart)).amin(dim=1)
    return tile.T.unflatten(0, (together, apart)).amin(dim=0).T  # a tile turned over: along its memory too


def _below(
    tile: torch.Tensor, least: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, column and value of a tile's numbers (b, c) below their row's limit (b,), row by row.

    Most are above it, so that looking where `_least` is below costs little more than one reading of the tile.
    """
    row, first = (least < limits[:, None]).nonzero(as_tuple=True)
    columns = first[:, None] + torch.arange(0, tile.shape[1], least.shape[1], device=tile.device)
    values = tile[row[:, None], columns]
    which, member = (values < limits[row][:, None]).nonzero(as_tuple=True)
    return row[which], columns[which, member], values[which, member]


def nearest_neighbours(
    features: Any, k: int, groups: np.ndarray | None = None, *, normalize: bool = False, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other samples by Euclidean distance: rows (n, k) int64 and distances (n, k) float32.

    Parameters
    ----------
    features : array-like, (n, d)
    k : int
    groups : ndarray, (n,), optional
        Samples of one group are not each other's neighbours.
    normalize : bool
        Lengths 1, so that the order is that of cosines.

    Raises
    ------
    UsageError
        k larger than the collection.
    """
    points = Points(features, normalize=normalize, device=device)
    nearest = Nearest(k, group_codes(groups, points.count), device)
    sweep(points, [nearest])
    return nearest.rows.cpu().numpy(), nearest.squares.sqrt().cpu().numpy()


def knn_purity(
    neighbours: np.ndarray,
    classes: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> list[Measure]:
    """Return the mean share of neighbours of the same class: of all samples, and of each class.

    Parameters
    ----------
    neighbours : ndarray of int, (n, k)
        As `nearest_neighbours` returns them.
    classes : ndarray of int, (n,)
        -1 leaves a sample out as one that asks; as a neighbour it counts as another class.
    groups : ndarray, (n,), optional
    """
    classes, kept = checked_classes(neighbours, classes)
    codes = group_codes(groups, len(classes))
    share = (classes[neighbours] == classes[:, None]).mean(axis=1)
    number = int(classes.max()) + 1
    null = np.empty((permutations, number + 1))
    for row, order in enumerate(permuted_rows(codes, permutations, seed) if permutations else ()):
        permuted = classes[order]
        drawn = (permuted[neighbours] == permuted[:, None]).mean(axis=1)
        null[row] = _means_by_class(drawn, permuted, number)
    weights = resample_weights(codes, replicates, seed)[:, 1:].astype(np.float64)
    result = []
    for label in (None, *np.unique(classes[kept])):
        rows = kept if label is None else np.flatnonzero(classes == label)
        result.append(
            measure(
                "knn_purity",
                share[rows].mean(),
                label=None if label is None else class_name(int(label), class_names),
                drawn=_weighted_mean(share[rows], weights[rows]) if replicates else None,
                null=null[:, -1 if label is None else label] if permutations else None,
                better="higher",
                level=level,
                samples=len(rows),
                groups=len(np.unique(codes[rows])),
                note="a class of one sample has no neighbour of its class" if len(rows) == 1 else "",
            )
        )
    return result


def label_purity(
    neighbours: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    label_names: tuple[str, ...],
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> list[Measure]:
    """Return neighbours' agreement for several labels a sample.

    The first measure, "knn_overlap", is the mean Jaccard overlap of a sample's label set with its neighbours' (two
    samples without any label agree: 1). Then "knn_purity" of each label: the share of its positives' neighbours that
    are positive too; its null is near the label's prevalence.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    """
    truth = np.asarray(y) == 1
    if truth.ndim != 2 or len(truth) != len(neighbours) or truth.shape[1] != len(label_names):
        raise DataError(
            f"labels of shape {truth.shape} for {len(neighbours)} samples and {len(label_names)} label names"
        )
    codes = group_codes(groups, len(truth))
    orders = permuted_rows(codes, permutations, seed) if permutations else np.empty((0, len(truth)), dtype=np.int64)
    sets, number_of_set = np.unique(truth, axis=0, return_inverse=True)
    number_of_set = number_of_set.reshape(-1)
    overlap = jaccard(sets)
    weights = resample_weights(codes, replicates, seed)[:, 1:].astype(np.float64)
    samples, patients = len(truth), len(np.unique(codes))

    def overlap_of(order: np.ndarray) -> np.ndarray:
        permuted = number_of_set[order]
        return overlap[permuted[:, None], permuted[neighbours]].mean(axis=1)

    own = overlap_of(np.arange(samples))
    result = [
        measure(
            "knn_overlap", own.mean(), drawn=_weighted_mean(own, weights) if replicates else None,
            null=np.array([overlap_of(order).mean() for order in orders]) if permutations else None,
            better="higher", level=level, samples=samples, groups=patients,
        )
    ]  # fmt: skip
    for column, name in enumerate(label_names):
        positive = np.flatnonzero(truth[:, column])
        if not len(positive):
            result.append(measure("knn_purity", np.nan, label=name, note=f"{name!r} has no positive sample"))
            continue
        share = truth[neighbours[positive], column].mean(axis=1)
        null = np.empty(permutations)
        for row, order in enumerate(orders):
            permuted = truth[order, column]
            null[row] = permuted[neighbours[permuted]].mean()
        result.append(
            measure(
                "knn_purity", share.mean(), label=name,
                drawn=_weighted_mean(share, weights[positive]) if replicates else None,
                null=null if permutations else None, better="higher", level=level, samples=len(positive),
                groups=len(np.unique(codes[positive])),
                note="one positive sample: no neighbour can share the label" if len(positive) == 1 else "",
            )
        )  # fmt: skip
    return result


def jaccard(sets: np.ndarray) -> np.ndarray:
    """Return the Jaccard overlap of every pair of label sets (u, L), (u, u) float64; 1 for two empty sets."""
    members = np.asarray(sets).astype(np.float64)
    both = members @ members.T
    sizes = members.sum(axis=1)
    either = sizes[:, None] + sizes - both
    return np.where(either > 0, both / np.where(either > 0, either, 1.0), 1.0)


def occurrences(neighbours: np.ndarray) -> np.ndarray:
    """Return how many samples have each one among their k neighbours, (n,) int64."""
    return np.bincount(np.asarray(neighbours).ravel(), minlength=len(neighbours)).astype(np.int64)


def hubness(
    neighbours: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> list[Measure]:
    """Return "hubness" (skewness of the k-occurrence), "antihubs" and "hubs" (shares of samples).

    The null has every sample choose its k neighbours at random. The interval takes occurrences as they are and draws
    patients.

    Parameters
    ----------
    neighbours : ndarray of int, (n, k)
    groups : ndarray, (n,), optional
    """
    count, k = np.shape(neighbours)
    codes = group_codes(groups, count)
    found = occurrences(neighbours).astype(np.float64)
    weights = resample_weights(codes, replicates, seed).astype(np.float64)
    values = _hub_figures(found[:, None], weights)  # (3, R + 1)
    generator = np.random.Generator(np.random.PCG64(seed))
    null = np.empty((3, permutations))
    for row in range(permutations):
        chosen = np.bincount(generator.integers(0, count, count * k), minlength=count).astype(np.float64)
        null[:, row] = _hub_figures(chosen[:, None], np.ones((count, 1)))[:, 0]
    note = "every sample occurs equally often: no skew" if np.ptp(found) == 0 else ""
    return [
        measure(
            name, values[row, 0], drawn=values[row, 1:] if replicates else None,
            null=null[row] if permutations else None, better="lower", effect="higher", level=level, samples=count,
            groups=len(np.unique(codes)), note=note,
        )
        for row, name in enumerate(("hubness", "antihubs", "hubs"))
    ]  # fmt: skip


def _hub_figures(found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return skewness, share of anti-hubs and share of hubs of occurrences (n, 1) under weights (n, R), (3, R)."""
    total = weights.sum(axis=0)
    mean = (weights * found).sum(axis=0) / total
    second = (weights * found**2).sum(axis=0) / total
    third = (weights * found**3).sum(axis=0) / total
    variance = np.maximum(second - mean**2, 0.0)
    spread = variance > 1e-12 * np.maximum(second, 1.0)
    central = third - 3 * mean * second + 2 * mean**3
    skewness = np.where(spread, central / np.where(spread, variance, 1.0) ** 1.5, 0.0)
    antihubs = (weights * (found == 0)).sum(axis=0) / total
    # Of the data's own spread, so that a resample does not move the line between hubs and others.
    line = found.mean() + HUB_DEVIATIONS * max(float(found.std()), float(np.finfo(float).tiny))
    hubs = (weights * (found > line)).sum(axis=0) / total
    return np.stack([skewness, antihubs, hubs])


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return means of values (n,) under weights (n, R), (R,); NaN where nothing was drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (values @ weights) / weights.sum(axis=0)


def _means_by_class(values: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """Return the mean of each class, and of all samples that have one as the last, (L + 1,)."""
    with_class = classes >= 0
    sums = np.bincount(classes[with_class], weights=values[with_class], minlength=number)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / np.bincount(classes[with_class], minlength=number)
    return np.append(means, values[with_class].mean())
