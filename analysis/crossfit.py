"""Heads for data too small to hold rows back: every row is explained by a head that never saw its patient.

In come embeddings, truth and groups; out go folds by group and one head a fold, trained on the other folds. C is chosen
inside: one of the other folds serves as validation, and the head is then trained on all of them with that C. The inner
and outer fits of all folds are one sweep of `solve_logistic`: a row of weights says which rows a fit may see.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.bootstrap import group_sums
from analysis.heads import LinearHead
from analysis.metrics import check_truth
from analysis.probes.fitting import C_GRID, check_part, warn_of_unfinished
from analysis.probes.logistic import TOLERANCE, solve_logistic
from analysis.probes.selection import choose_best, validation_scores
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossFit:
    """One head a fold.

    Parameters
    ----------
    heads : tuple of LinearHead, length K
        ``heads[k]`` was trained without any group of fold k.
    fold : ndarray of int64, (n,)
        Fold of each row.
    """

    heads: tuple[LinearHead, ...]
    fold: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return probabilities (n, L) of the rows (n, d) that it was fitted on, each by the head that never saw it."""
        if len(features) != len(self.fold):
            raise DataError(f"{len(features)} embeddings for {len(self.fold)} rows; give those it was fitted on")
        found = np.empty((len(self.fold), len(self.heads[0].label_names)))
        for number, head in enumerate(self.heads):
            rows = self.fold == number
            found[rows] = head.probabilities(np.asarray(features)[rows])
        return found

    def head_of(self, row: int) -> LinearHead:
        """Return the head that never saw the group of a row."""
        return self.heads[int(self.fold[row])]


def group_folds(groups: Sequence[str] | np.ndarray, folds: int, seed: int, y: np.ndarray | None = None) -> np.ndarray:
    """Return a fold for every row, whole groups together, rows and rare labels spread evenly.

    Groups are dealt out one by one, those with the rarest labels first, each to the fold that has fewest of its rarest
    label, then fewest rows; what is left equal is decided by the seed. Without truth only rows are balanced.

    Source: iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011), here over groups.

    Parameters
    ----------
    groups : (n,) str
    folds : int
    seed : int
    y : ndarray of 0/1, (n, L), optional

    Returns
    -------
    ndarray of int64, (n,)
        0 to folds - 1, none of them empty. The order of the rows does not matter.
    """
    codes, names = pd.factorize(np.asarray(groups, dtype=object), sort=True)
    if folds < 2 or folds > len(names):
        raise UsageError(
            f"{folds} folds of {len(names)} groups; give at least 2 folds and no more than there are groups"
        )
    if (codes < 0).any():
        raise DataError(f"{(codes < 0).sum()} rows have no group; folds by group need one for each")
    sizes = np.bincount(codes, minlength=len(names))
    truth = check_truth(np.zeros((len(codes), 1)) if y is None else y)
    if len(truth) != len(codes):
        raise DataError(f"labels of {len(truth)} rows for {len(codes)} groups")
    positives = group_sums(truth, codes, len(names)).astype(np.int64)
    totals = positives.sum(axis=0)
    rarest = np.where(positives > 0, totals, np.iinfo(np.int64).max).argmin(axis=1)
    rarity = np.where(positives.any(axis=1), totals[rarest], np.iinfo(np.int64).max)
    generator = np.random.Generator(np.random.PCG64(seed))
    order = np.lexsort((generator.permutation(len(names)), -sizes, rarity))
    fold_of = np.empty(len(names), dtype=np.int64)
    rows_in, labels_in = np.zeros(folds, dtype=np.int64), np.zeros((folds, truth.shape[1]), dtype=np.int64)
    for place, group in enumerate(order):
        of_label = labels_in[:, rarest[group]] if positives[group].any() else np.zeros(folds, dtype=np.int64)
        # Each fold gets one of the last groups at the latest, so that none stays empty.
        empty = rows_in == 0
        allowed = empty if len(order) - place <= empty.sum() else np.ones(folds, dtype=bool)
        candidates = np.flatnonzero(allowed)
        draw = generator.permutation(folds)
        chosen = candidates[np.lexsort((draw[candidates], rows_in[candidates], of_label[candidates]))[0]]
        fold_of[group] = chosen
        rows_in[chosen] += sizes[group]
        labels_in[chosen] += positives[group]
    return fold_of[codes]


def crossfit_heads(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    label_names: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    c_grid: Sequence[float] = C_GRID,
    select: str = "log_loss",
    normalize: bool = True,
    encoder_id: str = "",
) -> CrossFit:
    """Train one head a fold on the rows of all other folds.

    Parameters
    ----------
    x : ndarray of float, (n, d)
        Un-normalised embeddings.
    y : ndarray of 0/1, (n, L)
    groups : (n,) str
        Patient or study of each row.
    label_names : sequence of str, length L
    folds, seed : int
        As in `group_folds`.
    c_grid, select, normalize, encoder_id
        As in `analysis.probes.fit_probe`. With two folds C cannot be chosen inside, so the grid must be one value.

    Returns
    -------
    CrossFit
        Labels of one value only among the rows of a fold's training get their prior there, and are named in the head's
        provenance.
    """
    names, grid = tuple(label_names), sorted(float(value) for value in c_grid)
    if len(np.asarray(x)) != len(np.asarray(y)):
        raise DataError(f"{len(np.asarray(x))} embeddings for {len(np.asarray(y))} rows of labels")
    embeddings, truth = check_part(x, y, names, "cross-fitting", normalize)
    fold = group_folds(groups, folds, seed, truth)
    if len(grid) > 1 and folds < 3:
        raise UsageError(f"2 folds leave no fold to choose among {len(grid)} values of C on; use 3 or more, or one C")
    rest = np.stack([fold != held_out for held_out in range(folds)])
    inner = np.stack([fold == (held_out + 1) % folds for held_out in range(folds)])
    seen = np.concatenate([rest, rest & ~inner]) if len(grid) > 1 else rest
    fits = solve_logistic(embeddings, truth, grid, row_weights=seen, label_names=names)
    warn_of_unfinished(fits, TOLERANCE, 200)
    lacking = np.asarray(~fits.trained[:folds, 0].all(axis=0))
    if lacking.any():
        logger.warning(
            "labels of one value only in the training rows of a fold get their prior there: %s",
            ", ".join(name for name, lacks in zip(names, lacking, strict=True) if lacks),
        )
    heads = []
    for held_out in range(folds):
        chosen = 0
        if len(grid) > 1:
            weight, bias = fits.weight[folds + held_out, 0], fits.bias[folds + held_out, 0]
            rows = inner[held_out]
            chosen = choose_best(
                [
                    validation_scores(truth[rows], embeddings[rows] @ weight[:, level].T + bias[:, level])
                    for level in range(len(grid))
                ],
                select,
            )
        untrained = [name for name, trained in zip(names, fits.trained[held_out, 0], strict=True) if not trained]
        heads.append(
            LinearHead(
                weight=fits.weight[held_out, 0, :, chosen],
                bias=fits.bias[held_out, 0, :, chosen],
                label_names=names,
                normalised=normalize,
                encoder_id=encoder_id,
                provenance={
                    "recipe": "logistic regression, cross-fitted",
                    "C": grid[chosen],
                    "c_grid": grid,
                    "select": select if len(grid) > 1 else None,
                    "fold": held_out,
                    "train_samples": int(rest[held_out].sum()),
                    "train_positives": truth[rest[held_out]].sum(axis=0).tolist(),
                    "untrained_labels": untrained,
                },
            )
        )
    return CrossFit(tuple(heads), fold)
