"""Thresholds against brute force over all cuts, and the rule that test truth never enters a choice."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.preprocessing import minmax_scale

from analysis import thresholds
from engine.errors import DataError, UsageError


def random_case(seed: int, count: int = 50, labels: int = 6, digits: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = generator.random((count, labels)) < 0.25
    return y, np.round(generator.normal(size=y.shape) + y, digits)


@pytest.mark.parametrize("digits", [6, 0])
def test_f1_optimal__is_the_best_of_all_cuts(digits):
    y, scores = random_case(0, digits=digits)
    chosen = thresholds.f1_optimal(y, scores)
    decisions = thresholds.decide(scores, chosen)
    for label in range(y.shape[1]):
        cuts = [-np.inf, *np.unique(scores[:, label])]
        best = max(f1_score(y[:, label], scores[:, label] > cut, zero_division=0) for cut in cuts)
        np.testing.assert_allclose(f1_score(y[:, label], decisions[:, label]), best, rtol=0, atol=1e-12)


def test_f1_optimal__label_without_positives_takes_the_fallback():
    y, scores = random_case(1)
    y[:, 2] = False
    assert thresholds.f1_optimal(y, scores)[2] == np.inf
    assert thresholds.f1_optimal(y, scores, fallback=np.arange(6.0))[2] == 2.0
    assert np.isfinite(thresholds.choose("f1", y, scores, prevalence=np.full(6, 0.2))[2])


def test_f1_optimal__never_says_a_label_whose_scores_know_nothing():
    truth = np.array([[1, 1], [0, 0], [0, 1]])
    scores = np.array([[0.1, 0.9], [0.1, 0.2], [0.1, 0.8]])
    said = thresholds.decide(scores, thresholds.f1_optimal(truth, scores))
    assert not said[:, 0].any()
    assert (said[:, 1] == truth[:, 1]).all()


def test_candidates__tell_neighbouring_floats_apart():
    scores = np.array([1.0, np.nextafter(1.0, 2.0), 3.0])
    cuts = thresholds.candidate_thresholds(scores)
    assert [int((scores > cut).sum()) for cut in cuts] == [0, 1, 2, 3]


def test_prevalence_matched__says_each_label_as_often_as_asked():
    _, scores = random_case(2, count=200)
    prevalence = np.array([0.0, 0.005, 0.1, 0.5, 0.97, 1.0])
    said = thresholds.decide(scores, thresholds.prevalence_matched(scores, prevalence)).sum(axis=0)
    np.testing.assert_array_equal(said, prevalence * 200)


def test_prevalence_matched__takes_the_nearest_count_under_ties():
    scores = np.array([0.0] * 6 + [1.0] * 4)[:, None]
    for share, said in [(0.1, 0), (0.3, 4), (0.65, 4), (0.75, 10), (0.2, 0)]:
        assert thresholds.decide(scores, thresholds.prevalence_matched(scores, np.array([share]))).sum() == said


def test_minmax__is_the_studys_cut():
    scores = np.random.default_rng(3).normal(size=(40, 14)) * 30
    expected = minmax_scale(scores, axis=1)
    np.testing.assert_allclose(thresholds.minmax_per_image(scores), expected, atol=1e-9)
    np.testing.assert_array_equal(thresholds.minmax_decisions(scores, 0.5), expected > 0.5)
    flat = np.full((1, 14), 7.0)
    assert not thresholds.minmax_decisions(flat, 0.2).any()
    # Strictly above: a score in the exact middle is not said, nor is the highest at a cut of 1.
    middle = np.array([[0.0, 0.5, 1.0]])
    np.testing.assert_array_equal(thresholds.minmax_decisions(middle, 0.5), [[False, False, True]])
    assert not thresholds.minmax_decisions(middle, 1.0).any()


@pytest.mark.parametrize("rule", thresholds.RULES)
def test_choice__never_reads_test_truth_or_test_scores(rule):
    y, scores = random_case(4, count=120)
    split = np.array(["train", "val", "test"] * 40, dtype=object)
    chosen = thresholds.choose_on_validation(rule, y, scores, split)
    changed_y, changed_scores = y.copy(), scores.copy()
    changed_y[split == "test"] ^= True
    changed_scores[split == "test"] = -7.0
    np.testing.assert_array_equal(chosen, thresholds.choose_on_validation(rule, changed_y, changed_scores, split))
    if rule != "fixed":
        changed_scores[split == "val"] *= 2
        assert (chosen != thresholds.choose_on_validation(rule, changed_y, changed_scores, split)).any()


def test_rules__refuse_what_they_cannot_use():
    y, scores = random_case(5)
    with pytest.raises(UsageError, match=r"unknown threshold rule 'youden'.*f1"):
        thresholds.choose("youden", y, scores)
    with pytest.raises(UsageError, match="needs the training prevalence"):
        thresholds.choose("prevalence", y, scores)
    with pytest.raises(DataError, match="no validation samples"):
        thresholds.choose("f1", y[:0], scores[:0])
    with pytest.raises(DataError, match="6 shares between 0 and 1"):
        thresholds.prevalence_matched(scores, np.full(6, 20.0))
    np.testing.assert_array_equal(thresholds.choose("fixed", y, scores), np.full(6, 0.5))
