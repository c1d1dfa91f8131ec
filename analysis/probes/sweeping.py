"""A sweep of probes and the choice among them: on validation rows, or on folds of everything but the test rows.

In come embeddings and truth without any test row; out go held-out logits of every candidate, the best of them, and a
probe fitted with it. What the candidates are, `analysis.probes.candidates` says; how they are fitted,
`analysis.probes.fitters`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.crossfit import group_folds
from analysis.heads import LinearHead
from analysis.metrics import check_truth
from analysis.probes.candidates import Candidate, Options
from analysis.probes.fitters import Fitter, fitter_of
from analysis.probes.fitting import check_part
from analysis.probes.logistic import TOLERANCE, LogisticFits
from analysis.probes.selection import choose_best, mean_average_precision, mean_log_loss
from analysis.probes.stored import StoredProbe
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)


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
    probe : LinearHead or StoredProbe
        Fitted with the chosen candidate: on the training rows, or with folds on all rows.
    fits : mapping of str to LogisticFits
        Convergence of every problem by feature set, for the convex kinds; empty for the others.
    untrained_labels : tuple of str
        Labels of one value only in at least one fit: there they have their prior.
    """

    kind: str
    candidates: tuple[Candidate, ...]
    logits: np.ndarray
    levelled: np.ndarray
    scores: list[dict[str, float]]
    chosen: int
    probe: LinearHead | StoredProbe
    fits: Mapping[str, LogisticFits]
    untrained_labels: tuple[str, ...]

    def convergence(self) -> pd.DataFrame:
        """Return one row a problem; empty for kinds without."""
        parts = [fits.table().assign(features=name) for name, fits in self.fits.items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def convergence_sentence(self) -> str:
        """Return in a sentence how many problems are solved and how well; "" for kinds without."""
        table = self.convergence()
        if not len(table):
            return ""
        done, trained = int(table["converged"].sum()), table[table["trained"]]
        worst = float((trained["gap"] / trained["objective"]).max()) if len(trained) else 0.0
        which = f"all {done:,}" if done == len(table) else f"{done:,} of {len(table):,}"
        lacking = len(table) - len(trained)
        return (
            f"convergence: {which} problems proved within {TOLERANCE:g} of their minimum (relative); worst gap "
            f"{worst:.1e}" + (f"; {lacking:,} of one value only have their prior" if lacking else "")
        )


def sweep_on_validation(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str],
    **options: Any,
) -> Sweep:
    """Fit every candidate on the training rows and choose on the validation rows.

    Parameters
    ----------
    train_x, val_x : ndarray of float, (n, d) and (m, d)
        Un-normalised embeddings; (n, t, width) tokens for the kind "attention".
    train_y, val_y : ndarray of 0/1, (n, L) and (m, L)
    label_names : sequence of str, length L
    options
        Of `Options`.
    """
    names, wanted = tuple(label_names), Options(**options)
    x, y = _checked(train_x, train_y, names, "training")
    held_x, held_y = _checked(val_x, val_y, names, "validation")
    rows = np.ones((1, len(x)), dtype=bool)
    fitter = fitter_of(x, y, rows, names, wanted)
    logits = fitter.logits(0, held_x)
    return _chosen(fitter, wanted, logits, logits, held_y, names, rows, y)


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
        Un-normalised embeddings, or tokens, no test row among them.
    y : ndarray of 0/1, (n, L)
    groups : (n,) str
        Kept whole by the folds.
    label_names : sequence of str, length L
    folds : int
    seeds : sequence of int
        Of the folds; each seed deals them out anew.
    options
        Of `Options`.
    """
    names, wanted = tuple(label_names), Options(**options)
    values, truth = _checked(x, y, names, "cross-validation")
    if not len(seeds):
        raise UsageError("a sweep over folds needs at least one seed")
    dealt = [group_folds(groups, folds, seed, truth) for seed in seeds]
    seen = np.concatenate([np.stack([fold != number for number in range(folds)]) for fold in dealt])
    # The last weighting sees all rows: its fit with the chosen candidate is the probe that is kept.
    everything = np.concatenate([seen, np.ones((1, len(values)), dtype=bool)])
    fitter = fitter_of(values, truth, everything, names, wanted)
    logits = np.zeros((len(wanted.candidates()), *truth.shape))
    levelled = np.zeros_like(logits)
    for which, rows in enumerate(seen):
        found = fitter.logits(which, values)
        logits[:, ~rows] += found[:, ~rows] / len(seeds)
        levelled[:, ~rows] += (found[:, ~rows] - found[:, rows].mean(axis=1, keepdims=True)) / len(seeds)
    return _chosen(fitter, wanted, logits, levelled, truth, names, everything, truth)


def _checked(x: np.ndarray, y: np.ndarray, names: tuple[str, ...], which: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings as float64, or tokens as they are, and truth as bool; DataError where they do not fit."""
    if np.ndim(x) != 3:
        return check_part(x, y, names, which, False)
    values, truth = np.asarray(x), check_truth(y)
    if len(values) != len(truth) or truth.shape[1] != len(names) or not len(values):
        raise DataError(
            f"{which}: tokens {values.shape}, labels {truth.shape} and {len(names)} label names do not fit together"
        )
    return values, truth


def _chosen(
    fitter: Fitter, options: Options, logits: np.ndarray, levelled: np.ndarray, held_y: np.ndarray,
    names: tuple[str, ...], rows: np.ndarray, y: np.ndarray,
) -> Sweep:  # fmt: skip
    """Return the sweep with its choice, by held-out logits; the last of `rows` (G, n) is what the kept probe sees."""
    scores = [
        {"log_loss": mean_log_loss(held_y, each), "average_precision": mean_average_precision(held_y, ranked)}
        for each, ranked in zip(logits, levelled, strict=True)
    ]
    chosen = choose_best(scores, options.selection)
    untrained = tuple(
        name
        for name, column in zip(names, y.T, strict=True)
        if any(len(set(column[seen].tolist())) < 2 for seen in rows)
    )
    if untrained:
        logger.warning(
            "labels of one value only in at least one training part have no probe there, but their prior: %s",
            ", ".join(untrained),
        )
    probe = fitter.probe(len(rows) - 1, chosen)
    return Sweep(options.kind, options.candidates(), logits, levelled, scores, chosen, probe, fitter.fits, untrained)
