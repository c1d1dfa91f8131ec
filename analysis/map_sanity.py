"""Does a heatmap depend on what the model has learnt? Similarity of maps before and after something was taken away.

In come raw maps of the same images and labels by an intact and by an altered model; out go rank correlations, one an
image and label. A method whose maps stay the same when weights are shuffled from the top down, or when a head was
trained on permuted labels, shows edges of the image and not the model (Adebayo et al., NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def map_similarity(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> np.ndarray:
    """Return Spearman's rank correlation of the drawn (positive) parts of maps, pairwise.

    Parameters
    ----------
    before, after : n arrays of float, (rows, columns)

    Returns
    -------
    ndarray of float64, (n,)
        -1..1. NaN where one of the two is the same everywhere, such as an empty map: it has no order to compare.
    """
    return np.array(
        [_spearman(np.maximum(one, 0), np.maximum(other, 0)) for one, other in zip(before, after, strict=True)]
    )


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = np.array([rankdata(values.ravel()) for values in (one, other)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / spread.prod()) if spread.all() else float("nan")
