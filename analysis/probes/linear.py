"""Linear probes as estimators: logistic regression, logistic regression drawn to text, and ridge regression.

In come features and truth, out go weights. All three are convex, so their results depend on no seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from analysis.probes.base import LinearEstimator
from analysis.probes.inputs import on_device
from analysis.probes.logistic import LogisticFits, solve_logistic

# One problem alone is solved to rounding, so that it depends on nothing but the data; a sweep is not.
EXACT = 1e-20


class LinearProbe(LinearEstimator):
    """L2-regularised logistic regression, one for each column of the truth.

    The objective is that of scikit-learn's LogisticRegression; several classes are fitted one against the rest. A CUDA
    tensor's problems are solved there.

    Parameters
    ----------
    C : float
        Inverse strength of the ridge.
    class_weight : "balanced", mapping of class to weight, or None
        Balanced for each column by itself; a mapping only where y is one column.
    normalize : bool
        Bring features to length 1 first.
    tol : float
        Bound on the distance from the minimum, relative to the objective. The default solves to rounding in float64;
        1e-6 stays in float32 and is several times faster.
    max_iter : int
        Newton iterations.

    Attributes
    ----------
    fits_ : LogisticFits
        The account of convergence.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: str | Mapping[Any, float] | None = None,
        normalize: bool = False,
        tol: float = EXACT,
        max_iter: int = 200,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.normalize = normalize
        self.tol = tol
        self.max_iter = max_iter

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        self._solve(self._scaled(x), y, weight, None)
        self.coef_, self.intercept_ = self.fits_.weight[0, 0, :, 0], self.fits_.bias[0, 0, :, 0]

    def _solve(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray, offset: np.ndarray | None) -> None:
        kind = "none"
        if isinstance(self.class_weight, Mapping):
            weight = weight * self._of_classes(y, self.class_weight)
        elif self.class_weight is not None:
            kind = self.class_weight
        self.fits_: LogisticFits = solve_logistic(
            on_device(x, self._lies), y, [self.C], row_weights=weight[None], class_weights=[kind], offset=offset,
            tol=self.tol, max_iter=self.max_iter,
        )  # fmt: skip
        self.n_iter_ = self.fits_.iterations[0, 0, :, 0]
        if self.fits_.unfinished():
            warnings.warn(
                f"{', '.join(self.fits_.unfinished())} did not reach tol = {self.tol:g} in {self.max_iter} iterations",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _of_classes(self, y: np.ndarray, weights: Mapping[Any, float]) -> np.ndarray:
        """Return the weight (n,) of each row's class, 1 for classes that are not named."""
        if self._kind == "multilabel-indicator":
            raise ValueError("class weights by class are for one column of classes; several labels take 'balanced'")
        of_class = np.array([weights.get(name, 1.0) for name in self.classes_], dtype=np.float64)
        return of_class[y[:, 0].astype(int) if self._kind == "binary" else y.argmax(axis=1)]


class TextPriorProbe(LinearProbe):
    """Logistic regression whose ridge pulls to the zero-shot weights instead of to 0.

    The penalty is |w - s t|^2 / 2 with the labels' text vectors t and a scale s. With C towards 0 the probe is
    zero-shot (and a fitted intercept), with large C a linear probe; 1 / C is the path's lambda. It is solved as
    logistic regression on the logits that the text gives already, in w - s t.

    Parameters
    ----------
    text : ndarray of float, (L, d), or None
        Text vector of each label, as long as zero-shot uses it; None is 0.
    scale : float
        Times which the dot product with a text is a logit (the model's logit scale, for texts of length 1).
    C, class_weight, normalize, tol, max_iter
        As in `LinearProbe`.
    """

    def __init__(
        self,
        text: np.ndarray | None = None,
        C: float = 1.0,
        *,
        scale: float = 1.0,
        class_weight: str | Mapping[Any, float] | None = None,
        normalize: bool = False,
        tol: float = EXACT,
        max_iter: int = 200,
    ) -> None:
        super().__init__(C, class_weight=class_weight, normalize=normalize, tol=tol, max_iter=max_iter)
        self.text = text
        self.scale = scale

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        values = self._scaled(x)
        prior = self.scale * text_vectors(self.text, y.shape[1], x.shape[1])
        self._solve(values, y, weight, values @ prior.T)
        self.coef_ = self.fits_.weight[0, 0, :, 0] + prior
        self.intercept_ = self.fits_.bias[0, 0, :, 0]


class RidgeProbe(LinearEstimator):
    """Ridge regression on +-1, its strength chosen by leave-one-out error in closed form, from one decomposition.

    Parameters
    ----------
    alphas : sequence of float
        Strengths to try, above 0.
    alpha_per_label : bool
        Choose one strength a label instead of one for all.
    normalize : bool
        Bring features to length 1 first.

    Attributes
    ----------
    alpha_ : ndarray of float64, (L,)
    loo_errors_ : ndarray of float64, (A, L)
        Weighted mean squared leave-one-out error at each strength.
    """

    def __init__(
        self,
        alphas: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
        *,
        alpha_per_label: bool = False,
        normalize: bool = False,
    ) -> None:
        self.alphas = alphas
        self.alpha_per_label = alpha_per_label
        self.normalize = normalize

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        strengths = np.asarray(self.alphas, dtype=np.float64).reshape(-1)
        if not strengths.size or not (strengths > 0).all():
            raise ValueError(f"alphas must be above 0 and at least one, got {self.alphas!r}")
        coefficients, intercepts, self.loo_errors_ = ridge_path(self._scaled(x), 2.0 * y - 1, strengths, weight)
        of_label = self.loo_errors_.argmin(axis=0)
        if not self.alpha_per_label:
            of_label = np.full_like(of_label, self.loo_errors_.mean(axis=1).argmin())
        labels = np.arange(y.shape[1])
        self.alpha_ = strengths[of_label]
        self.coef_, self.intercept_ = coefficients[of_label, labels], intercepts[of_label, labels]


def ridge_path(
    x: np.ndarray, target: np.ndarray, alphas: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ridge regressions of all strengths and their leave-one-out errors, from one decomposition.

    With centred, weighted features X = U S V' the fit is H y, H = U diag(s^2 / (s^2 + alpha)) U' + the mean's share,
    and leaving a row out multiplies its residual by 1 / (1 - h_ii) (Golub, Heath, Wahba 1979).

    Parameters
    ----------
    x : ndarray of float, (n, d)
    target : ndarray of float, (n, L)
    alphas : ndarray of float, (A,)
    weight : ndarray of float, (n,), optional

    Returns
    -------
    coefficients : ndarray of float64, (A, L, d)
    intercepts : ndarray of float64, (A, L)
    errors : ndarray of float64, (A, L)
        Weighted mean squared error of each row by the fit without it; rows of weight 0 do not count, and a row of a
        weight w above 1 counts as w copies, of which one is left out.
    """
    values, truth = np.asarray(x, dtype=np.float64), np.asarray(target, dtype=np.float64)
    rows = np.ones(len(values)) if weight is None else np.asarray(weight, dtype=np.float64)
    used = rows > 0
    values, truth, rows = values[used], truth[used], rows[used]
    mean, middle = np.average(values, axis=0, weights=rows), np.average(truth, axis=0, weights=rows)
    root = np.sqrt(rows)[:, None]
    left, size, right = np.linalg.svd(root * (values - mean), full_matrices=False)
    turned = left.T @ (root * (truth - middle))
    coefficients = np.einsum("as,sl,sd->ald", size / (size**2 + alphas[:, None]), turned, right, optimize=True)
    intercepts = middle - coefficients @ mean
    errors = np.empty((len(alphas), truth.shape[1]))
    for place, alpha in enumerate(alphas):
        shrunk = size**2 / (size**2 + alpha)
        fitted = (left * shrunk) @ turned / root + middle
        kept = 1 - np.minimum(1, 1 / rows) * ((left**2) @ shrunk + rows / rows.sum())
        # A lone row says nothing about itself: without it the fit is nothing, so its error is that of 0.
        apart = np.where(kept[:, None] > 1e-12, (truth - fitted) / np.maximum(kept, 1e-12)[:, None], truth)
        errors[place] = np.average(apart**2, axis=0, weights=rows)
    return coefficients, intercepts, errors


def text_vectors(text: np.ndarray | None, labels: int, dimensions: int) -> np.ndarray:
    """Return text vectors (L, d) as float64, 0 where none are given; ValueError where they do not fit."""
    if text is None:
        return np.zeros((labels, dimensions))
    found = np.asarray(text, dtype=np.float64)
    if found.shape != (labels, dimensions) or not np.isfinite(found).all():
        raise ValueError(f"text vectors {found.shape} must be finite, one of {dimensions} a label, {labels} labels")
    return found
