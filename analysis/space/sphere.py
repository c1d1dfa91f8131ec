"""Embeddings as directions: alignment of pairs, uniformity over the sphere, and the gap between images and texts.

In come embeddings, brought to length 1 here because all three are defined on the unit sphere; out go measures with
intervals by patient and nulls.

* Alignment: mean of |x - y|^alpha over positive pairs, alpha 2 (Wang and Isola, Understanding contrastive
  representation learning through alignment and uniformity on the hypersphere, 2020). Pairs are an image and its text,
  or two images of one class. Lower is better aligned.
* Uniformity: log of the mean of exp(-t |x - y|^2) over pairs of different samples, t 2 (ibid.). Lower is more uniform.
* Modality gap: distance between the centroids of image and of text embeddings (Liang et al., Mind the gap, 2022).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.special import hyp0f1
from scipy.stats import norm

from analysis.bootstrap import resample_counts
from analysis.space.centroids import ClassSums, permuted_sums, weighted_sums
from analysis.space.classes import checked_classes
from analysis.space.measures import Measure, measure
from analysis.space.pairwise import Points, sweep
from analysis.space.patient_pairs import PatientPairs
from analysis.space.resampling import group_codes, patients_up_to, permuted_rows, resample_weights
from analysis.space.rows import BLOCK_ROWS, Chosen, Shifted, gathered, precision_of, rows_of
from engine.errors import DataError, UsageError


class GaussianPotential:
    """Consumer that sums exp(-t d^2) over pairs of different samples, in every resample.

    Parameters
    ----------
    t : float
    weights : ndarray of float32, (n, R + 1)
    """

    squared = True
    bytes_a_row = 0

    def __init__(self, t: float, weights: np.ndarray, device: Any = "cpu") -> None:
        if not t > 0:
            raise UsageError(f"uniformity with t = {t}; t must be above 0 (2 is usual)")
        self.t = t
        self.weights = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)).to(device)
        self._totals = torch.zeros(weights.shape[1], dtype=torch.float64, device=device)

    def take(self, rows: slice, columns: slice, tile: torch.Tensor, both: bool) -> None:
        """Add a tile's potentials; a sample's own potential to itself and to its copies is none of two samples."""
        potential = torch.mul(tile, -self.t).exp_()
        if rows.start < columns.stop and columns.start < rows.stop:
            same = torch.arange(max(rows.start, columns.start), min(rows.stop, columns.stop), device=tile.device)
            potential[same - rows.start, same - columns.start] = 0.0
        # Of the data all weights are 1; a product is wanted for resamples alone.
        found = torch.zeros_like(self._totals)
        found[0] = potential.sum(dim=1).sum(dtype=torch.float64)
        if self.weights.shape[1] > 1:
            products = (potential @ self.weights[columns, 1:]) * self.weights[rows, 1:]
            found[1:] = products.sum(dim=0, dtype=torch.float64)
        self._totals += 2 * found if both else found

    def finish(self, rows: slice) -> None:
        """Nothing is kept by row."""

    def result(self) -> np.ndarray:
        """Return the uniformity of the data and of each resample, (R + 1,) float64."""
        weights = self.weights.double()
        pairs = (weights.sum(dim=0) ** 2 - weights.square().sum(dim=0)).cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(self._totals.cpu().numpy() / pairs)


def uniformity(
    features: Any,
    groups: np.ndarray | None = None,
    *,
    t: float = 2.0,
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
    interval_samples: int | None = None,
) -> Measure:
    """Return the uniformity of embeddings over the unit sphere; its null is an even spread over the sphere.

    Parameters
    ----------
    features : array-like, (n, d)
        Brought to length 1.
    t : float
        Width of the potential.
    interval_samples : int, optional
        Where there are more samples, the interval is drawn on whole patients with so many at most; the value is always
        of all.
    """
    features = rows_of(features, normalize=True, device=device, dtype=precision_of(features))
    count = features.shape[0]
    if count < 2:
        raise DataError(f"uniformity is about pairs of samples, and there is {count}; give at least 2")
    codes = group_codes(groups, count)
    points = Points(features, normalize=True, device=device)
    whole = interval_samples is None or count <= interval_samples
    potential = GaussianPotential(t, resample_weights(codes, replicates if whole else 0, seed), points.device)
    sweep(points, [potential])
    if whole or interval_samples is None or not replicates:
        return uniformity_measure(potential, codes, points.dimensions, replicates, level)
    part = part_resamples(features, codes, interval_samples, t=t, replicates=replicates, seed=seed, device=device)
    return uniformity_measure(potential, codes, points.dimensions, replicates, level, part)


def part_resamples(
    features: Any, codes: np.ndarray, samples: int, *, t: float = 2.0, replicates: int, seed: int, device: str
) -> tuple[np.ndarray, int]:
    """Return uniformity in resamples (R,) of whole patients with at most so many samples, and how many they have."""
    rows = patients_up_to(codes, samples, seed)
    own = np.unique(codes[rows], return_inverse=True)[1]
    points = Points(features, rows, normalize=True, device=device)
    potential = GaussianPotential(t, resample_weights(own, replicates, seed), points.device)
    sweep(points, [potential])
    return potential.result()[1:], len(rows)


def uniformity_measure(
    potential: GaussianPotential,
    codes: np.ndarray,
    dimensions: int,
    replicates: int,
    level: float,
    part: tuple[np.ndarray, int] | None = None,
) -> Measure:
    """Return the measure of a finished potential; its interval from resamples of a part where those are given.

    Parameters
    ----------
    part : (R,) ndarray and int, optional
        As of `part_resamples`; moved until their mean is the value.
    """
    values = potential.result()
    drawn, used = (values[1:], len(codes)) if part is None else part
    mean, spread = sphere_potential(dimensions, potential.t, len(codes))
    reach = float(norm.ppf(0.5 + level / 2)) * spread
    found = measure(
        "uniformity", values[0], drawn=drawn if replicates else None, level=level, samples=len(codes),
        interval_samples=used, centred=part is not None, groups=len(np.unique(codes)),
        note="null: samples spread evenly over the sphere, in closed form",
    )  # fmt: skip
    tiny = float(np.finfo(float).tiny)
    low, high = (float(np.log(max(mean + sign * reach, tiny))) for sign in (-1, 1))
    return replace(found, null=float(np.log(mean)), null_low=low, null_high=high)


def sphere_potential(dimensions: int, t: float, samples: int) -> tuple[float, float]:
    """Return mean and standard deviation of the mean potential of so many points spread evenly over a sphere.

    With u and v uniform on the unit sphere of R^d, |u - v|^2 = 2 - 2 u.v and E exp(s u.v) = 0F1(; d / 2; s^2 / 4), so
    E exp(-t |u - v|^2) = exp(-2 t) 0F1(; d / 2; t^2). Given u the mean does not depend on u, so pairs are uncorrelated
    and the variance of the mean over all pairs is that of one pair over their number.
    """
    mean = float(np.exp(-2 * t) * hyp0f1(dimensions / 2, t**2))
    square = float(np.exp(-4 * t) * hyp0f1(dimensions / 2, 4 * t**2))
    return mean, float(np.sqrt(max(square - mean**2, 0.0) / (samples * (samples - 1) / 2)))


def pair_alignment(
    x: Any,
    y: Any,
    groups: np.ndarray | None = None,
    *,
    alpha: float = 2.0,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
    null_samples: int = 20_000,
) -> Measure:
    """Return the alignment of pairs, such as images and their texts; its null pairs patients at random.

    Parameters
    ----------
    x, y : array-like, (n, d) both
        Row i of one belongs to row i of the other. Brought to length 1.
    alpha : float
    """
    x, y = paired(x, y, normalize=True, device=device)
    codes = group_codes(groups, len(x))
    apart = _powers(x, y, alpha)
    weights = resample_weights(codes, replicates, seed)[:, 1:].astype(np.float64)
    part = patients_up_to(codes, null_samples, seed)
    null = np.empty(permutations)
    inside = torch.from_numpy(part).to(x.device)
    for row, order in enumerate(_orders(codes[part], permutations, seed)):
        null[row] = _powers(x[inside], y[inside][torch.from_numpy(order).to(x.device)], alpha).mean()
    return measure(
        "alignment", apart.mean(), drawn=(apart @ weights) / weights.sum(axis=0) if replicates else None,
        null=null if permutations else None, observed=float(apart[part].mean()), better="lower", level=level,
        samples=len(x), groups=len(np.unique(codes)), null_samples=len(part), note="pairs: image and its text",
    )  # fmt: skip


def class_alignment(
    features: Any,
    classes: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
) -> Measure:
    """Return the mean squared distance of samples of one class and different patients, on the unit sphere (alpha 2).

    The sum over pairs of a class is n sum |x|^2 - |sum x|^2, so no pair is looked at. In a resample, copies of one
    sample are no pair. Classes of one sample have no pairs and take no part.

    Parameters
    ----------
    classes : ndarray of int, (n,)
        -1 leaves a sample out.
    """
    unit = rows_of(features, normalize=True, device=device)
    classes, kept = checked_classes(unit, classes)
    codes = np.unique(group_codes(groups, len(classes))[kept], return_inverse=True)[1]
    labels = classes[kept]
    rows = Shifted(Chosen(unit, kept))
    present, own = np.unique(labels, return_inverse=True)
    members = [np.flatnonzero(own == number) for number in range(len(present))]
    patients = PatientPairs(rows, codes)
    weights = resample_weights(codes, replicates, seed)
    alike = (own[patients.first] == own[patients.second]).astype(np.float64)
    pairs = patients.weights(weights).T
    less = pairs @ alike, pairs @ (alike * patients.squares)
    drawn = _mean_within(weighted_sums(rows, members, weights), *less)
    null = np.empty(0)
    if permutations:
        indicator = (own[:, None] == np.arange(len(present))).astype(np.uint8)
        orders = permuted_rows(codes, permutations, seed)
        same = [own[order[patients.first]] == own[order[patients.second]] for order in orders]
        less = np.array([each.sum() for each in same]), np.array([patients.squares @ each for each in same])
        null = _mean_within(permuted_sums(rows, indicator, orders), *less)
    note = "pairs: two samples of one class"
    if not np.isfinite(drawn[0]):
        note = "no class has samples of two patients, so there is no pair"
    return measure(
        "alignment", drawn[0], drawn=drawn[1:] if replicates else None, null=null if permutations else None,
        better="lower", level=level, samples=len(labels), groups=len(np.unique(codes)), note=note,
    )  # fmt: skip


def _mean_within(sums: ClassSums, less: np.ndarray, less_squares: np.ndarray) -> np.ndarray:
    """Return the mean squared distance of pairs of one class, less those of one patient, (R,)."""
    totals = 2 * (sums.mass * sums.squares - sums.vectors.square().sum(dim=2).cpu().numpy())
    pairs = (sums.mass**2 - sums.mass_of_squares).sum(axis=1) - 2 * less
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0.5, np.maximum(totals.sum(axis=1) - 2 * less_squares, 0.0) / pairs, np.nan)


def modality_gap(
    x: Any,
    y: Any,
    groups: np.ndarray | None = None,
    *,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
) -> Measure:
    """Return the distance between the centroids of two modalities of the same samples, both brought to length 1.

    The null exchanges image and text within patients at random: what is left when the modality means nothing.

    Parameters
    ----------
    x, y : array-like, (n, d) both
    """
    x, y = paired(x, y, normalize=True, device=device)
    codes = group_codes(groups, len(x))
    patients = int(codes.max()) + 1
    membership = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(patients, len(codes)))
    by_patient = membership @ (x - y).cpu().numpy()
    sizes = np.bincount(codes)
    counts = resample_counts(np.arange(patients), replicates, seed)[1].astype(np.float64) if replicates else None
    drawn = None if counts is None else np.linalg.norm(counts @ by_patient, axis=1) / (counts @ sizes)
    signs = np.random.Generator(np.random.PCG64(seed)).choice([-1.0, 1.0], (permutations, patients))
    null = np.linalg.norm(signs @ by_patient, axis=1) / len(x)
    return measure(
        "modality_gap", float(np.linalg.norm(by_patient.sum(axis=0))) / len(x), drawn=drawn,
        null=null if permutations else None, better="lower", effect="higher", level=level, samples=len(x),
        groups=patients,
    )  # fmt: skip


def paired(x: Any, y: Any, *, normalize: bool, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tables whose rows belong together, float32; DataError where they do not fit."""
    tables = [rows_of(each, normalize=normalize, device=device, dtype=precision_of(each)) for each in (x, y)]
    shapes = [each.shape for each in tables]
    if shapes[0][0] != shapes[1][0]:
        raise DataError(
            f"embeddings of shapes {shapes[0]} and {shapes[1]} are no pairs; both need one row a sample, in one order"
        )
    if shapes[0][1] != shapes[1][1]:
        raise DataError(f"embeddings of {shapes[0][1]} and {shapes[1][1]} dimensions do not lie in one space")
    first, second = (gathered(each, device=device, dtype=torch.float32) for each in tables)
    return first, second


def _powers(x: torch.Tensor, y: torch.Tensor, alpha: float) -> np.ndarray:
    """Return |x - y|^alpha of each pair, (n,) float64."""
    apart = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        apart[part] = torch.linalg.vector_norm(x[part].double() - y[part].double(), dim=1).pow(alpha)
    return apart.cpu().numpy()


def _orders(codes: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    dense = np.unique(codes, return_inverse=True)[1]
    return permuted_rows(dense, permutations, seed) if permutations else np.empty((0, len(codes)), dtype=np.int64)
