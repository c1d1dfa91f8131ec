"""Multi-label distances against brute force over all pairs; unbiased whatever the class sizes."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from analysis import distances
from analysis.space import resampling
from engine.errors import DataError

NAMES = ("a", "b", "c", "d")


def labelled(seed: int = 0, count: int = 70, width: int = 5):
    generator = np.random.default_rng(seed)
    y = (generator.random((count, 4)) < [0.5, 0.3, 0.15, 0.0]).astype(np.int8)
    y[3, 3] = 1
    features = generator.normal(size=(count, width)) + y @ generator.normal(size=(4, width)) + 7
    return features, y


def brute_separation(features, positive, weights, groups):
    squares, pairs = cdist(features, features) ** 2, np.outer(weights, weights) * (groups[:, None] != groups)

    def mean(rows, columns):
        if not pairs[np.ix_(rows, columns)].any():
            return np.nan  # no two positives were drawn
        return np.average(squares[np.ix_(rows, columns)], weights=pairs[np.ix_(rows, columns)])

    across, within, others = mean(positive, ~positive), mean(positive, positive), mean(~positive, ~positive)
    return (across - (within + others) / 2) / ((within + others) / 4)


def brute_overlap(features, y, weights, groups):
    squares, pairs = cdist(features, features) ** 2, np.outer(weights, weights) * (groups[:, None] != groups)
    both, either = (y[:, None] & y).sum(axis=2), (y[:, None] | y).sum(axis=2)
    overlap = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    means = [
        np.average(squares, weights=pairs * which)
        for which in (overlap == 1, (overlap > 0) & (overlap < 1), overlap == 0)
    ]
    slope = np.polyfit(overlap.ravel(), squares.ravel(), 1, w=np.sqrt(pairs.ravel()))[0]
    return [*np.sqrt(means), 1 - means[0] / means[2], -slope / np.average(squares, weights=pairs)]


def test_separation__equals_brute_force_with_interval_and_null():
    features, y = labelled()
    groups = np.arange(70) // 2
    found = {
        m.label: m
        for m in distances.label_separation(
            features, y, groups, label_names=NAMES, replicates=9, permutations=7, seed=3
        )
    }
    weights = resampling.resample_weights(groups, 9, 3)
    for column, name in enumerate("abc"):
        positive = y[:, column] == 1
        drawn = [brute_separation(features, positive, w, groups) for w in weights.T]
        assert found[name].value == pytest.approx(drawn[0], rel=1e-6)
        np.testing.assert_allclose(
            [found[name].low, found[name].high], np.nanpercentile(drawn[1:], [2.5, 97.5]), rtol=1e-6
        )
        null = [
            brute_separation(features, positive[o], weights[:, 0], groups)
            for o in resampling.permuted_rows(groups, 7, 3)
        ]
        assert found[name].null == pytest.approx(np.mean(null), abs=1e-6)
    assert found[None].value == pytest.approx(np.mean([found[name].value for name in "abc"]))
    assert "without d" in found[None].note
    assert np.isnan(found["d"].value) and "'d' has positives of fewer than two patients" in found["d"].note


def test_a_label_of_one_patient__has_no_separation():
    features, y = labelled(8)
    y[:, 3] = 0
    y[[4, 5, 6], 3] = 1
    groups = np.arange(70)
    groups[[4, 5, 6]] = 4
    found = distances.label_separation(features, y, groups, label_names=NAMES, replicates=2, permutations=2)
    assert np.isnan(found[4].value) and "'d' has positives of fewer than two patients" in found[4].note


def test_separation__is_zero_on_average_for_rare_labels_that_mean_nothing():
    generator = np.random.default_rng(1)
    y = np.zeros((200, 2), dtype=np.int8)
    y[:3, 0], y[50:150, 1] = 1, 1
    options = {"label_names": ("rare", "common"), "replicates": 0, "permutations": 0}
    drawn = [
        [m.value for m in distances.label_separation(generator.normal(size=(200, 20)), y, **options)[1:]]
        for _ in range(80)
    ]
    spread = np.std(drawn, axis=0) / np.sqrt(80)
    assert (np.abs(np.mean(drawn, axis=0)) < 4 * spread).all()
    study = distances.class_distances(generator.normal(size=(200, 20)), y[:, 0].astype(int))
    assert study.ratio > 0.3, "the study's ratio takes the error of three samples' mean for distance"


def test_overlap__equals_brute_force_with_interval_and_null():
    features, y = labelled(2)
    groups = np.arange(70) // 2
    options = {"label_names": NAMES, "replicates": 8, "permutations": 6, "seed": 4}
    found = distances.overlap_distances(features, y, groups, **options)
    weights = resampling.resample_weights(groups, 8, 4)
    drawn = np.array([brute_overlap(features, y, w, groups) for w in weights.T])
    null = [brute_overlap(features, y[o], weights[:, 0], groups) for o in resampling.permuted_rows(groups, 6, 4)]
    np.testing.assert_allclose([m.value for m in found], drawn[0], rtol=1e-6)
    ends = np.percentile(drawn[1:], [2.5, 97.5], axis=0)
    np.testing.assert_allclose([[m.low for m in found], [m.high for m in found]], ends, rtol=1e-6)
    np.testing.assert_allclose([m.null for m in found], np.mean(null, axis=0), rtol=1e-5, atol=1e-7)
    # Towards less for pairs that share labels, towards more for the rest; the value counts in.
    side = np.array([-1, -1, 1, 1, 1])
    reached = 1 + (side * np.array(null) >= side * drawn[0] - 1e-9).sum(axis=0)
    np.testing.assert_allclose([m.p for m in found], reached / 7)
    blocks = dask.array.from_array(features, chunks=(9, 5))
    again = distances.overlap_distances(blocks, y, groups, **options)
    np.testing.assert_allclose([m.low for m in again], [m.low for m in found], rtol=1e-9)


def test_labels_that_shape_the_space__stand_above_their_null():
    features, y = labelled(5, count=200)
    found = {m.name: m for m in distances.overlap_distances(features, y, label_names=NAMES)}
    for name in ("overlap_contrast", "overlap_slope"):
        assert found[name].low > found[name].null_high and found[name].p < 0.01


def test_all_labels_negative_and_one_sample__are_told():
    features, _ = labelled(6)
    nothing = np.zeros((70, 4), dtype=int)
    with pytest.raises(DataError, match="none of the labels a, b, c, d has two positive"):
        distances.label_separation(features, nothing, label_names=NAMES)
    found = {m.name: m for m in distances.overlap_distances(features, nothing, label_names=NAMES, replicates=2,
                                                            permutations=2)}  # fmt: skip
    assert found["rms_same"].value > 0 and np.isnan(found["overlap_slope"].value)
    assert all("same labels" in found[name].note for name in ("rms_disjoint", "overlap_contrast", "overlap_slope"))
    with pytest.raises(DataError, match="at least 2 patients"):
        distances.overlap_distances(features[:1], nothing[:1], label_names=NAMES)
    with pytest.raises(DataError, match="label names"):
        distances.label_separation(features, nothing[:, :2], label_names=NAMES)


def test_identical_positives_and_negatives__are_not_separated():
    features = np.tile(np.random.default_rng(7).normal(size=(20, 3)), (2, 1))
    found = distances.label_separation(features, np.repeat([[0], [1]], 20, axis=0), label_names=("x",), replicates=0,
                                       permutations=0)  # fmt: skip
    assert found[0].value == pytest.approx(-2 / 20, abs=0.06)
    constant = distances.label_separation(np.ones((8, 2)), np.arange(8)[:, None] % 2, label_names=("x",), replicates=2,
                                          permutations=2)  # fmt: skip
    assert np.isnan(constant[1].value) and "no spread" in constant[1].note
