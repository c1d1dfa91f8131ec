"""What comes in to a metric, checked; NumPy arrays and torch tensors (on any device) by the same code.

Truth, scores and decisions come in; the same as bool and float64 of one kind go out. A metric is written once in the
functions that NumPy and torch share (torch takes ``axis`` and ``keepdims`` as names too); `namespace` says which module
they are called from. torch is never imported here: where a tensor comes in, it is loaded already.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

from engine.errors import DataError

# A NumPy array or a torch tensor.
Array: TypeAlias = Any


def is_tensor(array: Any) -> bool:
    """Return whether it is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def namespace(*arrays: Any) -> Any:
    """Return the module whose functions take these arrays: torch where one is a tensor, else NumPy."""
    return sys.modules["torch"] if any(is_tensor(array) for array in arrays) else np


def alike(*arrays: Any) -> tuple[Array, ...]:
    """Return the arrays as NumPy arrays, or all as tensors on the device of the first tensor among them."""
    tensors = [array for array in arrays if is_tensor(array)]
    if not tensors:
        return tuple(np.asarray(array) for array in arrays)
    return tuple(like(tensors[0], array) for array in arrays)


def like(model: Array, array: Any) -> Array:
    """Return the array as one of the model's kind and on its device, in its own dtype."""
    if is_tensor(model):
        return array.to(model.device) if is_tensor(array) else namespace(model).as_tensor(array, device=model.device)
    return array.cpu().numpy() if is_tensor(array) else np.asarray(array)


def as_numpy(array: Any) -> np.ndarray:
    """Return the array, or the tensor's values, in the main memory."""
    return array.detach().cpu().numpy() if is_tensor(array) else np.asarray(array)


def floats(array: Array) -> Array:
    """Return the array as float64."""
    return array.to(namespace(array).float64) if is_tensor(array) else array.astype(np.float64, copy=False)


def bools(array: Array) -> Array:
    """Return the array as bool."""
    return array.to(namespace(array).bool) if is_tensor(array) else array.astype(bool, copy=False)


def check_truth(y: Any) -> Array:
    """Return the truth (n, L) as bool; DataError where it is not a table of 0 and 1."""
    truth = y if is_tensor(y) else np.asarray(y)
    if truth.ndim != 2:
        raise DataError(f"labels must be a table (samples, labels), got shape {tuple(truth.shape)}")
    if truth.dtype not in (bool, getattr(namespace(truth), "bool", bool)):
        unusual = ~((truth == 0) | (truth == 1))
        if unusual.any():
            found = np.unique(as_numpy(truth[unusual]))[:5]
            raise DataError(f"labels must be 0 or 1, found {found.tolist()}; map uncertain and blank values to 0 first")
        truth = bools(truth)
    return truth


def check_scores(truth: Array, scores: Any, label_names: Any = None) -> Array:
    """Return the scores as float64 of the truth's kind; DataError for another shape or a value that is not finite.

    Parameters
    ----------
    label_names : sequence of str, optional
        What a column is called in the error.
    """
    values = floats(like(truth, scores))
    if values.shape != truth.shape:
        raise DataError(f"scores have shape {tuple(values.shape)}, the labels {tuple(truth.shape)}; they must be equal")
    bad = ~namespace(values).isfinite(values)
    if bad.any():
        row, column = np.argwhere(as_numpy(bad))[0]
        name = column if label_names is None else repr(label_names[column])
        raise DataError(
            f"{int(bad.sum())} scores are not finite, first {float(values[row, column])} at row {row}, label {name}; "
            "look for overflow or a division by zero where they were made"
        )
    return values


def check_decisions(truth: Array, decisions: Any) -> Array:
    """Return the decisions as bool of the truth's kind; DataError where their shape is not the truth's."""
    decided = like(truth, decisions)
    if decided.shape != truth.shape:
        raise DataError(
            f"decisions have shape {tuple(decided.shape)}, the labels {tuple(truth.shape)}; they must be equal"
        )
    return bools(decided)


def divide(numerator: Array, denominator: Array, empty: float) -> Array:
    """Return the quotient in float64, and `empty` where the denominator is 0."""
    xp = namespace(numerator, denominator)
    filled = denominator != 0
    return xp.where(filled, floats(numerator) / xp.where(filled, floats(denominator), 1.0), empty)


def mean_of_defined(values: Array) -> Array:
    """Return the mean over the last axis of the values that are not NaN; NaN where none is."""
    xp = namespace(values)
    defined = ~xp.isnan(values)
    return divide(xp.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1), float("nan"))
