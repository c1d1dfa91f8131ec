"""Splits: the study's own against scikit-learn and the real table, and groups kept whole."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split

from engine.dataset import Dataset
from engine.errors import DataError, UsageError
from engine.sources import open_dataset
from engine.splits import apply_split, check_split, given, grouped_split, resplit, study_split
from tests.conftest import shared_data


def dataset(groups, split=None, view=""):
    count = len(groups)
    samples = pd.DataFrame({"id": [f"s{row}" for row in range(count)], "uri": "", "text": "", "group": groups})
    samples = samples.assign(view=view, split="" if split is None else split)
    return Dataset("table:x.csv", "x", samples, (), np.zeros((count, 0), dtype=np.int8), reader=None)


def test_study_split__of_the_real_table():
    table = pd.read_csv(shared_data("data/iu-xray-reports/indiana_projections.csv"), dtype=str)
    frontal = table[table["projection"] == "Frontal"]
    split = study_split(frontal["uid"].to_numpy())
    assert Counter(split) == {"train": 2670, "val": 575, "test": 573}
    of_group = dict(zip(frontal["uid"], split, strict=True))
    assert Counter(of_group.values()) == {"train": 2582, "val": 553, "test": 554}


def test_study_split__is_the_study_s_own_two_calls():
    groups = np.repeat([f"g{number}" for number in np.random.default_rng(0).permutation(40)], 2)
    unique = list(dict.fromkeys(groups))
    train, rest = train_test_split(unique, test_size=0.30, random_state=42, shuffle=True)
    val, test = train_test_split(rest, test_size=0.50, random_state=42, shuffle=True)
    split = study_split(groups)
    for name, members in (("train", train), ("val", val), ("test", test)):
        assert set(groups[split == name]) == set(members)


def test_apply_split__study_counts_frontal_images_only():
    groups = [f"g{row // 2}" for row in range(20)] + ["lateral only"]
    view = ["frontal", "lateral"] * 10 + ["lateral"]
    split = apply_split(dataset(groups, view=view), "study").samples["split"].to_numpy()
    np.testing.assert_array_equal(split[:-1:2], study_split(groups[:-1:2]))
    np.testing.assert_array_equal(split[1:-1:2], split[:-1:2])
    assert split[-1] == ""


def test_grouped_split__keeps_groups_whole_and_near_their_share():
    rng = np.random.default_rng(1)
    groups = np.array([f"p{number}" for number in rng.integers(0, 400, 2000)])
    split = grouped_split(groups, seed=3)
    check_split(groups, split)
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        assert abs((split == name).mean() - share) < 0.01
    assert (grouped_split(groups, seed=4) != split).any()


def test_grouped_split__does_not_depend_on_the_order_of_samples():
    groups = np.array([f"p{number // 3}" for number in range(90)])
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(grouped_split(groups[order], seed=5), grouped_split(groups, seed=5)[order])


def test_grouped_split__may_leave_a_part_out():
    split = grouped_split([f"p{number}" for number in range(50)], (0.8, 0, 0.2), seed=0)
    assert Counter(split) == {"train": 40, "test": 10}


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (np.nan, 0.5, 0.5)])
def test_grouped_split__refuses_fractions_that_do_not_add_up(fractions):
    with pytest.raises(UsageError, match="three numbers of 0 or more that add up to 1"):
        grouped_split(["a", "b", "c"], fractions)


def test_grouped_split__says_when_a_part_stays_empty():
    with pytest.raises(DataError, match=r"no group falls into 'train' .* 10 samples, 1 groups"):
        grouped_split(["one"] * 10, (0.34, 0.33, 0.33))


def test_check_split__names_the_groups():
    groups = ["a", "a", "b", "b", "c", "c"]
    check_split(groups, ["train", "train", "test", "test", "val", ""])
    with pytest.raises(DataError, match=r"2 groups .*'a' in train and test; 'c' in val and train"):
        check_split(groups, ["train", "test", "test", "test", "val", "train"])


def test_given__needs_a_split_that_is_known():
    assert given(dataset(["a", "b"], ["train", "test"])).tolist() == ["train", "test"]
    with pytest.raises(DataError, match="brings no split"):
        apply_split(dataset(["a", "b"]))
    with pytest.raises(DataError, match="has the split 'holdout'"):
        given(dataset(["a", "b"], ["train", "holdout"]))
    with pytest.raises(DataError, match="'a' in train and test"):
        apply_split(dataset(["a", "a"], ["train", "test"]))


def test_apply_split__names_the_nearest_way():
    with pytest.raises(UsageError, match=r"unknown split 'group'; nearest: grouped"):
        apply_split(dataset(["a", "b"]), "group")


def test_study_split__from_another_seed_is_made_in_the_same_way():
    uids = np.array([f"u{number // 2}" for number in range(200)], dtype=object)
    train, rest = train_test_split(pd.unique(uids), test_size=0.30, random_state=7, shuffle=True)
    val, _ = train_test_split(rest, test_size=0.50, random_state=7, shuffle=True)
    expected = np.where(np.isin(uids, train), "train", np.where(np.isin(uids, val), "val", "test"))
    np.testing.assert_array_equal(study_split(uids, 7), expected)


@pytest.mark.parametrize("how", ["study", "grouped", "stratified", "given"])
def test_resplit__gives_other_splits_of_the_same_kind(how):
    drawn = open_dataset("phantom:300?seed=1&size=64&enrich=0.2")
    first = apply_split(drawn, "grouped" if how == "given" else how, 0)
    again = [resplit(first, number, how, 0).samples["split"].to_numpy() for number in (0, 1, 1, 2)]
    assert (again[0] == first.samples["split"]).all() and (again[1] == again[2]).all()
    assert (again[1] != again[0]).any() and (again[3] != again[1]).any()
    for split in again:
        shares = pd.Series(split).value_counts(normalize=True)
        assert abs(shares["train"] - 0.7) < 0.05 and shares["test"] > 0.08
        assert pd.DataFrame({"group": first.groups, "split": split}).groupby("group")["split"].nunique().max() == 1
