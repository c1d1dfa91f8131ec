"""Which of several fits serves validation best: the one place where C and class weighting are chosen.

In come truth and logits of validation rows, one set of logits a candidate; out come scores and a choice. Test rows are
never an argument here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.metrics import average_precision, mean_of_defined
from engine.errors import DataError, UsageError

SELECTIONS = ("log_loss", "average_precision")


def mean_log_loss(y: np.ndarray, logits: np.ndarray) -> float:
    """Return the binary cross-entropy of logits (n, L), averaged over samples and labels; stable for any logit."""
    return float(np.mean(np.logaddexp(0.0, logits) - np.asarray(y) * logits))


def mean_average_precision(y: np.ndarray, logits: np.ndarray) -> float:
    """Return average precision averaged over the labels that have positives, NaN where none has."""
    return float(mean_of_defined(average_precision(y, logits)))


def validation_scores(y: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Return what a choice is made by: mean log-loss, and mean average precision over labels with positives (or NaN).

    Parameters
    ----------
    y : ndarray of 0/1, (m, L)
    logits : ndarray of float, (m, L)
    """
    return {"log_loss": mean_log_loss(y, logits), "average_precision": mean_average_precision(y, logits)}


def choose_best(scores: Sequence[dict[str, float]], select: str) -> int:
    """Return the position of the best candidate; the first among equals, so sort simpler ones to the front.

    Raises
    ------
    UsageError
        For an unknown selection.
    DataError
        No candidate has a score, because no label has a positive in validation.
    """
    if select not in SELECTIONS:
        raise UsageError(f"unknown selection {select!r}; known: {', '.join(SELECTIONS)}")
    values = np.array([row[select] for row in scores])
    if np.isnan(values).all():
        raise DataError(f"no label has a positive in validation, so C cannot be chosen by {select}; use 'log_loss'")
    return int(np.nanargmin(values) if select == "log_loss" else np.nanargmax(values))
