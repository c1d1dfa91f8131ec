"""Probes against scikit-learn's own fits and a NumPy transcription of the study's training loop."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss

from analysis import probes as probe
from engine.errors import DataError, UsageError

LABELS = ("Edema", "Fracture", "Pneumothorax", "No Finding")


def random_case(seed: int = 0, count: int = 400, dimensions: int = 12):
    generator = np.random.default_rng(seed)
    x = (generator.normal(size=(count, dimensions)) + 1.5) * 3
    weights = generator.normal(size=(dimensions, 4)) * 0.3
    lifted = (x - x.mean(axis=0)) @ weights - np.array([0.5, 1.5, 2.5, 0.0])
    y = generator.random(lifted.shape) < expit(lifted)
    split = np.array((["train"] * 5 + ["val", "test"]) * count, dtype=object)[:count]
    return x.astype(np.float32), y, split


def unit(x):
    return x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)


def test_fit_probe__equals_scikit_learn_at_the_c_that_validation_prefers():
    x, y, split = random_case()
    train, val = split == "train", split == "val"
    for select in probe.SELECTIONS:
        result = probe.fit_probe_on_split(x, y, split, label_names=LABELS, select=select, encoder_id="tiny")
        losses, precisions, models = [], [], []
        for c in probe.C_GRID:
            fits = [LogisticRegression(C=c, tol=1e-8, max_iter=9000).fit(unit(x)[train], t) for t in y[train].T]
            chances = [fit.predict_proba(unit(x)[val])[:, 1] for fit in fits]
            losses.append(np.mean([log_loss(t, p) for t, p in zip(y[val].T, chances, strict=True)]))
            precisions.append(np.mean([average_precision_score(t, p) for t, p in zip(y[val].T, chances, strict=True)]))
            models.append(fits)
        best = int(np.argmin(losses) if select == "log_loss" else np.argmax(precisions))
        assert result.head.provenance["C"] == probe.C_GRID[best]
        np.testing.assert_allclose([row["log_loss"] for row in result.history], losses, atol=2e-3)
        np.testing.assert_allclose([row["average_precision"] for row in result.history], precisions, atol=5e-3)
        expected = np.stack([fit.coef_[0] for fit in models[best]])
        np.testing.assert_allclose(result.head.weight, expected, rtol=0.02, atol=0.02)
        assert result.head.normalised and result.head.encoder_id == "tiny" and not result.untrained_labels


def test_fit_probe__reaches_the_minimum_of_the_objective_it_names():
    x, y, split = random_case(1)
    train = split == "train"
    c = 10.0
    head = probe.fit_probe(x[train], y[train], x[:0], y[:0], label_names=LABELS, c_grid=[c], tol=1e-8).head

    def objective(parameters, truth):
        logits = unit(x)[train] @ parameters[:-1] + parameters[-1]
        return c * np.sum(np.logaddexp(0, logits) - truth * logits) + 0.5 * parameters[:-1] @ parameters[:-1]

    for label in range(4):
        mine = objective(np.append(head.weight[label], head.bias[label]), y[train, label])
        found = minimize(objective, np.zeros(13), args=(y[train, label],), method="BFGS", options={"gtol": 1e-6})
        assert mine <= found.fun * (1 + 1e-6)


def test_untrained_labels__get_their_prior_and_are_named(caplog):
    x, y, split = random_case(2)
    train = split == "train"
    y[train, 1], y[train, 3] = False, True
    with caplog.at_level(logging.WARNING):
        result = probe.fit_probe_on_split(x, y, split, label_names=LABELS)
    assert result.untrained_labels == ("Fracture", "No Finding")
    assert "Fracture, No Finding" in caplog.text
    count = train.sum()
    np.testing.assert_allclose(result.head.probabilities(x[:5])[:, 1], 0.5 / (count + 1))
    np.testing.assert_allclose(result.head.probabilities(x[:5])[:, 3], (count + 0.5) / (count + 1))
    assert result.head.provenance["untrained_labels"] == ["Fracture", "No Finding"]


def test_fit_probe_on_split__never_reads_a_test_row():
    x, y, split = random_case(3)
    changed_x, changed_y = x.copy(), y.copy()
    changed_x[split == "test"], changed_y[split == "test"] = np.nan, True
    first = probe.fit_probe_on_split(x, y, split, label_names=LABELS).head
    second = probe.fit_probe_on_split(changed_x, changed_y, split, label_names=LABELS).head
    np.testing.assert_array_equal(first.weight, second.weight)
    assert first.provenance == second.provenance


def test_mean_log_loss__equals_scikit_learn_and_is_stable():
    generator = np.random.default_rng(0)
    y, logits = generator.random((30, 3)) < 0.4, generator.normal(size=(30, 3)) * 4
    expected = np.mean([log_loss(t, expit(s)) for t, s in zip(y.T, logits.T, strict=True)])
    np.testing.assert_allclose(probe.mean_log_loss(y, logits), expected, rtol=1e-12)
    assert probe.mean_log_loss(np.array([[1]]), np.array([[-900.0]])) == 900


def test_unfinished_fits__are_said(caplog):
    x, y, split = random_case(4)
    with caplog.at_level(logging.WARNING):
        probe.fit_probe_on_split(x, y, split, label_names=LABELS, max_iter=1, c_grid=[100.0])
    assert "before they reached tol" in caplog.text and "Edema at C = 100" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"select": "f1"}, UsageError, "unknown selection 'f1'"),
        ({"c_grid": [0.0, 1.0]}, UsageError, "above 0"),
        ({"c_grid": []}, UsageError, "at least one"),
        ({"label_names": ("a",)}, DataError, "1 label names do not fit"),
    ],
)
def test_fit_probe__refuses_wrong_requests(change, error, message):
    x, y, split = random_case()
    with pytest.raises(error, match=message):
        probe.fit_probe_on_split(x, y, split, **({"label_names": LABELS} | change))


def test_fit_probe__refuses_empty_or_broken_data():
    x, y, split = random_case()
    with pytest.raises(DataError, match="no training samples"):
        probe.fit_probe_on_split(x, y, np.where(split == "train", "", split), label_names=LABELS)
    with pytest.raises(DataError, match="no validation samples to choose among 5"):
        probe.fit_probe_on_split(x, y, np.where(split == "val", "", split), label_names=LABELS)
    x[0] = np.inf
    with pytest.raises(DataError, match="training: 1 embeddings are not finite"):
        probe.fit_probe_on_split(x, y, split, label_names=LABELS)


def numpy_paper_probe(x, y, x_val, y_val, seed, epochs=10, patience=5, rate=1e-4, decay=1e-2, batch=24):
    """The study's loop with AdamW written out; random draws come from the same torch generator."""
    generator = torch.Generator().manual_seed(seed)
    dimensions, labels = x.shape[1], y.shape[1]
    limit = math.sqrt(6 / (dimensions + labels))
    weight = torch.empty(labels, dimensions).uniform_(-limit, limit, generator=generator).double().numpy()
    bias = torch.empty(labels).uniform_(-1 / math.sqrt(dimensions), 1 / math.sqrt(dimensions), generator=generator)
    parameters = [weight, bias.double().numpy()]
    moments = [[np.zeros_like(p), np.zeros_like(p)] for p in parameters]
    step, best, waited, history = 0, (np.inf, None, None), 0, []

    def loss(features, truth):
        logits = features @ parameters[0].T + parameters[1]
        return np.mean(np.logaddexp(0, logits) - truth * logits)

    for epoch in range(epochs):
        lr = 0.5 * rate * (1 + math.cos(math.pi * epoch / epochs))
        order = torch.randperm(len(x), generator=generator).numpy()
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            error = (expit(x[rows] @ parameters[0].T + parameters[1]) - y[rows]) / (len(rows) * labels)
            step += 1
            for p, (m, v), g in zip(parameters, moments, (error.T @ x[rows], error.sum(axis=0)), strict=True):
                p *= 1 - lr * decay
                m[:] = 0.9 * m + 0.1 * g
                v[:] = 0.999 * v + 0.001 * g * g
                p -= lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        val = np.mean([loss(x_val[s : s + batch], y_val[s : s + batch]) for s in range(0, len(x_val), batch)])
        history.append((lr, val))
        if val < best[0] - 1e-4:
            best, waited = (val, parameters[0].copy(), parameters[1].copy()), 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best, history


def test_paper_probe__equals_the_loop_written_out():
    x, y, split = random_case(5)
    train, val = split == "train", split == "val"
    result = probe.paper_probe(x[train], y[train], x[val], y[val], label_names=LABELS, seed=42)
    (loss, weight, bias), history = numpy_paper_probe(
        x[train].astype(float), y[train], x[val].astype(float), y[val], seed=42
    )
    np.testing.assert_allclose(result.head.weight, weight, atol=1e-5)
    np.testing.assert_allclose(result.head.bias, bias, atol=1e-5)
    np.testing.assert_allclose([row["val_loss"] for row in result.history], [val for _, val in history], atol=1e-5)
    np.testing.assert_allclose([row["learning_rate"] for row in result.history], [lr for lr, _ in history], rtol=1e-9)
    np.testing.assert_allclose(result.history[result.head.provenance["best_epoch"] - 1]["val_loss"], loss, atol=1e-5)
    assert not result.head.normalised
    again = probe.paper_probe(x[train], y[train], x[val], y[val], label_names=LABELS, seed=42)
    np.testing.assert_array_equal(again.head.weight, result.head.weight)
    other = probe.paper_probe(x[train], y[train], x[val], y[val], label_names=LABELS, seed=43)
    assert (other.head.weight != result.head.weight).any()


def test_paper_probe__stops_after_its_patience_and_keeps_the_best_epoch():
    x, y, split = random_case(6)
    train, val = split == "train", split == "val"
    settings = probe.PaperProbeSettings(learning_rate=0.5, epochs=40, patience=3)
    result = probe.paper_probe(x[train], y[train], x[val], ~y[val], label_names=LABELS, settings=settings)
    losses = [row["val_loss"] for row in result.history]
    best = result.head.provenance["best_epoch"]
    assert len(losses) == best + 3 < 40
    assert losses[best - 1] == min(losses)
    logits = result.head.logits(x[val])
    batches = [probe.mean_log_loss(~y[val][s : s + 24], logits[s : s + 24]) for s in range(0, val.sum(), 24)]
    np.testing.assert_allclose(np.mean(batches), losses[best - 1], rtol=1e-4)
