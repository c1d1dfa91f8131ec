"""One number about a space, with its interval, and with what it would be if labels or pairs meant nothing.

In come a value, its resamples and its null; out go a `Measure` and, of several, a table. An interval is by patient and
says how the number would vary had other patients come; a null says how large it is without any effect. Neither is ever
a silent NaN: where one is missing, ``note`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.bootstrap import bias_shift, percentile_ends
from engine.errors import UsageError

NAN = float("nan")
Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Measure:
    """A number with its interval and its null.

    Parameters
    ----------
    name : str
    value : float
        On the data as they are; NaN only with a note.
    label : str or None
        The class or label it is of; None for all together.
    low, high : float
        Ends of the percentile interval, groups drawn with replacement. A resample holds about 63 % of the patients, and
        copies: what depends on how many different samples there are (widths of small classes, a minimum over classes)
        is shifted in it. Resamples of such measures are moved until their mean is the value.
    replicates : int
        Resamples in which it is defined.
    null, null_low, null_high : float
        Mean and ends of the percentile range without effect.
    p : float
        Share of the null at least as far in the direction of an effect as the value, the value counted in: mostly that
        of ``better``, but towards more for hubness and modality gap, which are effects nobody wishes for.
    permutations : int
    better : "higher", "lower" or ""
    samples, groups : int
        Of the value.
    interval_samples, null_samples : int
        Of the interval and of the null, fewer where all would be too dear (whole patients, drawn at random).
    note : str
    """

    name: str
    value: float
    label: str | None = None
    low: float = NAN
    high: float = NAN
    replicates: int = 0
    null: float = NAN
    null_low: float = NAN
    null_high: float = NAN
    p: float = NAN
    permutations: int = 0
    better: Better = ""
    samples: int = 0
    groups: int = 0
    interval_samples: int = 0
    null_samples: int = 0
    note: str = ""


def measure(
    name: str,
    value: float,
    *,
    label: str | None = None,
    drawn: np.ndarray | None = None,
    null: np.ndarray | None = None,
    observed: float | None = None,
    better: Better = "",
    effect: Better | None = None,
    centred: bool = False,
    level: float = 0.95,
    samples: int = 0,
    groups: int = 0,
    interval_samples: int | None = None,
    null_samples: int | None = None,
    note: str = "",
) -> Measure:
    """Return a `Measure` of a value, its resamples (R,) and its null (P,).

    Parameters
    ----------
    observed : float, optional
        What the null is compared with, where it was drawn on a part of the samples; the value unless given.
    effect : "higher" or "lower", optional
        Where an effect moves the value; to the better unless given.
    centred : bool
        Move the resamples until their mean is the value.
    """
    if not 0 < level < 1:
        raise UsageError(f"confidence level {level} is not between 0 and 1; 0.95 is usual")
    notes = [note] if note else []
    low = high = null_mean = null_low = null_high = p = NAN
    replicates = 0
    if drawn is not None:
        drawn = _finite(drawn)
        replicates = int(np.isfinite(drawn).sum())
        if groups < 2:
            notes.append("no interval: it needs at least two patients")
        elif not replicates:
            notes.append("no interval: undefined in every resample")
        else:
            moved = bias_shift(value, drawn) if centred else 0.0
            low, high = (float(end + moved) for end in percentile_ends(drawn, level))
    permutations = 0
    if null is not None:
        null = _finite(null)
        permutations = int(np.isfinite(null).sum())
        if not permutations:
            notes.append("no null: undefined in every permutation")
        else:
            null_mean = float(np.nanmean(null))
            null_low, null_high = (float(end) for end in percentile_ends(null, level))
            p = tail_share(null, value if observed is None else observed, better if effect is None else effect)
    return Measure(
        name, float(value), label, low, high, replicates, null_mean, null_low, null_high, p, permutations, better,
        samples, groups,
        samples if interval_samples is None else interval_samples,
        samples if null_samples is None else null_samples,
        "; ".join(notes),
    )  # fmt: skip


def tail_share(null: np.ndarray, observed: float, side: Better) -> float:
    """Return the share of null values at least as high (or low) as the observed one, which counts in; NaN for no side.

    Source: Phipson and Smyth, Permutation p-values should never be zero (2010).
    """
    defined = null[np.isfinite(null)]
    if not side or not math.isfinite(observed) or not len(defined):
        return NAN
    # A permutation that gives the same labels again gives the same value but for the last digits of float32: of 1 where
    # sums of about that size cancel, of less where all are smaller, as distances of short embeddings are.
    largest = max(abs(observed), float(np.abs(defined).max()))
    slack = 1e-6 * max(abs(observed), min(1.0, 10 * largest))
    as_far = defined >= observed - slack if side == "higher" else defined <= observed + slack
    return (1 + int(as_far.sum())) / (1 + len(defined))


def measure_table(measures: Iterable[Measure]) -> pd.DataFrame:
    """Return measures as a table, one row each, columns as in `Measure`."""
    return pd.DataFrame([asdict(each) for each in measures], columns=list(Measure.__dataclass_fields__))


def _finite(values: np.ndarray) -> np.ndarray:
    """Return float64 with NaN for infinite values, so that one of them does not carry a mean away."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(values), values, NAN)
