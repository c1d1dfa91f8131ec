"""The joint solver against scikit-learn's own fits of the same objective, problem by problem."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from analysis.probes.logistic import solve_logistic, tile_width
from engine.errors import DataError, UsageError
from tests.analysis.probes.data import study_like

SWEEP = tuple(np.logspace(-4, 4, 10))


def objective(x, y, weight, bias, c, row_weight=None):
    logits = x @ weight + bias
    losses = np.logaddexp(0, logits) - y * logits
    return c * np.sum(losses if row_weight is None else row_weight * losses) + 0.5 * weight @ weight


def scikit_learn(x, y, c, solver="lbfgs", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at tol 1e-8 L-BFGS says that it cannot go on
        model = LogisticRegression(C=c, tol=1e-8, max_iter=20_000, solver=solver, **options)
        return model.fit(x, y)


def folds(rows, count=5, seed=1):
    return np.stack([np.random.default_rng(seed).integers(0, count, rows) != fold for fold in range(count)])


def above(x, y, fits, fold, label, level, solver="lbfgs"):
    """Return how far, relatively, our objective is above scikit-learn's."""
    rows, c = folds(len(x))[fold], SWEEP[level]
    model = scikit_learn(x[rows], y[rows, label], c, solver)
    theirs = objective(x[rows], y[rows, label], model.coef_[0], model.intercept_[0], c)
    weight, bias = fits.weight[fold, 0, label, level], fits.bias[fold, 0, label, level]
    ours = objective(x[rows], y[rows, label], weight, bias, c)
    np.testing.assert_allclose(fits.objective[fold, 0, label, level], ours, rtol=1e-10)
    return ours / theirs - 1


def test_thirty_problems_of_the_sweep__are_not_above_scikit_learn():
    x, y = study_like(1494, 64)
    fits = solve_logistic(x, y, SWEEP, row_weights=folds(len(x)))
    assert fits.converged.all() and fits.trained.all() and fits.bias.shape == (5, 1, 14, 10)
    extremes = [(fold, label, level) for fold in (0, 4) for label in (0, 7, 13) for level in (0, 5, 9)]
    others = [(fold, (3 * fold + level) % 14, level) for fold in (1, 2, 3) for level in (1, 3, 6, 8)]
    assert max(above(x, y, fits, *which) for which in extremes + others) < 1e-6


def test_extremes_at_full_size__are_not_above_newton_cholesky():
    x, y = study_like(7470, 512)
    rows = folds(len(x))[:1]
    fits = solve_logistic(x.astype(np.float32), y[:, [0, 13]], SWEEP[::9], row_weights=rows)
    assert fits.converged.all()
    x = x.astype(np.float32).astype(float)[rows[0]]
    truth = y[rows[0], 13]
    model = scikit_learn(x, truth, SWEEP[9], "newton-cholesky")
    theirs = objective(x, truth, model.coef_[0], model.intercept_[0], SWEEP[9])
    assert objective(x, truth, fits.weight[0, 0, 1, 1], fits.bias[0, 0, 1, 1], SWEEP[9]) < theirs * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 5, 9, 13])
def test_whole_ladders_at_full_size__are_not_above_scikit_learn(label):
    x, y = study_like(7470, 512)
    fits = solve_logistic(x, y, SWEEP, row_weights=folds(len(x)))
    assert fits.converged.all()
    levels = range(10) if label in (0, 13) else (0, 3, 5, 7, 8)
    assert max(above(x, y, fits, label % 5, label, level) for level in levels) < 1e-6


def test_the_bound__holds_and_the_tolerance_is_kept():
    x, y = study_like(500, 16)
    for tol in (1e-2, 1e-5):
        rough = solve_logistic(x, y, SWEEP, tol=tol)
        exact = solve_logistic(x, y, SWEEP, tol=1e-13, precision="float64")
        assert exact.converged.all() and rough.converged.all()
        assert (rough.objective - exact.objective <= rough.gap * (1 + 1e-9) + 1e-12 * exact.objective).all()
        assert (rough.gap <= tol * rough.objective).all()
    np.testing.assert_allclose(rough.gradient_norm**2 / 2, rough.gap)


def test_sample_and_class_weights__are_those_of_scikit_learn():
    x, y = study_like(600, 10)
    weights = np.random.default_rng(3).random((2, 600)) * (folds(600, 2) > 0)
    fits = solve_logistic(x, y[:, [2, 9]], [0.5, 50.0], row_weights=weights, class_weights=["none", "balanced"])
    for group, weighting, label, level in np.ndindex(fits.bias.shape):
        model = LogisticRegression(
            C=fits.c_grid[level], tol=1e-10, max_iter=9000, class_weight=(None, "balanced")[weighting]
        )
        truth, used = y[:, [2, 9][label]], weights[group] > 0
        model.fit(x[used], truth[used])
        # Balanced by hand: how scikit-learn counts rows with sample weights has changed between its releases.
        of_row = weights[group].copy()
        if weighting:
            positive, negative = of_row[truth].sum(), of_row[~truth].sum()
            of_row *= np.where(truth, (positive + negative) / (2 * positive), (positive + negative) / (2 * negative))
        model.set_params(class_weight=None).fit(x, truth, sample_weight=of_row)
        theirs = objective(x, truth, model.coef_[0], model.intercept_[0], model.C, of_row)
        ours = objective(
            x, truth, fits.weight[group, weighting, label, level], fits.bias[group, weighting, label, level],
            model.C, of_row,
        )  # fmt: skip
        assert abs(ours / theirs - 1) < 1e-6


def test_balanced_weights__are_those_of_scikit_learn_without_sample_weights():
    x, y = study_like(400, 8)
    fits = solve_logistic(x, y[:, 4:5], [3.0], class_weights=["balanced"], tol=1e-9)
    model = LogisticRegression(C=3.0, tol=1e-10, max_iter=9000, class_weight="balanced").fit(x, y[:, 4])
    np.testing.assert_allclose(fits.weight[0, 0, 0, 0], model.coef_[0], atol=1e-4)


def test_offsets__stand_in_the_logits():
    x, y = study_like(300, 6)
    truth, offset, c = y[:, 1].astype(float), np.random.default_rng(0).normal(size=300) * 2, 4.0
    fits = solve_logistic(x, y[:, 1:2], [c], offset=offset[:, None], tol=1e-9)

    def value(parameters):
        logits = x @ parameters[:-1] + parameters[-1] + offset
        return c * np.sum(np.logaddexp(0, logits) - truth * logits) + 0.5 * parameters[:-1] @ parameters[:-1]

    found = minimize(value, np.zeros(7), method="BFGS", options={"gtol": 1e-7})
    assert value(np.append(fits.weight[0, 0, 0, 0], fits.bias[0, 0, 0, 0])) <= found.fun * (1 + 1e-8)


def test_order_of_c_and_tiles__change_no_solution():
    x, y = study_like(400, 12)
    whole = solve_logistic(x, y, [0.1, 10.0, 1.0], row_weights=folds(400, 3), tol=1e-10)
    tiled = solve_logistic(x, y, [1.0, 0.1, 10.0], row_weights=folds(400, 3), tol=1e-10, memory=200_000)
    np.testing.assert_allclose(whole.weight[..., [2, 0, 1], :], tiled.weight, atol=1e-3)
    np.testing.assert_allclose(whole.objective[..., [2, 0, 1]], tiled.objective, rtol=1e-9)
    assert tile_width(400, 12, 4, 200_000) == 7
    assert tile_width(10**6, 512, 4, 1) == 1


def test_memory__is_a_bound_on_what_is_held_at_once(monkeypatch):
    from analysis.probes import newton

    widths = []
    solve = newton.ChainSolver.solve

    def watched(self, weight, bias):
        widths.append(len(weight))
        return solve(self, weight, bias)

    monkeypatch.setattr(newton.ChainSolver, "solve", watched)
    x, y = study_like(400, 12)
    solve_logistic(x, y, [1.0], row_weights=folds(400, 5), memory=200_000)
    assert max(widths) == 7 and sum(widths) == 70


@pytest.mark.parametrize("width", [3, 48])
def test_several_cores_and_chains_that_wait__solve_the_same_problems(monkeypatch, width):
    from analysis.probes import logistic, threads

    x, y = study_like(400, 12)
    rows = folds(400, 3)
    alone = solve_logistic(x, y, SWEEP, row_weights=rows)
    monkeypatch.setattr(threads, "_WORTH_SHARING", 0)
    monkeypatch.setattr(logistic, "_WIDTH", width)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        dealt, again = (solve_logistic(x, y, SWEEP, row_weights=rows) for _ in range(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert dealt.converged.all() and not np.isnan(dealt.weight).any()
    np.testing.assert_allclose(dealt.objective, alone.objective, rtol=2e-6)
    np.testing.assert_array_equal(dealt.weight, again.weight)
    for label, level in ((0, 0), (0, 9), (13, 5)):
        model = scikit_learn(x[rows[0]], y[rows[0], label], SWEEP[level])
        theirs = objective(x[rows[0]], y[rows[0], label], model.coef_[0], model.intercept_[0], SWEEP[level])
        assert dealt.objective[0, 0, label, level] < theirs * (1 + 1e-6)


def test_one_class__gets_its_prior_and_is_said():
    x, y = study_like(200, 5)
    y[:, 0], y[:, 1] = False, True
    rows = np.ones((2, 200))
    rows[1, y[:, 2]] = 0  # the third label has no positives among the rows of the second weighting
    fits = solve_logistic(x, y[:, :3], [1.0, 10.0], row_weights=rows)
    assert fits.trained.tolist() == [[[False, False, True]], [[False, False, False]]]
    np.testing.assert_allclose(fits.bias[0, 0, 0], np.log(0.5 / 200.5))
    np.testing.assert_allclose(fits.bias[0, 0, 1], np.log(200.5 / 0.5))
    assert (fits.weight[~fits.trained] == 0).all() and fits.converged.all()
    assert fits.table()["trained"].tolist() == [False] * 4 + [True] * 2 + [False] * 6


def test_one_sample__gives_the_prior():
    fits = solve_logistic(np.array([[0.3, 0.4]]), np.array([[1, 0]]), [1.0])
    assert not fits.trained.any() and (fits.weight == 0).all()
    np.testing.assert_allclose(fits.bias[0, 0, :, 0], [np.log(3), -np.log(3)])


def test_constant_features__leave_the_prior():
    for value in (0.0, 0.1, -3e7):
        y = np.array([[1], [0], [0], [0], [0]])
        fits = solve_logistic(np.full((5, 4), value), y, [1e-4, 1e4])
        assert fits.converged.all()
        assert (np.abs(fits.weight) < 1e-12).all()
        np.testing.assert_allclose(fits.bias, np.log(0.25), atol=1e-4)


def test_fewer_rows_than_dimensions_and_repeated_columns__are_solved():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(12, 40))
    x[:, 20:] = x[:, :20]
    y = (np.arange(12) % 3 == 0)[:, None]
    fits = solve_logistic(x, y, [1e-3, 1.0, 1e3])
    for level, c in enumerate(fits.c_grid):
        model = scikit_learn(x, y[:, 0], c, "newton-cholesky")
        theirs = objective(x, y[:, 0], model.coef_[0], model.intercept_[0], c)
        assert objective(x, y[:, 0], fits.weight[0, 0, 0, level], fits.bias[0, 0, 0, level], c) <= theirs * (1 + 1e-6)


def test_identical_classes__give_even_chances():
    x = np.repeat(np.random.default_rng(0).normal(size=(20, 3)), 2, axis=0)
    fits = solve_logistic(x, (np.arange(40) % 2)[:, None], [1e-4, 1.0, 1e4])
    assert fits.converged.all()
    np.testing.assert_allclose(x @ fits.weight[0, 0, 0].T + fits.bias[0, 0, 0], 0, atol=2e-2)


def test_two_samples__are_separated_as_far_as_the_ridge_lets_them():
    fits = solve_logistic(np.array([[0.0], [1.0]]), np.array([[0], [1]]), [1.0, 1e4], tol=1e-10)
    for level, c in enumerate((1.0, 1e4)):
        found = minimize(lambda w, c=c: 2 * c * np.logaddexp(0, -w[0] / 2) + w[0] ** 2 / 2, [1.0], tol=1e-12)
        np.testing.assert_allclose(fits.weight[0, 0, 0, level, 0], found.x[0], rtol=1e-3)
        np.testing.assert_allclose(fits.bias[0, 0, 0, level], -found.x[0] / 2, rtol=1e-3)


def test_columns_of_very_different_scale__reach_the_tolerance_by_float64():
    x, y = study_like(300, 8)
    x = x * np.logspace(-5, 5, 8)
    fits = solve_logistic(x, y, [1e-2, 1e2], tol=1e-9)
    assert fits.converged.all() and fits.polished.any()
    huge = solve_logistic(x[:, -1:] * 1e3, y[:, :1], [1e4])
    assert huge.converged.all() and np.isfinite(huge.weight).all()


def test_what_does_not_converge__is_reported():
    x, y = study_like(300, 20)
    fits = solve_logistic(x, y[:, :2], [1e-4, 1e4], max_iter=1, label_names=["a", "b"])
    assert not fits.converged[..., 1].any()
    assert fits.unfinished()[-1] == "b at C = 10000"
    assert (fits.gap[..., 1] > 1e-6 * fits.objective[..., 1]).all() and np.isfinite(fits.weight).all()


def test_tensors__are_taken_as_arrays_are():
    x, y = study_like(150, 5)
    given = solve_logistic(torch.tensor(x, requires_grad=True), torch.tensor(y), [1.0])
    np.testing.assert_array_equal(given.weight, solve_logistic(x, y, [1.0]).weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.full((30, 4), np.nan)}, DataError, "30 embeddings are not finite, first row 0"),
        ({"x": np.zeros((29, 4))}, DataError, "do not fit together"),
        ({"x": np.zeros(30)}, DataError, "must be a table"),
        ({"x": np.zeros((0, 4)), "y": np.zeros((0, 14))}, DataError, "nothing to train on"),
        ({"y": np.full((30, 1), 2)}, DataError, "labels must be 0 or 1"),
        ({"c_grid": [0.0]}, UsageError, "above 0"),
        ({"c_grid": [np.inf]}, UsageError, "finite"),
        ({"row_weights": np.ones((1, 29))}, DataError, "for 30 rows"),
        ({"row_weights": np.zeros((1, 30))}, DataError, "row weighting 0 counts no row"),
        ({"row_weights": -np.ones((1, 30))}, DataError, "not negative"),
        ({"class_weights": ["even"]}, UsageError, "unknown class weighting"),
        ({"offset": np.zeros((30, 2))}, DataError, "offsets"),
    ],
)
def test_what_does_not_fit__is_refused(change, error, message):
    x, y = study_like(30, 4)
    given = {"x": x, "y": y, "c_grid": [1.0]} | change
    with pytest.raises(error, match=message):
        solve_logistic(given.pop("x"), given.pop("y"), given.pop("c_grid"), **given)
