"""A flat picture of embedding space: principal components, then t-SNE where that is affordable.

In come embeddings (n, d); out go two coordinates a sample. A t-SNE map keeps neighbours together and nothing else: gaps
and sizes in it mean nothing, which `describe` says so that a figure can say it too. Seeded, so that the same embeddings
give the same picture.

Source: van der Maaten and Hinton, Visualizing Data using t-SNE (2008), as in scikit-learn, started from PCA.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError

METHODS = ("auto", "pca", "tsne")
LARGEST_TSNE = 5000
_COMPONENTS_BEFORE_TSNE = 50
_FEWEST_FOR_TSNE = 10


def map_method(samples: int, method: str = "auto") -> str:
    """Return "tsne" or "pca" for a number of samples; PCA alone above `LARGEST_TSNE` or below ten."""
    if method not in METHODS:
        raise UsageError(f"unknown embedding map {method!r}; known: {', '.join(METHODS)}")
    if method != "auto":
        return method
    return "tsne" if _FEWEST_FOR_TSNE <= samples <= LARGEST_TSNE else "pca"


def describe(samples: int, method: str = "auto") -> str:
    """Return one sentence on how to read the map of so many samples."""
    if map_method(samples, method) == "pca":
        return "First two principal components: straight distances in the picture are parts of real ones."
    return "t-SNE: who is near whom is kept; distances, gaps and sizes of clusters in the picture mean nothing."


def embedding_map(
    features: np.ndarray, *, seed: int = 0, method: str = "auto", normalize: bool = True, perplexity: float = 30.0
) -> np.ndarray:
    """Return two coordinates for every embedding.

    Parameters
    ----------
    features : ndarray of float, (n, d)
    seed : int
    method : "auto" | "pca" | "tsne"
        "auto" as in `map_method`.
    normalize : bool
        Bring embeddings to length 1 first.
    perplexity : float
        Of t-SNE; at most a third of the other samples.

    Returns
    -------
    ndarray of float64, (n, 2)
        Centred on 0. Samples that are all equal lie on one point.
    """
    values = normalise_rows(features) if normalize else np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise DataError(f"a map needs embeddings (samples, dimensions), got shape {values.shape}")
    chosen = map_method(len(values), method)
    # One thread: the sums of several are added in another order each time, and t-SNE enlarges the last bits.
    with threadpool_limits(1):
        wanted = _COMPONENTS_BEFORE_TSNE if chosen == "tsne" else 2
        places = _principal_components(values, wanted)
        if chosen == "tsne" and len(values) > 3 and np.ptp(places[:, 0]) > 0:
            tsne = TSNE(
                perplexity=min(perplexity, (len(values) - 1) / 3), init="pca", random_state=seed, learning_rate="auto"
            )
            places = tsne.fit_transform(places).astype(np.float64)
    return places[:, :2] - places[:, :2].mean(axis=0)


def _principal_components(values: np.ndarray, wanted: int) -> np.ndarray:
    """Return the first components (n, wanted or fewer, at least 2); columns that do not exist are 0."""
    count = min(wanted, *values.shape)
    if np.ptp(values, axis=0).max(initial=0.0) == 0.0:
        return np.zeros((len(values), 2))
    solver = "covariance_eigh" if values.shape[1] <= len(values) else "full"
    places = PCA(n_components=count, svd_solver=solver).fit_transform(values)
    return np.pad(places, ((0, 0), (0, max(0, 2 - count))))
