"""Which conclusions hang on a choice that somebody had to make? One choice changed at a time, all else as it was.

In come the settings' predictions on test as the study made them, and the same with one choice changed (thresholds,
prompts, normalisation, the source of the labels); out go the figures with their difference to the study's own, and what
each change does to the comparisons that a conclusion is made of. A comparison is "above" or "below" where the paired
interval of the difference lies on one side of 0, else "not told apart"; a change matters where one of these words
becomes another, not where a figure moves.

All variants are scored on the same resamples of the same patients, so differences between variants are paired, those
between label sources included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.baselines import PREVALENCE
from analysis.bootstrap import Bootstrap, bootstrap_metrics, percentile_ends
from analysis.metrics import LOWER_IS_BETTER, Prediction
from analysis.sentences import TITLES
from engine.errors import UsageError

METRICS = ("lrap", "f1_macro", "exact_match", "map", "auroc_macro")
# Metrics whose comparisons make the conclusion.
CONCLUDED = ("lrap", "f1_macro")
ABOVE, BELOW, SAME = "above", "below", "not told apart"


@dataclass(frozen=True)
class Variant:
    """The study with one choice changed.

    Parameters
    ----------
    changed : str
        What: "thresholds", "prompts", "normalisation", "labels"; "" for the study as it is.
    choice : str
        To what.
    truth : ndarray of 0/1, (n, L)
        On test.
    predictions : mapping of setting name to Prediction
        All settings; those that the choice does not touch as they were.
    baseline : Prediction
        The prevalence ranking of this variant's training labels.
    touched : sequence of str
        The settings that the choice changes.
    note : str
        What could not be changed with it.
    """

    changed: str
    choice: str
    truth: np.ndarray
    predictions: Mapping[str, Prediction]
    baseline: Prediction
    touched: Sequence[str] = ()
    note: str = ""


def sensitivity(
    variants: Sequence[Variant],
    groups: np.ndarray,
    *,
    label_names: tuple[str, ...],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return figures and comparisons of every variant beside those of the first, which is the study as it is.

    Parameters
    ----------
    variants : sequence of Variant
    groups : ndarray, (n,)
        Patients of the test images.
    label_names, replicates, seed, level

    Returns
    -------
    figures : DataFrame
        changed, choice, setting, metric, value, low, high, difference (to the study's own), difference_low,
        difference_high, note: one row for each setting that the choice touches.
    comparisons : DataFrame
        changed, choice, metric (`CONCLUDED`), setting, other, difference, low, high, verdict, before (the verdict of
        the study as it is), changes.
    """
    if not variants or variants[0].changed:
        raise UsageError("the first variant must be the study as it is (changed='')")
    drawn = [
        bootstrap_metrics(
            each.truth,
            {**each.predictions, PREVALENCE: each.baseline},
            groups,
            label_names=label_names,
            replicates=replicates,
            seed=seed,
            level=level,
        )
        for each in variants
    ]
    figures: list[dict] = []
    comparisons: list[dict] = []
    before = {(row["metric"], row["setting"], row["other"]): row["verdict"] for row in _comparisons(drawn[0])}
    for variant, own in zip(variants, drawn, strict=True):
        names = {"changed": variant.changed or "nothing", "choice": variant.choice}
        touched = variant.touched if variant.changed else tuple(variant.predictions)
        figures += [{**names, **row, "note": variant.note} for row in _figures(own, drawn[0], touched)]
        for row in _comparisons(own):
            was = before[row["metric"], row["setting"], row["other"]]
            comparisons.append({**names, **row, "before": was, "changes": row["verdict"] != was})
    return pd.DataFrame(figures), pd.DataFrame(comparisons)


def sensitivity_sentences(comparisons: pd.DataFrame) -> list[str]:
    """Return for each change whether a comparison of the settings comes out otherwise, and which."""
    sentences = []
    for changed, of_changed in comparisons.groupby("changed", sort=False):
        if changed == "nothing":
            continue
        as_before: list[str] = []
        for choice, part in of_changed.groupby("choice", sort=False):
            other = part[part["changes"]]
            if other.empty:
                as_before.append(str(choice))
                continue
            told = "; ".join(
                f"{row.setting} against {row.other} by {TITLES[str(row.metric)]}: {row.before} becomes {row.verdict}"
                for row in other.itertuples()
            )
            sentences.append(
                f"With other {changed} ({choice}) {len(other)} of {len(part)} comparisons come out otherwise: {told}."
            )
        if as_before:
            sentences.append(f"With other {changed} ({', '.join(as_before)}) every comparison comes out as before.")
    return sentences


def _figures(own: Bootstrap, base: Bootstrap, settings: Sequence[str]) -> list[dict]:
    rows = []
    for setting, metric in itertools.product([*settings, PREVALENCE], METRICS):
        value, low, high, _ = own.interval(setting, metric)
        mine, first = own.column(setting, metric), base.column(setting, metric)
        ends = percentile_ends(mine.replicates - first.replicates, own.level)
        lower, upper = (float(end) if own.groups > 1 else float("nan") for end in ends)
        row = {"setting": setting, "metric": metric, "value": value, "low": low, "high": high}
        row |= {"difference": mine.value - first.value, "difference_low": lower, "difference_high": upper}
        rows.append(row)
    return rows


def _comparisons(drawn: Bootstrap) -> list[dict]:
    settings = [name for name in drawn.settings if name != PREVALENCE]
    pairs = [(later, earlier) for earlier, later in itertools.combinations(settings, 2)]
    pairs += [(name, PREVALENCE) for name in settings]
    rows = []
    for metric, (setting, other) in itertools.product(CONCLUDED, pairs):
        value, low, high, _ = drawn.difference(setting, other, metric)
        verdict = SAME
        if low > 0 or high < 0:
            verdict = ABOVE if (low > 0) != (metric in LOWER_IS_BETTER) else BELOW
        row = {"metric": metric, "setting": setting, "other": other, "difference": value, "low": low, "high": high}
        rows.append(row | {"verdict": verdict})
    return rows
