"""Sentences follow from the numbers alone: which side of zero an interval lies on, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import baselines, bootstrap, sentences
from analysis.bootstrap import Interval
from analysis.distances import Null
from analysis.metrics import Prediction

NAN = float("nan")


@pytest.mark.parametrize(
    ("numbers", "options", "expected"),
    [
        (
            (0.01, -0.02, 0.04),
            {},
            "Probe's LRAP is not above that of prevalence ranking: difference 0.01, 95 % interval -0.02 to 0.04.",
        ),
        (
            (0.21, 0.15, 0.27),
            {"level": 0.9},
            "Probe's LRAP is above that of prevalence ranking: difference 0.21, 90 % interval 0.15 to 0.27.",
        ),
        (
            (-0.2, -0.3, -0.1),
            {},
            "Probe's LRAP is below that of prevalence ranking: difference -0.20, 95 % interval -0.30 to -0.10.",
        ),
        (
            (0.2, -0.1, 0.5),
            {"lower_is_better": True},
            "Probe's LRAP is not below that of prevalence ranking: difference 0.20, 95 % interval -0.10 to 0.50.",
        ),
        (
            (0.2, 0.1, 0.5),
            {"lower_is_better": True},
            "Probe's LRAP is above that of prevalence ranking: difference 0.20, 95 % interval 0.10 to 0.50.",
        ),
        # An end at zero is not on one side of it; a tiny end is shown with digits enough to see its side.
        ((0.1, 0.0, 0.2), {}, "Probe's LRAP is not above that of prevalence ranking: difference 0.10, 95 % interval 0.00 to 0.20."),  # noqa: E501
        ((0.1, 0.0004, 0.2), {}, "Probe's LRAP is above that of prevalence ranking: difference 0.1000, 95 % interval 0.0004 to 0.2000."),  # noqa: E501
        ((0.1, NAN, NAN), {}, "Probe's LRAP cannot be compared with that of prevalence ranking: the difference or its interval is undefined."),  # noqa: E501
    ],
)  # fmt: skip
def test_difference__is_named_by_the_side_its_interval_lies_on(numbers, options, expected):
    assert sentences.difference_sentence("Probe's LRAP", "prevalence ranking", *numbers, **options) == expected


def test_figure__never_writes_a_negative_zero():
    assert sentences.figure(-0.001) == "0.00" and sentences.figure(-0.006) == "-0.01"
    assert sentences.figure(NAN) == "undefined"


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.95, "above them"), (0.89, "within"), (0.86, "no more"), (0.5, "below them")]
)
def test_null__is_beaten_only_above_its_range(value, verdict):
    null = Null(0.88, 0.85, 0.92, 0.01, np.array([0.88]))
    text = sentences.null_sentence("Zero-shot's ratio", value, null, singletons=1)
    assert verdict in text and "give 0.88 (95 % of permutations 0.85 to 0.92)" in text
    assert text.endswith("1 class has a single image, which raises both.")
    assert "single" not in sentences.null_sentence("Zero-shot's ratio", value, null)
    assert "undefined" in sentences.null_sentence("Zero-shot's ratio", NAN, null)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.6, 0.55, 0.65), ": above"), ((0.52, 0.48, 0.6), "not above"), ((0.4, 0.3, 0.45), ": below")],
)
def test_chance__is_beaten_only_by_the_whole_interval(interval, verdict):
    assert verdict in sentences.chance_sentence("Probe's macro-AUROC", Interval(*interval, 10), 0.5)


def test_reference__lies_inside_or_outside_our_interval():
    ours = Interval(0.75, 0.72, 0.78, 1000)
    inside = sentences.reference_sentence("Probe's LRAP", ours, 0.741, "arXiv 2506.14136")
    assert inside == (
        "Probe's LRAP is 0.750 here; arXiv 2506.14136 published 0.741, within our 95 % interval 0.720 to 0.780."
    )
    assert "outside our" in sentences.reference_sentence("Probe's LRAP", ours, 0.25, "arXiv 2506.14136")


def test_data__counts_what_was_lost():
    text = sentences.data_sentence({"train": 70, "val": 15, "test": 14}, 60, 1)
    assert text.startswith("99 samples of 60 patients (train 70, val 15, test 14); 1 image could not be read")
    assert "every image was read" in sentences.data_sentence({"test": 1}, 1, 0)


@pytest.fixture(scope="module")
def study():
    """A setting that sees, one that says everything, and the baselines, on labels of which one never occurs."""
    generator = np.random.default_rng(0)
    y = generator.random((300, 4)) < np.array([0.5, 0.2, 0.02, 0.0])
    train = generator.random((900, 4)) < np.array([0.5, 0.2, 0.02, 0.01])
    seeing = y + generator.normal(size=y.shape) * 0.3
    blind = generator.normal(size=y.shape)
    predictions = {
        "Seeing": Prediction(seeing, seeing > 0.5),
        "Blind": Prediction(blind, np.ones_like(y)),
    } | baselines.trivial_baselines(train, 300, seed=1)
    names = ("Opacity", "Edema", "Fracture", "Hernia")
    found = bootstrap.bootstrap_metrics(y, predictions, np.arange(300), label_names=names, replicates=200)
    return found, ("Seeing", "Blind"), baselines.BASELINES


def test_classification__says_who_sees_and_who_does_not(study):
    drawn = sentences.classification_sentences(*study)
    text = "\n".join(drawn)
    assert drawn[0].startswith("The test split has no positive of Hernia")
    assert drawn[1].startswith("Fewer than 10 test positives: Fracture (")
    assert "Seeing's macro-AUROC is" in text and "above chance (0.50)" in text
    assert "Seeing's LRAP is above that of Prevalence ranking" in text
    assert "Seeing's coverage error is below that of Prevalence ranking" in text
    assert "Blind's LRAP is below that of Prevalence ranking" in text
    assert "Blind's exact match is below that of" in text
    assert "Blind says 4.00 labels an image where the truth has 0." in text
    assert "of 4 labels it says 4 more often than they occur and 0 less often" in text
    assert drawn[-1].startswith("Blind's LRAP is below that of Seeing")
    assert drawn == sentences.classification_sentences(*study)
    assert all(each.endswith(".") and each[0].isupper() for each in drawn)


def test_best_baseline__is_taken_metric_by_metric(study):
    found, _, trivial = study
    for metric, best in (("lrap", max), ("coverage_error", min)):
        values = {name: found.interval(name, metric).value for name in trivial}
        chosen = sentences.best_of(found, trivial, metric)
        assert values[chosen] == best(values.values())


def test_one_group__is_not_judged(study):
    y = np.array([[1, 0], [0, 1], [1, 1]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.7]])
    found = bootstrap.bootstrap_metrics(
        y, {"Probe": Prediction(scores, scores > 0.1), "Rank": Prediction(scores, scores > 2)}, ["a"] * 3,
        label_names=("Edema", "Fracture"), replicates=5,
    )  # fmt: skip
    text = "\n".join(sentences.classification_sentences(found, ["Probe"], ["Rank"]))
    assert "cannot be compared" in text and "above" not in text and "more often" not in text
