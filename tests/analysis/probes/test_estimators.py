"""The family of probes: scikit-learn's own checks, its tools, and oracles for what each computes."""

from __future__ import annotations

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from analysis.probes import (
    AttentionPoolingProbe,
    LinearProbe,
    MLPProbe,
    NearestMean,
    NeighbourProbe,
    RidgeProbe,
    TextPriorProbe,
    TipAdapterProbe,
    solve_logistic,
)
from analysis.probes.linear import ridge_path
from tests.analysis.probes.data import study_like

FAMILY = [
    LinearProbe(),
    TextPriorProbe(),
    RidgeProbe(),
    NearestMean(),
    NeighbourProbe(n_neighbors=5, metric="euclidean"),
    TipAdapterProbe(),
    MLPProbe(hidden=16, epochs=25, batch_size=64),
    AttentionPoolingProbe(epochs=25),
]


@parametrize_with_checks(FAMILY)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


NAMES = [type(estimator).__name__ for estimator in FAMILY]


@pytest.mark.parametrize("estimator", FAMILY, ids=NAMES)
def test_several_labels__in_pipelines_frames_tensors_and_files(estimator, tmp_path):
    x, y = study_like(120, 6)
    y = y[:, [0, 1, 2]].astype(int)
    pipeline = make_pipeline(StandardScaler(), estimator).fit(x, y)
    assert cross_val_score(pipeline, x, y, cv=3).shape == (3,)
    frame = pd.DataFrame(x, columns=[f"x{column}" for column in range(6)])
    fitted = estimator.fit(frame, pd.DataFrame(y, columns=["a", "b", "c"]))
    chances = fitted.predict_proba(frame)
    assert chances.shape == (120, 3) and (chances >= 0).all() and (chances <= 1).all()
    np.testing.assert_array_equal(fitted.predict(frame), chances > 0.5)
    tensors = estimator.fit(torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(tensors.predict_proba(torch.tensor(x)), chances, rtol=1e-12)
    joblib.dump(tensors, tmp_path / "probe.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "probe.joblib").predict_proba(x), tensors.predict_proba(x))


def test_grid_search__finds_the_strength_that_folds_prefer():
    x, y = study_like(200, 8)
    grid = {"C": [1e-3, 1.0]}
    ours = GridSearchCV(LinearProbe(), grid, scoring="neg_log_loss", cv=3).fit(x, y[:, 0])
    theirs = GridSearchCV(LogisticRegression(tol=1e-8), grid, scoring="neg_log_loss", cv=3).fit(x, y[:, 0])
    assert ours.best_params_ == theirs.best_params_
    np.testing.assert_allclose(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], rtol=1e-3)


def test_several_classes__are_one_against_the_rest():
    x, _ = study_like(150, 5)
    y = np.array(["b", "c", "a"])[np.digitize(x[:, 0], np.quantile(x[:, 0], [1 / 3, 2 / 3]))]
    probe = LinearProbe(C=5.0, tol=1e-10).fit(x, y)
    for column, name in enumerate(probe.classes_):
        oracle = LogisticRegression(C=5.0, tol=1e-10).fit(x, y == name)
        np.testing.assert_allclose(probe.coef_[column], oracle.coef_[0], atol=1e-3)
    np.testing.assert_allclose(probe.predict_proba(x).sum(axis=1), 1)
    assert (probe.predict(x) == y).mean() > 0.7


@pytest.mark.parametrize("weighted", [False, True])
def test_ridge__equals_scikit_learn_and_a_loop_that_leaves_one_out(weighted):
    x, y = study_like(40, 6)
    target, alphas = 2.0 * y[:, :3] - 1, np.array([0.1, 1.0, 30.0])
    weight = np.random.default_rng(0).random(40) + 0.5 if weighted else np.ones(40)
    coefficients, intercepts, errors = ridge_path(x, target, alphas, weight)
    oracle = RidgeCV(alphas, store_cv_results=True).fit(x, target, sample_weight=weight if weighted else None)
    place = list(alphas).index(oracle.alpha_)
    np.testing.assert_allclose(coefficients[place], oracle.coef_, rtol=1e-8)
    np.testing.assert_allclose(intercepts[place], oracle.intercept_, rtol=1e-8)
    from sklearn.linear_model import Ridge

    for number, alpha in enumerate(alphas):
        left_out = np.stack(
            [
                Ridge(alpha).fit(x, target, sample_weight=weight - left).predict(x[[row]])[0]
                for row in range(40)
                for left in [np.minimum(weight, 1) * (np.arange(40) == row)]
            ]
        )
        expected = np.average((target - left_out) ** 2, axis=0, weights=weight)
        np.testing.assert_allclose(errors[number], expected, rtol=1e-6)
    probe = RidgeProbe(alphas).fit(x, y[:, :3], sample_weight=weight)
    assert (probe.alpha_ == alphas[errors.mean(axis=1).argmin()]).all()
    apart = RidgeProbe(alphas, alpha_per_label=True).fit(x, y[:, :3], sample_weight=weight)
    np.testing.assert_array_equal(apart.alpha_, alphas[errors.argmin(axis=0)])


def test_ridge_with_fewer_rows_than_dimensions__equals_leaving_out():
    x, y = study_like(9, 30)
    target = y[:, 0] * 2.0 - 1
    _, _, errors = ridge_path(x, target[:, None], np.array([0.5]))
    from sklearn.linear_model import Ridge

    found = cross_val_predict(Ridge(0.5), x, target, cv=LeaveOneOut())
    np.testing.assert_allclose(errors[0], ((target - found) ** 2).mean(), rtol=1e-8)


def test_nearest_mean__is_the_nearest_centroid():
    x, y = study_like(200, 4)
    for truth in (y[:, 0].astype(int), np.digitize(x[:, 1], [-0.3, 0.3])):
        np.testing.assert_array_equal(
            NearestMean().fit(x, truth).predict(x), NearestCentroid().fit(x, truth).predict(x)
        )
    y[:, 1], y[:, 2] = False, True
    logits = NearestMean().fit(x, y[:, :3]).decision_function(x)
    assert (logits[:, 1:] == 0).all() and (logits[:, 0] != 0).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours__are_those_of_scikit_learn(metric):
    x, y = study_like(90, 5)
    probe = NeighbourProbe(7, metric=metric).fit(x[:60], y[:60, :4].astype(int))
    oracle = KNeighborsClassifier(7, metric=metric).fit(x[:60], y[:60, :4].astype(int))
    shares = np.stack([chance[:, 1] if chance.shape[1] > 1 else chance[:, 0] * 0 for chance in oracle.predict_proba(x)])
    np.testing.assert_allclose(probe.shares(x), shares.T)
    np.testing.assert_array_equal(probe.predict(x), shares.T > 0.5)
    assert NeighbourProbe(1000).fit(x, y[:, 0]).shares(x).shape == (90, 1)  # more than there are


def test_neighbours__are_found_far_from_the_origin_too():
    x, y = study_like(90, 5)
    far = x + 1e7
    probe = NeighbourProbe(5, metric="euclidean").fit(far[:60], y[:60, :2].astype(int))
    oracle = KNeighborsClassifier(5, algorithm="kd_tree").fit(far[:60], y[:60, :2].astype(int))
    np.testing.assert_allclose(probe.shares(far), np.stack([chance[:, 1] for chance in oracle.predict_proba(far)]).T)


def test_neighbours_equally_near__come_in_the_order_of_rows():
    """Multiples of whole numbers have the same direction, and not the same last bits."""
    rng = np.random.default_rng(3)
    rows = rng.integers(1, 4, (30, 3))
    x = np.concatenate([rows, 3 * rows, 7 * rows])
    y = np.repeat([[1, 0], [0, 1], [0, 1]], 30, axis=0)
    np.testing.assert_array_equal(NeighbourProbe(1).fit(x, y).shares(x)[:, 0], 1.0)


def test_tip_adapter__is_its_formula_and_zero_shot_without_affinities():
    x, y = study_like(50, 6)
    text = np.random.default_rng(0).normal(size=(2, 6))
    probe = TipAdapterProbe(text, alpha=3.0, beta=2.0, scale=4.0, bias=-1.0).fit(x[:30], y[:30, :2].astype(int))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.empty((20, 2))
    for row in range(20):
        affinity = [np.exp(-2.0 * (1 - unit[30 + row] @ unit[stored])) for stored in range(30)]
        for label in range(2):
            there = [a for a, t in zip(affinity, y[:30, label], strict=True) if t]
            absent = [a for a, t in zip(affinity, y[:30, label], strict=True) if not t]
            expected[row, label] = 4 * unit[30 + row] @ text[label] - 1 + 3 * (np.mean(there) - np.mean(absent))
    np.testing.assert_allclose(probe.decision_function(x[30:]), expected, rtol=1e-10)
    none = TipAdapterProbe(text, alpha=0.0).fit(x, y[:, :2].astype(int))
    np.testing.assert_allclose(none.decision_function(x), unit @ text.T, rtol=1e-10)


def test_text_prior__runs_from_zero_shot_to_the_probe():
    x, y = study_like(300, 6)
    text, truth = np.random.default_rng(1).normal(size=(1, 6)), y[:, 0]
    nearly_text = TextPriorProbe(text, C=1e-9, scale=2.0).fit(x, truth)
    np.testing.assert_allclose(nearly_text.coef_, 2 * text, atol=1e-5)
    ends = [TextPriorProbe(prior, C=1e7, tol=1e-12).fit(x, truth).coef_ for prior in (text, None)]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-3)
    c = 0.7
    middle = TextPriorProbe(text, C=c, tol=1e-10).fit(x, truth)

    def value(parameters):
        logits = x @ parameters[:-1] + parameters[-1]
        away = parameters[:-1] - text[0]
        return c * np.sum(np.logaddexp(0, logits) - truth * logits) + 0.5 * away @ away

    found = minimize(value, np.zeros(7), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(np.append(middle.coef_, middle.intercept_), found.x, atol=1e-3)
    with pytest.raises(ValueError, match="text vectors"):
        TextPriorProbe(text[:, :3]).fit(x, truth)


def test_an_mlp__learns_what_no_linear_probe_can():
    x = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert LinearProbe().fit(x, y).score(x, y) < 0.65
    probe = MLPProbe(hidden=32, epochs=60, learning_rate=0.02).fit(x[:400], y[:400])
    assert probe.score(x[400:], y[400:]) > 0.9
    again = MLPProbe(hidden=32, epochs=60, learning_rate=0.02).fit(x[:400], y[:400])
    np.testing.assert_array_equal(again.decision_function(x), probe.decision_function(x))


def test_attention__finds_the_token_that_bears_the_label():
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(300, 9, 8)).astype(np.float32)
    tokens[:, :, 0] *= 6  # the mean over tokens says little
    y = generator.random(300) < 0.5
    place = generator.integers(0, 9, 300)
    tokens[np.arange(300), place, 0] = np.where(y, 6, -6)
    tokens[np.arange(300), place, 1] += 6
    probe = AttentionPoolingProbe(epochs=60, learning_rate=0.05).fit(tokens[:200], y[:200])
    assert probe.score(tokens[200:], y[200:]) > 0.95
    attention = probe.attention(tokens[200:])
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-5)
    assert (attention[:, 0].argmax(axis=1) == place[200:]).mean() > 0.9
    assert probe.n_features_in_ == 8
    with pytest.raises(ValueError, match="NaN"):
        probe.fit(np.full((4, 2, 8), np.nan), [0, 1, 0, 1])


def test_a_probe__becomes_a_head():
    x, y = study_like(100, 5)
    for probe in (LinearProbe(normalize=True), RidgeProbe(), NearestMean(normalize=True)):
        probe.fit(x, y[:, :2].astype(int))
        head = probe.to_head(("a", "b"), "encoder")
        np.testing.assert_allclose(head.logits(x), probe.decision_function(x), atol=1e-12)


@pytest.mark.parametrize("estimator", FAMILY, ids=NAMES)
def test_labels_of_one_value__are_defined_and_one_class_alone_is_refused(estimator):
    x, y = study_like(60, 4)
    y = y[:, :3].astype(int)
    y[:, 1], y[:, 2] = 0, 1
    chances = estimator.fit(x, y).predict_proba(x)
    assert np.isfinite(chances).all()
    with pytest.raises(ValueError, match="at least two classes"):
        estimator.fit(x, np.ones(60))
    constant = estimator.fit(np.full((6, 4), 0.3), [0, 1, 1, 1, 0, 1]).predict_proba(np.full((2, 4), 0.3))
    assert np.isfinite(constant).all()


def test_choices__are_made_without_the_rows_that_count_nothing():
    x, y = study_like(80, 5)
    weight = np.r_[np.ones(60), np.zeros(20)]
    changed = y.copy()
    changed[60:] = ~changed[60:]
    one, other = (solve_logistic(x, truth, [0.1, 10.0], row_weights=weight[None]) for truth in (y, changed))
    np.testing.assert_array_equal(one.weight, other.weight)
    alphas = [RidgeProbe().fit(x, truth[:, :3].astype(int), weight).alpha_ for truth in (y, changed)]
    np.testing.assert_array_equal(*alphas)
