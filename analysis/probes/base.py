"""What all probes share: scikit-learn's interface over logits of labels.

In come features (arrays, data frames or tensors) and truth; out go decisions, probabilities and logits. A subclass says
how it learns (`_learn`) and what it answers (`_answer`); this class turns truth of any kind into 0/1 columns and logits
back into what scikit-learn expects:

* two classes: one column, the second class being the positive one;
* several classes: a column each, one against the rest, and the largest logit decides;
* several labels (n, L): a column each; ``predict`` gives 0/1 and ``predict_proba`` the probability (n, L) that each
  label is there, as scikit-learn's MLPClassifier does.

Wrong input raises ValueError with scikit-learn's own messages, as its tools expect of an estimator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from analysis.heads import LinearHead


def plain(values: Any) -> Any:
    """Return a tensor as a NumPy array, bfloat16 as float32; anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    found = values.detach().cpu()
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()


def device_of(values: Any) -> str:
    """Return the device that features lie on: a tensor's own, else the processor."""
    return str(values.device) if isinstance(values, torch.Tensor) else "cpu"


class Probe(ClassifierMixin, BaseEstimator):
    """Base of the probes; a subclass defines `_learn` and `_answer`.

    Attributes
    ----------
    classes_ : ndarray
        The classes; for several labels 0 to L - 1.
    n_features_in_ : int
    """

    def __sklearn_tags__(self) -> Any:
        """Say that several labels are taken."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        """Learn from features (n, d), truth (n, L) bool and sample weights (n,)."""
        raise NotImplementedError

    def _answer(self, x: np.ndarray) -> np.ndarray:
        """Return logits (m, L), above 0 where a label is there."""
        raise NotImplementedError

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return what the probe has learnt as named arrays, for a file; `take_arrays` puts them back."""
        raise NotImplementedError(f"{type(self).__name__} is kept as a head: see to_head")

    def take_arrays(self, arrays: Mapping[str, np.ndarray], labels: int, features: int) -> Probe:
        """Become the probe of several labels (or of one label's two classes) that had learnt these arrays."""
        self._kind = "binary" if labels == 1 else "multilabel-indicator"
        self.classes_ = np.arange(2 if labels == 1 else labels)
        self.n_features_in_ = features
        return self

    def _features(self, x: Any, reset: bool) -> np.ndarray:
        return validate_data(self, plain(x), reset=reset, dtype=[np.float64, np.float32])

    def fit(self, X: Any, y: Any) -> Probe:
        """Learn from features and truth.

        Parameters
        ----------
        X : array, data frame or tensor of float, (n, d)
        y : array, data frame or tensor, (n,) of two or more classes, or (n, L) of 0/1

        Returns
        -------
        Probe
            Itself.

        Raises
        ------
        ValueError
            A value is not finite, rows do not match, or there is one class only.
        """
        features = self._features(X, reset=True)
        self._lies = device_of(X)
        self._learn(features, self._columns(plain(y), len(features)), np.ones(len(features)))
        return self

    def _columns(self, y: Any, rows: int) -> np.ndarray:
        """Return truth as bool (n, L), and remember what kind it is."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        check_classification_targets(y)
        values = np.asarray(y)
        if len(values) != rows:
            raise ValueError(f"inconsistent numbers of samples: {rows} rows of features, {len(values)} of labels")
        self._kind = type_of_target(values)
        if values.ndim == 2 and values.shape[1] == 1 and not self._kind.startswith("multilabel"):
            values = values.ravel()
            self._warn_of_column()
        if self._kind == "multilabel-indicator":
            self.classes_ = np.arange(values.shape[1])
            return values.astype(bool)
        if values.ndim != 1:
            raise ValueError(f"labels of shape {values.shape} hold more than 0 and 1; give one 0/1 column a label")
        self.classes_ = np.unique(values)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least two classes, got one class, {self.classes_[0]!r}, "
                f"in all {rows} rows"
            )
        self._kind = "binary" if len(self.classes_) == 2 else "multiclass"
        if self._kind == "binary":
            return (values == self.classes_[1])[:, None]
        return values[:, None] == self.classes_

    def _warn_of_column(self) -> None:
        import warnings

        from sklearn.exceptions import DataConversionWarning

        warnings.warn(
            "A column-vector y was passed when a 1d array was expected; it is taken as y.ravel()",
            DataConversionWarning,
            stacklevel=4,
        )

    def decision_function(self, X: Any) -> np.ndarray:
        """Return logits: (m,) for two classes, else (m, L)."""
        check_is_fitted(self)
        logits = self._answer(self._features(X, reset=False))
        return logits[:, 0] if self._kind == "binary" else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities: (m, classes) that sum to 1, or (m, L) of each label for itself."""
        chance = expit(np.atleast_2d(self.decision_function(X).T).T)
        if self._kind == "binary":
            return np.hstack([1 - chance, chance])
        if self._kind == "multiclass":
            total = chance.sum(axis=1, keepdims=True)
            # All logits far below 0: every class is as good as another.
            return np.where(total > 0, chance / np.where(total > 0, total, 1), 1 / len(self.classes_))
        return chance

    def predict(self, X: Any) -> np.ndarray:
        """Return the classes (m,), or 0/1 for each label (m, L)."""
        logits = self.decision_function(X)
        if self._kind == "binary":
            return self.classes_[(logits > 0).astype(int)]
        if self._kind == "multiclass":
            return self.classes_[logits.argmax(axis=1)]
        return (logits > 0).astype(int)


class WeightedProbe(Probe):
    """Base of the probes that take sample weights: a row of weight 2 counts as if it were there twice."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> WeightedProbe:
        """Learn from features, truth and sample weights (n,), not negative; see `Probe.fit`."""
        features = self._features(X, reset=True)
        self._lies = device_of(X)
        truth = self._columns(plain(y), len(features))
        weight = _check_sample_weight(plain(sample_weight), features, dtype=np.float64, ensure_non_negative=True)
        if not (weight > 0).any():
            raise ValueError("all sample weights are zero; there is nothing to train on")
        self._learn(features, truth, weight)
        return self


class LinearEstimator(WeightedProbe):
    """Base of the probes whose logits are linear in the features.

    Attributes
    ----------
    coef_ : ndarray of float64, (L, d)
    intercept_ : ndarray of float64, (L,)
    """

    normalize: bool

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return unit_rows(x) if self.normalize else x

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return self._scaled(x) @ self.coef_.T + self.intercept_

    def to_head(
        self, label_names: tuple[str, ...], encoder_id: str = "", provenance: Mapping[str, Any] | None = None
    ) -> LinearHead:
        """Return the head that `fluoro cam` and a study take, its labels named in the order of the columns."""
        check_is_fitted(self)
        own = {"recipe": type(self).__name__, **{k: v for k, v in self.get_params().items() if is_simple(v)}}
        known = {**own, **(provenance or {})}
        return LinearHead(self.coef_, self.intercept_, tuple(label_names), self.normalize, encoder_id, known)


def is_simple(value: Any) -> bool:
    """Whether JSON can hold a parameter as it is."""
    return value is None or isinstance(value, str | int | float | bool)


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Return features of length 1 as float64; a row of zeros stays, because scikit-learn's tools may send one."""
    values = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(lengths > 0, lengths, 1)
