"""Nulls against scikit-learn on the same permutations, and that they deal truth out by patient."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import coverage_error, f1_score, roc_auc_score

from analysis import nulls
from analysis.metrics import Prediction
from engine.errors import UsageError

LABELS = ("a", "b", "c")


@pytest.fixture
def case():
    generator = np.random.default_rng(1)
    groups = np.array([f"p{number // 2}" if number < 60 else f"p{number}" for number in range(120)])
    y = generator.random((120, 3)) < (0.5, 0.3, 0.2)
    scores = generator.normal(size=(120, 3)) + y
    return y, {"model": Prediction(scores, scores > 0.5)}, groups


def test_permutations__keep_patients_whole_and_among_their_size(case):
    groups = case[2]
    for order in nulls.permuted_rows(groups, 20, seed=0):
        assert sorted(order) == list(range(120))
        for patient in np.unique(groups):
            given = groups[order[groups == patient]]
            assert len(set(given)) == 1 and (groups == given[0]).sum() == (groups == patient).sum()


def test_null__is_scikit_learns_on_the_same_permutations(case):
    y, predictions, groups = case
    found = nulls.permuted_metrics(y, predictions, groups, label_names=LABELS, permutations=40, seed=7)
    scores, decisions = predictions["model"]
    orders = list(nulls.permuted_rows(groups, 40, seed=7))
    expected = {
        "auroc_macro": [roc_auc_score(y[order], scores) for order in orders],
        "f1_macro": [f1_score(y[order], decisions, average="macro", zero_division=0) for order in orders],
        "coverage_error": [coverage_error(y[order], scores) for order in orders],
    }
    observed = {
        "auroc_macro": roc_auc_score(y, scores),
        "f1_macro": f1_score(y, decisions, average="macro", zero_division=0),
        "coverage_error": coverage_error(y, scores),
    }
    for metric, drawn in expected.items():
        value, low, high, p_value = found.null("model", metric)
        assert value == pytest.approx(np.mean(drawn))
        np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), rtol=1e-9)
        as_good = [d <= observed[metric] if metric == "coverage_error" else d >= observed[metric] for d in drawn]
        assert p_value == pytest.approx((1 + sum(as_good)) / 41)
    with pytest.raises(UsageError, match="no null of 'auroc'"):
        found.null("model", "auroc")


def test_null__of_what_knows_nothing_is_not_surprising():
    generator = np.random.default_rng(2)
    y, scores = generator.random((300, 3)) < 0.3, generator.normal(size=(300, 3))
    found = nulls.permuted_metrics(
        y, {"blind": Prediction(scores, scores > 0)}, np.arange(300), label_names=LABELS, permutations=99
    )
    assert found.null("blind", "auroc_macro").p > 0.01
    y[:, 1] = False
    found = nulls.permuted_metrics(
        y, {"blind": Prediction(scores, scores > 0)}, np.arange(300), label_names=LABELS, permutations=9
    )
    assert np.isnan(found.null("blind", "auroc", "b")).all()
    with pytest.raises(UsageError, match="0 permutations"):
        nulls.permuted_metrics(y, {}, np.arange(300), label_names=LABELS, permutations=0)
