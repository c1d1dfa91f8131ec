"""Calibration: do probabilities mean what they say?

Truth (n, L) and probabilities (n, L) come in, NumPy or torch; Brier scores, expected calibration errors and reliability
curves go out, for each label by itself. Pooling the labels would hide a rare label's error behind thousands of easy
negatives, so overall figures are means over labels (classwise ECE).

Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks (ICML 2017) for the binned error; Nixon
et al., Measuring Calibration in Deep Learning (CVPR workshops 2019) and Kull et al. (NeurIPS 2019) for its mean over
classes; Brier (1950).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics.arrays import Array, alike, as_numpy, check_scores, check_truth, floats, like, namespace
from engine.errors import DataError

BINS = 15


def are_probabilities(scores: Array) -> bool:
    """Return whether all scores lie between 0 and 1, so that calibration can be asked of them."""
    return bool(((scores >= 0) & (scores <= 1)).all())


def bin_numbers(probabilities: Array, bins: int = BINS) -> Array:
    """Return the bin of each probability, 0 to bins - 1: equal widths, upper ends included, as scikit-learn's."""
    edges = like(probabilities, np.linspace(0.0, 1.0, bins + 1)[1:-1])
    xp = namespace(probabilities)
    if xp is np:
        return np.searchsorted(edges, probabilities)
    return xp.searchsorted(edges, probabilities.contiguous())


def brier(y: Array, probabilities: Array) -> Array:
    """Return each label's mean squared error of the probability, (L,) float64, as ``brier_score_loss``."""
    truth, values = _checked(y, probabilities)
    return ((values - floats(truth)) ** 2).mean(axis=0)


def expected_calibration_error(y: Array, probabilities: Array, bins: int = BINS) -> Array:
    """Return each label's mean absolute difference of probability and frequency, (L,) float64.

    Parameters
    ----------
    y : array of 0/1, (n, L)
    probabilities : array of float in [0, 1], (n, L)
    bins : int
        Of equal width; the difference is taken within each and weighted by its share of samples.

    Raises
    ------
    DataError
        Scores that are not probabilities.
    """
    truth, values = _checked(y, probabilities)
    xp = namespace(truth)
    numbers, gaps = bin_numbers(values, bins), values - floats(truth)
    inside = [xp.where(numbers == number, gaps, 0.0).sum(axis=0) for number in range(bins)]
    return xp.abs(xp.stack(inside)).sum(axis=0) / len(truth)


def reliability_curve(y: Array, probabilities: Array, label_names: tuple[str, ...], bins: int = BINS) -> pd.DataFrame:
    """Return how often what was said so surely was true: one row a label and a bin that has samples.

    Returns
    -------
    DataFrame
        label, bin (0 to bins - 1), probability (their mean), frequency (share of positives), count.
    """
    truth, values = (as_numpy(array) for array in _checked(y, probabilities))
    numbers = bin_numbers(values, bins)
    rows = []
    for column, label in enumerate(label_names):
        for number in np.unique(numbers[:, column]):
            inside = numbers[:, column] == number
            said, found = values[inside, column].mean(), truth[inside, column].mean()
            rows.append((label, int(number), float(said), float(found), int(inside.sum())))
    return pd.DataFrame(rows, columns=["label", "bin", "probability", "frequency", "count"])


def calibration_sums(
    truth: np.ndarray, values: np.ndarray, codes: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums from which ECE follows under any weights.

    Parameters
    ----------
    truth, values : ndarray, (n, L)
    codes : ndarray of int, (n,)
        Row of the weights that each sample has.
    groups : int
        Rows of the weights, G.

    Returns
    -------
    gaps : ndarray of float64, (G, B)
        Sum of probability minus truth in each (label, bin) that has samples.
    member : ndarray of float64, (B, L)
        1 where the column of `gaps` is the label's.
    """
    labels = truth.shape[1]
    cells = bin_numbers(values) + BINS * np.arange(labels)
    filled, column = np.unique(cells, return_inverse=True)
    column = column.reshape(cells.shape)
    flat = codes[:, None] * len(filled) + column
    gaps = np.bincount(flat.ravel(), (values - truth).ravel(), minlength=groups * len(filled))
    return gaps.reshape(groups, len(filled)), (filled[:, None] // BINS == np.arange(labels)).astype(np.float64)


def _checked(y: Array, probabilities: Array) -> tuple[Array, Array]:
    y, probabilities = alike(y, probabilities)
    truth = check_truth(y)
    values = check_scores(truth, probabilities)
    if not len(truth):
        raise DataError("no samples to score; look at the split and at the list of failures")
    if not are_probabilities(values):
        raise DataError(
            f"calibration is of probabilities, but scores reach from {float(values.min()):g} to "
            f"{float(values.max()):g}; give a head's probabilities, not logits or cosines"
        )
    return truth, values
