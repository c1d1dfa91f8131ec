"""Sweeps and their choices: what scikit-learn's cross-validation finds, and nothing from a row that must not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from analysis.crossfit import group_folds
from analysis.heads import LinearHead
from analysis.probes import LinearProbe, MLPProbe, TipAdapterProbe, candidates, fit_probe, fitters, sweeping
from engine.errors import DataError, UsageError
from tests.analysis.probes.data import study_like

NAMES = ("a", "b", "c")
SMALL = {"k": [10, 5], "alpha": [1, 100], "beta": [1, 5.5], "hidden": [8, 16], "epochs": [90]}
SMALL_ATTENTION = {"epochs": [20, 30]}


def case(rows=240, dimensions=8):
    x, y = study_like(rows, dimensions)
    return x + 1, y[:, [0, 1, 3]], np.array([f"p{row // 2}" for row in range(rows)], dtype=object)


def small_grid(kind):
    grids = SMALL | (SMALL_ATTENTION if kind == "attention" else {})
    return {name: grids[name] for name in candidates.PARAMETERS.get(kind, ())}


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_folds__hold_out_what_scikit_learn_would_and_choose_as_it_would():
    x, y, groups = case()
    grid = [0.1, 30.0]
    found = sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=3, seeds=[0, 1], c_grid=grid)
    expected = np.zeros((2, 240, 3))
    for seed in (0, 1):
        fold = group_folds(groups, 3, seed, y)
        for level, c in enumerate(grid):
            for label in range(3):
                for number in range(3):
                    out = fold == number
                    model = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(unit(x)[~out], y[~out, label])
                    expected[level, out, label] += model.decision_function(unit(x)[out]) / 2
    np.testing.assert_allclose(found.logits, expected, atol=0.05)
    losses = [
        np.mean([log_loss(t, 1 / (1 + np.exp(-z))) for t, z in zip(y.T, level.T, strict=True)]) for level in expected
    ]
    np.testing.assert_allclose([score["log_loss"] for score in found.scores], losses, atol=1e-3)
    assert found.chosen == int(np.argmin(losses))
    kept = LogisticRegression(C=grid[found.chosen], tol=1e-9, max_iter=5000).fit(unit(x), y[:, 1])
    assert isinstance(found.probe, LinearHead)
    np.testing.assert_allclose(found.probe.weight[1], kept.coef_[0], atol=0.1)
    assert len(found.convergence()) == 7 * 3 * 2 and found.convergence()["converged"].all()


def test_ranking_over_folds__is_even_where_nothing_is_learnt():
    generator = np.random.default_rng(0)
    scores = []
    for seed in range(6):
        x, y = generator.normal(size=(90, 5)), generator.random((90, 3)) < 0.3
        groups = np.arange(90).astype(str)
        found = sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=9, seeds=[seed], c_grid=[1e-6])
        scores += [roc_auc_score(y[:, label], found.levelled[0, :, label]) for label in range(3)]
    assert abs(np.mean(scores) - 0.5) < 0.06


def test_validation__gives_the_studys_own_probe():
    x, y, _ = case()
    options = {"label_names": NAMES, "c_grid": [0.1, 10.0, 1000.0]}
    found = sweeping.sweep_on_validation(x[:160], y[:160], x[160:], y[160:], **options)
    head = fit_probe(x[:160], y[:160], x[160:], y[160:], **options).head
    np.testing.assert_array_equal(found.probe.weight, head.weight)
    assert head.provenance["C"] == found.candidates[found.chosen].C


@pytest.mark.parametrize("kind", candidates.KINDS)
def test_every_kind__answers_for_held_out_rows(kind, caplog):
    x, y, groups = case(120)
    y[:, 2] = False
    text = np.random.default_rng(0).normal(size=(3, 8))
    options = {
        "label_names": NAMES,
        "kind": kind,
        "c_grid": [0.01, 1.0],
        "class_weights": ["none", "balanced"],
        "text": text,
        "grid": small_grid(kind),
    }
    if kind == "attention":
        x = np.stack([x, -x], axis=1).astype(np.float16)
    found = sweeping.sweep_on_folds(x, y, groups, folds=3, **options)
    count = {"ridge": 1, "nearest-mean": 1, "neighbours": 2, "tip-adapter": 4, "mlp": 2, "attention": 2}.get(kind, 4)
    assert found.logits.shape == (count, 120, 3) and np.isfinite(found.logits).all()
    assert found.untrained_labels == ("c",) and "but their prior: c" in caplog.text
    assert isinstance(found.probe, LinearHead) == (kind in ("logistic", "text-prior", "ridge", "nearest-mean"))
    assert roc_auc_score(y[:, 0], found.levelled[found.chosen][:, 0]) > 0.55
    assert sweeping.sweep_on_validation(x[:80], y[:80], x[80:], y[80:], **options).logits.shape == (count, 40, 3)


def test_neighbours__every_k_is_scikit_learns_and_the_best_on_validation_is_kept():
    x, y, _ = case(150)
    grid = {"k": [3, 40, 9]}
    found = sweeping.sweep_on_validation(
        x[:100], y[:100], x[100:], y[100:], label_names=NAMES, kind="neighbours", grid=grid
    )
    assert [candidate.name for candidate in found.candidates] == ["k = 40", "k = 9", "k = 3"]
    losses = []
    for k, logits in zip((40, 9, 3), found.logits, strict=True):
        oracle = KNeighborsClassifier(k, metric="cosine").fit(x[:100], y[:100].astype(int))
        share = np.stack([chance[:, 1] for chance in oracle.predict_proba(x[100:])], axis=1)
        np.testing.assert_allclose(logits, np.log(share + 0.5 / k) - np.log(1 - share + 0.5 / k), atol=1e-9)
        losses.append(np.mean(np.logaddexp(0, logits) - y[100:] * logits))
    assert found.chosen == int(np.argmin(losses))
    assert found.probe.probe.n_neighbors == (40, 9, 3)[found.chosen]


@pytest.mark.parametrize("kind", ["tip-adapter", "mlp"])
def test_a_grid__gives_what_each_estimator_gives_alone(kind):
    x, y, _ = case(90)
    text = np.random.default_rng(0).normal(size=(3, 8))
    grid = {"alpha": [0.5, 20], "beta": [1, 6]} if kind == "tip-adapter" else {"hidden": [4, 8], "epochs": [3, 5]}
    found = sweeping.sweep_on_validation(
        x[:60], y[:60], x[60:], y[60:], label_names=NAMES, kind=kind, grid=grid, text=text, scale=3.0, seed=4
    )
    assert len(found.candidates) == 4
    for candidate, logits in zip(found.candidates, found.logits, strict=True):
        values = dict(candidate.parameters)
        if kind == "mlp":
            alone = MLPProbe(values["hidden"], epochs=values["epochs"], random_state=4)
        else:
            alone = TipAdapterProbe(text, alpha=values["alpha"], beta=values["beta"], scale=3.0, bias=None)
        alone.fit(unit(x[:60]), y[:60].astype(int))
        np.testing.assert_allclose(logits, alone.decision_function(unit(x[60:])), rtol=1e-9, atol=1e-12)
    scores = [
        np.mean([average_precision_score(t, z) for t, z in zip(y[60:].T, each.T, strict=True) if t.any()])
        for each in found.logits
    ]
    losses = [np.mean(np.logaddexp(0, each) - y[60:] * each) for each in found.logits]
    assert found.chosen == int(np.argmax(scores) if kind == "tip-adapter" else np.argmin(losses))


def test_feature_sets__are_candidates_beside_one_another():
    x, y, _ = case(160)
    x = x * np.random.default_rng(0).uniform(0.2, 5, 160)[:, None]
    found = sweeping.sweep_on_validation(
        x[:100], y[:100], x[100:], y[100:], label_names=NAMES, c_grid=[0.1, 3.0], features=["unit", "raw"]
    )
    names = ["C = 0.1", "C = 3", "C = 0.1, raw", "C = 3, raw"]
    assert [candidate.name for candidate in found.candidates] == names
    for candidate, logits in zip(found.candidates, found.logits, strict=True):
        values = unit(x) if candidate.features == "unit" else x
        oracle = LogisticRegression(C=candidate.C, tol=1e-9, max_iter=5000).fit(values[:100], y[:100, 1])
        np.testing.assert_allclose(logits[:, 1], oracle.decision_function(values[100:]), atol=0.05)
    assert isinstance(found.probe, LinearHead)
    np.testing.assert_allclose(found.probe.logits(x[100:]), found.logits[found.chosen], atol=1e-9)
    assert found.probe.normalised == (found.candidates[found.chosen].features == "unit")
    table = found.convergence()
    assert len(table) == 3 * 2 * 2 and set(table["features"]) == {"unit", "raw"}
    worst = (table["gap"] / table["objective"]).max()
    assert f"all 12 problems proved within 1e-06 of their minimum (relative); worst gap {worst:.1e}" in (
        found.convergence_sentence()
    )
    with pytest.raises(UsageError, match="'neighbours' is always on embeddings of length 1; raw ones are for logistic"):
        candidates.Options(kind="neighbours", features=["raw"])


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_the_device_asked_for__is_handed_on(monkeypatch, kind):
    x, y, _ = case(60)
    asked = []

    def on_device(values, device):
        asked.append(device)
        return values

    monkeypatch.setattr(fitters, "on_device", on_device)
    monkeypatch.setattr(fitters, "MLPProbe", lambda *_, device, **__: asked.append(device) or MLPProbe(2, epochs=1))
    sweeping.sweep_on_validation(
        x[:40], y[:40], x[40:], y[40:], label_names=NAMES, kind=kind, grid=small_grid(kind), device="cuda:7"
    )
    assert asked and set(asked) == {"cuda:7"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_sweep_on_the_gpu__reaches_the_objectives_of_the_cpu():
    x, y = study_like(400, 24)
    options = {"label_names": [str(label) for label in range(14)], "c_grid": [1e-4, 1.0, 1e4],
               "class_weights": ["none", "balanced"]}  # fmt: skip
    groups = np.arange(400).astype(str)
    tables = [
        sweeping.sweep_on_folds(x, y, groups, folds=3, device=device, **options).convergence()
        for device in ("cpu", "cuda")
    ]
    assert tables[1]["converged"].all()
    known = tables[0]["trained"]
    np.testing.assert_allclose(tables[1]["objective"][known], tables[0]["objective"][known], rtol=1e-6)
    probe = LinearProbe().fit(torch.tensor(x, device="cuda"), torch.tensor(y, device="cuda"))
    np.testing.assert_allclose(probe.coef_, LinearProbe().fit(x, y).coef_, rtol=1e-5, atol=1e-7)
    network = MLPProbe(8, epochs=2, device="cuda").fit(x, y)
    np.testing.assert_allclose(
        network.decision_function(x), MLPProbe(8, epochs=2).fit(x, y).decision_function(x), atol=1e-2
    )


def test_wrong_requests__are_refused_with_what_is_wrong():
    x, y, groups = case(60)
    with pytest.raises(UsageError, match="unknown kind of probe 'svm'"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, kind="svm")
    with pytest.raises(UsageError, match="text vectors"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, kind="tip-adapter")
    with pytest.raises(DataError, match="cross-validation: embeddings"):
        sweeping.sweep_on_folds(x[:50], y, groups, label_names=NAMES)
    with pytest.raises(UsageError, match="31 folds of 30 groups"):
        sweeping.sweep_on_folds(x, y, groups, label_names=NAMES, folds=31)
    lone = np.zeros((60, 1), dtype=bool)
    lone[:2] = True
    with pytest.raises(DataError, match="label 'a' has one value only"):
        sweeping.sweep_on_folds(x, lone, groups, label_names=("a",), kind="ridge")
    with pytest.raises(DataError, match="label 'a' has one value only among the training samples, so a ridge probe"):
        sweeping.sweep_on_validation(x, lone[::-1] & False, x, lone, label_names=("a",), kind="ridge")
