"""Silhouettes against scikit-learn, their resamples and null against brute force on the full distance matrix."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn import metrics

from analysis.space import pairwise, resampling, silhouettes
from engine.errors import DataError


def clustered(seed: int = 0, sizes=(50, 30, 12, 1, 0, 2), width: int = 8, offset: float = 5.0):
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return generator.normal(size=(len(classes), width)) + generator.normal(size=(len(sizes), width))[
        classes
    ] + offset, classes


def weighted_silhouette(features, classes, weights):
    """Brute force: each sample against all others, copies of itself left out."""
    apart = cdist(features, features)
    values = np.zeros(len(features))
    for i in np.flatnonzero(weights):
        means = {}
        for label in np.unique(classes):
            w = weights * (classes == label)
            w[i] = 0
            if w.sum() > 0:
                means[label] = (apart[i] * w).sum() / w.sum()
        if classes[i] in means:
            a, b = means.pop(classes[i]), min(means.values())
            values[i] = (b - a) / max(a, b)
    return (values * weights).sum() / weights.sum()


@pytest.mark.parametrize("memory", [pairwise.MEMORY, 0], ids=["above the diagonal", "all tiles"])
@pytest.mark.parametrize("tile", [7, 2048])
def test_samples__equal_scikit_learn(monkeypatch, memory, tile):
    monkeypatch.setattr(pairwise.sweep, "__kwdefaults__", {"tile": tile, "memory": memory})
    features, classes = clustered()
    found = silhouettes.silhouette_samples(features, classes, memory=memory)
    np.testing.assert_allclose(found, metrics.silhouette_samples(features, classes), atol=2e-6)


def test_near_duplicates_far_from_the_origin__do_not_cancel():
    generator = np.random.default_rng(1)
    classes = np.arange(60) % 3
    features = generator.normal(size=(60, 16)) * 1e-3 + 100 * generator.normal(size=(20, 16))[np.arange(60) // 3]
    expected = metrics.silhouette_samples(features.astype(np.float32).astype(np.float64), classes)
    np.testing.assert_allclose(silhouettes.silhouette_samples(features, classes), expected, atol=1e-3)
    points = pairwise.Points(features)
    whole = slice(0, 60)
    squared = points.squared_distances(whole, whole).numpy()
    centred = points._left[:, :-2].double().numpy()
    np.testing.assert_allclose(squared, cdist(centred, centred) ** 2, rtol=1e-4)
    assert (np.diag(squared) == 0).all()


def test_interval_and_null__equal_brute_force_by_patient():
    features, classes = clustered(2, sizes=(20, 9, 6, 1))
    groups = np.arange(len(classes)) // 2
    whole = silhouettes.silhouette(features, classes, groups, replicates=20, permutations=15, seed=3)[0]
    weights = resampling.resample_weights(groups, 20, 3)
    drawn = [weighted_silhouette(features, classes, w) for w in weights.T[1:]]
    moved = np.percentile(drawn, [2.5, 97.5]) + whole.value - np.mean(drawn)
    np.testing.assert_allclose([whole.low, whole.high], moved, atol=1e-5)
    null = [metrics.silhouette_score(features, classes[order]) for order in resampling.permuted_rows(groups, 15, 3)]
    np.testing.assert_allclose(whole.null, np.mean(null), atol=1e-5)
    assert whole.value == pytest.approx(metrics.silhouette_score(features, classes), abs=1e-6)
    assert whole.p == (1 + (np.array(null) >= whole.value - 1e-6).sum()) / 16


def test_each_class_has_its_mean__and_a_class_of_one_is_named():
    features, classes = clustered(4)
    found = {m.label: m for m in silhouettes.silhouette(features, classes, class_names=tuple("abcdef"), replicates=5,
                                                       permutations=3)}  # fmt: skip
    expected = metrics.silhouette_samples(features, classes)
    assert set(found) == {None, "a", "b", "c", "d", "f"}
    assert found["c"].value == pytest.approx(expected[classes == 2].mean(), abs=1e-6)
    assert found["d"].value == 0 and "one sample" in found["d"].note and "no interval" in found["d"].note


def test_large_collections__draw_interval_and_null_on_whole_patients_and_say_so():
    features, classes = clustered(5)
    groups = np.arange(len(classes)) // 3
    whole = silhouettes.silhouette(features, classes, groups, replicates=30, permutations=20, interval_samples=40,
                                  null_samples=30)[0]  # fmt: skip
    assert whole.value == pytest.approx(metrics.silhouette_score(features, classes), abs=1e-6)
    assert 30 < whole.interval_samples <= 40 and 20 < whole.null_samples <= 30 and whole.samples == len(classes)
    assert np.isfinite([whole.low, whole.high, whole.null, whole.p]).all()


def test_samples_without_a_class__take_no_part():
    features, classes = clustered(6)
    without = np.where(np.arange(len(classes)) % 5 == 0, -1, classes)
    kept = without >= 0
    found = silhouettes.silhouette_samples(features, without)
    assert np.isnan(found[~kept]).all()
    np.testing.assert_allclose(found[kept], metrics.silhouette_samples(features[kept], without[kept]), atol=2e-6)


def test_identical_classes_and_constant_features__have_silhouettes_of_zero_or_below():
    features = np.tile(np.random.default_rng(7).normal(size=(10, 4)), (2, 1))
    assert silhouettes.silhouette_samples(features, np.repeat([0, 1], 10)).max() <= 0
    np.testing.assert_array_equal(silhouettes.silhouette_samples(np.ones((9, 3)), np.arange(9) % 2), np.zeros(9))


def test_wrong_input__is_refused_with_its_place():
    features, classes = clustered(8)
    with pytest.raises(DataError, match="are of class 0, and 2 classes"):
        silhouettes.silhouette_samples(features, np.zeros(len(features), dtype=int))
    with pytest.raises(DataError, match="of class 0, and 2 classes"):
        silhouettes.silhouette_samples(features[:1], np.zeros(1, dtype=int))
    with pytest.raises(DataError, match="do not fit together"):
        silhouettes.silhouette_samples(features, classes[:-1])
    with pytest.raises(DataError, match="no sample has a class"):
        silhouettes.silhouette_samples(features, np.full(len(features), -1))
    features[7, 2] = np.nan
    with pytest.raises(DataError, match="NaN or infinite values, first row 7"):
        silhouettes.silhouette(features, np.arange(len(features)) % 2)
    features[7] = 0
    with pytest.raises(DataError, match=r"first row 7 of length 0\.0"):
        silhouettes.silhouette_samples(features, np.arange(len(features)) % 2, normalize=True)
