"""Silhouettes: is a sample nearer to its own class than to the nearest other one?

In come embeddings (n, d) and a class for each sample; out go the silhouette of every sample, its mean over all and over
each class, intervals by patient and a null from permuted labels.

Of a sample of class A, a is its mean distance to the others of A, b its mean distance to the samples of the nearest
other class, s = (b - a) / max(a, b); 0 in a class of one (Rousseeuw, Silhouettes, 1987; as in scikit-learn).

All that a silhouette needs are sums of distances to each class. A resample gives weights to samples, so its sums are
the tile of distances times a weight matrix; and because samples are sorted by class, the columns of a tile that belong
to one class are multiplied with that class's weights only. So R resamples cost about R / d of the distances themselves.
In a resample, copies of one image are not counted as each other's neighbours: two prints of one image are not a pair of
images, and would make every class look tighter than it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from analysis.space.classes import checked_classes, class_name
from analysis.space.measures import Measure, measure
from analysis.space.pairwise import MEMORY, Points, row_panels, sweep
from analysis.space.resampling import group_codes, patients_up_to, permuted_rows, resample_weights
from analysis.space.rows import precision_of, rows_of
from engine.errors import DataError

# Samples that the null is drawn on: its cost grows with their square times permutations times classes.
NULL_SAMPLES = 5000
# Samples that intervals are drawn on, likewise.
INTERVAL_SAMPLES = 50_000
_PANEL = 512


class Silhouettes(NamedTuple):
    """Silhouettes of samples and resamples.

    Parameters
    ----------
    samples : ndarray of float32, (n,)
        Of each sample, between -1 and 1.
    means : ndarray of float64, (R + 1,)
        Mean over samples: of the data (first) and of each resample.
    of_class : ndarray of float64, (R + 1, L)
        Mean over each class's samples; NaN where a class has none.
    """

    samples: np.ndarray
    means: np.ndarray
    of_class: np.ndarray


class ClassSums:
    """Consumer that keeps each sample's sums of distances to every class, in every resample, and its silhouette.

    Parameters
    ----------
    classes : ndarray of int, (n,)
        Ascending: the points must be sorted by class.
    weights : ndarray of float32, (n, R + 1)
        Column 0 all ones.
    device : str or torch.device
    """

    squared = False

    def __init__(self, classes: np.ndarray, weights: np.ndarray, device: Any = "cpu") -> None:
        if len(classes) > 1 and (np.diff(classes) < 0).any():
            raise DataError("samples must be sorted by class for sums of distances; use silhouette()")
        self.number = int(classes[-1]) + 1
        self.bounds = np.searchsorted(classes, np.arange(self.number + 1))
        self.classes = torch.from_numpy(classes).to(device)
        self.weights = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)).to(device)
        # A value without resamples is one column and can afford float64; an interval's ends need no more than float32.
        self.dtype = torch.float64 if weights.shape[1] == 1 else torch.float32
        self.bytes_a_row = self.number * weights.shape[1] * self.dtype.itemsize
        self.sizes = torch.stack([self.weights[a:b].double().sum(dim=0) for a, b in self._segments()])  # (L, R + 1)
        self.samples = torch.zeros(len(classes), dtype=torch.float32, device=device)
        self._totals = torch.zeros((self.number, weights.shape[1]), dtype=torch.float64, device=device)
        self._undefined = torch.zeros(weights.shape[1], dtype=torch.bool, device=device)
        self._kept: dict[int, torch.Tensor] = {}

    def take(self, rows: slice, columns: slice, tile: torch.Tensor, both: bool) -> None:
        """Add a tile's distances to the sums of its rows, and of its columns."""
        self._add(rows, columns, tile)
        if both:
            self._add(columns, rows, tile.T)

    def _add(self, rows: slice, columns: slice, tile: torch.Tensor) -> None:
        sums = self._kept.get(rows.start)
        if sums is None:
            shape = (self.number, rows.stop - rows.start, self.weights.shape[1])
            sums = self._kept[rows.start] = torch.zeros(shape, dtype=self.dtype, device=tile.device)
        for label in range(self.number):
            first = max(columns.start, int(self.bounds[label]))
            last = min(columns.stop, int(self.bounds[label + 1]))
            if first < last:
                part = tile[:, first - columns.start : last - columns.start]
                sums[label] += part @ self.weights[first:last]

    def finish(self, rows: slice) -> None:
        """Turn the sums of some rows into silhouettes."""
        sums = self._kept.pop(rows.start)
        own = self.classes[rows]
        weights = self.weights[rows].to(sums.dtype)  # (b, R + 1)
        sizes = self.sizes.to(sums.dtype)
        position = torch.arange(len(own), device=own.device)
        others = sizes[own] - weights
        inside = sums[own, position] / torch.where(others > 0, others, 1.0)
        means = sums / torch.where(sizes > 0, sizes, 1.0)[:, None]
        means.masked_fill_((sizes == 0)[:, None], torch.inf)
        means[own, position] = torch.inf
        outside = means.amin(dim=0)
        longer = torch.maximum(inside, outside)
        values = torch.where(longer > 0, (outside - inside) / torch.where(longer > 0, longer, 1.0), 0.0)
        values = torch.where(others > 0, values, 0.0)
        self._undefined |= (torch.isinf(outside) & (weights > 0)).any(dim=0)
        values = torch.where(torch.isinf(outside), 0.0, values)
        self.samples[rows] = values[:, 0].float()
        self._totals.index_add_(0, own, (values * weights).double())

    def result(self) -> Silhouettes:
        """Return what was found, once all pairs were shown."""
        with np.errstate(invalid="ignore", divide="ignore"):
            sizes, totals = self.sizes.cpu().numpy(), self._totals.cpu().numpy()
            means, of_class = totals.sum(axis=0) / sizes.sum(axis=0), (totals / sizes).T
        undefined = self._undefined.cpu().numpy()
        means[undefined], of_class[undefined] = np.nan, np.nan
        return Silhouettes(self.samples.cpu().numpy(), means, of_class)

    def _segments(self) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in zip(self.bounds[:-1], self.bounds[1:], strict=True)]


def silhouette_samples(
    features: Any, classes: np.ndarray, *, normalize: bool = False, device: str = "cpu", memory: int = MEMORY
) -> np.ndarray:
    """Return the silhouette of every sample, (n,) float32; NaN for samples of class -1, which take no part.

    Raises
    ------
    DataError
        Fewer than two classes.
    """
    features = rows_of(features, normalize=normalize, device=device, dtype=precision_of(features))
    classes, kept = checked_classes(features, classes, at_least=2)
    order = kept[np.argsort(classes[kept], kind="stable")]
    points = Points(features, order, normalize=normalize, device=device)
    sums = ClassSums(classes[order], np.ones((len(order), 1)), points.device)
    sweep(points, [sums], memory=memory)
    samples = np.full(len(classes), np.nan, dtype=np.float32)
    samples[order] = sums.result().samples
    return samples


def silhouette(
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
    memory: int = MEMORY,
    interval_samples: int = INTERVAL_SAMPLES,
    null_samples: int = NULL_SAMPLES,
) -> list[Measure]:
    """Return the mean silhouette of all samples and of each class.

    Parameters
    ----------
    features : array-like, (n, d)
        Anything that `analysis.space.rows.rows_of` reads, also dask arrays: one float32 table of it is held in memory.
    classes : ndarray of int, (n,)
        -1 leaves a sample out.
    groups : ndarray, (n,), optional
        Patients; every sample its own unless given.
    class_names : tuple of str, optional
    replicates, permutations : int
        0 for neither interval nor null.
    interval_samples, null_samples : int
        Where there are more samples, the interval and the null are drawn on whole patients with so many at most; the
        value is always of all. `Measure` says how many it were.

    Raises
    ------
    DataError
        Fewer than two classes, shapes that do not fit, values that are not finite.
    """
    features = rows_of(features, normalize=normalize, device=device, dtype=precision_of(features))
    classes, kept = checked_classes(features, classes, at_least=2, names=class_names)
    codes = group_codes(groups, len(classes))
    order = kept[np.argsort(classes[kept], kind="stable")]
    whole = len(order) <= interval_samples
    points = Points(features, order, normalize=normalize, device=device)
    weights = resample_weights(codes[order], replicates if whole else 0, seed)
    sums = ClassSums(classes[order], weights, points.device)
    sweep(points, [sums], memory=memory)
    found = sums.result()
    drawn, drawn_of_class, drawn_classes = found.means[1:], found.of_class[1:], classes[order]
    if not whole and replicates:
        part = order[patients_up_to(_dense(codes[order]), interval_samples, seed)]
        sums = ClassSums(classes[part], resample_weights(codes[part], replicates, seed), points.device)
        sweep(Points(features, part, normalize=normalize, device=device), [sums], memory=memory)
        resampled = sums.result()
        drawn, drawn_of_class, drawn_classes = resampled.means[1:], resampled.of_class[1:], classes[part]
    null = None
    if permutations:
        null = silhouette_null(
            features, classes, codes, permutations=permutations, seed=seed, normalize=normalize, device=device,
            samples=null_samples,
        )  # fmt: skip
    return silhouette_measures(
        found, drawn, drawn_of_class, drawn_classes, null, classes[order], codes[order], class_names, level, replicates
    )


class SilhouetteNull(NamedTuple):
    """Silhouettes under permuted labels.

    Parameters
    ----------
    means, of_class : ndarray of float64, (P + 1,) and (P + 1, L)
        Of the data first.
    counts : ndarray of int, (L,)
        Samples of each class that they were drawn on.
    """

    means: np.ndarray
    of_class: np.ndarray
    counts: np.ndarray


def silhouette_null(
    features: Any,
    classes: np.ndarray,
    codes: np.ndarray,
    *,
    permutations: int,
    seed: int = 0,
    normalize: bool = False,
    device: str = "cpu",
    samples: int = NULL_SAMPLES,
) -> SilhouetteNull:
    """Return mean silhouettes with labels exchanged between patients, on at most so many samples.

    The sums of distances to every class under all permutations are one product of the distances with an indicator
    matrix (n, P L), which is what limits the number of samples.
    """
    kept = np.flatnonzero(classes >= 0)
    part = kept[patients_up_to(_dense(codes[kept]), samples, seed)]
    number = int(classes.max()) + 1
    truth = classes[part]
    orders = np.concatenate([np.arange(len(part))[None], permuted_rows(_dense(codes[part]), permutations, seed)])
    labels = torch.from_numpy(truth[orders].T.copy()).to(device)  # (n, P + 1)
    sizes = torch.from_numpy(np.bincount(truth, minlength=number)).to(device).float()
    if int((sizes > 0).sum()) < 2:  # the drawn patients all have one class
        return SilhouetteNull(
            np.full(len(orders), np.nan), np.full((len(orders), number), np.nan), np.bincount(truth, minlength=number)
        )
    points = Points(features, part, normalize=normalize, device=device)
    totals = torch.zeros((len(orders), number), dtype=torch.float64, device=device)
    # 128 MB of indicators at a time; the distances are made again for each part, which is small beside the product.
    step = max(1, (1 << 25) // (len(part) * number))
    for first in range(0, len(orders), step):
        some = labels[:, first : first + step]
        indicators = torch.nn.functional.one_hot(some, number).view(len(part), -1).float()
        for rows, distances in row_panels(points, _PANEL):
            own = some[rows]
            sums = (distances @ indicators).view(len(own), -1, number)
            values = _plain_silhouettes(sums, own, sizes)
            parts = torch.zeros((own.shape[1], number), dtype=torch.float64, device=device)
            parts.scatter_add_(1, own.T, values.T.double())
            totals[first : first + step] += parts
    found = totals.cpu().numpy()
    counts = np.bincount(truth, minlength=number)
    with np.errstate(invalid="ignore", divide="ignore"):
        return SilhouetteNull(found.sum(axis=1) / len(part), found / counts, counts)


def _plain_silhouettes(sums: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return silhouettes (b, P) of sums (b, P, L), classes (b, P) and class sizes (L,)."""
    at = own[:, :, None]
    others = sizes[own] - 1
    inside = sums.gather(2, at)[:, :, 0] / others.clamp(min=1.0)
    means = sums / sizes.clamp(min=1.0)
    means.masked_fill_((sizes == 0)[None, None], torch.inf)
    means.scatter_(2, at, torch.inf)
    outside = means.amin(dim=2)
    longer = torch.maximum(inside, outside)
    values = (outside - inside) / torch.where(longer > 0, longer, 1.0)
    return torch.where(others > 0, values, 0.0)


def silhouette_measures(
    found: Silhouettes,
    drawn: np.ndarray,
    drawn_of_class: np.ndarray,
    drawn_classes: np.ndarray,
    null: SilhouetteNull | None,
    classes: np.ndarray,
    codes: np.ndarray,
    class_names: tuple[str, ...] | None,
    level: float,
    replicates: int,
) -> list[Measure]:
    """Put values, resamples and null together, for all samples and for each class that has any."""
    counts = np.bincount(classes)
    result = []
    for label in (None, *np.flatnonzero(counts)):
        members = codes if label is None else codes[classes == label]
        column = slice(None) if label is None else label
        resampled = drawn if label is None else drawn_of_class[:, column]
        permuted = None if null is None else (null.means if label is None else null.of_class[:, column])
        note = "a class of one sample, whose silhouette is 0 by definition" if len(members) == 1 else ""
        result.append(
            measure(
                "silhouette",
                float(found.means[0] if label is None else found.of_class[0, label]),
                label=None if label is None else class_name(int(label), class_names),
                drawn=resampled if replicates else None,
                null=None if permuted is None else permuted[1:],
                observed=None if permuted is None else float(permuted[0]),
                better="higher",
                centred=True,
                level=level,
                samples=len(members),
                groups=len(np.unique(members)),
                interval_samples=len(drawn_classes) if label is None else int((drawn_classes == label).sum()),
                null_samples=None if null is None else int(null.counts.sum() if label is None else null.counts[label]),
                note=note,
            )
        )
    return result


def _dense(codes: np.ndarray) -> np.ndarray:
    return np.unique(codes, return_inverse=True)[1]
