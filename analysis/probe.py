"""Linear probes on cached embeddings: the sound one (regularised, tuned on validation) and the study's own recipe.

In come embeddings and truth of the training and validation rows; out goes a `LinearHead` with how it came about. No
test row is ever an argument. Both recipes leave the encoder frozen, so cached embeddings give what the tower would.

`fit_probe` is one L2-regularised logistic regression a label, scikit-learn's own objective (C times the summed log-loss
plus half the squared norm of the weights; the bias is free), on normalised embeddings, with one C for all labels chosen
on validation. `paper_probe` transcribes the training loop of arXiv 2506.14136.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import logit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from analysis.heads import LinearHead
from analysis.metrics import average_precision, check_truth, mean_of_defined
from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)

C_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
SELECTIONS = ("log_loss", "average_precision")


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
    normalize: bool = True,
    encoder_id: str = "",
    tol: float = 1e-5,
    max_iter: int = 5000,
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
    normalize : bool
        Bring embeddings to length 1 first; the head remembers it.
    encoder_id : str
        Kept in the head.
    tol, max_iter
        Of scikit-learn's L-BFGS. Larger C starts from the smaller one's solution.

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
    x, y = _checked(train_x, train_y, names, "training", normalize)
    if select not in SELECTIONS:
        raise UsageError(f"unknown selection {select!r}; known: {', '.join(SELECTIONS)}")
    if not grid or grid[0] <= 0:
        raise UsageError(f"values of C must be above 0 and at least one, got {list(c_grid)}")
    tuned = len(grid) > 1
    if tuned and not len(val_x):
        raise DataError(f"no validation samples to choose among {len(grid)} values of C; give a val split or one C")
    if tuned:
        x_val, y_val = _checked(val_x, val_y, names, "validation", normalize)
    trainable = np.asarray(y.any(axis=0) & ~y.all(axis=0))
    # L-BFGS makes thousands of small products; BLAS threads waiting for each other on a busy machine made them 20 times
    # slower than one thread.
    with threadpool_limits(1, user_api="blas"):
        weights, biases, iterations = _regularisation_path(x, y, trainable, grid, names, tol, max_iter)
    history = []
    for index, c in enumerate(grid):
        row = {"C": c, "iterations": float(iterations[index].sum())}
        if tuned:
            logits = x_val @ weights[index].T + biases[index]
            row["log_loss"] = float(mean_log_loss(y_val, logits))
            row["average_precision"] = float(mean_of_defined(average_precision(y_val, logits)))
        history.append(row)
    chosen = _best(history, select) if tuned else 0
    if tuned and len(grid) > 2 and chosen in (0, len(grid) - 1):
        logger.info("C = %g was chosen at the edge of the grid %s", grid[chosen], grid)
    untrained = tuple(names[label] for label in np.flatnonzero(~trainable))
    if untrained:
        logger.warning(
            "labels of one value only in training get their prior instead of a probe: %s", ", ".join(untrained)
        )
    head = LinearHead(
        weight=weights[chosen],
        bias=biases[chosen],
        label_names=names,
        normalised=normalize,
        encoder_id=encoder_id,
        provenance={
            "recipe": "logistic regression",
            "C": grid[chosen],
            "c_grid": grid,
            "select": select if tuned else None,
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


def mean_log_loss(y: np.ndarray, logits: np.ndarray) -> float:
    """Return the binary cross-entropy of logits (n, L), averaged over samples and labels; stable for any logit."""
    return float(np.mean(np.logaddexp(0.0, logits) - np.asarray(y) * logits))


def smoothed_prior(y: np.ndarray) -> np.ndarray:
    """Return the log-odds of each label's share in truth (n, L), half a sample added to either side; (L,) float64."""
    truth = check_truth(y)
    return logit((truth.sum(axis=0) + 0.5) / (len(truth) + 1.0))


def _checked(
    x: np.ndarray, y: np.ndarray, names: tuple[str, ...], which: str, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings as float64 and truth as bool, or say what does not fit."""
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


def _regularisation_path(
    x: np.ndarray,
    y: np.ndarray,
    trainable: np.ndarray,
    grid: list[float],
    names: tuple[str, ...],
    tol: float,
    max_iter: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights (C, L, d), biases (C, L) and iterations (C, L) for ascending C."""
    labels = y.shape[1]
    weights = np.zeros((len(grid), labels, x.shape[1]))
    biases = np.tile(smoothed_prior(y), (len(grid), 1))
    iterations = np.zeros((len(grid), labels), dtype=np.int64)
    unfinished = []
    for label in np.flatnonzero(trainable):
        model = LogisticRegression(tol=tol, max_iter=max_iter, warm_start=True)
        for index, c in enumerate(grid):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                model.set_params(C=c).fit(x, y[:, label])
            if any(issubclass(each.category, ConvergenceWarning) for each in caught):
                unfinished.append(f"{names[label]} at C = {c:g}")
            weights[index, label], biases[index, label] = model.coef_[0], model.intercept_[0]
            iterations[index, label] = model.n_iter_[0]
    if unfinished:
        logger.warning(
            "%d fits stopped after %d iterations before they reached tol = %g: %s",
            len(unfinished),
            max_iter,
            tol,
            ", ".join(unfinished[:5]),
        )
    return weights, biases, iterations


def _best(history: list[dict[str, float]], select: str) -> int:
    values = np.array([row[select] for row in history])
    if np.isnan(values).all():
        raise DataError(f"no label has a positive in validation, so C cannot be chosen by {select}; use 'log_loss'")
    return int(np.nanargmin(values) if select == "log_loss" else np.nanargmax(values))


@dataclass(frozen=True)
class PaperProbeSettings:
    """The study's recipe for the probe (its notebook, ``train_eval_biomedclip(mode="linearprobe")``)."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 24
    epochs: int = 10
    patience: int = 5
    minimum_improvement: float = 1e-4


def paper_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str],
    seed: int = 42,
    settings: PaperProbeSettings | None = None,
    encoder_id: str = "",
) -> ProbeResult:
    """Train the study's linear probe.

    One linear layer on un-normalised embeddings: weight Xavier-uniform, bias as torch's default; plain binary
    cross-entropy; AdamW; batches of 24 shuffled anew every epoch, the last one short; a cosine schedule stepped once an
    epoch over all epochs; validation loss as the mean over batches (the short one counting as much as the others); the
    best epoch's weights kept, an epoch being better if its loss is lower by more than 1e-4; stop after 5 epochs
    that are not.

    The study ran the tower under fp16 autocast during training; on cached embeddings that is a matter of the
    encoder's precision, and the head itself is trained in float32 on the CPU.

    Parameters
    ----------
    train_x, val_x : ndarray of float, (n, d) and (m, d)
        Un-normalised embeddings.
    train_y, val_y : ndarray of 0/1, (n, L) and (m, L)
    label_names : sequence of str, length L
    seed : int
        Of the weights and of the shuffling.
    settings : PaperProbeSettings, optional
    encoder_id : str
        Kept in the head.
    """
    begun = time.perf_counter()
    recipe = settings or PaperProbeSettings()
    names = tuple(label_names)
    x, y = (_tensor(each) for each in _checked(train_x, train_y, names, "training", False))
    x_val, y_val = (_tensor(each) for each in _checked(val_x, val_y, names, "validation", False))
    with _one_torch_thread():
        best, best_epoch, history = _paper_loop(x, y, x_val, y_val, seed, recipe)
    trained = LinearHead(
        weight=best["weight"].double().numpy(),
        bias=best["bias"].double().numpy(),
        label_names=names,
        normalised=False,
        encoder_id=encoder_id,
        provenance={
            "recipe": "arXiv 2506.14136, linear probe",
            **asdict(recipe),
            "seed": seed,
            "best_epoch": best_epoch,
            "epochs_run": len(history),
            "train_samples": len(x),
            "train_positives": y.sum(dim=0).int().tolist(),
        },
    )
    return ProbeResult(trained, history, (), time.perf_counter() - begun)


def _paper_loop(
    x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor, seed: int, recipe: PaperProbeSettings
) -> tuple[dict[str, torch.Tensor], int, list[dict[str, float]]]:
    """Return the best epoch's parameters, its number (from 1), and one row an epoch."""
    generator = torch.Generator().manual_seed(seed)
    head = paper_head(x.shape[1], y.shape[1], generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    best_loss, best_epoch, waited = float("inf"), 0, 0
    best = {name: value.clone() for name, value in head.state_dict().items()}
    history: list[dict[str, float]] = []
    for epoch in range(1, recipe.epochs + 1):
        rate = float(schedule.get_last_lr()[0])
        order = torch.randperm(len(x), generator=generator)
        train_loss = _train_epoch(head, optimizer, x[order], y[order], recipe.batch_size)
        val_loss = _batch_loss(head, x_val, y_val, recipe.batch_size)
        schedule.step()
        history.append({"epoch": float(epoch), "learning_rate": rate, "train_loss": train_loss, "val_loss": val_loss})
        if val_loss < best_loss - recipe.minimum_improvement:
            best_loss, best_epoch, waited = val_loss, epoch, 0
            best = {name: value.clone() for name, value in head.state_dict().items()}
        else:
            waited += 1
            if waited >= recipe.patience:
                break
    return best, best_epoch, history


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Train on one thread: a batch of 24 rows is too little to share, and on a busy machine sharing costs 50 times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def paper_head(dimensions: int, labels: int, generator: torch.Generator) -> torch.nn.Linear:
    """Return the study's head, seeded: weight Xavier-uniform, bias uniform within 1/sqrt(d) as ``nn.Linear`` has it."""
    head = torch.nn.utils.skip_init(torch.nn.Linear, dimensions, labels)
    bound = dimensions**-0.5
    with torch.no_grad():
        torch.nn.init.xavier_uniform_(head.weight, generator=generator)
        torch.nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head


def _train_epoch(
    head: torch.nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch_size: int
) -> float:
    losses = []
    for features, truth in zip(x.split(batch_size), y.split(batch_size), strict=True):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(features), truth)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def _batch_loss(head: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> float:
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(head(features), truth).item()
        for features, truth in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    return float(np.mean(losses))


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
