"""The linear probe of the sound protocol: one logistic regression a label, its C chosen on validation.

In come embeddings and truth of the training and validation rows; out goes a `LinearHead` with how it came about. No
test row is ever an argument. The objective is scikit-learn's (C times the summed log-loss plus half the squared norm of
the weights; the bias is free), on normalised embeddings; all values of C are solved together by `solve_logistic`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import logit

from analysis.heads import LinearHead
from analysis.metrics import check_truth
from analysis.probes.inputs import on_device
from analysis.probes.logistic import TOLERANCE, LogisticFits, solve_logistic
from analysis.probes.selection import SELECTIONS, choose_best, validation_scores
from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)

C_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class ProbeResult:
    """A trained head and the account of its training.

    Parameters
    ----------
    head : LinearHead
    history : list of dict
        One row a value of C (``C``, ``log_loss``, ``average_precision``, ``iterations``) or, for the study's recipe, an
        epoch (``epoch``, ``learning_rate``, ``train_loss``, ``val_loss``).
    untrained_labels : tuple of str
        Labels of one value only in training: they get no weights, and their smoothed prior as the bias.
    seconds : float
    """

    head: LinearHead
    history: list[dict[str, float]] = field(default_factory=list)
    untrained_labels: tuple[str, ...] = ()
    seconds: float = 0.0


def fit_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str],
    c_grid: Sequence[float] = C_GRID,
    select: str = "log_loss",
    class_weight: str = "none",
    normalize: bool = True,
    encoder_id: str = "",
    tol: float = TOLERANCE,
    max_iter: int = 200,
    device: str = "cpu",
) -> ProbeResult:
    """Fit one logistic regression a label for every C, and keep the C that serves validation best.

    Parameters
    ----------
    train_x, val_x : ndarray of float, (n, d) and (m, d)
        Un-normalised embeddings.
    train_y, val_y : ndarray of 0/1, (n, L) and (m, L)
    label_names : sequence of str, length L
    c_grid : sequence of float
        Values of C to try, all above 0. With a single one, validation may be empty (m = 0).
    select : "log_loss" | "average_precision"
        Lowest mean log-loss over labels (default: smooth even for labels with few positives in validation), or highest
        mean average precision over the labels that have positives there. Ties go to the smaller C.
    class_weight : "none" | "balanced"
        As scikit-learn's.
    normalize : bool
        Bring embeddings to length 1 first; the head remembers it.
    encoder_id : str
        Kept in the head.
    tol, max_iter
        As in `solve_logistic`: how far above the minimum an objective may be, and Newton iterations.
    device : str
        Where the problems are solved.

    Returns
    -------
    ProbeResult

    Raises
    ------
    DataError
        Where shapes do not fit, or there is nothing to train or tune on.
    UsageError
        For an unknown selection or a C that is not positive.
    """
    begun = time.perf_counter()
    names, grid = tuple(label_names), sorted(float(c) for c in c_grid)
    x, y = check_part(train_x, train_y, names, "training", normalize)
    if select not in SELECTIONS:
        raise UsageError(f"unknown selection {select!r}; known: {', '.join(SELECTIONS)}")
    tuned = len(grid) > 1
    if tuned and not len(val_x):
        raise DataError(f"no validation samples to choose among {len(grid)} values of C; give a val split or one C")
    fits = solve_logistic(
        on_device(x, device), y, grid, class_weights=[class_weight], label_names=names, tol=tol, max_iter=max_iter
    )
    warn_of_unfinished(fits, tol, max_iter)
    weights, biases, iterations = (each[0, 0] for each in (fits.weight, fits.bias, fits.iterations))
    history = [{"C": c, "iterations": float(iterations[:, index].sum())} for index, c in enumerate(grid)]
    chosen = 0
    if tuned:
        x_val, y_val = check_part(val_x, val_y, names, "validation", normalize)
        for index, row in enumerate(history):
            row |= validation_scores(y_val, x_val @ weights[:, index].T + biases[:, index])
        chosen = choose_best(history, select)
    if tuned and len(grid) > 2 and chosen in (0, len(grid) - 1):
        logger.info("C = %g was chosen at the edge of the grid %s", grid[chosen], grid)
    untrained = tuple(name for name, trained in zip(names, fits.trained[0, 0], strict=True) if not trained)
    if untrained:
        logger.warning(
            "labels of one value only in training get their prior instead of a probe: %s", ", ".join(untrained)
        )
    head = LinearHead(
        weight=weights[:, chosen],
        bias=biases[:, chosen],
        label_names=names,
        normalised=normalize,
        encoder_id=encoder_id,
        provenance={
            "recipe": "logistic regression",
            "C": grid[chosen],
            "c_grid": grid,
            "select": select if tuned else None,
            "class_weight": class_weight,
            "tol": tol,
            "train_samples": len(x),
            "train_positives": y.sum(axis=0).tolist(),
            "untrained_labels": list(untrained),
        },
    )
    return ProbeResult(head, history, untrained, time.perf_counter() - begun)


def fit_probe_on_split(
    x: np.ndarray, y: np.ndarray, split: np.ndarray, *, label_names: Sequence[str], **options: Any
) -> ProbeResult:
    """Fit `fit_probe` on the train rows of a whole data set and tune it on the val rows; test rows are never read.

    Parameters
    ----------
    x : ndarray of float, (n, d)
    y : ndarray of 0/1, (n, L)
    split : ndarray of str, (n,)
        "train", "val", "test" or "".
    label_names, options
        As in `fit_probe`.
    """
    parts = np.asarray(split, dtype=object)
    train, validation = parts == "train", parts == "val"
    embeddings, truth = np.asarray(x), np.asarray(y)
    return fit_probe(
        embeddings[train],
        truth[train],
        embeddings[validation],
        truth[validation],
        label_names=label_names,
        **options,
    )


def smoothed_prior(y: np.ndarray) -> np.ndarray:
    """Return the log-odds of each label's share in truth (n, L), half a sample added to either side; (L,) float64."""
    truth = check_truth(y)
    return logit((truth.sum(axis=0) + 0.5) / (len(truth) + 1.0))


def warn_of_unfinished(fits: LogisticFits, tol: float, max_iter: int) -> None:
    """Say which problems of a sweep are not converged."""
    unfinished = fits.unfinished()
    if unfinished:
        logger.warning(
            "%d fits stopped after %d iterations before they reached tol = %g: %s",
            len(unfinished),
            max_iter,
            tol,
            ", ".join(unfinished[:5]),
        )


def check_part(
    x: np.ndarray, y: np.ndarray, names: tuple[str, ...], which: str, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings as float64 and truth as bool, or raise DataError that says what does not fit in this part."""
    values, truth = np.asarray(x, dtype=np.float64), check_truth(y)
    if values.ndim != 2 or len(values) != len(truth) or truth.shape[1] != len(names):
        raise DataError(
            f"{which}: embeddings {values.shape}, labels {truth.shape} and {len(names)} label names do not fit together"
        )
    if not len(values):
        raise DataError(f"no {which} samples; look at the split and at the list of failures")
    if not np.isfinite(values).all():
        raise DataError(
            f"{which}: {(~np.isfinite(values)).any(axis=1).sum()} embeddings are not finite; compute them again"
        )
    return (normalise_rows(values) if normalize else values), truth
