"""Cross-fitting: no head sees a patient it explains, and folds share rare labels fairly."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from analysis import crossfit
from engine.errors import DataError, UsageError

LABELS = ("common", "rare")


def random_case(seed: int = 0, patients: int = 60):
    generator = np.random.default_rng(seed)
    groups = np.repeat([f"p{number:03d}" for number in range(patients)], generator.integers(1, 5, patients))
    y = np.column_stack(
        [generator.random(len(groups)) < 0.4, np.isin(groups, ["p003", "p017", "p029", "p031", "p044"])]
    )
    x = generator.normal(size=(len(groups), 8)) + 0.8 * y @ generator.normal(size=(2, 8)) + 2
    return x, y, groups.astype(object)


def test_folds__keep_groups_whole_and_sizes_even():
    _, _, groups = random_case()
    fold = crossfit.group_folds(groups, 5, 0)
    assert all(len(set(fold[groups == group])) == 1 for group in set(groups))
    sizes = np.bincount(fold, minlength=5)
    assert sizes.max() - sizes.min() <= 4
    np.testing.assert_array_equal(fold, crossfit.group_folds(groups, 5, 0))
    assert (fold != crossfit.group_folds(groups, 5, 1)).any()
    order = np.random.default_rng(1).permutation(len(groups))
    np.testing.assert_array_equal(crossfit.group_folds(groups[order], 5, 0), fold[order])


def test_folds__share_a_rare_label():
    _, y, groups = random_case()
    for seed in range(5):
        fold = crossfit.group_folds(groups, 5, seed, y)
        assert len({fold[groups == group][0] for group in set(groups[y[:, 1]])}) == 5
        counts = [y[fold == number, 0].sum() for number in range(5)]
        assert max(counts) - min(counts) <= 8


def test_folds__are_never_empty():
    assert set(crossfit.group_folds(["a", "b", "c"], 3, 0)) == {0, 1, 2}
    groups = np.array(["big"] * 50 + ["b", "c", "d"], dtype=object)
    assert set(crossfit.group_folds(groups, 4, 0, np.ones((53, 1)))) == {0, 1, 2, 3}


def test_heads__are_those_of_the_other_folds():
    x, y, groups = random_case()
    fitted = crossfit.crossfit_heads(
        x, y, groups, label_names=LABELS, folds=3, seed=2, c_grid=[10.0], encoder_id="tiny"
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for number, head in enumerate(fitted.heads):
        rest = fitted.fold != number
        for label in range(2):
            expected = LogisticRegression(C=10.0, tol=1e-8, max_iter=5000).fit(unit[rest], y[rest, label])
            np.testing.assert_allclose(head.weight[label], expected.coef_[0], atol=5e-3)
        assert head.encoder_id == "tiny"
    found = fitted.probabilities(x)
    row = 7
    np.testing.assert_allclose(found[row], fitted.head_of(row).probabilities(x[row : row + 1])[0])
    assert roc_auc_score(y[:, 0], found[:, 0]) > 0.6


def test_rows_of_a_fold__change_nothing_in_its_head():
    x, y, groups = random_case()
    first = crossfit.crossfit_heads(x, y, groups, label_names=LABELS, folds=4)
    changed = x.copy()
    changed[first.fold == 2] = np.random.default_rng(5).normal(size=changed[first.fold == 2].shape)
    second = crossfit.crossfit_heads(changed, y, groups, label_names=LABELS, folds=4)
    np.testing.assert_array_equal(first.fold, second.fold)
    # The held-out rows turn the shared basis, so only the solution, to its tolerance, is the same.
    np.testing.assert_allclose(first.heads[2].weight, second.heads[2].weight, atol=1e-2)
    assert first.heads[2].provenance == second.heads[2].provenance
    assert (first.heads[1].weight != second.heads[1].weight).any()
    assert {head.provenance["C"] for head in first.heads} <= set(crossfit.C_GRID)


def test_labels_of_a_fold__change_nothing_in_its_head_nor_its_c(monkeypatch):
    x, y, groups = random_case()
    fold = crossfit.group_folds(groups, 4, 0, y)
    monkeypatch.setattr(crossfit, "group_folds", lambda *_: fold)  # dealing out looks at the labels
    first = crossfit.crossfit_heads(x, y, groups, label_names=LABELS, folds=4)
    for held_out in range(4):
        changed = np.where((fold == held_out)[:, None], ~y, y)
        second = crossfit.crossfit_heads(x, changed, groups, label_names=LABELS, folds=4)
        np.testing.assert_allclose(first.heads[held_out].weight, second.heads[held_out].weight, atol=1e-2)
        assert first.heads[held_out].provenance == second.heads[held_out].provenance


def test_a_label_that_one_fold_holds_alone__is_named(caplog):
    x, _, groups = random_case()
    y = np.column_stack([np.arange(len(groups)) % 2 == 0, groups == "p003"])
    fitted = crossfit.crossfit_heads(x, y, groups, label_names=LABELS, folds=3, c_grid=[1.0])
    number = int(fitted.fold[groups == "p003"][0])
    assert [head.provenance["untrained_labels"] for head in fitted.heads] == [
        ["rare"] if fold == number else [] for fold in range(3)
    ]
    assert np.isfinite(fitted.probabilities(x)).all() and "prior there: rare" in caplog.text


def test_wrong_requests__are_refused():
    x, y, groups = random_case()
    with pytest.raises(UsageError, match="61 folds of 60 groups"):
        crossfit.group_folds(groups, 61, 0)
    with pytest.raises(UsageError, match="2 folds leave no fold to choose among 5"):
        crossfit.crossfit_heads(x, y, groups, label_names=LABELS, folds=2)
    with pytest.raises(DataError, match="1 rows have no group"):
        crossfit.group_folds(np.array([None, *groups[1:]], dtype=object), 3, 0)
    with pytest.raises(DataError, match="give those it was fitted on"):
        crossfit.crossfit_heads(x, y, groups, label_names=LABELS, folds=3, c_grid=[1.0]).probabilities(x[:4])
