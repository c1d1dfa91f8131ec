"""Metrics against scikit-learn, on random inputs and on those that break shortcuts: ties, empty rows, empty labels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn import metrics as oracle

from analysis import metrics
from engine.errors import DataError

EXACT = {"rtol": 0, "atol": 1e-12}


def random_case(seed: int, count: int = 60, labels: int = 14, levels: int | None = None) -> tuple:
    """Truth of uneven prevalence, scores (on few levels: ties), decisions."""
    generator = np.random.default_rng(seed)
    y = (generator.random((count, labels)) < generator.uniform(0.02, 0.6, labels)).astype(np.int8)
    scores = generator.normal(size=(count, labels))
    if levels:
        scores = np.round(scores * levels) / levels
    return y, scores, scores > generator.normal(size=labels)


def case_all_tied() -> tuple:
    y, _, decisions = random_case(3)
    return y, np.zeros(y.shape), decisions


def case_empty_and_full_rows() -> tuple:
    y, scores, decisions = random_case(4)
    y[:5], y[5:9] = 0, 1
    return y, scores, decisions


def case_labels_without_positives_or_negatives() -> tuple:
    y, scores, decisions = random_case(5)
    y[:, 2], y[:, 7] = 0, 1
    decisions[:, 2] = False
    return y, scores, decisions


def case_adjacent_floats() -> tuple:
    y, scores, decisions = random_case(6, count=40, labels=5)
    scores[:] = 1.0
    scores[::2] = np.nextafter(1.0, 2.0)
    return y, scores, decisions


def case_float32() -> tuple:
    y, scores, decisions = random_case(7)
    return y, scores.astype(np.float32), decisions


def case_one_label() -> tuple:
    return random_case(8, labels=1)


def case_one_sample() -> tuple:
    y, scores, decisions = random_case(9, count=1)
    y[0, :2] = 1
    return y, scores, decisions


CASES = {
    "random": lambda: random_case(0),
    "many ties": lambda: random_case(1, levels=2),
    "two levels": lambda: random_case(2, levels=1),
    "all tied": case_all_tied,
    "empty and full rows": case_empty_and_full_rows,
    "labels without positives or negatives": case_labels_without_positives_or_negatives,
    "adjacent floats": case_adjacent_floats,
    "float32": case_float32,
    "one sample": case_one_sample,
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request) -> tuple:
    return CASES[request.param]()


def sklearn_auroc(y, scores, weights=None) -> float:
    used = y if weights is None else y[weights > 0]
    if len(np.unique(used)) < 2:
        return np.nan
    return oracle.roc_auc_score(y, scores, sample_weight=weights)


def sklearn_ap(y, scores, weights=None) -> float:
    used = y if weights is None else y[weights > 0]
    return oracle.average_precision_score(y, scores, sample_weight=weights) if used.any() else np.nan


def test_summary__equals_scikit_learn(case):
    y, scores, decisions = case
    result = metrics.summary(y, scores, decisions)
    overall, per_label = result["overall"], result["per_label"]
    expected = {
        "f1_macro": oracle.f1_score(y, decisions, average="macro", zero_division=0),
        "f1_micro": oracle.f1_score(y, decisions, average="micro", zero_division=0),
        "exact_match": oracle.accuracy_score(y, decisions),
        "lrap": oracle.label_ranking_average_precision_score(y, scores),
        "coverage_error": oracle.coverage_error(y, scores),
        "hamming": oracle.hamming_loss(y, decisions),
        "ranking_loss": oracle.label_ranking_loss(y, scores),
        "auroc_micro": oracle.roc_auc_score(y.ravel(), scores.ravel()),
        "over_prediction": decisions.sum() / y.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(overall[name], value, err_msg=name, **EXACT)
    precision, recall, f1, positives = oracle.precision_recall_fscore_support(
        y, decisions, average=None, zero_division=0
    )
    np.testing.assert_allclose(per_label["precision"], precision, **EXACT)
    np.testing.assert_allclose(per_label["recall"], recall, **EXACT)
    np.testing.assert_allclose(per_label["f1"], f1, **EXACT)
    np.testing.assert_allclose(per_label["positives"], positives, **EXACT)
    np.testing.assert_allclose(per_label["prevalence"], y.mean(axis=0), **EXACT)
    np.testing.assert_allclose(per_label["predicted_rate"], decisions.mean(axis=0), **EXACT)
    aurocs = [sklearn_auroc(y[:, label], scores[:, label]) for label in range(y.shape[1])]
    precisions = [sklearn_ap(y[:, label], scores[:, label]) for label in range(y.shape[1])]
    np.testing.assert_allclose(per_label["auroc"], aurocs, **EXACT)
    np.testing.assert_allclose(per_label["ap"], precisions, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        np.testing.assert_allclose(overall["auroc_macro"], np.nanmean(aurocs), **EXACT)
        np.testing.assert_allclose(overall["map"], np.nanmean(precisions), **EXACT)
    assert result["labels_counted"]["map"] == np.isfinite(precisions).sum()
    assert result["labels_counted"]["auroc_macro"] == np.isfinite(aurocs).sum()
    assert set(overall) == set(metrics.OVERALL_METRICS) and set(per_label) == set(metrics.LABEL_METRICS)


def test_weighted_metrics__equal_scikit_learn_under_sample_weights(case):
    y, scores, decisions = case
    weights = np.random.default_rng(11).choice([0.0, 0.5, 1.0, 3.0], size=(len(y), 6))
    weights[0] = 1.0
    result = metrics.weighted_metrics(y, metrics.Prediction(scores, decisions), weights)
    for column, weight in enumerate(weights.T):
        expected = {
            "f1_macro": oracle.f1_score(y, decisions, average="macro", zero_division=0, sample_weight=weight),
            "f1_micro": oracle.f1_score(y, decisions, average="micro", zero_division=0, sample_weight=weight),
            "exact_match": oracle.accuracy_score(y, decisions, sample_weight=weight),
            "lrap": oracle.label_ranking_average_precision_score(y, scores, sample_weight=weight),
            "coverage_error": oracle.coverage_error(y, scores, sample_weight=weight),
            "hamming": oracle.hamming_loss(y, decisions, sample_weight=weight),
            "ranking_loss": oracle.label_ranking_loss(y, scores, sample_weight=weight),
            "auroc_micro": oracle.roc_auc_score(y.ravel(), scores.ravel(), sample_weight=weight.repeat(y.shape[1])),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(result.overall[name][column], value, err_msg=name, **EXACT)
        for label in range(y.shape[1]):
            np.testing.assert_allclose(
                result.per_label["auroc"][column, label], sklearn_auroc(y[:, label], scores[:, label], weight), **EXACT
            )
            np.testing.assert_allclose(
                result.per_label["ap"][column, label], sklearn_ap(y[:, label], scores[:, label], weight), **EXACT
            )


def test_many_columns_of_weights__give_what_few_give(case):
    """Thousands of columns take another way through AUROC and AP than a few: products of runs, in float32 and 64."""
    y, scores, decisions = case
    generator = np.random.default_rng(12)
    whole = generator.integers(0, 4, size=(len(y), 40)).astype(float)
    for weights in (whole, whole + generator.choice([0.0, 0.25], size=whole.shape), whole * 2.0**22):
        many = metrics.weighted_metrics(y, metrics.Prediction(scores, decisions), weights)
        few = [
            metrics.weighted_metrics(y, metrics.Prediction(scores, decisions), weights[:, start : start + 8])
            for start in range(0, 40, 8)
        ]
        for name in ("auroc", "ap"):
            expected = np.concatenate([part.per_label[name] for part in few])
            np.testing.assert_allclose(many.per_label[name], expected, err_msg=name, **EXACT)
        expected = np.concatenate([part.overall["auroc_micro"] for part in few])
        np.testing.assert_allclose(many.overall["auroc_micro"], expected, **EXACT)


def test_many_columns_of_fractions__leave_auroc_undefined_where_no_negative_weighs():
    """All weight less the positives' is not always 0 then, only nearly."""
    generator = np.random.default_rng(51)
    y = generator.random((12, 3)) < 0.5
    scores, weights = generator.normal(size=y.shape), generator.random((12, 40))
    weights[~y[:, 0]] = 0.0
    result = metrics.weighted_metrics(y, metrics.Prediction(scores, scores > 0), weights)
    expected = [[sklearn_auroc(y[:, k], scores[:, k], column) for k in range(3)] for column in weights.T]
    assert np.isnan(expected)[:, 0].all()
    np.testing.assert_allclose(result.per_label["auroc"], expected, **EXACT)


def test_patients__weigh_all_their_samples():
    y, scores, decisions = random_case(13, count=80, levels=3)
    codes = np.random.default_rng(0).integers(0, 30, 80)
    weights = np.random.default_rng(1).integers(0, 3, size=(30, 40))
    plan = metrics.MetricPlan(y, metrics.Prediction(scores, decisions), codes, 30)
    by_sample = metrics.weighted_metrics(y, metrics.Prediction(scores, decisions), weights[codes])
    result = plan.evaluate(weights)
    for name in metrics.OVERALL_METRICS:
        np.testing.assert_allclose(result.overall[name], by_sample.overall[name], err_msg=name, **EXACT)
    for name in metrics.LABEL_METRICS:
        np.testing.assert_allclose(result.per_label[name], by_sample.per_label[name], err_msg=name, **EXACT)


def test_torch__gives_numpy_s_numbers(case):
    torch = pytest.importorskip("torch")
    y, scores, decisions = case
    weights = np.random.default_rng(14).integers(0, 3, size=(len(y), 40))
    weights[0] += 1
    for columns in (weights, weights[:, :3]):
        expected = metrics.weighted_metrics(y, metrics.Prediction(scores, decisions), columns)
        on_torch = metrics.Prediction(torch.as_tensor(scores), torch.as_tensor(decisions))
        result = metrics.weighted_metrics(torch.as_tensor(y), on_torch, torch.as_tensor(columns))
        for part, other in zip(result, expected, strict=True):
            for name, values in part.items():
                assert isinstance(values, torch.Tensor)
                np.testing.assert_allclose(values.numpy(), other[name], err_msg=name, **EXACT)
    assert metrics.summary(torch.as_tensor(y), *on_torch)["overall"]["lrap"] == pytest.approx(
        metrics.summary(y, scores, decisions)["overall"]["lrap"], abs=1e-12
    )
    np.testing.assert_allclose(metrics.auroc(y, torch.as_tensor(scores)).numpy(), metrics.auroc(y, scores), **EXACT)
    np.testing.assert_allclose(
        metrics.lrap_samples(y, torch.as_tensor(scores)), metrics.lrap_samples(y, scores), **EXACT
    )


def test_auroc_and_average_precision__stand_alone(case):
    y, scores, _ = case
    expected = [sklearn_auroc(truth, score) for truth, score in zip(y.T, scores.T, strict=True)]
    np.testing.assert_allclose(metrics.auroc(y, scores), expected, **EXACT)
    expected = [sklearn_ap(truth, score) for truth, score in zip(y.T, scores.T, strict=True)]
    np.testing.assert_allclose(metrics.average_precision(y, scores), expected, **EXACT)
    np.testing.assert_allclose(
        metrics.auroc_micro(y, scores), oracle.roc_auc_score(y, scores, average="micro"), **EXACT
    )


def test_one_label__needs_no_special_case():
    y, scores, decisions = case_one_label()
    result = metrics.summary(y, scores, decisions)
    np.testing.assert_allclose(result["overall"]["auroc_macro"], oracle.roc_auc_score(y, scores), **EXACT)
    np.testing.assert_allclose(result["overall"]["f1_macro"], oracle.f1_score(y[:, 0], decisions[:, 0]), **EXACT)
    assert (metrics.lrap_samples(y, scores) == 1).all()


def test_sample_values__average_to_the_metric_and_follow_one_sample(case):
    y, scores, decisions = case
    for row in range(0, len(y), 7):
        one = slice(row, row + 1)
        expected = oracle.label_ranking_average_precision_score(y[one], scores[one])
        np.testing.assert_allclose(metrics.lrap_samples(y, scores)[row], expected, **EXACT)
        expected = oracle.coverage_error(y[one], scores[one])
        np.testing.assert_allclose(metrics.coverage_samples(y, scores)[row], expected, **EXACT)
    tp, fp, fn = metrics.confusion_samples(y, decisions)
    np.testing.assert_array_equal(tp.astype(int) + fn, y)
    np.testing.assert_array_equal(tp | fp, decisions)
    np.testing.assert_allclose(metrics.hamming_samples(y, decisions).mean(), oracle.hamming_loss(y, decisions), **EXACT)


def test_lrap__same_in_blocks(monkeypatch):
    y, scores, _ = random_case(12, count=101)
    whole = metrics.lrap_samples(y, scores)
    monkeypatch.setattr(metrics.samples, "_COMPARISON_CELLS", 14 * 14 * 7)
    np.testing.assert_array_equal(metrics.lrap_samples(y, scores), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, s, d: (y[:, :3], s, d), "shape"),
        (lambda y, s, d: (y[0], s, d), "table"),
        (lambda y, s, d: (y.astype(int) - 1, s, d), "0 or 1"),
        (lambda y, s, d: (y, np.where(np.arange(14) == 3, np.nan, s), d), "not finite.*row 0, label 3"),
        (lambda y, s, d: (y, s, d[:5]), "decisions have shape"),
        (lambda y, s, d: (y[:0], s[:0], d[:0]), "no samples"),
        (lambda y, s, d: (y, s[:-1], d), r"scores have shape \(59, 14\), the labels \(60, 14\)"),
    ],
)
def test_summary__refuses_what_it_cannot_score(change, message):
    with pytest.raises(DataError, match=message):
        metrics.summary(*change(*random_case(0)))


def test_label_with_a_nan_score__is_named():
    y, scores, decisions = random_case(0)
    scores[7, 3] = np.nan
    names = tuple(f"finding {number}" for number in range(14))
    with pytest.raises(DataError, match="1 scores are not finite, first nan at row 7, label 'finding 3'"):
        metrics.summary(y, scores, decisions, names)
