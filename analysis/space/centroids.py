"""Sums over the samples of every class, in every resample and permutation, by matrix products over blocks of rows.

In come embeddings as blocks of rows, who belongs to which class, and either weights (resamples) or row orders
(permutations); out come masses, vector sums and sums of squares, and from them centroids and mean distances to them.
Rows are read once for sums and once more for distances to centroids, so any collection that can be read in blocks will
do. Products and differences have the precision of the blocks, sums over blocks are float64. So that float32 blocks lose
nothing by it, rows are looked at from near by: from the mean of the first block, or from their class's centroid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from analysis.space.rows import BLOCK_ROWS, Rows, Shifted

# Cells of an indicator block; 16 MB as float32.
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
    single = bool((indicator.sum(axis=1) == 1).all())
    one_by_one = single and labels > _FEW_CLASSES
    own = indicator.argmax(axis=1)
    vectors: torch.Tensor | None = None
    squares = np.zeros((count, labels))
    step = 1 if one_by_one else max(1, _CELLS // (BLOCK_ROWS * labels))
    for place, block in rows.blocks():
        if vectors is None:
            vectors = torch.zeros((count, labels, rows.shape[1]), dtype=torch.float64, device=block.device)
        lengths = block.square().sum(dim=1)
        for first in range(0, count, step):
            some = orders[first : first + step, place]
            if one_by_one:
                where = torch.from_numpy(own[some[0]]).to(block.device)
                vectors[first] += block.new_zeros((labels, block.shape[1])).index_add_(0, where, block)
                squares[first] += lengths.new_zeros(labels).index_add_(0, where, lengths).cpu().numpy()
                continue
            if single:
                members = block.new_zeros((len(block), len(some) * labels))
                members.scatter_(1, _columns(own, some, labels, block.device), 1.0)
            else:
                members = torch.from_numpy(indicator[some.T].reshape(len(block), -1)).to(block)
            vectors[first : first + len(some)] += (members.T @ block).view(len(some), labels, -1)
            squares[first : first + len(some)] += (lengths @ members).view(len(some), labels).cpu().numpy()
    mass = np.tile(indicator.sum(axis=0, dtype=np.float64), (count, 1))
    assert vectors is not None  # rows are at least one
    return ClassSums(mass, mass.copy(), vectors, squares)


def plain_geometry(rows: Rows, labels: np.ndarray, number: int) -> ClassGeometry:
    """Return the geometry of classes as they are (R = 1); every sample must have a class.

    Parameters
    ----------
    labels : ndarray of int, (n,)
    number : int
        L.
    """
    rows = Shifted(rows)
    centroids = _class_means(rows, labels, number)
    counts, widths, scatter = np.bincount(labels, minlength=number)[None] * 1.0, np.zeros(number), np.zeros(number)
    for place, block in rows.blocks():
        own = labels[place]
        apart = centroids.to(block.dtype).index_select(0, torch.from_numpy(own).to(block.device))
        lengths = torch.linalg.vector_norm(apart.sub_(block), dim=1).double().cpu().numpy()
        widths += np.bincount(own, lengths, number)
        scatter += np.bincount(own, lengths**2, number)
    return _geometry(counts, widths[None], scatter[None], centroids[None], counts)


def weighted_geometry(rows: Rows, labels: np.ndarray, number: int, weights: np.ndarray) -> ClassGeometry:
    """Return the geometry of classes under weights; every sample must have a class.

    Parameters
    ----------
    labels : ndarray of int, (n,)
    number : int
        L.
    weights : ndarray, (n, R)
    """
    rows = Shifted(rows)
    # Seen from its class's centroid a sample is not far from that of a resample, so no digits cancel.
    origins = _class_means(rows, labels, number)
    members = [np.flatnonzero(labels == label) for label in range(number)]
    mass = np.stack([_column_sums(weights[each]) for each in members], axis=1)
    moved = torch.zeros((number, weights.shape[1], rows.shape[1]), dtype=torch.float64, device=origins.device)
    for label, w, part in _seen_from(origins, rows, members, weights):
        moved[label] += w.T @ part
    moved /= torch.from_numpy(np.where(mass > 0, mass, 1.0)).to(moved).T[:, :, None]
    turned = moved.to(rows.dtype)
    lengths = turned.square().sum(dim=2)
    widths, scatter = np.zeros(mass.shape), np.zeros(mass.shape)
    for label, w, part in _seen_from(origins, rows, members, weights):
        apart = torch.addmm(part.square().sum(dim=1)[:, None], part, turned[label].T, alpha=-2.0)
        apart = apart.add_(lengths[label]).clamp_(min=0.0)
        scatter[:, label] += torch.einsum("br,br->r", apart, w).double().cpu().numpy()
        widths[:, label] += torch.einsum("br,br->r", apart.sqrt_(), w).double().cpu().numpy()
    distinct = np.stack([(weights[each] > 0).sum(axis=0) for each in members], axis=1)
    return _geometry(mass, widths, scatter, (origins[:, None] + moved).transpose(0, 1), distinct)


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
    flat = centroids.view(-1, centroids.shape[2]).to(rows.dtype)
    lengths = flat.square().sum(dim=1)
    widths, scatter = (torch.zeros(len(flat), dtype=torch.float64, device=flat.device) for _ in range(2))
    step = max(1, _CELLS // (BLOCK_ROWS * number))
    for place, block in rows.blocks():
        squares = block.square().sum(dim=1)[:, None]
        for first in range(0, len(orders), step):
            own = _columns(labels, orders[first : first + step, place], number, block.device)
            some = slice(first * number, (first + own.shape[1]) * number)
            products = (block @ flat[some].T).gather(1, own)
            apart = (squares - 2 * products + lengths[some][own]).clamp_(min=0.0).double().reshape(-1)
            scatter[some] += torch.bincount(own.reshape(-1), apart, len(lengths[some]))
            widths[some] += torch.bincount(own.reshape(-1), apart.sqrt_(), len(lengths[some]))
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


def _class_means(rows: Rows, labels: np.ndarray, number: int) -> torch.Tensor:
    """Return the mean of each class, (L, d) float64; 0 for classes without samples."""
    totals: torch.Tensor | None = None
    for place, block in rows.blocks():
        own = torch.from_numpy(labels[place]).to(block.device)
        if number <= _FEW_CLASSES:
            sums = block.new_zeros((number, len(block))).scatter_(0, own[None], 1.0) @ block
        else:
            sums = block.new_zeros((number, block.shape[1])).index_add_(0, own, block)
        totals = sums.double() if totals is None else totals.add_(sums)
    assert totals is not None  # rows are at least one
    counts = np.maximum(np.bincount(labels, minlength=number), 1.0)
    return totals / torch.from_numpy(counts).to(totals)[:, None]


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


def _seen_from(
    origins: torch.Tensor, rows: Rows, members: Sequence[np.ndarray], weights: np.ndarray
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the samples of each class in each block: its number, weights (b, R), rows less their origin (b, d)."""
    near = origins.to(rows.dtype)
    for place, block in rows.blocks():
        for label, w, inside in _parts(place, members, weights, block.device):
            yield label, w.to(block.dtype), block[inside].sub_(near[label])


def _columns(own: np.ndarray, orders: np.ndarray, number: int, device: torch.device) -> torch.Tensor:
    """Return for samples (b,) in permutations (p, b) the column of their class among those of all, (b, p)."""
    columns = torch.from_numpy(own[orders].T.copy()).to(device)
    return columns.add_(torch.arange(columns.shape[1], device=device) * number)


def _column_sums(weights: np.ndarray) -> np.ndarray:
    return weights.sum(axis=0, dtype=np.float64)
