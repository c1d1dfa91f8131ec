"""A sweep of probes and the choice among them: on validation rows, or on folds of everything but the test rows.

In come embeddings and truth without any test row; out go held-out logits of every candidate (class weighting x C), the
best of them, and a probe fitted with it. Convex kinds are one sweep of `solve_logistic`, whatever the number of folds
and seeds; the others are estimators, fitted one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.crossfit import group_folds
from analysis.heads import LinearHead
from analysis.probes.base import LinearEstimator, Probe
from analysis.probes.fitting import check_part, warn_of_unfinished
from analysis.probes.linear import RidgeProbe, text_vectors
from analysis.probes.logistic import TOLERANCE, LogisticFits, solve_logistic
from analysis.probes.neighbours import NearestMean, NeighbourProbe, TipAdapterProbe
from analysis.probes.selection import choose_best, mean_average_precision, mean_log_loss
from analysis.probes.trained import MLPProbe
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)

CONVEX = ("logistic", "text-prior")
KINDS = (*CONVEX, "ridge", "nearest-mean", "neighbours", "tip-adapter", "mlp")


@dataclass(frozen=True)
class Candidate:
    """What a probe is fitted with; C is None for kinds that have none."""

    class_weight: str = "none"
    C: float | None = None

    @property
    def name(self) -> str:
        """A short name, such as "C = 10, balanced"."""
        strength = [] if self.C is None else [f"C = {self.C:g}"]
        return ", ".join([*strength, *([self.class_weight] if self.class_weight != "none" else [])]) or "as it is"


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Parameters
    ----------
    kind : str
    candidates : tuple of Candidate, length A
    logits : ndarray of float64, (A, m, L)
        Of the held-out rows, each by fits that did not see it (their mean over seeds).
    levelled : ndarray of float64, (A, m, L)
        The same for ranking: each fit's logits minus their mean over the rows it learnt from. A fold that happens to
        hold more positives leaves fewer for the fit that is asked about it, so that logits of several fits in one
        ranking would put AUROC below 0.5 where nothing is learnt.
    scores : list of dict, length A
        ``log_loss`` and ``average_precision`` of the held-out rows.
    chosen : int
    probe : LinearHead or Probe
        Fitted with the chosen candidate: on the training rows, or with folds on all rows.
    fits : LogisticFits or None
        Convergence of every problem, for the convex kinds.
    untrained_labels : tuple of str
        Labels of one value only in at least one fit: there they have their prior.
    """

    kind: str
    candidates: tuple[Candidate, ...]
    logits: np.ndarray
    levelled: np.ndarray
    scores: list[dict[str, float]]
    chosen: int
    probe: LinearHead | Probe
    fits: LogisticFits | None
    untrained_labels: tuple[str, ...]

    def convergence(self) -> pd.DataFrame:
        """Return one row a problem; empty for kinds without."""
        return pd.DataFrame() if self.fits is None else self.fits.table()


def sweep_on_validation(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str],
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> Sweep:
    """Fit every candidate on the training rows and choose on the validation rows.

    Parameters
    ----------
    train_x, val_x : ndarray of float, (n, d) and (m, d)
        Un-normalised embeddings.
    train_y, val_y : ndarray of 0/1, (n, L) and (m, L)
    label_names : sequence of str, length L
    seeds : sequence of int
        The first one is the MLP's.
    options
        See `sweep_on_folds`.
    """
    names = tuple(label_names)
    x, y = check_part(train_x, train_y, names, "training", True)
    held_x, held_y = check_part(val_x, val_y, names, "validation", True)
    fitter = _fitter(x, y, np.ones((1, len(x)), dtype=bool), names, seeds=seeds, **options)
    logits = np.stack([fitter.logits(0, candidate, held_x) for candidate in range(len(fitter.candidates))])
    return fitter.result(logits, logits, held_y, 0)


def sweep_on_folds(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    *,
    label_names: Sequence[str],
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    **options: Any,
) -> Sweep:
    """Fit every candidate on all folds but one, for each fold and seed, choose on the rows left out, and fit on all.

    Parameters
    ----------
    x : ndarray of float, (n, d)
        Un-normalised embeddings, no test row among them.
    y : ndarray of 0/1, (n, L)
    groups : (n,) str
        Kept whole by the folds.
    label_names : sequence of str, length L
    folds : int
    seeds : sequence of int
        Of the folds; each seed deals them out anew.
    options
        ``kind`` (of `KINDS`), ``c_grid``, ``class_weights``, ``select`` ("log_loss" | "average_precision"), ``text``
        (L, d) normalised text vectors for "text-prior" and "tip-adapter", ``scale``, the model's logit scale, and
        ``encoder_id``.
    """
    names = tuple(label_names)
    values, truth = check_part(x, y, names, "cross-validation", True)
    if not len(seeds):
        raise UsageError("a sweep over folds needs at least one seed")
    dealt = [group_folds(groups, folds, seed, truth) for seed in seeds]
    seen = np.concatenate([np.stack([fold != number for number in range(folds)]) for fold in dealt])
    # The last weighting sees all rows: its fit with the chosen candidate is the probe that is kept.
    everything = np.concatenate([seen, np.ones((1, len(values)), dtype=bool)])
    fitter = _fitter(values, truth, everything, names, seeds=seeds, **options)
    logits = np.zeros((len(fitter.candidates), *truth.shape))
    levelled = np.zeros_like(logits)
    for which, rows in enumerate(seen):
        for candidate in range(len(fitter.candidates)):
            found = fitter.logits(which, candidate, values)
            logits[candidate, ~rows] += found[~rows] / len(seeds)
            levelled[candidate, ~rows] += (found[~rows] - found[rows].mean(axis=0)) / len(seeds)
    return fitter.result(logits, levelled, truth, len(seen))


@dataclass
class _Fitter:
    """Fits of all candidates on all row weightings, made when the object is."""

    kind: str
    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    select: str
    encoder_id: str
    rows: np.ndarray
    truth: np.ndarray
    logits_of: Callable[[int, int, np.ndarray], np.ndarray]
    probe_of: Callable[[int, int], LinearHead | Probe]
    fits: LogisticFits | None

    def logits(self, which: int, candidate: int, x: np.ndarray) -> np.ndarray:
        return self.logits_of(which, candidate, x)

    def result(self, logits: np.ndarray, levelled: np.ndarray, y: np.ndarray, which: int) -> Sweep:
        scores = [
            {"log_loss": mean_log_loss(y, each), "average_precision": mean_average_precision(y, ranked)}
            for each, ranked in zip(logits, levelled, strict=True)
        ]
        chosen = choose_best(scores, self.select)
        untrained = tuple(
            name
            for name, column in zip(self.names, self.truth.T, strict=True)
            if any(len(set(column[seen].tolist())) < 2 for seen in self.rows)
        )
        if untrained:
            logger.warning(
                "labels of one value only in at least one training part have no probe there, but their prior: %s",
                ", ".join(untrained),
            )
        probe = self.probe_of(which, chosen)
        return Sweep(self.kind, self.candidates, logits, levelled, scores, chosen, probe, self.fits, untrained)


def _fitter(
    x: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    names: tuple[str, ...],
    *,
    kind: str = "logistic",
    c_grid: Sequence[float] = (1.0,),
    class_weights: Sequence[str] = ("none",),
    select: str = "log_loss",
    text: np.ndarray | None = None,
    scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    encoder_id: str = "",
) -> _Fitter:
    if kind not in KINDS:
        raise UsageError(f"unknown kind of probe {kind!r}; known: {', '.join(KINDS)}")
    if kind in ("text-prior", "tip-adapter") and text is None:
        raise UsageError(f"a probe of kind {kind!r} needs the labels' text vectors")
    if kind in CONVEX:
        return _convex(x, y, rows, names, kind, c_grid, class_weights, select, text, scale, encoder_id)
    return _others(x, y, rows, names, kind, select, text, scale, int(seeds[0]), encoder_id)


def _convex(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], kind: str, c_grid: Sequence[float],
    class_weights: Sequence[str], select: str, text: np.ndarray | None, scale: float, encoder_id: str,
) -> _Fitter:  # fmt: skip
    grid = sorted({float(c) for c in c_grid})
    prior = scale * text_vectors(text if kind == "text-prior" else None, y.shape[1], x.shape[1])
    offset = x @ prior.T if kind == "text-prior" else None
    fits = solve_logistic(x, y, grid, row_weights=rows, class_weights=class_weights, offset=offset, label_names=names)
    warn_of_unfinished(fits, TOLERANCE, 200)
    # Smaller C first: among equals the stronger ridge is kept.
    places = [(weighting, level) for level in range(len(grid)) for weighting in range(len(class_weights))]
    candidates = tuple(Candidate(class_weights[weighting], grid[level]) for weighting, level in places)

    def parts(which: int, candidate: int) -> tuple[np.ndarray, np.ndarray]:
        weighting, level = places[candidate]
        return fits.weight[which, weighting, :, level] + prior, fits.bias[which, weighting, :, level]

    def logits(which: int, candidate: int, values: np.ndarray) -> np.ndarray:
        weight, bias = parts(which, candidate)
        return values @ weight.T + bias

    def head(which: int, candidate: int) -> LinearHead:
        weight, bias = parts(which, candidate)
        truth = y[rows[which]]
        provenance = {
            "recipe": "logistic regression" if kind == "logistic" else "logistic regression drawn to text",
            "C": candidates[candidate].C,
            "c_grid": grid,
            "class_weight": candidates[candidate].class_weight,
            "select": select if len(candidates) > 1 else None,
            "tol": TOLERANCE,
            "train_samples": len(truth),
            "train_positives": truth.sum(axis=0).tolist(),
            "untrained_labels": [names[k] for k in np.flatnonzero(~fits.trained[which, places[candidate][0]])],
        }
        return LinearHead(weight, bias, names, True, encoder_id, provenance)

    return _Fitter(kind, names, candidates, select, encoder_id, rows, y, logits, head, fits)


def _others(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], kind: str, select: str,
    text: np.ndarray | None, scale: float, seed: int, encoder_id: str,
) -> _Fitter:  # fmt: skip
    if y.shape[1] < 2:
        # One column is two classes to scikit-learn, so a part with one class only would be refused there.
        lone = [number for number, seen in enumerate(rows) if len(set(y[seen, 0].tolist())) < 2]
        if lone:
            if len(rows) == 1:
                raise DataError(
                    f"label {names[0]!r} has one value only among the training samples, so a {kind} probe learns "
                    "nothing from them; take the logistic one, which gives the prior, or another split"
                )
            raise DataError(f"label {names[0]!r} has one value only in training part {lone[0]}; use fewer folds")
    made: dict[str, Callable[[], Probe]] = {
        "ridge": lambda: RidgeProbe(normalize=True, alphas=tuple(np.logspace(-4, 4, 17).tolist())),
        "nearest-mean": lambda: NearestMean(normalize=True),
        "neighbours": lambda: NeighbourProbe(20),
        "tip-adapter": lambda: TipAdapterProbe(text, scale=scale),
        "mlp": lambda: MLPProbe(random_state=seed),
    }
    probes = [made[kind]().fit(x[seen], y[seen].astype(int)) for seen in rows]

    def logits(which: int, _: int, values: np.ndarray) -> np.ndarray:
        found = probes[which].decision_function(values)
        return found[:, None] if found.ndim == 1 else found

    def kept(which: int, _: int) -> LinearHead | Probe:
        probe = probes[which]
        return probe.to_head(names, encoder_id) if isinstance(probe, LinearEstimator) else probe

    return _Fitter(kind, names, (Candidate(),), select, encoder_id, rows, y, logits, kept, None)
