"""Sweeps and their choices: what scikit-learn's cross-validation finds, and nothing from a row that must not count."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from analysis.crossfit import group_folds
from analysis.heads import LinearHead
from analysis.probes import fit_probe, sweeping
from analysis.thresholds import choose
from engine.errors import DataError, UsageError
from tests.analysis.probes.data import study_like

NAMES = ("a", "b", "c")


def case(rows=240, dimensions=8):
    x, y = study_like(rows, dimensions)
    return x + 1, y[:, [0, 1, 3]], np.array([f"p{row // 2}" for row in range(rows)], dtype=object)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_folds__hold_out_what_scikit_learn_would_and_choose_as_it_would():
    x, y, groups = case()
    grid = [0.1, 30.0]
    found = sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=3, seeds=[0, 1], c_grid=grid)
    expected = np.zeros((2, 240, 3))
    for seed in (0, 1):
        fold = group_folds(groups, 3, seed, y)
        for level, c in enumerate(grid):
            for label in range(3):
                for number in range(3):
                    out = fold == number
                    model = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(unit(x)[~out], y[~out, label])
                    expected[level, out, label] += model.decision_function(unit(x)[out]) / 2
    np.testing.assert_allclose(found.logits, expected, atol=0.05)
    losses = [
        np.mean([log_loss(t, 1 / (1 + np.exp(-z))) for t, z in zip(y.T, level.T, strict=True)]) for level in expected
    ]
    np.testing.assert_allclose([score["log_loss"] for score in found.scores], losses, atol=1e-3)
    assert found.chosen == int(np.argmin(losses))
    kept = LogisticRegression(C=grid[found.chosen], tol=1e-9, max_iter=5000).fit(unit(x), y[:, 1])
    assert isinstance(found.probe, LinearHead)
    np.testing.assert_allclose(found.probe.weight[1], kept.coef_[0], atol=0.1)
    assert len(found.convergence()) == 7 * 3 * 2 and found.convergence()["converged"].all()


def test_ranking_over_folds__is_even_where_nothing_is_learnt():
    generator = np.random.default_rng(0)
    scores = []
    for seed in range(6):
        x, y = generator.normal(size=(90, 5)), generator.random((90, 3)) < 0.3
        groups = np.arange(90).astype(str)
        found = sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=9, seeds=[seed], c_grid=[1e-6])
        scores += [roc_auc_score(y[:, label], found.levelled[0, :, label]) for label in range(3)]
    assert abs(np.mean(scores) - 0.5) < 0.06


def test_validation__gives_the_studys_own_probe():
    x, y, _ = case()
    options = {"label_names": NAMES, "c_grid": [0.1, 10.0, 1000.0]}
    found = sweeping.sweep_on_validation(x[:160], y[:160], x[160:], y[160:], **options)
    head = fit_probe(x[:160], y[:160], x[160:], y[160:], **options).head
    np.testing.assert_array_equal(found.probe.weight, head.weight)
    assert head.provenance["C"] == found.candidates[found.chosen].C


@pytest.mark.parametrize("kind", sweeping.KINDS)
def test_every_kind__answers_for_held_out_rows(kind, caplog):
    x, y, groups = case(120)
    y[:, 2] = False
    text = np.random.default_rng(0).normal(size=(3, 8))
    options = {
        "label_names": NAMES,
        "kind": kind,
        "c_grid": [0.01, 1.0],
        "class_weights": ["none", "balanced"],
        "text": text,
    }
    found = sweeping.sweep_on_folds(x, y, groups, folds=3, **options)
    count = 4 if kind in sweeping.CONVEX else 1
    assert found.logits.shape == (count, 120, 3) and np.isfinite(found.logits).all()
    assert found.untrained_labels == ("c",) and "but their prior: c" in caplog.text
    assert isinstance(found.probe, LinearHead) == (kind not in ("neighbours", "tip-adapter", "mlp"))
    assert roc_auc_score(y[:, 0], found.levelled[found.chosen][:, 0]) > 0.55
    assert sweeping.sweep_on_validation(x[:80], y[:80], x[80:], y[80:], **options).logits.shape == (count, 40, 3)


@pytest.mark.parametrize("kind", sweeping.KINDS)
def test_test_rows__change_no_choice_of_strength_or_threshold(kind):
    """The study's order: a data set with a split goes in whole, and only test truth differs."""
    x, y, _ = case(200)
    split = np.repeat(["train", "val", "test"], [100, 50, 50])
    text = np.random.default_rng(0).normal(size=(3, 8))
    made = []
    for truth in (y, np.where((split == "test")[:, None], ~y, y)):
        train, val = split == "train", split == "val"
        found = sweeping.sweep_on_validation(
            x[train], truth[train], x[val], truth[val],
            label_names=NAMES, kind=kind, c_grid=[0.01, 1.0, 100.0], class_weights=["none", "balanced"], text=text,
        )  # fmt: skip
        made.append((found.chosen, found.logits, choose("f1", truth[val], found.logits[found.chosen])))
    assert made[0][0] == made[1][0]
    np.testing.assert_array_equal(made[0][1], made[1][1])
    np.testing.assert_array_equal(made[0][2], made[1][2])


def test_wrong_requests__are_refused_with_what_is_wrong():
    x, y, groups = case(60)
    with pytest.raises(UsageError, match="unknown kind of probe 'svm'"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, kind="svm")
    with pytest.raises(UsageError, match="text vectors"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, kind="tip-adapter")
    with pytest.raises(DataError, match="cross-validation: embeddings"):
        sweeping.sweep_on_folds(x[:50], y, groups, label_names=NAMES)
    with pytest.raises(UsageError, match="31 folds of 30 groups"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=31)
    lone = np.zeros((60, 1), dtype=bool)
    lone[:2] = True
    with pytest.raises(DataError, match="label 'a' has one value only"):
        sweeping.sweep_on_folds(x, lone, groups, label_names=("a",), kind="ridge")
    with pytest.raises(DataError, match="label 'a' has one value only among the training samples, so a ridge probe"):
        sweeping.sweep_on_validation(x, lone[::-1] & False, x, lone, label_names=("a",), kind="ridge")
