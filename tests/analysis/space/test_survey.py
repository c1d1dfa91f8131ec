"""All measures of a space from one look at the pairs are those that the single functions give."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest

from analysis import space
from analysis.space import resampling, survey
from engine.errors import DataError, UsageError
from tests.analysis.space.test_silhouettes import clustered

NAMES = tuple("abcdef")
OPTIONS = {"replicates": 10, "permutations": 6, "seed": 2}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_look__gives_what_single_functions_give(missing, normalize):
    features, classes = clustered()
    if missing:
        classes = np.where(np.arange(len(classes)) % 6 == 0, -1, classes)
    y = (classes[:, None] == np.arange(6)).astype(np.int8)
    groups = np.arange(len(classes)) // 2
    found = survey.measure_space(features, classes, y, groups, label_names=NAMES, k=4, normalize=normalize, **OPTIONS)
    rows, _ = space.nearest_neighbours(features, 4, groups, normalize=normalize)
    expected = [
        *space.silhouette(features, classes, groups, class_names=NAMES, normalize=normalize, **OPTIONS),
        *space.centroid_measures(features, classes, groups, class_names=NAMES, normalize=normalize, **OPTIONS)[3:],
        space.knn_purity(rows, classes, groups, class_names=NAMES, **OPTIONS)[0],
        *space.label_purity(rows, y, groups, label_names=NAMES, **OPTIONS),
        *space.hubness(rows, groups, **OPTIONS),
        space.class_alignment(features, classes, groups, **OPTIONS),
        space.uniformity(features, groups, replicates=10, seed=2),
    ]
    table, single = space.measure_table(found), space.measure_table(expected)
    assert table[["name", "label", "note"]].equals(single[["name", "label", "note"]])
    for column in ("value", "low", "high", "null", "p"):
        np.testing.assert_allclose(table[column], single[column], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", [False, True])
def test_dask_arrays__give_what_arrays_in_memory_give(missing):
    features, classes = clustered()
    classes = np.where(np.arange(len(classes)) % 6 == 0, -1, classes) if missing else classes
    y, groups = (classes[:, None] == np.arange(6)).astype(np.int8), np.arange(len(classes)) // 2
    blocks = dask.array.from_array(features, chunks=(13, 5))
    tables = [
        space.measure_table(
            survey.measure_space(each, classes, y, groups, label_names=NAMES, k=4, interval_samples=41, **OPTIONS)
        )
        for each in (features, blocks)
    ]
    for column in ("value", "low", "high", "null", "p"):
        np.testing.assert_allclose(tables[0][column], tables[1][column], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_blocks_callables_and_lists__give_what_arrays_give(normalize):
    features, classes = clustered()
    features = features.astype(np.float32)
    y, cut = (classes[:, None] == np.arange(6)).astype(np.int8), [features[:10], features[10:11], features[11:]]
    measured = []
    for source in (features, cut, lambda: iter(cut), features.tolist()):
        found = survey.measure_space(source, classes, y, label_names=NAMES, k=4, normalize=normalize, **OPTIONS)
        found += [
            space.pair_alignment(source, features[::-1].copy()),
            space.modality_gap(source, features[::-1].copy()),
        ]
        nearest = space.nearest_neighbours(source, 4, normalize=normalize)[1]
        measured.append([each.value for each in found] + nearest.ravel().tolist())
    for each in measured[1:]:
        np.testing.assert_allclose(each, measured[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_intervals_of_large_collections__are_drawn_on_whole_patients(normalize):
    features, classes = clustered()
    y, groups = (classes[:, None] == np.arange(6)).astype(np.int8), np.arange(len(classes)) // 2
    found = survey.measure_space(
        features, classes, y, groups, label_names=NAMES, k=4, normalize=normalize, interval_samples=41, **OPTIONS
    )
    measured = next(each for each in found if each.name == "uniformity")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    squares = ((unit[:, None] - unit) ** 2).sum(axis=2)
    rows = resampling.patients_up_to(groups, 41, 2)
    assert len(rows) == 40 and measured.interval_samples == 40 and measured.samples == len(classes)

    def value(which, weights):
        pairs = np.outer(weights, weights) * ~np.eye(len(which), dtype=bool)
        return np.log((pairs * np.exp(-2 * squares[np.ix_(which, which)])).sum() / pairs.sum())

    weights = resampling.resample_weights(np.unique(groups[rows], return_inverse=True)[1], 10, 2)[:, 1:]
    drawn = np.array([value(rows, column.astype(np.float64)) for column in weights.T])
    everything = value(np.arange(len(classes)), np.ones(len(classes)))
    np.testing.assert_allclose(measured.value, everything, rtol=1e-4)
    low, high = np.quantile(drawn, [0.025, 0.975]) + everything - drawn.mean()
    np.testing.assert_allclose([measured.low, measured.high], [low, high], rtol=1e-3)


def test_every_undefined_number__has_a_note():
    features, classes = clustered(3)
    y = np.column_stack([(classes[:, None] == np.arange(6)), np.zeros(len(classes))]).astype(np.int8)
    table = space.measure_table(
        survey.measure_space(features, classes, y, label_names=(*NAMES, "nobody has it"), k=3, **OPTIONS)
    )
    silent = table[table[["value", "low", "null"]].isna().any(axis=1) & (table["note"] == "")]
    assert not len(silent), silent


def test_wrong_input__is_refused():
    features, classes = clustered(4)
    y = (classes[:, None] == np.arange(6)).astype(np.int8)
    with pytest.raises(DataError, match="rows of labels"):
        survey.measure_space(features, classes, y[:-1], label_names=NAMES)
    with pytest.raises(UsageError, match="choose k up to 94"):
        survey.measure_space(features, classes, y, label_names=NAMES, k=1000)
    broken = features.copy()
    broken[41] = np.nan
    with pytest.raises(DataError, match="first row 41;"):
        survey.measure_space(broken, classes, y, label_names=NAMES)
    with pytest.raises(DataError, match="are of 'b', and 2 classes are needed"):
        survey.measure_space(features[:1], classes[:1], y[:1], label_names=NAMES)
