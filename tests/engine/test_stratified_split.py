"""The stratified split against its promises: whole groups, parts of their size, labels kept, one seed one split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from engine.errors import DataError, UsageError
from engine.splits import SPLITS, apply_split, check_split, grouped_split, stratified_split
from engine.stratified_split import split_report
from tests.conftest import shared_data

NAMES = tuple(f"label {number}" for number in range(14))
COUNTS = np.array([70, 415, 516, 165, 49, 31, 68, 216, 20, 129, 56, 127, 163, 2400]) / 3818


def study_like(count: int = 3818, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    groups = np.array([f"p{number}" for number in generator.integers(0, int(count * 0.8), count)], dtype=object)
    return groups, (generator.random((count, 14)) < COUNTS).astype(np.int8)


def spread(split: np.ndarray, labels: np.ndarray) -> float:
    """Chi-square distance from a split that keeps everything exactly, computed label by label."""
    total = 0.0
    for name, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        for column in labels.T:
            expected = share * column.sum()
            total += (column[split == name].sum() - expected) ** 2 / expected
    return total


def test_every_label_is_kept_far_better_than_by_chance():
    groups, labels = study_like()
    split = stratified_split(groups, labels, seed=1)
    check_split(groups, split)
    for name, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert abs((split == name).mean() - share) < 0.003
        for column in labels.T:
            assert abs(column[split == name].sum() - share * column.sum()) < 2.5
    by_chance = np.median([spread(grouped_split(groups, seed=seed), labels) for seed in range(9)])
    assert spread(split, labels) < by_chance / 20


def test_combinations_of_labels_are_kept_too():
    generator = np.random.default_rng(3)
    labels = generator.choice([0, 1], size=(2000, 2), p=[0.7, 0.3])
    groups = np.array([f"s{number}" for number in range(2000)])
    split = stratified_split(groups, labels, (0.5, 0.25, 0.25), seed=2)
    both = labels.all(axis=1)
    for name, share in zip(SPLITS, (0.5, 0.25, 0.25), strict=True):
        assert abs(both[split == name].sum() - share * both.sum()) <= 1


def test_large_groups_that_are_all_different_are_still_balanced():
    generator = np.random.default_rng(4)
    sizes = generator.integers(1, 60, 150)
    groups = np.repeat([f"p{number:03d}" for number in range(150)], sizes)
    habit = generator.random((150, 6)) * np.array([0.5, 0.2, 0.1, 0.05, 0.05, 0.02])
    labels = generator.random((len(groups), 6)) < np.repeat(habit, sizes, axis=0)
    split = stratified_split(groups, labels, seed=0)
    check_split(groups, split)
    by_chance = np.median([spread(grouped_split(groups, seed=seed), labels) for seed in range(9)])
    assert spread(split, labels) < by_chance / 5
    assert abs((split == "train").mean() - 0.7) < 0.02


def test_one_seed_is_one_split_whatever_the_order():
    groups, labels = study_like(600)
    split = stratified_split(groups, labels, seed=5)
    order = np.random.default_rng(0).permutation(len(groups))
    np.testing.assert_array_equal(stratified_split(groups[order], labels[order], seed=5), split[order])
    assert (stratified_split(groups, labels, seed=6) != split).any()


def test_a_part_of_nothing_stays_empty():
    groups, labels = study_like(400)
    split = stratified_split(groups, labels, (0.8, 0.0, 0.2), seed=0)
    assert set(split) == {"train", "test"}
    assert abs((split == "test").mean() - 0.2) < 0.02


def test_a_label_of_one_patient_and_labels_without_variation_do_no_harm():
    groups, labels = study_like(300)
    labels[:, 0], labels[:, 1], labels[:, 2] = 0, 1, 0
    labels[7, 2] = 1
    split = stratified_split(groups, labels, seed=0)
    report = split_report(split, labels, NAMES, SPLITS).set_index("label")
    assert report.loc["label 0", "positives"] == 0 and np.isnan(report.loc["label 0", "deviation"])
    assert report.loc["label 1", "deviation"] == 0
    assert report.loc["label 2", "positives"] == 1 and report.loc["label 2", list(SPLITS)].eq(0).sum() == 2


def test_report__compares_each_part_with_the_whole():
    split = np.array(["train"] * 6 + ["test"] * 4 + [""] * 2, dtype=object)
    labels = np.array([[1], [1], [1], [0], [0], [0], [1], [0], [0], [0], [1], [1]])
    report = split_report(split, labels, ("a",), SPLITS).iloc[0]
    assert report["positives"] == 4 and report["prevalence"] == 0.4 and report["train"] == 0.5
    assert report["test"] == 0.25 and report["deviation"] == pytest.approx(0.375)
    # Drawing 4 of 10 without replacement: var = p (1-p) / 4 * (1 - 4/10), as a share of p.
    assert report["by_chance"] == pytest.approx(np.sqrt(0.4 * 0.6 / 4 * 0.6) / 0.4)
    assert "val" not in report.index


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (np.zeros((6, 0)), {}, DataError, "nothing to stratify by.*grouped"),
        (np.ones((6, 2)), {}, DataError, "nothing to stratify by"),
        (np.eye(5), {}, DataError, r"labels of shape \(5, 5\) for 6 groups"),
        (np.eye(6), {"fractions": (0.5, 0.2, 0.2)}, UsageError, "add up to 1"),
        (np.eye(6)[:, :1], {"fractions": (0.98, 0.01, 0.01)}, DataError, "no group falls into"),
    ],
)
def test_what_cannot_be_split_is_refused(labels, options, error, message):
    with pytest.raises(error, match=message):
        stratified_split(np.array(list("abcdef"), dtype=object), labels, **options)


def test_the_real_nih_labels_are_kept():
    table = pd.read_csv(shared_data("data/nih-cxr-subset/manifest.csv"), dtype=str)
    findings = table["labels"].str.get_dummies(";")
    groups = table["patient_id"].to_numpy(dtype=object)
    split = stratified_split(groups, findings.to_numpy(), seed=0)
    check_split(groups, split)
    report = split_report(split, findings.to_numpy(), tuple(findings.columns), SPLITS)
    common = report[report["positives"] >= 40]
    assert len(common) >= 4 and (common["deviation"] < common["by_chance"]).all()


def test_apply_split__knows_stratified():
    from tests.engine.test_splits import dataset

    groups, labels = study_like(300)
    plain = dataset(list(groups))
    with pytest.raises(DataError, match="nothing to stratify by"):
        apply_split(plain, "stratified")
    from dataclasses import replace

    labelled = replace(plain, label_names=NAMES, labels=labels)
    result = apply_split(labelled, "stratified", seed=3).samples["split"].to_numpy()
    np.testing.assert_array_equal(result, stratified_split(groups, labels, seed=3))
