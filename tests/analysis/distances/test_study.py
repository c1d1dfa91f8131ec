"""Distances against a short independent NumPy version, on classes of every size."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from analysis import bootstrap, distances
from engine.errors import DataError, UsageError


def study_distances(features, labels):
    """The formula of the study, a class at a time."""
    classes = sorted(set(labels) - {-1})
    members = {c: features[labels == c] for c in classes}
    centres = {c: members[c].mean(axis=0) for c in classes}
    intra = np.mean([np.mean([np.linalg.norm(x - centres[c]) for x in members[c]]) for c in classes])
    inter = np.mean([np.linalg.norm(centres[a] - centres[b]) for a, b in combinations(classes, 2)])
    return inter, intra, inter / intra


def random_case(seed: int, sizes=(30, 12, 5, 1, 0, 2, 1), dimensions: int = 16):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    features = (
        generator.normal(size=(len(labels), dimensions)) * 5 + generator.normal(size=(len(sizes), 16))[labels] * 3
    )
    return features, labels


@pytest.mark.parametrize("normalize", [False, True])
def test_class_distances__equal_the_study_formula(normalize):
    features, labels = random_case(0)
    labels[3] = distances.NO_CLASS
    result = distances.class_distances(features, labels, classes=9, normalize=normalize)
    used = features / np.linalg.norm(features, axis=1, keepdims=True) if normalize else features
    np.testing.assert_allclose([result.inter, result.intra, result.ratio], study_distances(used, labels), rtol=1e-12)
    np.testing.assert_array_equal(result.counts, [(labels == c).sum() for c in range(9)])
    assert result.singletons == 2
    assert result.intra_of_class[3] == 0 and np.isnan(result.intra_of_class[[4, 7, 8]]).all()
    for a, b in [(0, 1), (2, 6)]:
        expected = np.linalg.norm(used[labels == a].mean(axis=0) - used[labels == b].mean(axis=0))
        np.testing.assert_allclose([result.between[a, b], result.between[b, a]], expected)
    assert np.isnan(result.between[4]).all() and (np.diag(result.between)[[0, 1, 3]] == 0).all()


def test_first_positive__follows_label_order():
    y = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(distances.first_positive(y), [1, 0, -1, 2])


def test_permuted_null__equals_the_formula_on_the_same_permutations():
    features, labels = random_case(1)
    null = distances.permuted_null(features, labels, permutations=40, seed=5)
    generator = np.random.Generator(np.random.PCG64(5))
    expected = [study_distances(features, generator.permutation(labels))[2] for _ in range(40)]
    np.testing.assert_allclose(null.ratios, expected, rtol=1e-9)
    np.testing.assert_allclose([null.low, null.high], np.percentile(expected, [2.5, 97.5]), rtol=1e-9)
    observed = study_distances(features, labels)[2]
    assert null.p == (1 + (np.array(expected) >= observed).sum()) / 41


def test_null__is_far_from_zero_for_class_sizes_like_the_studys():
    sizes = (10, 60, 70, 20, 5, 1, 3, 14, 1, 8, 2, 9, 12, 360)
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(14), sizes)
    features = generator.normal(size=(len(labels), 512))
    null = distances.permuted_null(features, labels, permutations=50)
    assert 0.5 < null.low < null.high < 1.2
    observed = distances.class_distances(features, labels).ratio
    assert null.low - 0.05 < observed < null.high + 0.05 and null.p > 0.001


def test_separated_classes__lie_above_their_null():
    features, labels = random_case(2, sizes=(30, 30, 30))
    null = distances.permuted_null(features, labels, permutations=100)
    assert distances.class_distances(features, labels).ratio > null.high and null.p < 0.02


def test_bootstrap_distances__equal_the_formula_on_resampled_rows():
    features, labels = random_case(3)
    labels[5] = distances.NO_CLASS
    groups = np.arange(len(labels)) // 2
    result = distances.bootstrap_distances(features, labels, groups, replicates=30, seed=4, normalize=True)
    codes, counts = bootstrap.resample_counts(groups, 30, 4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    drawn = []
    for count in counts:
        rows = np.repeat(np.arange(len(labels)), count[codes])
        drawn.append(study_distances(unit[rows], labels[rows]))
    for column, name in enumerate(("inter", "intra", "ratio")):
        low, high = np.percentile(np.array(drawn)[:, column], [2.5, 97.5])
        # Copies of one sample form a class at distance 0, where inner products leave about 1e-8.
        np.testing.assert_allclose([result[name].low, result[name].high], [low, high], rtol=1e-6)
        np.testing.assert_allclose(result[name].value, study_distances(unit, labels)[column])


def test_classes_of_one_patient__have_no_interval_whoever_else_has_none():
    features, labels = random_case(7)
    groups = np.where(np.arange(len(labels)) < 20, "one", np.arange(len(labels)).astype(str))
    result = distances.bootstrap_distances(features, np.where(groups == "one", labels, -1), groups, replicates=20)
    for each in result.values():
        assert np.isfinite(each.value) and np.isnan([each.low, each.high]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint64])
def test_classes__may_be_whole_numbers_of_any_width(dtype):
    features, labels = random_case(4)
    labels, groups = np.maximum(labels, 0), np.arange(len(labels))
    kinds = (labels.astype(dtype), labels)
    null, expected = (distances.permuted_null(features, each, permutations=5) for each in kinds)
    np.testing.assert_array_equal(null.ratios, expected.ratios)
    drawn, wide = (distances.bootstrap_distances(features, each, groups, replicates=5) for each in kinds)
    assert drawn == wide


def test_degenerate_classes__give_nan_and_not_infinity():
    features, _ = random_case(4)
    one_class = distances.class_distances(features, np.zeros(len(features), dtype=int))
    assert np.isnan(one_class.inter) and np.isnan(one_class.ratio) and one_class.intra > 0
    alone = distances.class_distances(features[:3], np.arange(3))
    assert alone.intra == 0 and np.isnan(alone.ratio) and alone.inter > 0
    assert np.isnan(distances.permuted_null(features[:3], np.arange(3), permutations=5).p)


def test_wrong_input__is_refused():
    features, labels = random_case(5)
    with pytest.raises(DataError, match="do not fit together"):
        distances.class_distances(features, labels[:-1])
    with pytest.raises(DataError, match="expected 0 to 2"):
        distances.class_distances(features, labels, classes=3)
    with pytest.raises(DataError, match="no sample has a class"):
        distances.class_distances(features, np.full(len(labels), -1))
    with pytest.raises(DataError, match="whole numbers"):
        distances.class_distances(features, labels.astype(float))
    features[7] = 0
    with pytest.raises(DataError, match=r"first row 7 of length 0\.0"):
        distances.class_distances(features, labels, normalize=True)
    with pytest.raises(UsageError, match="at least 1"):
        distances.permuted_null(features, labels, permutations=0)
