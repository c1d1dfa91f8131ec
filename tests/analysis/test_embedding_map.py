"""Embedding maps: seeded, of the right shape for any input, and true to neighbours."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from analysis import embedding_map
from engine.errors import DataError, UsageError


def clusters(count: int = 90, dimensions: int = 20) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(3, dimensions))[np.arange(count) % 3] * 4 + generator.normal(size=(count, dimensions))


def test_map__is_seeded_and_keeps_neighbours():
    features = clusters()
    places = embedding_map.embedding_map(features, seed=3)
    assert places.shape == (90, 2) and np.abs(places.mean(axis=0)).max() < 1e-6
    np.testing.assert_array_equal(places, embedding_map.embedding_map(features, seed=3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert trustworthiness(unit, places, n_neighbors=10) > 0.9


def test_pca__is_the_singular_value_decomposition():
    features = clusters()
    places = embedding_map.embedding_map(features, method="pca", normalize=False)
    centred = features - features.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(u[:, :2] * s[:2]), rtol=1e-6, atol=1e-8)


def test_method__is_pca_alone_for_many_or_few():
    assert embedding_map.map_method(embedding_map.LARGEST_TSNE + 1) == "pca"
    assert embedding_map.map_method(2000) == "tsne" and embedding_map.map_method(4) == "pca"
    assert "principal" in embedding_map.describe(9) and "mean nothing" in embedding_map.describe(900)
    with pytest.raises(UsageError, match="unknown embedding map 'som'; known: auto, pca, tsne, umap"):
        embedding_map.map_method(5, "som")


def test_umap__is_used_where_installed_and_else_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install umap-learn"):
        embedding_map.embedding_map(clusters(), method="umap")

    class Fake(types.ModuleType):
        class UMAP:
            def __init__(self, **options):
                self.options = options

            def fit_transform(self, values):
                assert self.options["random_state"] == 4 and values.shape[0] == 90
                return values[:, :2].astype(np.float32) + 1

    monkeypatch.setitem(sys.modules, "umap", Fake("umap"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    places = embedding_map.embedding_map(clusters(), method="umap", seed=4)
    assert places.shape == (90, 2) and np.abs(places.mean(axis=0)).max() < 1e-6
    assert embedding_map.describe(90, "umap").startswith("UMAP: who is near whom")


def test_signs_of_principal_components__do_not_depend_on_the_order_of_samples():
    features = clusters()
    places = embedding_map.embedding_map(features, method="pca")
    turned = embedding_map.embedding_map(features[::-1].copy(), method="pca")
    np.testing.assert_allclose(turned[::-1], places, atol=1e-9)


@pytest.mark.parametrize(("count", "dimensions"), [(1, 5), (2, 5), (3, 1), (12, 2), (40, 3)])
def test_small_inputs__have_two_coordinates(count, dimensions):
    features = np.random.default_rng(1).normal(size=(count, dimensions)) + 3
    assert embedding_map.embedding_map(features, normalize=False).shape == (count, 2)


def test_equal_samples__lie_on_one_point():
    np.testing.assert_array_equal(embedding_map.embedding_map(np.ones((30, 4))), np.zeros((30, 2)))
    with pytest.raises(DataError, match="a map needs embeddings"):
        embedding_map.embedding_map(np.zeros((0, 4)))
