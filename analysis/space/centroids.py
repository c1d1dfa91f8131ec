"""Sums over the samples of every class, in every resample and permutation, by matrix products over blocks of rows.

In come embeddings as blocks of rows, who belongs to which class, and either weights (resamples) or row orders
(permutations); out come masses, vector sums and sums of squares, and from them centroids and mean distances to them.
Rows are read once for sums and once more for distances to centroids, so any collection that can be read in blocks will
do; all is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from analysis.space.rows import Rows, Shifted

# Float64 cells of an indicator block; 32 MB.
_CELLS = 1 << 22
# Above so many classes a product with indicators costs more than adding rows one by one.
_FEW_CLASSES = 48


@dataclass(frozen=True)
class ClassSums:
    """Sums over the samples of L classes (which may share samples) in R resamples or permutations.

    Parameters
    ----------
    mass, mass_of_squares : ndarray of float64, (R, L)
        Sums of weights and of their squares.
    vectors : Tensor of float64, (R, L, d)
        Weighted sums of rows.
    squares : ndarray of float64, (R, L)
        Weighted sums of squared lengths.
    """

    mass: np.ndarray
    mass_of_squares: np.ndarray
    vectors: torch.Tensor
    squares: np.ndarray


@dataclass(frozen=True)
class ClassGeometry:
    """Where classes lie and how wide they are, in R resamples or permutations.

    Parameters
    ----------
    counts : ndarray of float64, (R, L)
        Samples, or sums of weights.
    widths : ndarray of float64, (R, L)
        Mean distance to the class's centroid; NaN where a class has no sample.
    scatter : ndarray of float64, (R, L)
        Sum of squared distances to the class's centroid.
    between : ndarray of float64, (R, L, L)
        Distances of centroids; NaN where a class has no sample.
    """

    counts: np.ndarray
    widths: np.ndarray
    scatter: np.ndarray
    between: np.ndarray


def weighted_sums(rows: Rows, members: Sequence[np.ndarray], weights: np.ndarray) -> ClassSums:
    """Return sums of classes under weights.

    Parameters
    ----------
    rows : Rows, (n, d)
    members : sequence of L ndarrays of int
        Samples of each class, ascending; a sample may be in several classes or none.
    weights : ndarray, (n, R)
    """
    count, width = weights.shape[1], rows.shape[1]
    vectors: torch.Tensor | None = None
    squares = np.zeros((count, len(members)))
    for place, block in rows.blocks():
        if vectors is None:
            vectors = torch.zeros((count, len(members), width), dtype=torch.float64, device=block.device)
        lengths = block.square().sum(dim=1)
        for label, w, inside in _parts(place, members, weights, block.device):
            vectors[:, label] += w.T @ block[inside]
            squares[:, label] += (w.T @ lengths[inside]).cpu().numpy()
    mass = np.stack([_column_sums(weights[each]) for each in members], axis=1)
    second = np.stack([_column_sums(weights[each].astype(np.float64) ** 2) for each in members], axis=1)
    assert vectors is not None  # rows are at least one
    return ClassSums(mass, second, vectors, squares)


def permuted_sums(rows: Rows, indicator: np.ndarray, orders: np.ndarray) -> ClassSums:
    """Return sums of classes whose membership rows are exchanged between samples.

    Parameters
    ----------
    indicator : ndarray of 0/1, (n, L)
    orders : ndarray of int, (P, n)
        For each permutation, whose row every sample gets.
    """
    count, labels = len(orders), indicator.shape[1]
    single = labels > _FEW_CLASSES and bool((indicator.sum(axis=1) == 1).all())
    own = indicator.argmax(axis=1) if single else None
    vectors: torch.Tensor | None = None
    squares = np.zeros((count, labels))
    step = max(1, _CELLS // (8192 * labels))
    for place, block in rows.blocks():
        if vectors is None:
            vectors = torch.zeros((count, labels, rows.shape[1]), dtype=torch.float64, device=block.device)
        lengths = block.square().sum(dim=1)
        for first in range(0, count, 1 if single else step):
            if own is not None:
                where = torch.from_numpy(own[orders[first, place]]).to(block.device)
                vectors[first].index_add_(0, where, block)
                totals = torch.zeros(labels, dtype=torch.float64, device=block.device)
                squares[first] += totals.index_add_(0, where, lengths).cpu().numpy()
                continue
            some = orders[first : first + step, place]
            members = torch.from_numpy(indicator[some.T].reshape(len(block), -1)).to(block)
            vectors[first : first + len(some)] += (members.T @ block).view(len(some), labels, -1)
            squares[first : first + len(some)] += (lengths @ members).view(len(some), labels).cpu().numpy()
    mass = np.tile(indicator.sum(axis=0, dtype=np.float64), (count, 1))
    assert vectors is not None  # rows are at least one
    return ClassSums(mass, mass.copy(), vectors, squares)


def weighted_geometry(rows: Rows, labels: np.ndarray, number: int, weights: np.ndarray) -> ClassGeometry:
    """Return the geometry of classes under weights.

    Parameters
    ----------
    labels : ndarray of int, (n,)
        Class of each sample, -1 for none.
    number : int
        L.
    weights : ndarray, (n, R)
    """
    rows = Shifted(rows)
    members = [np.flatnonzero(labels == label) for label in range(number)]
    sums = weighted_sums(rows, members, weights)
    centroids = _centroids(sums)
    lengths = centroids.square().sum(dim=2)
    widths, scatter = np.zeros(sums.mass.shape), np.zeros(sums.mass.shape)
    for place, block in rows.blocks():
        for label, w, inside in _parts(place, members, weights, block.device):
            part = block[inside]
            apart = torch.addmm(part.square().sum(dim=1)[:, None], part, centroids[:, label].T, alpha=-2.0)
            apart = (apart + lengths[:, label]).clamp_(min=0.0)
            scatter[:, label] += (apart * w).sum(dim=0).cpu().numpy()
            widths[:, label] += (apart.sqrt_() * w).sum(dim=0).cpu().numpy()
    distinct = np.stack([(weights[each] > 0).sum(axis=0) for each in members], axis=1)
    return _geometry(sums.mass, widths, scatter, centroids, distinct)


def permuted_geometry(rows: Rows, labels: np.ndarray, number: int, orders: np.ndarray) -> ClassGeometry:
    """Return the geometry of classes exchanged between samples; every sample must have a class.

    Parameters
    ----------
    orders : ndarray of int, (P, n)
        For each permutation, whose class every sample gets.
    """
    rows = Shifted(rows)
    sums = permuted_sums(rows, (labels[:, None] == np.arange(number)).astype(np.uint8), orders)
    centroids = _centroids(sums)
    flat = centroids.view(-1, centroids.shape[2])
    lengths = flat.square().sum(dim=1)
    widths, scatter = (torch.zeros(len(flat), dtype=torch.float64, device=flat.device) for _ in range(2))
    step = max(1, _CELLS // (8192 * number))
    for place, block in rows.blocks():
        squares = block.square().sum(dim=1)[:, None]
        for first in range(0, len(orders), step):
            own = torch.from_numpy(labels[orders[first : first + step, place]].T.copy()).to(block.device)  # (b, p)
            own += torch.arange(own.shape[1], device=own.device) * number
            some = slice(first * number, (first + own.shape[1]) * number)
            products = (block @ flat[some].T).gather(1, own)
            apart = (squares - 2 * products + lengths[some][own]).clamp_(min=0.0)
            scatter[some] += torch.zeros_like(lengths[some]).scatter_add_(0, own.reshape(-1), apart.reshape(-1))
            widths[some].scatter_add_(0, own.reshape(-1), apart.sqrt_().reshape(-1))
    shape = sums.mass.shape
    return _geometry(
        sums.mass, widths.view(shape).cpu().numpy(), scatter.view(shape).cpu().numpy(), centroids, sums.mass
    )


def inter_intra_ratio(geometry: ClassGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the study's three figures of each resample or permutation, (R,) each; NaN where one is undefined."""
    number = geometry.counts.shape[1]
    upper = np.triu_indices(number, k=1)
    pairs = geometry.between[:, upper[0], upper[1]]
    defined = ~np.isnan(pairs)
    present = ~np.isnan(geometry.widths)
    with np.errstate(invalid="ignore", divide="ignore"):
        inter = np.where(defined, pairs, 0.0).sum(axis=1) / defined.sum(axis=1)
        intra = np.where(present, geometry.widths, 0.0).sum(axis=1) / present.sum(axis=1)
        ratio = np.where(intra > 0, inter / intra, np.nan)
    return inter, intra, ratio


def _geometry(
    mass: np.ndarray, widths: np.ndarray, scatter: np.ndarray, centroids: torch.Tensor, distinct: np.ndarray
) -> ClassGeometry:
    # Rounding leaves about 1e-8 of a vector's length where the distance is exactly 0: a class of one.
    widths, scatter = np.where(distinct == 1, 0.0, widths), np.where(distinct == 1, 0.0, scatter)
    absent = mass == 0
    between = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    between = np.where(absent[:, :, None] | absent[:, None, :], np.nan, between)
    widths = np.where(absent, np.nan, widths / np.where(absent, 1.0, mass))
    return ClassGeometry(mass, widths, np.maximum(scatter, 0.0), between)


def _centroids(sums: ClassSums) -> torch.Tensor:
    mass = torch.from_numpy(np.where(sums.mass > 0, sums.mass, 1.0)).to(sums.vectors)
    return sums.vectors / mass[:, :, None]


def _parts(
    place: slice, members: Sequence[np.ndarray], weights: np.ndarray, device: torch.device
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield for each class with samples in a block: its number, their weights (b, R), their places in the block."""
    for label, every in enumerate(members):
        here = every[np.searchsorted(every, place.start) : np.searchsorted(every, place.stop)]
        if len(here):
            w = torch.from_numpy(weights[here].astype(np.float64)).to(device)
            yield label, w, torch.from_numpy(here - place.start).to(device)


def _column_sums(weights: np.ndarray) -> np.ndarray:
    return weights.sum(axis=0, dtype=np.float64)
