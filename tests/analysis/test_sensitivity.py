"""Sensitivity and figures beside their baselines: paired differences on explicit resamples, and what a change does."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, label_ranking_average_precision_score

from analysis import figures_beside, nulls, sensitivity
from analysis.baselines import PREVALENCE, prevalence_ranking, trivial_baselines
from analysis.bootstrap import bootstrap_metrics
from analysis.metrics import Prediction
from engine.errors import UsageError

LABELS = ("a", "b", "c", "d")


@pytest.fixture
def case():
    generator = np.random.default_rng(0)
    y = generator.random((150, 4)) < (0.5, 0.3, 0.2, 0.1)
    y[~y.any(axis=1), 0] = True
    good = y + 0.5 * generator.normal(size=y.shape)
    poor = generator.normal(size=y.shape)
    predictions = {"Zero-shot": Prediction(poor, poor > 1), "Probe": Prediction(good, good > 0.5)}
    return y, predictions, np.arange(150) // 2


def test_variants__are_paired_with_the_study_as_it_is(case):
    y, predictions, groups = case
    ranking = prevalence_ranking(y, len(y))
    base = sensitivity.Variant("", "as it is", y, predictions, ranking)
    lenient = predictions | {"Zero-shot": Prediction(predictions["Zero-shot"].scores, np.ones_like(y))}
    swapped = {"Zero-shot": predictions["Probe"], "Probe": predictions["Zero-shot"]}
    variants = [
        base,
        sensitivity.Variant("thresholds", "all", y, lenient, ranking, ("Zero-shot",)),
        sensitivity.Variant("prompts", "better", y, swapped, ranking, ("Zero-shot", "Probe"), "swapped"),
    ]
    figures, comparisons = sensitivity.sensitivity(variants, groups, label_names=LABELS, replicates=200, seed=4)
    row = figures[(figures["changed"] == "thresholds") & (figures["metric"] == "f1_macro")].iloc[0]

    def score(rows, decided):
        return f1_score(y[rows], decided[rows], average="macro", zero_division=0)

    everyone, before = np.ones_like(y), predictions["Zero-shot"].decisions
    rows = np.arange(150)
    assert row["setting"] == "Zero-shot" and row["value"] == pytest.approx(score(rows, everyone))
    drawn = np.random.Generator(np.random.PCG64(4)).integers(0, 75, size=(200, 75))
    samples = [np.concatenate([2 * chosen, 2 * chosen + 1]) for chosen in drawn]
    expected = np.array([score(rows, everyone) - score(rows, before) for rows in samples])
    # Macro F1 is biased in resamples: the difference is moved to where the data have it.
    expected += score(rows, everyone) - score(rows, before) - expected.mean()
    np.testing.assert_allclose([row["difference_low"], row["difference_high"]], np.quantile(expected, [0.025, 0.975]))
    assert set(figures.loc[figures["changed"] == "thresholds", "setting"]) == {"Zero-shot", PREVALENCE}
    own = comparisons[comparisons["changed"] == "nothing"].set_index(["metric", "setting", "other"])["verdict"]
    assert own["lrap", "Probe", "Zero-shot"] == "above" and own["lrap", "Zero-shot", PREVALENCE] == "below"
    said = sensitivity.sensitivity_sentences(comparisons)
    assert any("With other prompts (better)" in text and "above becomes below" in text for text in said)
    assert not comparisons.loc[
        (comparisons["changed"] == "thresholds") & (comparisons["metric"] == "lrap"), "changes"
    ].any()
    with pytest.raises(UsageError, match="as it is"):
        sensitivity.sensitivity(variants[1:], groups, label_names=LABELS)


def test_unchanged_choices__are_told_in_one_sentence(case):
    y, predictions, groups = case
    ranking = prevalence_ranking(y, len(y))
    variants = [sensitivity.Variant("", "as it is", y, predictions, ranking)]
    variants += [sensitivity.Variant("prompts", name, y, predictions, ranking, ("Zero-shot",)) for name in ("x", "y")]
    _, comparisons = sensitivity.sensitivity(variants, groups, label_names=LABELS, replicates=100)
    assert sensitivity.sensitivity_sentences(comparisons) == [
        "With other prompts (x, y) every comparison comes out as before."
    ]


def test_other_labels__change_truth_and_baseline(case):
    y, predictions, groups = case
    other = y[:, ::-1].copy()
    variants = [
        sensitivity.Variant("", "as it is", y, predictions, prevalence_ranking(y, len(y))),
        sensitivity.Variant("labels", "mesh", other, predictions, prevalence_ranking(other, len(y)), ("Probe",)),
    ]
    figures, _ = sensitivity.sensitivity(variants, groups, label_names=LABELS, replicates=100)
    part = figures[(figures["changed"] == "labels") & (figures["metric"] == "lrap")].set_index("setting")["value"]
    assert part["Probe"] == pytest.approx(label_ranking_average_precision_score(other, predictions["Probe"].scores))
    ranking = np.tile(other.mean(axis=0), (150, 1))
    assert part[PREVALENCE] == pytest.approx(label_ranking_average_precision_score(other, ranking))


def test_figures__stand_beside_the_best_baseline_and_their_null(case):
    y, predictions, groups = case
    trivial = trivial_baselines(y, len(y), 0)
    drawn = bootstrap_metrics(y, predictions | trivial, groups, label_names=LABELS, replicates=200)
    found = nulls.permuted_metrics(y, predictions, groups, label_names=LABELS, permutations=30)
    table = figures_beside.beside_baselines(drawn, found, tuple(trivial), ("lrap", "coverage_error", "brier"))
    values = table.set_index(["setting", "metric"])
    assert len(table) == 6
    scores = {name: label_ranking_average_precision_score(y, each.scores) for name, each in trivial.items()}
    row = values.loc[("Probe", "lrap")]
    assert row["baseline"] == max(scores, key=scores.get) and row["baseline_value"] == pytest.approx(
        max(scores.values())
    )
    assert row["verdict"] == "better" and row["null_high"] < row["value"] and row["p"] == pytest.approx(1 / 31)
    assert values.loc[("Zero-shot", "lrap"), "verdict"] == "worse"
    assert values.loc[("Zero-shot", "coverage_error"), "verdict"] == "worse"
    assert values.loc[("Probe", "brier")].drop(["baseline", "verdict", "n", "baseline_value"]).isna().all()
