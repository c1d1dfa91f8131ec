"""Subgroups against scoring each alone, and the gap's test against a plain loop of permutations and its error rate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import bootstrap, metrics, subgroups
from analysis.metrics import Prediction
from engine.errors import DataError, UsageError

NAMES = ("a", "b", "c")


def study(seed: int = 0, count: int = 120, gap: float = 0.0) -> tuple:
    """Samples of patients with two images each; women are served worse by `gap`."""
    generator = np.random.default_rng(seed)
    patients = np.arange(count) // 2
    sex = np.array(["F", "M"], dtype=object)[(patients * 7 % 5) % 2]
    y = generator.random((count, 3)) < 0.4
    strength = np.where(sex == "F", 1.5 - gap, 1.5)[:, None]
    predictions = {
        name: Prediction(scores, scores > 0.7)
        for name in ("probe", "tuned")
        for scores in [generator.normal(size=y.shape) + strength * y]
    }
    return y, predictions, patients, sex


def measured(y, predictions, patients, values, **options) -> subgroups.Subgroups:
    options = {"replicates": 60, "permutations": 60} | options
    return subgroups.subgroup_metrics(y, predictions, patients, values, label_names=NAMES, column="sex", **options)


def test_values__are_those_of_each_subgroup_alone():
    y, predictions, patients, sex = study()
    result = measured(y, predictions, patients, sex)
    for value in ("F", "M"):
        rows = sex == value
        for setting, each in predictions.items():
            alone = metrics.summary(y[rows], each.scores[rows], each.decisions[rows])
            for name in ("map", "f1_macro", "lrap", "auroc_micro"):
                found = result.bootstraps[value].interval(setting, name)
                np.testing.assert_allclose(found.value, alone["overall"][name], atol=1e-12)
                assert found.low <= found.value <= found.high
    counts = result.counts.set_index("subgroup")
    assert counts.loc["F", "samples"] == (sex == "F").sum() and counts.loc["F", "groups"] == (sex == "F").sum() // 2
    table = result.table()
    assert set(table["subgroup"]) == {"F", "M"} and len(table) == 2 * len(result.bootstraps["F"].table())


def test_gap__is_tested_as_a_loop_of_permutations_would():
    y, predictions, patients, sex = study(1, count=60)
    result = measured(y, predictions, patients, sex, permutations=40, seed=4)
    gaps = result.gaps(["lrap", "coverage_error"]).set_index(["setting", "metric"])
    units = np.unique(patients)
    of_unit = np.array([np.flatnonzero(np.array(["F", "M"]) == sex[patients == unit][0])[0] for unit in units])
    generator = np.random.Generator(np.random.PCG64(4))
    each = predictions["probe"]
    values = metrics.lrap_samples(y, each.scores)
    spreads = []
    dealt = generator.permuted(np.tile(of_unit, (40, 1)), axis=1)
    for row in dealt:
        means = [values[row[patients] == number].mean() for number in (0, 1)]
        spreads.append(abs(means[0] - means[1]))
    observed = abs(values[sex == "F"].mean() - values[sex == "M"].mean())
    found = gaps.loc[("probe", "lrap")]
    np.testing.assert_allclose(found["gap"], observed, atol=1e-12)
    np.testing.assert_allclose(found["p"], (1 + np.sum(np.array(spreads) >= observed - 1e-12)) / 41)
    coverage = {value: result.bootstraps[value].interval("probe", "coverage_error").value for value in ("F", "M")}
    assert gaps.loc[("probe", "coverage_error"), "best"] == min(coverage, key=coverage.get)


def test_a_real_gap_is_found_and_best_of_many_equal_subgroups_is_not():
    y, predictions, patients, sex = study(2, count=600, gap=1.2)
    gaps = measured(y, predictions, patients, sex, permutations=199).gaps(["auroc_macro"])
    assert (gaps["p_holm"] < 0.05).all() and (gaps["worst"] == "F").all() and (gaps["low"] > 0).all()
    # Eight subgroups that differ by chance only: the largest gap among 28 pairs looks large, and is not called so.
    found = []
    for seed in range(12):
        y, predictions, patients, _ = study(seed, count=240)
        of_chance = np.random.default_rng(seed).integers(0, 8, 120)[patients]
        result = measured(y, predictions, patients, of_chance, permutations=39, replicates=2)
        found.append(result.gaps(["lrap"])["p"].iloc[0] <= 0.05)
    assert np.sum(found) <= 3  # binomial(12, 0.05) exceeds this once in 450


def test_subgroups__small_ones_and_missing_values_are_shown_but_not_compared():
    y, predictions, patients, sex = study()
    sex[:4] = "X"
    sex[4:8] = [None, np.nan, "", " "]
    result = measured(y, predictions, patients, sex)
    counts = result.counts.set_index("subgroup")
    assert counts["compared"].to_dict() == {"(not given)": False, "F": True, "M": True, "X": False}
    assert counts.loc["X", "groups"] == 2 and counts.loc["(not given)", "samples"] == 4
    assert (result.gaps(["map"])["subgroups"] == 2).all()
    assert {"X", "(not given)"} <= set(result.table()["subgroup"])


def test_subgroup_without_a_label__leaves_it_out_and_says_how_many_were_compared():
    y, predictions, patients, sex = study()
    three = sex.copy()
    three[80:] = "other"
    y[80:, 1] = False
    result = measured(y, predictions, patients, three)
    gaps = result.gaps(["ap", "f1"], labels=["a", "b"]).set_index(["setting", "metric", "label"])
    assert gaps.loc[("probe", "ap", "a"), "subgroups"] == 3 and gaps.loc[("probe", "ap", "b"), "subgroups"] == 2
    one = measured(y, predictions, patients, np.full(len(y), "F")).gaps(["map"])
    assert one["gap"].isna().all() and (one["best"] == "").all() and one["p_holm"].isna().all()


def test_views_of_one_patient__are_resampled_together():
    y, predictions, patients, _ = study()
    y[1::2] = y[::2]
    view = np.array(["frontal", "lateral"] * 60)
    result = measured(y, predictions, patients, view)
    assert result.counts["groups"].tolist() == [60, 60]
    drawn = [result.bootstraps[name].column("probe", "positives", "a").replicates for name in ("frontal", "lateral")]
    np.testing.assert_array_equal(*drawn)
    assert np.ptp(drawn[0]) > 0


def test_bands__name_ages_and_numbers_of_findings():
    ages = [0, 17.9, 18, 39, 40, 79, 80, 101, np.nan, "", "045", None]
    assert subgroups.age_bands(ages).tolist() == [
        "under 18", "under 18", "18-39", "18-39", "40-59", "60-79", "80 and over", "80 and over", "", "", "40-59", ""
    ]  # fmt: skip
    infants = [0.2, 0.5, 1.4, 1.5, 17.9, 18]
    bands = ["under 0.5", "0.5 to 1.5", "0.5 to 1.5", "1.5 to 18", "1.5 to 18", "18 and over"]
    assert subgroups.age_bands(infants, (0.5, 1.5, 18)).tolist() == bands
    with pytest.raises(UsageError, match="increasing"):
        subgroups.age_bands(ages, (40, 18))
    y = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    expected = ["no finding", "one finding", "several findings", "no finding"]
    assert subgroups.finding_counts(y, ("a", "b", "No Finding")).tolist() == expected
    assert subgroups.finding_counts(y, NAMES)[0] == "one finding"


def test_a_subgroup_of_one_patient__has_no_interval_of_a_gap():
    """Its resamples hold the same images whenever they hold any."""
    y, predictions, patients, _ = study(count=60)
    patients, kind = np.where(np.arange(60) < 10, "one", patients), np.where(np.arange(60) < 10, "his", "others'")
    result = measured(y, predictions, patients, kind, least_groups=1)
    assert result.counts["groups"].tolist()[0] == 1
    gaps, apart = result.gaps(["lrap"]), result.difference("his", "others'", ["lrap"])
    np.testing.assert_allclose(gaps["gap"], apart["difference"].abs())
    assert gaps[["low", "high"]].isna().all().all() and apart[["low", "high"]].isna().all().all()


def test_two_named_subgroups__are_held_against_each_other_on_the_same_resamples():
    y, predictions, patients, _ = study(count=80)
    kind = np.array(["one finding", "several findings", "no finding"], dtype=object)[np.arange(80) % 3]
    result = measured(y, predictions, patients, kind, seed=7)
    table = result.difference("one finding", "several findings", ["lrap", "hamming"])
    counts = bootstrap.resample_counts(patients, 60, 7)[1]
    for name, each in predictions.items():
        drawn = []
        for count in counts:
            rows = np.repeat(np.arange(80), count[patients])
            values = metrics.lrap_samples(y[rows], each.scores[rows])
            drawn.append(values[kind[rows] == "one finding"].mean() - values[kind[rows] == "several findings"].mean())
        row = table[(table["setting"] == name) & (table["metric"] == "lrap")].iloc[0]
        np.testing.assert_allclose([row["low"], row["high"]], np.percentile(drawn, [2.5, 97.5]), atol=1e-12)
        np.testing.assert_allclose(row["difference"], row["first"] - row["second"], atol=1e-12)
    by_label = result.difference("one finding", "several findings", ["ap"], ["a", "c"])
    assert by_label["label"].tolist() == ["a", "c"] * 2 and by_label["low"].notna().all()
    with pytest.raises(UsageError, match=r"no subgroup 'many' of 'sex'; there are no finding, one finding"):
        result.difference("one finding", "many")


def test_numbers__get_bands_of_about_as_many_samples():
    doses = np.random.default_rng(0).gamma(2.0, 10.0, 400)
    bands = subgroups.number_bands([*doses[:399], None], 12)
    names, counts = np.unique(bands[:399], return_counts=True)
    assert len(names) == 4 and counts.min() > 95 and bands[399] == ""
    low, high = (float(part) for part in next(name for name in names if " to " in name).split(" to "))
    inside = bands[:399] == f"{low:g} to {high:g}"
    np.testing.assert_array_equal(inside, (doses[:399] >= low) & (doses[:399] < high))
    assert subgroups.number_bands([1, 2, "2", None, " "], 12).tolist() == [1, 2, "2", "", ""]
    days = pd.date_range("2020-01-01", "2020-12-31").strftime("%Y%m%d").astype(int)
    names, counts = np.unique(subgroups.number_bands(days, 12), return_counts=True)
    assert len(names) == 4 and counts.min() > 80 and "below 20200400" in names
    milliseconds = 1_600_000_000_000 + np.arange(400)
    bands = subgroups.number_bands(milliseconds, 12)
    names, counts = np.unique(bands, return_counts=True)
    assert len(names) == 4 and counts.min() > 80
    for name in names[["to" in each for each in names]]:
        low, high = map(float, name.split(" to "))
        np.testing.assert_array_equal(bands == name, (milliseconds >= low) & (milliseconds < high))
    words = np.array([f"site {number}" for number in range(30)], dtype=object)
    assert subgroups.number_bands(words, 12).tolist() == words.tolist()
    mostly_none = subgroups.number_bands(np.r_[np.zeros(80), np.arange(1, 21)], 12)
    assert dict(zip(*np.unique(mostly_none, return_counts=True), strict=True)) == {"1 and over": 20, "below 1": 80}


def test_what_cannot_be_divided__is_refused():
    y, predictions, patients, sex = study()
    with pytest.raises(DataError, match="119 values of 'sex' for 120 samples"):
        measured(y, predictions, patients, sex[:-1])
    with pytest.raises(DataError, match="no sample has a value of 'sex'"):
        measured(y, predictions, patients, np.full(120, ""))
    with pytest.raises(DataError, match="1 samples have no group"):
        measured(y, predictions, np.array([""] + ["p"] * 119, dtype=object), sex)
    with pytest.raises(DataError, match="no samples to score"):
        measured(y[:0], {}, patients[:0], sex[:0])


def test_subgroups__stand_in_their_order():
    truth, scores = np.eye(2, dtype=bool)[np.arange(80) % 2], np.random.default_rng(0).normal(size=(80, 2))
    prediction = {"one": Prediction(scores, scores > 0)}

    def order(values):
        found = subgroups.subgroup_metrics(
            truth, prediction, np.arange(80), values, label_names=("a", "b"), column="x", replicates=2, permutations=2
        )
        return found.counts["subgroup"].tolist()

    ages = np.resize([70, 5, np.nan, 100, 20, 45], 80)
    assert order(subgroups.age_bands(ages)) == ["under 18", "18-39", "40-59", "60-79", "80 and over", "(not given)"]
    doses = subgroups.number_bands(np.resize([5.0, 9.5, 100, 40, 12, 8, 30, 60], 80), 4)
    assert order(doses)[0].startswith("below ") and order(doses)[-1].endswith(" and over")
    starts = [float(name.split()[0]) for name in order(doses)[1:]]
    assert starts == sorted(starts) and len(starts) == 3
    assert order(np.resize(["10", "9", "PA", "AP", ""], 80)) == ["9", "10", "AP", "PA", "(not given)"]
