"""A flat picture of embedding space: principal components always, t-SNE or UMAP where affordable or installed.

In come embeddings (n, d); out go two coordinates a sample. A t-SNE or UMAP map keeps neighbours together and nothing
else: gaps and sizes in it mean nothing, which `describe` says so that a figure can say it too. Seeded, and with the
signs of principal components fixed (the largest loading of each is positive), so that the same embeddings give the same
picture.

Sources: van der Maaten and Hinton, Visualizing data using t-SNE (2008), as in scikit-learn, started from PCA; McInnes,
Healy and Melville, UMAP (2018), of the package umap-learn where that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError

METHODS = ("auto", "pca", "tsne", "umap")
LARGEST_TSNE = 5000
_COMPONENTS_BEFORE_TSNE = 50
_FEWEST_FOR_TSNE = 10


def map_method(samples: int, method: str = "auto") -> str:
    """Return the method for a number of samples: "auto" is t-SNE from ten to `LARGEST_TSNE` samples, else PCA.

    Raises
    ------
    UsageError
        An unknown method, or UMAP where its package is not installed.
    """
    if method not in METHODS:
        raise UsageError(f"unknown embedding map {method!r}; known: {', '.join(METHODS)}")
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise UsageError(
            "an embedding map by 'umap' needs the package umap-learn: pip install umap-learn; or take 'tsne'"
        )
    if method != "auto":
        return method
    return "tsne" if _FEWEST_FOR_TSNE <= samples <= LARGEST_TSNE else "pca"


def describe(samples: int, method: str = "auto") -> str:
    """Return one sentence on how to read the map of so many samples."""
    chosen = map_method(samples, method)
    if chosen == "pca":
        return "First two principal components: straight distances in the picture are parts of real ones."
    name = "UMAP" if chosen == "umap" else "t-SNE"
    return f"{name}: who is near whom is kept; distances, gaps and sizes of clusters in the picture mean nothing."


def embedding_map(
    features: np.ndarray, *, seed: int = 0, method: str = "auto", normalize: bool = True, perplexity: float = 30.0
) -> np.ndarray:
    """Return two coordinates for every embedding.

    Parameters
    ----------
    features : ndarray of float, (n, d)
    seed : int
    method : "auto" | "pca" | "tsne" | "umap"
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
        wanted = 2 if chosen == "pca" else _COMPONENTS_BEFORE_TSNE
        places = _principal_components(values, wanted)
        if chosen == "umap" and len(values) > 4 and np.ptp(places[:, 0]) > 0:
            umap: Any = importlib.import_module("umap")
            # A seed makes UMAP run on one thread, which is what makes it give the same map again.
            mapper = umap.UMAP(n_neighbors=min(15, len(values) - 1), random_state=seed, init="pca")
            places = np.asarray(mapper.fit_transform(places), dtype=np.float64)
        elif chosen == "tsne" and len(values) > 3 and np.ptp(places[:, 0]) > 0:
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
    model = PCA(n_components=count, svd_solver=solver)
    places = model.fit_transform(values)
    # Said here and not left to the library, whose releases have chosen signs in different ways.
    largest = np.abs(model.components_).argmax(axis=1)
    signs = np.where(model.components_[np.arange(count), largest] < 0, -1.0, 1.0)
    places = places * signs
    return np.pad(places, ((0, 0), (0, max(0, 2 - count))))
