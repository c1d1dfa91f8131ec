"""Baselines against the figures that follow from the study's label counts."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import baselines, metrics
from engine.errors import DataError

COUNTS = np.array([70, 415, 516, 165, 49, 31, 68, 216, 20, 129, 56, 127, 163, 2400])


def study_like_truth(seed: int, count: int = 3818) -> np.ndarray:
    """Labels at the study's prevalences; No Finding exactly where there is none, as in the study."""
    generator = np.random.default_rng(seed)
    ill = generator.random(count) >= 2400 / 3818
    y = generator.random((count, 14)) < COUNTS / (3818 - 2400)
    y[~ill] = False
    y[:, 13] = ~y[:, :13].any(axis=1)
    return y


def test_baselines__reach_what_the_facts_say_of_them():
    train, test = study_like_truth(0), study_like_truth(1)
    rows = baselines.trivial_baselines(train, len(test), seed=2)
    assert tuple(rows) == baselines.BASELINES
    scores = {name: metrics.summary(test, *row)["overall"] for name, row in rows.items()}
    assert 0.22 < scores[baselines.RANDOM]["lrap"] < 0.28
    assert 7.5 < scores[baselines.RANDOM]["coverage_error"] < 8.6
    assert 0.72 < scores[baselines.PREVALENCE]["lrap"] < 0.86
    assert 2.2 < scores[baselines.PREVALENCE]["coverage_error"] < 3.2
    assert 0.11 < scores[baselines.ALL_POSITIVE]["f1_macro"] < 0.15
    assert scores[baselines.ALL_POSITIVE]["exact_match"] == 0
    assert 0.55 < scores[baselines.MOST_FREQUENT]["exact_match"] < 0.75
    assert abs(scores[baselines.RANDOM]["auroc_macro"] - 0.5) < 0.05
    for name in (baselines.PREVALENCE, baselines.ALL_POSITIVE, baselines.MOST_FREQUENT):
        assert scores[name]["auroc_macro"] == 0.5


def test_random_scores__say_labels_as_often_as_training_has_them():
    train = study_like_truth(0)
    row = baselines.random_scores(train, 20000, seed=1)
    np.testing.assert_allclose(row.decisions.mean(axis=0), train.mean(axis=0), atol=0.015)
    np.testing.assert_array_equal(row.scores, baselines.random_scores(train, 20000, seed=1).scores)
    assert (row.scores != baselines.random_scores(train, 20000, seed=2).scores).any()


def test_prevalence_ranking__is_the_same_for_every_sample():
    train = study_like_truth(0)
    row = baselines.prevalence_ranking(train, 3)
    np.testing.assert_array_equal(row.scores, [train.mean(axis=0)] * 3)
    np.testing.assert_array_equal(row.decisions, [np.arange(14) == 13] * 3)


def test_most_frequent_set__is_the_mode_of_whole_rows():
    train = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 1]])
    row = baselines.most_frequent_set(train, 2)
    np.testing.assert_array_equal(row.decisions, [[True, False, True]] * 2)
    np.testing.assert_array_equal(row.scores, row.decisions)


def test_baselines__refuse_an_empty_training_split():
    with pytest.raises(DataError, match="no training samples"):
        baselines.trivial_baselines(np.zeros((0, 14)), 5, seed=0)
