"""Families of thresholds against each rule applied by hand, and the proof that test labels change no choice."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as oracle

from analysis import threshold_families as families
from analysis import thresholds
from engine.errors import DataError, UsageError

NAMES = ("a", "b", "c", "d")


def study(seed: int = 0, count: int = 240) -> tuple:
    generator = np.random.default_rng(seed)
    y = generator.random((count, 4)) < np.array([0.6, 0.3, 0.1, 0.05])
    split = np.array(["train", "val", "test"] * (count // 3), dtype=object)
    logits = generator.normal(size=y.shape) + 1.5 * y - 1
    scores = {"zero-shot": 20 + generator.normal(size=y.shape) + 0.2 * y, "probe": 1 / (1 + np.exp(-logits))}
    return y, scores, split, np.arange(count) // 2 * 3 + np.arange(count) % 3


def measured(y, scores, split, groups, **options):
    return families.threshold_families(y, scores, split, groups, label_names=NAMES, **({"replicates": 50} | options))


def test_table__is_each_rule_by_hand():
    y, scores, split, groups = study()
    table = measured(y, scores, split, groups).set_index(["family", "setting", "metric"])
    test, val, train = (split == name for name in ("test", "val", "train"))
    values = scores["probe"]
    decisions = {
        "fixed": values > 0.5,
        "minmax": thresholds.minmax_decisions(values, 0.5),
        "prevalence": values > thresholds.prevalence_matched(values[val], y[train].mean(axis=0)),
        "f1": values > thresholds.f1_optimal(y[val], values[val]),
    }
    for family, said in decisions.items():
        found = table.loc[(family, "probe")]["value"]
        f1 = oracle.f1_score(y[test], said[test], average="macro", zero_division=0)
        np.testing.assert_allclose(found["f1_macro"], f1, atol=1e-12)
        np.testing.assert_allclose(found["exact_match"], oracle.accuracy_score(y[test], said[test]), atol=1e-12)
        np.testing.assert_allclose(found["over_prediction"], said[test].sum() / y[test].sum(), atol=1e-12)
    assert table.loc[("fixed", "zero-shot", "over_prediction"), "value"] == 4 * test.sum() / y[test].sum()
    assert table.loc[("fixed", "probe", "f1_macro"), "probabilities"]
    assert not table.loc[("fixed", "zero-shot", "f1_macro"), "probabilities"]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_changing_test_labels__changes_no_decision(family):
    y, scores, split, _ = study(1)
    for values in scores.values():
        said = families.family_decisions(family, y, values, split)
        changed = y.copy()
        changed[split == "test"] ^= True
        np.testing.assert_array_equal(said, families.family_decisions(family, changed, values, split))
        # Nor do test scores change what is decided of others.
        moved = np.where((split == "test")[:, None], -values, values)
        rest = split != "test"
        np.testing.assert_array_equal(said[rest], families.family_decisions(family, y, moved, split)[rest])


def test_conclusions__say_where_the_family_decides_who_wins():
    y, scores, split, groups = study(2, count=600)
    table = measured(y, scores, split, groups)
    table = table[table["metric"].isin(["f1_macro", "over_prediction"])].copy()
    found = families.conclusions(table).set_index(["metric", "family"])
    for (metric, family), row in found.iterrows():
        part = table[(table["metric"] == metric) & (table["family"] == family)].set_index("setting")["value"]
        distance = -part if metric == "f1_macro" else np.log(part).abs()
        assert row["order"] == " > ".join(distance.sort_values().index)
    # A tie is said as one, and another order in one family marks the metric.
    table["rank"] = 1.0
    assert set(families.conclusions(table)["order"]) == {"zero-shot = probe"}
    assert not families.conclusions(table)["changes"].any()
    table.loc[(table["family"] == "f1") & (table["setting"] == "probe"), "rank"] = 2.0
    assert families.conclusions(table)["changes"].all()


def test_bad_input__is_told():
    y, scores, split, groups = study()
    with pytest.raises(UsageError, match="unknown family of thresholds 'youden'"):
        families.family_decisions("youden", y, scores["probe"], split)
    with pytest.raises(DataError, match="no validation samples"):
        measured(y, scores, np.where(split == "val", "train", split), groups)
    with pytest.raises(DataError, match="no samples to score"):
        measured(y, scores, np.where(split == "test", "train", split), groups)
    with pytest.raises(DataError, match="239 values of the split for 240 samples"):
        measured(y, scores, split[:-1], groups)
    scores["probe"][3, 1] = np.nan
    with pytest.raises(DataError, match="row 3, label 'b'"):
        measured(y, scores, split, groups)


def test_constant_scores__are_defined_everywhere():
    y, _, split, groups = study()
    constant = {"constant": np.full(y.shape, 0.7)}
    table = measured(y, constant, split, groups).set_index(["family", "metric"])["value"]
    assert table[("fixed", "over_prediction")] == pytest.approx(y[split == "test"].size / y[split == "test"].sum())
    assert table[("minmax", "over_prediction")] == 0 and table[("f1", "f1_macro")] == 0
    assert np.isfinite(table).all()
