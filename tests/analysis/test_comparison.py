"""Differences against a plain loop, Holm against its definition, and the error rates that both promise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import bootstrap, comparison
from analysis.metrics import Prediction
from engine.errors import UsageError

EXACT = {"rtol": 0, "atol": 1e-12}


def two_settings(seed: int = 0, gain: float = 1.0, count: int = 150) -> bootstrap.Bootstrap:
    generator = np.random.default_rng(seed)
    y = generator.random((count, 3)) < 0.3
    noise = generator.normal(size=y.shape)
    predictions = {}
    for name, strength in (("poor", 1.0), ("good", 1.0 + gain), ("same", 1.0)):
        scores = noise + strength * y
        predictions[name] = Prediction(scores, scores > 0.7)
    groups = np.arange(count) // 2
    return bootstrap.bootstrap_metrics(y, predictions, groups, label_names=("a", "b", "c"), replicates=400, seed=seed)


def holm_by_its_definition(p_values: list[float]) -> list[float]:
    """Step down through the ordered p-values, each times the hypotheses that are left."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for step, place in enumerate(order):
        highest = max(highest, (len(p_values) - step) * p_values[place])
        adjusted[place] = min(1.0, highest)
    return adjusted


@pytest.mark.parametrize("seed", range(4))
def test_holm__is_its_definition(seed):
    p_values = np.random.default_rng(seed).choice([0.001, 0.01, 0.01, 0.03, 0.2, 0.9, 1.0], size=9)
    np.testing.assert_allclose(comparison.holm(p_values), holm_by_its_definition(list(p_values)), **EXACT)


def test_holm__leaves_out_what_was_not_tested():
    np.testing.assert_allclose(comparison.holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])
    assert comparison.holm([]).shape == (0,)
    with pytest.raises(UsageError, match=r"between 0 and 1, got 1\.5"):
        comparison.holm([0.1, 1.5])


def test_paired_differences__are_those_of_the_same_resamples():
    result = two_settings()
    table = comparison.paired_differences(result, ["map", "coverage_error"])
    assert list(zip(table["setting"], table["other"], strict=True))[::2] == [
        ("poor", "good"), ("poor", "same"), ("good", "same")
    ]  # fmt: skip
    for row in table.to_dict("records"):
        interval = result.difference(row["setting"], row["other"], row["metric"])
        np.testing.assert_allclose([row["difference"], row["low"], row["high"]], interval[:3], **EXACT)
    np.testing.assert_allclose(table["p_holm"], holm_by_its_definition(list(table["p"])), **EXACT)
    by_pair = table.set_index(["setting", "other", "metric"])
    assert (by_pair.loc[("poor", "good"), "better"] == "good").all()  # coverage error: less is better
    assert (by_pair.loc[("poor", "same"), "p"] == 1).all() and (by_pair.loc[("poor", "same"), "better"] == "").all()


def test_p_value__agrees_with_the_percentile_interval():
    generator = np.random.default_rng(1)
    drawn = generator.normal(generator.uniform(-4, 4, 200), 1.0, size=(999, 200))
    p_values = comparison.bootstrap_p_value(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    inside = (low < 0) & (high > 0)
    agree = inside == (p_values > 0.05)
    assert agree.mean() > 0.97 and abs(p_values[~agree] - 0.05).max(initial=0) < 0.005
    assert p_values.min() >= 2 / 1000
    assert np.isnan(comparison.bootstrap_p_value(np.full((5, 1), np.nan))).all()
    # One undefined replicate of five is left out: 1 + 1 of 4 + 1 on the smaller side, twice.
    assert comparison.bootstrap_p_value(np.array([1.0, 2.0, -1.0, np.nan, 3.0])) == 2 * 2 / 5


def test_p_value__finds_a_difference_where_there_is_none_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    found = []
    for seed in range(120):
        values = generator.normal(size=(60, 1))
        means = bootstrap.clustered_bootstrap(values, np.arange(60), replicates=199, seed=seed).replicates
        found.append(comparison.bootstrap_p_value(means)[0] < 0.1)
    assert 0.03 < np.mean(found) < 0.19  # 0.1 give or take three standard errors, 0.027 each


def test_labels__are_compared_one_by_one_and_undefined_ones_say_so():
    result = two_settings()
    table = comparison.paired_differences(result, ["ap", "prevalence"], labels=["a", "c"], pairs=[("good", "poor")])
    assert table["label"].tolist() == ["a", "c", "a", "c"]
    assert (table.loc[table["metric"] == "prevalence", "better"] == "").all()
    assert (comparison.paired_differences(result, ["ece"], pairs=[("good", "poor")])["p"].isna()).all()
    with pytest.raises(UsageError, match="no setting 'best'"):
        comparison.paired_differences(result, pairs=[("best", "poor")])
    with pytest.raises(UsageError, match="nothing to compare"):
        comparison.paired_differences(result, pairs=[])


@pytest.mark.parametrize(("replicates", "enough"), [(199, False), (239, False), (240, True)])
def test_too_few_replicates__are_told_where_nothing_can_stand(replicates, enough):
    """Six comparisons: 2 / (R + 1) times 6 is below 0.05 from R = 240 on."""
    table = pd.DataFrame({"p": [2 / (replicates + 1)] * 6 + [np.nan], "replicates": replicates})
    assert (comparison.holm(table["p"])[0] < 0.05) == enough
    said = comparison.too_few_replicates(table)
    assert (said == "") == enough and (enough or "give 240 replicates or more" in said)
    assert comparison.too_few_replicates(table[6:]) == ""


def test_one_patient__allows_no_test():
    y, scores = np.eye(3, dtype=bool), np.random.default_rng(0).normal(size=(3, 3))
    both = {"a": Prediction(scores, scores > 0), "b": Prediction(-scores, scores < 0)}
    result = bootstrap.bootstrap_metrics(y, both, np.zeros(3), label_names=("x", "y", "z"), replicates=40)
    table = comparison.paired_differences(result, ["lrap"])
    assert table[["low", "high", "p", "p_holm"]].isna().all(axis=None) and np.isfinite(table["difference"]).all()
