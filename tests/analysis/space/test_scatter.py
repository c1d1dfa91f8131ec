"""Centroid measures against scikit-learn and the study's formula, in memory, as a dask array and block by block."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest
from sklearn import metrics

from analysis import distances
from analysis.space import resampling, rows, scatter
from engine.errors import DataError, UsageError
from tests.analysis.space.test_silhouettes import clustered


def found_by_name(*arguments, **options):
    return {m.name: m for m in scatter.centroid_measures(*arguments, **options)}


def fisher(features, classes):
    n, number = len(classes), len(np.unique(classes))
    return metrics.calinski_harabasz_score(features, classes) * (number - 1) / (n - number)


@pytest.mark.parametrize("normalize", [False, True])
def test_values__equal_scikit_learn_and_the_study(normalize):
    features, classes = clustered()
    found = found_by_name(features, classes, normalize=normalize, replicates=0, permutations=0)
    used = features / np.linalg.norm(features, axis=1, keepdims=True) if normalize else features
    assert found["davies_bouldin"].value == pytest.approx(metrics.davies_bouldin_score(used, classes), rel=1e-9)
    assert found["fisher_ratio"].value == pytest.approx(fisher(used, classes), rel=1e-9)
    study = distances.class_distances(used, classes)
    for name in ("inter", "intra", "ratio"):
        assert found[name].value == pytest.approx(getattr(study, name), rel=1e-9)


def test_interval_and_null__equal_scikit_learn_on_resampled_and_permuted_patients():
    features, classes = clustered(1, sizes=(30, 20, 10))
    groups = np.arange(len(classes)) // 2
    found = found_by_name(features, classes, groups, replicates=12, permutations=9, seed=5)
    scores = {"davies_bouldin": metrics.davies_bouldin_score, "fisher_ratio": fisher}
    resampled = [np.repeat(np.arange(60), w.astype(int)) for w in resampling.resample_weights(groups, 12, 5).T[1:]]
    orders = resampling.permuted_rows(groups, 9, 5)
    for name, score in scores.items():
        drawn = [score(features[chosen], classes[chosen]) for chosen in resampled]
        moved = np.percentile(drawn, [2.5, 97.5]) + found[name].value - np.mean(drawn)
        np.testing.assert_allclose([found[name].low, found[name].high], moved, rtol=1e-6)
        assert found[name].null == pytest.approx(
            np.mean([score(features, classes[order]) for order in orders]), rel=1e-6
        )


def test_p_values__do_not_depend_on_the_embeddings_length():
    features, classes = clustered(1, sizes=(30, 20, 10))
    usual, short = (found_by_name(features * scale, classes, replicates=0, permutations=19) for scale in (1.0, 1e-9))
    assert usual["inter"].p == 0.05
    for name, each in usual.items():
        assert short[name].p == each.p, name


def test_dask_arrays_blocks_and_callables__give_the_same_numbers():
    features, classes = clustered(2)
    expected = found_by_name(features, classes, replicates=5, permutations=4)
    cut = [features[:10], features[10:11], features[11:]]
    for source in (dask.array.from_array(features, chunks=(17, 3)), cut, lambda: iter(cut)):
        found = found_by_name(source, classes, replicates=5, permutations=4)
        for name, each in expected.items():
            np.testing.assert_allclose(
                [found[name].value, found[name].low, found[name].null], [each.value, each.low, each.null], rtol=1e-6
            )
    with pytest.raises(UsageError, match="only once"):
        scatter.centroid_measures(iter(cut), classes)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32__keeps_its_digits_over_several_blocks_far_from_the_origin(monkeypatch, offset):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 64)
    features, classes = clustered(6, sizes=(120, 60, 30, 5, 1), width=32, offset=offset)
    features = (features * 0.1 + offset).astype(np.float32)
    wide = features.astype(np.float64)
    groups = np.arange(len(classes)) // 2
    found = found_by_name(features, classes, groups, replicates=10, permutations=8, seed=2)
    assert found["davies_bouldin"].value == pytest.approx(metrics.davies_bouldin_score(wide, classes), rel=1e-5)
    assert found["fisher_ratio"].value == pytest.approx(fisher(wide, classes), rel=1e-5)
    expected = found_by_name(wide, classes, groups, replicates=10, permutations=8, seed=2)
    for name, each in expected.items():
        for field in ("value", "low", "high", "null", "null_low", "null_high", "p"):
            assert getattr(found[name], field) == pytest.approx(getattr(each, field), rel=1e-4), (name, field)


def test_samples_without_a_class__are_left_out_of_blocks_too():
    features, classes = clustered(7)
    without = np.where(np.arange(len(classes)) % 4 == 0, -1, classes)
    kept = without >= 0
    expected = metrics.davies_bouldin_score(features[kept], without[kept])
    for source in (features, dask.array.from_array(features, chunks=(17, 3)), [features[:30], features[30:]]):
        found = found_by_name(source, without, replicates=2, permutations=2)["davies_bouldin"]
        assert found.value == pytest.approx(expected, rel=1e-9) and found.samples == kept.sum()


def test_float32_rows_too_long_to_square__are_refused_and_normalised_ones_are_not():
    features, classes = clustered(8)
    features = (features * 1e20).astype(np.float32)
    with pytest.raises(DataError, match="too long for squared distances in float32"):
        scatter.centroid_measures(features, classes)
    for factor in (1.0, 1e-42):
        found = found_by_name((features * factor).astype(np.float32), classes, normalize=True, replicates=0,
                              permutations=0)  # fmt: skip
        unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        assert found["davies_bouldin"].value == pytest.approx(metrics.davies_bouldin_score(unit, classes), rel=1e-4)


def test_many_classes__are_summed_one_by_one_to_the_same():
    generator = np.random.default_rng(3)
    features, classes = generator.normal(size=(300, 6)), np.arange(300) % 60
    found = found_by_name(features, classes, replicates=0, permutations=3, seed=1)
    orders = resampling.permuted_rows(np.arange(300), 3, 1)
    expected = np.mean([metrics.davies_bouldin_score(features, classes[order]) for order in orders])
    assert found["davies_bouldin"].null == pytest.approx(expected, rel=1e-9)


def test_what_is_undefined_or_zero_by_construction__is_named():
    features, classes = clustered(4)
    found = found_by_name(features, classes, class_names=tuple("abcdef"), replicates=0, permutations=0)
    assert found["intra"].note == "width 0 by construction, one sample: d"
    twins = np.tile(features[:12], (2, 1))
    found = found_by_name(twins, np.repeat([0, 1], 12), class_names=("left", "right"), replicates=0, permutations=0)
    assert (
        np.isinf(found["davies_bouldin"].value) and "same centroid for left and right" in found["davies_bouldin"].note
    )
    constant = found_by_name(np.ones((8, 3)), np.arange(8) % 2, replicates=3, permutations=3)
    assert np.isnan(constant["fisher_ratio"].value) and "no spread" in constant["fisher_ratio"].note
    assert np.isnan(constant["ratio"].value) and "no spread" in constant["ratio"].note
    one_patient = found_by_name(features, classes, np.zeros(len(classes)), replicates=5, permutations=0)["ratio"]
    assert np.isnan(one_patient.low) and "at least two patients" in one_patient.note


def test_wrong_input__is_refused_with_its_place():
    features, classes = clustered(5)
    features[40, 1] = np.inf
    with pytest.raises(DataError, match="first row 40"):
        scatter.centroid_measures(features, classes)
    with pytest.raises(DataError, match="are of class 1, and 2 classes are needed"):
        scatter.centroid_measures(features[:1], classes[:1])
    with pytest.raises(DataError, match="a block of shape"):
        scatter.centroid_measures([features[:5], features[5:, :3]], classes)
    with pytest.raises(DataError, match="groups for"):
        scatter.centroid_measures(features[:40], classes[:40], np.arange(39))
