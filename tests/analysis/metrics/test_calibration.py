"""Calibration against scikit-learn's Brier score and calibration curve, and a loop over bins."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from analysis import metrics
from engine.errors import DataError

EXACT = {"rtol": 0, "atol": 1e-12}


def random_case(seed: int = 0, count: int = 300, edges: bool = False) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = generator.random((count, 4)) ** np.array([1.0, 3.0, 0.3, 1.0])
    if edges:
        # On the edges of bins, at 0 and at 1, where counting is most easily off by one.
        probabilities[:, 3] = generator.choice(np.linspace(0, 1, metrics.calibration.BINS + 1), count)
    return generator.random((count, 4)) < probabilities**2, probabilities


def loop_over_bins(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, bins: int) -> float:
    edges = np.linspace(0, 1, bins + 1)
    error = 0.0
    for number in range(bins):
        inside = (probabilities > edges[number]) & (probabilities <= edges[number + 1])
        if number == 0:
            inside |= probabilities == 0
        weight = weights[inside].sum()
        if weight:
            said = np.average(probabilities[inside], weights=weights[inside])
            found = np.average(truth[inside], weights=weights[inside])
            error += weight / weights.sum() * abs(said - found)
    return error


@pytest.mark.parametrize("edges", [False, True])
def test_calibration__equals_scikit_learn_and_a_loop(edges):
    y, probabilities = random_case(edges=edges)
    ones = np.ones(len(y))
    np.testing.assert_allclose(
        metrics.brier(y, probabilities),
        [brier_score_loss(t, p) for t, p in zip(y.T, probabilities.T, strict=True)],
        **EXACT,
    )
    for bins in (15, 4):
        expected = [loop_over_bins(t, p, ones, bins) for t, p in zip(y.T, probabilities.T, strict=True)]
        np.testing.assert_allclose(metrics.expected_calibration_error(y, probabilities, bins), expected, **EXACT)


def test_reliability_curve__is_scikit_learn_s():
    y, probabilities = random_case(1, edges=True)
    curve = metrics.reliability_curve(y, probabilities, ("a", "b", "c", "d"), bins=10)
    for column, label in enumerate("abcd"):
        frequency, said = calibration_curve(y[:, column], probabilities[:, column], n_bins=10)
        part = curve[curve["label"] == label]
        np.testing.assert_allclose(part["frequency"], frequency, **EXACT)
        np.testing.assert_allclose(part["probability"], said, **EXACT)
        assert part["count"].sum() == len(y)


@pytest.mark.parametrize("columns", [5, 50])
def test_calibration_under_weights__equals_the_loop(columns):
    y, probabilities = random_case(2, edges=True)
    weights = np.random.default_rng(3).integers(0, 3, size=(len(y), columns)).astype(float)
    result = metrics.weighted_metrics(y, metrics.Prediction(probabilities, probabilities > 0.5), weights)
    for replicate in (0, columns - 1):
        weight = weights[:, replicate]
        for label in range(4):
            truth, said = y[:, label], probabilities[:, label]
            expected = loop_over_bins(truth, said, weight, metrics.calibration.BINS)
            np.testing.assert_allclose(result.per_label["ece"][replicate, label], expected, **EXACT)
            expected = brier_score_loss(truth, said, sample_weight=weight)
            np.testing.assert_allclose(result.per_label["brier"][replicate, label], expected, **EXACT)
        np.testing.assert_allclose(result.overall["ece"][replicate], result.per_label["ece"][replicate].mean(), **EXACT)


def test_scores_that_are_no_probabilities__have_no_calibration():
    y, probabilities = random_case()
    logits = probabilities * 4 - 2
    result = metrics.summary(y, logits, logits > 0)
    assert not result["probabilities"]
    assert np.isnan(result["overall"]["ece"]) and np.isnan(result["per_label"]["brier"]).all()
    assert np.isfinite(result["overall"]["ranking_loss"])
    for ask in (metrics.brier, metrics.expected_calibration_error):
        with pytest.raises(DataError, match="calibration is of probabilities, but scores reach from -"):
            ask(y, logits)
    with pytest.raises(DataError, match="no samples"):
        metrics.brier(y[:0], probabilities[:0])


def test_torch__gives_numpy_s_calibration():
    torch = pytest.importorskip("torch")
    y, probabilities = random_case(4, edges=True)
    tensors = torch.as_tensor(y), torch.as_tensor(probabilities)
    for ask in (metrics.brier, metrics.expected_calibration_error):
        np.testing.assert_allclose(ask(*tensors).numpy(), ask(y, probabilities), **EXACT)
    names = ("a", "b", "c", "d")
    assert metrics.reliability_curve(*tensors, names).equals(metrics.reliability_curve(y, probabilities, names))
