"""All that is measured of one space of images, with one look at every pair of samples.

In come embeddings, 0/1 labels and patients; out go the measures of this package that need no second space: silhouette,
kNN purity, hubness and uniformity from one pass over all distances, and centroid measures and alignment by class from
sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.space import neighbours, scatter, sphere
from analysis.space.classes import checked_classes
from analysis.space.measures import Measure
from analysis.space.pairwise import MEMORY, Consumer, Points, sweep
from analysis.space.resampling import group_codes, resample_weights
from analysis.space.rows import check_rows, precision_of, rows_of
from analysis.space.silhouettes import (
    INTERVAL_SAMPLES,
    ClassSums,
    silhouette,
    silhouette_measures,
    silhouette_null,
)
from engine.errors import DataError


def measure_space(
    features: Any,
    classes: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    label_names: tuple[str, ...],
    k: int = 10,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    normalize: bool = True,
    device: str = "cpu",
    memory: int = MEMORY,
    interval_samples: int = INTERVAL_SAMPLES,
) -> list[Measure]:
    """Return the measures of a space, in the order silhouette, centroids, neighbours, sphere.

    Parameters
    ----------
    features : array-like, (n, d)
        Anything that `analysis.space.rows.rows_of` reads, also dask arrays: one float32 table of it is held in memory.
    classes : ndarray of int, (n,)
        One class a sample, such as the first positive label; -1 for none.
    y : ndarray of 0/1, (n, L)
        All labels, for the neighbours' overlap.
    groups : ndarray, (n,), optional
        Patients.
    k : int
        Neighbours.
    normalize : bool
        Lengths 1 for all; alignment and uniformity are on the unit sphere always.

    Raises
    ------
    DataError
        Fewer than two classes, shapes that do not fit, values that are not finite.
    UsageError
        k larger than what other patients leave.
    """
    features = rows_of(features, device=device, dtype=precision_of(features))
    classes, kept = checked_classes(features, classes, at_least=2, names=tuple(label_names))
    if not normalize:
        check_rows(features, normalize=True)  # alignment and uniformity need lengths whatever the rest does
    if len(y) != len(classes):
        raise DataError(f"{len(y)} rows of labels for {len(classes)} embeddings; give one a sample")
    codes = group_codes(groups, len(classes))
    options: dict[str, Any] = {"replicates": replicates, "permutations": permutations, "seed": seed, "level": level}
    order = np.argsort(classes, kind="stable")
    points = Points(features, order, normalize=normalize, device=device)
    nearest = neighbours.Nearest(k, codes[order], points.device)
    consumers: list[Consumer] = [nearest]
    whole = len(classes) <= interval_samples
    weights = resample_weights(codes, replicates if whole else 0, seed)[order]
    potential = sums = None
    if normalize:
        potential = sphere.GaussianPotential(2.0, weights, points.device)
        consumers.append(potential)
    shared = whole and len(kept) == len(classes)
    if shared:
        sums = ClassSums(classes[order], weights, points.device)
        consumers.append(sums)
    sweep(points, consumers, memory=memory)
    rows = np.empty((len(classes), k), dtype=np.int64)
    rows[order] = order[nearest.rows.cpu().numpy()]
    result: list[Measure] = []
    if sums is not None:
        found, null = sums.result(), None
        if permutations:
            null = silhouette_null(
                features, classes, codes, permutations=permutations, seed=seed, normalize=normalize, device=device
            )
        sorted_classes = classes[order]
        result += silhouette_measures(
            found, found.means[1:], found.of_class[1:], sorted_classes, null, sorted_classes, codes[order],
            label_names, level, replicates,
        )  # fmt: skip
    else:
        result += silhouette(
            features, classes, codes, class_names=label_names, normalize=normalize, device=device, memory=memory,
            interval_samples=interval_samples, **options,
        )  # fmt: skip
    result += [
        each
        for each in scatter.centroid_measures(
            features, classes, codes, class_names=label_names, normalize=normalize, device=device,
            **options,
        )
        if each.name in ("davies_bouldin", "fisher_ratio")
    ]  # fmt: skip
    result += neighbours.knn_purity(rows, classes, codes, class_names=label_names, **options)[:1]
    result += neighbours.label_purity(rows, y, codes, label_names=label_names, **options)
    result += neighbours.hubness(rows, codes, **options)
    result.append(sphere.class_alignment(features, classes, codes, device=device, **options))
    if potential is not None:
        part = None
        if replicates and not whole:
            part = sphere.part_resamples(
                features, codes, interval_samples, replicates=replicates, seed=seed, device=device
            )
        result.append(sphere.uniformity_measure(potential, codes, points.dimensions, replicates, level, part))
    else:
        result.append(
            sphere.uniformity(
                features, codes, replicates=replicates, seed=seed, level=level, device=device,
                interval_samples=interval_samples,
            )
        )  # fmt: skip
    return result
