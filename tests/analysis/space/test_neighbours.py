"""Neighbours against brute force and scikit-learn, purity and hubness against plain loops and scipy."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import skew
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from analysis.space import neighbours, pairwise, resampling
from engine.errors import UsageError
from tests.analysis.space.test_silhouettes import clustered


@pytest.mark.parametrize("tile", [5, 24, 2048])
def test_neighbours__equal_scikit_learn(monkeypatch, tile):
    monkeypatch.setattr(pairwise.sweep, "__kwdefaults__", {"tile": tile, "memory": pairwise.MEMORY})
    features, _ = clustered()
    rows, apart = neighbours.nearest_neighbours(features, 7)
    expected_apart, expected = NearestNeighbors(n_neighbors=8, algorithm="brute").fit(features).kneighbors(features)
    np.testing.assert_array_equal(rows, expected[:, 1:])
    np.testing.assert_allclose(apart, expected_apart[:, 1:], rtol=1e-5)


@pytest.mark.parametrize("tile", [5, 32, 2048])
def test_samples_of_one_patient__are_not_each_others_neighbours(monkeypatch, tile):
    monkeypatch.setattr(pairwise.sweep, "__kwdefaults__", {"tile": tile, "memory": pairwise.MEMORY})
    features, _ = clustered(1)
    groups = np.arange(len(features)) // 4
    rows, _ = neighbours.nearest_neighbours(features, 6, groups)
    apart = cdist(features, features)
    apart[groups[:, None] == groups] = np.inf
    np.testing.assert_array_equal(rows, np.argsort(apart, axis=1)[:, :6])


@pytest.mark.parametrize("memory", [pairwise.MEMORY, 0], ids=["above the diagonal", "all tiles"])
def test_many_tiles_of_float32_in_blocks__equal_brute_force(monkeypatch, memory):
    monkeypatch.setattr(pairwise.sweep, "__kwdefaults__", {"tile": 64, "memory": memory})
    features = np.random.default_rng(8).normal(size=(701, 24)).astype(np.float32) + 3
    groups = np.random.default_rng(9).permutation(701) // 3
    expected = cdist(features.astype(np.float64), features.astype(np.float64))
    expected[groups[:, None] == groups] = np.inf
    for source in (features, dask.array.from_array(features, chunks=(100, 24))):
        rows, apart = neighbours.nearest_neighbours(source, 12, groups)
        np.testing.assert_array_equal(rows, np.argsort(expected, axis=1)[:, :12])
        np.testing.assert_allclose(apart, np.sort(expected, axis=1)[:, :12], rtol=1e-5)


def test_duplicates__find_each_other_and_never_themselves():
    features = np.repeat(np.random.default_rng(2).normal(size=(6, 3)), 3, axis=0)
    rows, apart = neighbours.nearest_neighbours(features, 2)
    assert (rows // 3 == np.arange(18)[:, None] // 3).all() and (rows != np.arange(18)[:, None]).all()
    np.testing.assert_array_equal(apart, 0)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 5), (5, 0)])
def test_k_larger_than_the_collection__is_refused(count, k):
    with pytest.raises(UsageError, match="neighbours asked for"):
        neighbours.nearest_neighbours(np.random.default_rng(0).normal(size=(count, 3)), k)


def test_k_beyond_other_patients__is_refused():
    with pytest.raises(UsageError, match="only 2 others of other patients; choose k up to 2"):
        neighbours.nearest_neighbours(np.eye(6), 3, np.array([0, 0, 0, 0, 1, 2]))


def test_purity__is_the_mean_leave_one_out_vote():
    features, classes = clustered(3)
    rows, _ = neighbours.nearest_neighbours(features, 5)
    groups = np.arange(len(classes)) // 2
    found = {m.label: m for m in neighbours.knn_purity(rows, classes, groups, replicates=10, permutations=8, seed=1)}
    votes = []
    for i in range(len(classes)):
        others = np.delete(np.arange(len(classes)), i)
        model = KNeighborsClassifier(5, algorithm="brute").fit(features[others], classes[others])
        vote = dict(zip(model.classes_, model.predict_proba(features[i : i + 1])[0], strict=True))
        votes.append(vote.get(classes[i], 0.0))
    votes = np.array(votes)
    assert found[None].value == pytest.approx(votes.mean())
    assert found["class 1"].value == pytest.approx(votes[classes == 1].mean())
    weights = resampling.resample_weights(groups, 10, 1)[:, 1:]
    np.testing.assert_allclose(found[None].low, np.percentile(votes @ weights / weights.sum(axis=0), 2.5))
    null = [(classes[o][rows] == classes[o][:, None]).mean() for o in resampling.permuted_rows(groups, 8, 1)]
    assert found[None].null == pytest.approx(np.mean(null))
    assert found["class 3"].value == 0 and "one sample" in found["class 3"].note


def test_label_purity__is_the_mean_jaccard_overlap_and_names_empty_labels():
    generator = np.random.default_rng(4)
    y = (generator.random((80, 4)) < [0.4, 0.2, 0.0, 0.1]).astype(np.int8)
    rows, _ = neighbours.nearest_neighbours(generator.normal(size=(80, 5)), 6)
    found = {(m.name, m.label): m for m in neighbours.label_purity(rows, y, label_names=tuple("abcd"), permutations=20)}
    sets = [frozenset(np.flatnonzero(row)) for row in y]
    overlap = [
        [len(s & sets[j]) / len(s | sets[j]) if s | sets[j] else 1.0 for j in rows[i]] for i, s in enumerate(sets)
    ]
    assert found["knn_overlap", None].value == pytest.approx(np.mean(overlap))
    assert found["knn_purity", "b"].value == pytest.approx(y[rows[y[:, 1] == 1], 1].mean())
    assert np.isnan(found["knn_purity", "c"].value) and "'c' has no positive" in found["knn_purity", "c"].note
    assert found["knn_purity", "a"].null == pytest.approx(y[:, 0].mean(), abs=0.05)


def test_hubness__is_the_skewness_of_scipy_and_shares_of_hubs():
    features = np.random.default_rng(5).normal(size=(200, 40))
    rows, _ = neighbours.nearest_neighbours(features, 5)
    found = {m.name: m for m in neighbours.hubness(rows, replicates=20, permutations=20)}
    times = np.array([(rows == i).sum() for i in range(200)])
    assert found["hubness"].value == pytest.approx(skew(times))
    assert found["antihubs"].value == (times == 0).mean()
    assert found["hubs"].value == (times > times.mean() + 2 * times.std()).mean()
    assert found["hubness"].p < 0.1 and found["hubness"].null < found["hubness"].value
    ring = (np.arange(9)[:, None] + [1, 8]) % 9
    even = neighbours.hubness(ring, replicates=5, permutations=5)[0]
    assert even.value == 0 and "equally often" in even.note
