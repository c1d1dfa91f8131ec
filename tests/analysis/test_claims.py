"""The claims' figures against pandas and scikit-learn on explicit resamples, and their sentences against the rules."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import label_ranking_average_precision_score, roc_auc_score

from analysis import claim_verdicts, claims
from analysis.metrics import Prediction
from engine.errors import DataError, UsageError

LABELS = ("Edema", "Fracture", "Nodule", "No Finding")


@pytest.fixture
def case():
    """150 patients with one or two images each, four labels, one setting that knows and one that does not."""
    generator = np.random.default_rng(3)
    groups = np.repeat([f"p{number}" for number in range(150)], generator.integers(1, 3, 150))
    count = len(groups)
    y = np.column_stack([generator.random((count, 3)) < (0.45, 0.3, 0.25), np.zeros(count, bool)])
    y[~y.any(axis=1), 3] = True
    knows = generator.normal(size=(count, 4)) + 2.0 * y
    guesses = generator.normal(size=(count, 4))
    predictions = {"Knows": Prediction(knows, knows > 1), "Guesses": Prediction(guesses, guesses > 0)}
    return y, predictions, groups


def test_over_prediction__is_the_quotient_of_rates_on_explicit_resamples(case):
    y, predictions, groups = case
    decisions = {("Guesses", "fixed"): predictions["Guesses"].decisions}
    table = claims.over_prediction(y, decisions, groups, label_names=LABELS, replicates=300, seed=5)
    assert table["label"].isna().sum() == 1 and len(table) == 5
    patients = np.unique(groups)
    rows_of = {patient: np.flatnonzero(groups == patient) for patient in patients}
    generator = np.random.Generator(np.random.PCG64(5))
    drawn = patients[generator.integers(0, len(patients), size=(300, len(patients)))]
    said = decisions["Guesses", "fixed"]
    for place, label in enumerate(LABELS):
        row = table[table["label"] == label].iloc[0]
        assert row["ratio"] == pytest.approx(said[:, place].mean() / y[:, place].mean())
        ratios, gaps = [], []
        for chosen in drawn:
            rows = np.concatenate([rows_of[patient] for patient in chosen])
            ratios.append(said[rows, place].mean() / y[rows, place].mean())
            gaps.append(said[rows, place].mean() - y[rows, place].mean())
        np.testing.assert_allclose([row["low"], row["high"]], np.quantile(ratios, [0.025, 0.975]), rtol=1e-9)
        ends = np.quantile(gaps, [0.025, 0.975])
        np.testing.assert_allclose([row["excess_low"], row["excess_high"]], ends, atol=1e-12)
        expected = "over" if ends[0] > 0 else "under" if ends[1] < 0 else "not told apart"
        assert row["verdict"] == expected
    overall = table[table["label"].isna()].iloc[0]
    assert overall["said"] == pytest.approx(said.sum(axis=1).mean())


def test_over_prediction__of_absent_labels_and_single_patients(case):
    y, predictions, _ = case
    y[:, 1] = False
    said = predictions["Knows"].decisions
    table = claims.over_prediction(y, {("Knows", "f1"): said}, np.arange(len(y)), label_names=LABELS, replicates=100)
    row = table[table["label"] == "Fracture"].iloc[0]
    assert np.isnan(row["ratio"]) and row["verdict"] == "over" and row["excess"] > 0
    alone = claims.over_prediction(y, {("Knows", "f1"): said}, ["p"] * len(y), label_names=LABELS, replicates=100)
    assert (alone["verdict"] == "undefined").all() and alone["low"].isna().all()
    with pytest.raises(DataError, match="names for truth"):
        claims.over_prediction(y, {("Knows", "f1"): said}, ["p"] * len(y), label_names=LABELS[:2])


def test_subsets__count_findings_without_no_finding(case):
    y = case[0]
    findings = y[:, :3].sum(axis=1)
    for subset, expected in ((claims.DISTINCT, findings == 1), (claims.OVERLAPPING, findings >= 2)):
        np.testing.assert_array_equal(claims.subset_rows(y, LABELS, subset, "No Finding"), expected)
    with pytest.raises(UsageError, match="unknown subset"):
        claims.subset_rows(y, LABELS, "none", None)


@pytest.mark.parametrize("subset", claims.SUBSETS)
def test_subset_scores__are_scikit_learns_on_findings_alone(case, subset):
    y, predictions, groups = case
    found = claims.subset_scores(
        y, predictions, groups, [("Knows", "Guesses")], label_names=LABELS, subset=subset, nothing="No Finding",
        replicates=200, permutations=50,
    )  # fmt: skip
    rows = claims.subset_rows(y, LABELS, subset, "No Finding")
    assert (found.images, found.patients) == (rows.sum(), len(np.unique(groups[rows])))
    values = found.table.set_index(["setting", "metric"])
    for name, each in predictions.items():
        truth, scores = y[rows, :3], each.scores[rows, :3]
        assert values.loc[(name, "lrap"), "value"] == pytest.approx(
            label_ranking_average_precision_score(truth, scores)
        )
        assert values.loc[(name, "auroc_macro"), "value"] == pytest.approx(roc_auc_score(truth, scores))
    lrap = values.loc[("Knows", "lrap")]
    assert lrap["null_high"] < lrap["low"] and lrap["p"] == pytest.approx(1 / 51)
    assert (
        values.loc[("Guesses", "auroc_macro"), "null_low"] < 0.5 < values.loc[("Guesses", "auroc_macro"), "null_high"]
    )
    said = claim_verdicts.subset_sentences(claim_verdicts.CLAIM_2, found, "Knows", subset)
    assert "improves distinct diseases: holds here (" in said[0] and f"({found.images} test images" in said[0]
    assert "2 of 2 stand in its favour after Holm's correction, 0 against it." in said[0]
    assert f"LRAP {lrap['null']:.2f} where it has {lrap['value']:.2f} (p = 0.020)" in said[0]
    swapped = claims.subset_scores(
        y, predictions, groups, [("Guesses", "Knows")], label_names=LABELS, subset=subset, nothing="No Finding",
        replicates=200, permutations=5,
    )  # fmt: skip
    said = claim_verdicts.subset_sentences(claim_verdicts.CLAIM_2, swapped, "Guesses", subset)
    assert "does not hold here" in said[0] and "0 of 2 stand in its favour" in said[0] and "2 against it" in said[0]
    row = swapped.differences[swapped.differences["metric"] == "lrap"].iloc[0]
    assert f"LRAP: Knows {row['difference']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in said[0]
    # As of one patient alone.
    unknown = swapped._replace(differences=swapped.differences.assign(low=np.nan, high=np.nan))
    said = claim_verdicts.subset_sentences(claim_verdicts.CLAIM_2, unknown, "Guesses", subset)
    assert f"LRAP: Knows {row['difference']:.3f}" in said[0] and "undefined" not in said[0]


def test_subset_scores__of_a_handful_of_images_are_not_made(case):
    y, predictions, groups = case
    few = {name: Prediction(each.scores[:8], each.decisions[:8]) for name, each in predictions.items()}
    found = claims.subset_scores(
        y[:8], few, groups[:8], [("Knows", "Guesses")], label_names=LABELS, subset=claims.DISTINCT, nothing="No Finding"
    )
    assert found.table.empty and found.images <= 8
    text = claim_verdicts.subset_sentences(claim_verdicts.CLAIM_3, found, "Knows", claims.DISTINCT)
    assert len(text) == 1 and "cannot be tested here" in text[0]


def test_over_prediction_sentences__tell_what_the_threshold_makes():
    row = {"labels": 4, "under": 0, "ratio": 2.5, "low": 2.0, "high": 3.0}
    counts = pd.DataFrame(
        [
            {"setting": "Zero-shot", "family": "minmax", "over": 4, "holds": True, **row},
            {"setting": "Zero-shot", "family": "f1", "over": 1, "holds": False, **row},
            {"setting": "Linear probe", "family": "minmax", "over": 4, "holds": True, **row},
            {"setting": "Linear probe", "family": "f1", "over": 0, "holds": False, **row},
        ]
    )
    said = claim_verdicts.over_prediction_sentences(counts, "Zero-shot", ["Linear probe"])
    assert "4 of 4 by per-image min-max at 0.5 (2.50, 2.00 to 3.00)" in said[0] and "1 of 4 by F1-optimal" in said[0]
    assert "every label: holds when cut by per-image min-max at 0.5 only, so the threshold makes it." in said[0]
    assert said[1].endswith("by per-image min-max at 0.5 (Linear probe 4; Zero-shot 4).") and len(said) == 2
    every = claim_verdicts.over_prediction_sentences(counts[counts["family"] == "minmax"], "Zero-shot")
    assert "every label: holds under every threshold tried." in every[0]
    none = claim_verdicts.over_prediction_sentences(counts[counts["family"] == "f1"], "Zero-shot")
    assert "does not hold under any threshold tried." in none[0]
