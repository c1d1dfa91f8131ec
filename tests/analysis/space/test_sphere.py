"""Alignment, uniformity and modality gap against scipy's pairwise distances and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from analysis.space import resampling, rows, sphere
from engine.errors import DataError, UsageError


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def sample(seed: int = 0, count: int = 60, width: int = 6):
    return np.random.default_rng(seed).normal(size=(count, width)) + 1


def test_uniformity__is_the_log_mean_potential_of_pairs():
    features = sample()
    groups = np.arange(60) // 2
    found = sphere.uniformity(features, groups, replicates=15, seed=2)
    squares = squareform(pdist(unit(features)) ** 2)
    assert found.value == pytest.approx(np.log(np.exp(-2 * pdist(unit(features)) ** 2).mean()), abs=1e-6)
    off = ~np.eye(60, dtype=bool)
    drawn = []
    for w in resampling.resample_weights(groups, 15, 2).T[1:]:
        both = np.outer(w, w)[off]
        drawn.append(np.log((np.exp(-2 * squares[off]) * both).sum() / both.sum()))
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, [2.5, 97.5]), atol=1e-5)


def test_rows_that_were_read_as_they_are__are_brought_to_length_1():
    features = 5 * sample()
    classes = np.arange(60) % 3
    within = np.concatenate([pdist(unit(features)[classes == label]) for label in range(3)])
    for dtype in (torch.float64, torch.float32):
        read = rows.rows_of(features, dtype=dtype)
        found = sphere.class_alignment(read, classes, replicates=0, permutations=0)
        assert found.value == pytest.approx((within**2).mean())
        found = sphere.uniformity(read, replicates=0)
        assert found.value == pytest.approx(np.log(np.exp(-2 * pdist(unit(features)) ** 2).mean()), abs=1e-6)


def test_null_of_uniformity__is_what_even_spread_gives():
    generator = np.random.default_rng(1)
    drawn = [np.exp(-2 * pdist(unit(generator.normal(size=(50, 5)))) ** 2).mean() for _ in range(400)]
    mean, spread = sphere.sphere_potential(5, 2.0, 50)
    assert mean == pytest.approx(np.mean(drawn), rel=0.01) and spread == pytest.approx(np.std(drawn), rel=0.15)


def test_pair_alignment__is_the_mean_power_of_distances():
    x, y = sample(1), sample(2)
    found = sphere.pair_alignment(x, y, alpha=3.0, replicates=10, permutations=9, seed=4)
    apart = np.linalg.norm(unit(x) - unit(y), axis=1) ** 3
    assert found.value == pytest.approx(apart.mean(), rel=1e-6)
    orders = resampling.permuted_rows(np.arange(60), 9, 4)
    null = [(np.linalg.norm(unit(x) - unit(y)[order], axis=1) ** 3).mean() for order in orders]
    assert found.null == pytest.approx(np.mean(null), rel=1e-6)
    assert sphere.pair_alignment(x, x + 0.01).p == pytest.approx(1 / 201)


def test_class_alignment__is_the_mean_over_pairs_of_a_class():
    features, classes = sample(3), np.arange(60) % 7
    classes[0] = 9
    found = sphere.class_alignment(features, classes, replicates=8, permutations=5, seed=1)
    squares = squareform(pdist(unit(features)) ** 2)
    assert found.value == pytest.approx(squares[(classes[:, None] == classes) & ~np.eye(60, dtype=bool)].mean())
    groups = np.arange(60) // 14
    found = sphere.class_alignment(features, classes, groups, replicates=8, permutations=5, seed=1)
    pairs = (classes[:, None] == classes) & (groups[:, None] != groups)
    assert found.value == pytest.approx(squares[pairs].mean())
    null = [squares[(classes[o][:, None] == classes[o]) & (groups[:, None] != groups)].mean()
            for o in resampling.permuted_rows(groups, 5, 1)]  # fmt: skip
    assert found.null == pytest.approx(np.mean(null))
    weights = resampling.resample_weights(groups, 8, 1)[:, 1:]
    drawn = [(squares * np.outer(w, w) * pairs).sum() / (np.outer(w, w) * pairs).sum() for w in weights.T]
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, [2.5, 97.5]), rtol=1e-6)
    alone = sphere.class_alignment(features[:3], np.arange(3), replicates=3, permutations=3)
    assert np.isnan(alone.value) and "no class has samples of two patients" in alone.note


def test_modality_gap__is_the_distance_of_centroids_and_its_null_exchanges_modalities():
    x, y = sample(4), sample(5) - 2
    groups = np.arange(60) // 3
    found = sphere.modality_gap(x, y, groups, replicates=10, permutations=50, seed=3)
    assert found.value == pytest.approx(np.linalg.norm(unit(x).mean(axis=0) - unit(y).mean(axis=0)), rel=1e-6)
    assert found.low < found.value < found.high and found.null_high < found.value and found.p == pytest.approx(1 / 51)
    weights = resampling.resample_weights(groups, 10, 3)[:, 1:]
    drawn = np.linalg.norm(weights.T @ (unit(x) - unit(y)), axis=1) / weights.sum(axis=0)
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, [2.5, 97.5]), rtol=1e-5)


def test_wrong_input__is_refused_with_its_place():
    x = sample()
    with pytest.raises(DataError, match="are no pairs"):
        sphere.pair_alignment(x, x[:-1])
    with pytest.raises(DataError, match="do not lie in one space"):
        sphere.modality_gap(x, x[:, :3])
    with pytest.raises(DataError, match="there is 1"):
        sphere.uniformity(x[:1])
    with pytest.raises(UsageError, match="above 0"):
        sphere.uniformity(x, t=0.0)
    x[3] = 0
    with pytest.raises(DataError, match="first row 3 of length 0"):
        sphere.uniformity(x)
    x[3] = np.nan
    with pytest.raises(DataError, match="NaN or infinite values, first row 3"):
        sphere.pair_alignment(x, sample(1))


def test_constant_features__are_as_uneven_as_can_be():
    found = sphere.uniformity(np.ones((20, 4)), replicates=5)
    assert found.value == pytest.approx(0.0, abs=1e-6) and found.null < -2
