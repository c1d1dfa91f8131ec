"""Is one setting really better than another? Paired differences with p-values, corrected for their number.

A `Bootstrap` of several settings on the same samples comes in; a table of differences goes out. Both settings are
scored on each resample of the patients, so that what is hard for both cancels out.

The p-value is the two-sided one that belongs to the percentile interval: twice the smaller share of replicates on
either side of no difference, with one added to count and number so that it is never 0 (Davison and Hinkley, Bootstrap
Methods and their Application, 1997, section 4.2; a replicate at exactly 0 counts on both sides). It is below 0.05 where
the 95 % interval leaves out 0, up to the rounding of a replicate. With R replicates it cannot be smaller than 2 / (R +
1), and Holm's correction multiplies it by up to the number of comparisons: many comparisons need many replicates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.bootstrap import Bootstrap, percentile_ends
from analysis.metrics import LOWER_IS_BETTER, OVERALL_METRICS
from engine.errors import UsageError

# Metrics of which neither more nor less is better; a difference has no winner.
_WITHOUT_DIRECTION = frozenset({"prevalence", "predicted_rate", "positives", "over_prediction"})


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted for all of them being looked at (Holm, Scandinavian Journal of Statistics 1979).

    Parameters
    ----------
    p_values : (m,) float
        NaN where there is no test; these are not counted among the m and stay NaN.

    Returns
    -------
    ndarray of float64, (m,)
        The chance of one or more false findings among all is at most a, where those below a are called findings,
        whatever the tests' dependence.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if ((given < 0) | (given > 1)).any():
        raise UsageError(f"p-values must lie between 0 and 1, got {given[(given < 0) | (given > 1)][0]}")
    adjusted = np.full(given.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def bootstrap_p_value(differences: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of "no difference" from replicates of a difference.

    Parameters
    ----------
    differences : ndarray of float, (R, ...)
        NaN where a replicate is undefined; it is left out.

    Returns
    -------
    ndarray of float64, (...)
        NaN where no replicate is defined.
    """
    defined = (~np.isnan(differences)).sum(axis=0)
    below, above = (differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0)
    p_value = np.minimum(2.0 * (np.minimum(below, above) + 1) / (defined + 1), 1.0)
    return np.where(defined > 0, p_value, np.nan)


def paired_differences(
    bootstrap: Bootstrap,
    metrics: Sequence[str] = OVERALL_METRICS,
    *,
    labels: Sequence[str | None] = (None,),
    pairs: Sequence[tuple[str, str]] | None = None,
) -> pd.DataFrame:
    """Return the differences between settings, with intervals and p-values, each corrected over all rows.

    Parameters
    ----------
    bootstrap : Bootstrap
        Of the settings on the same samples.
    metrics : sequence of str
        Of `OVERALL_METRICS` (label None) or `LABEL_METRICS` (with labels).
    labels : sequence of str or None
        None for overall metrics.
    pairs : sequence of (setting, other), optional
        All pairs in the bootstrap's order by default.

    Returns
    -------
    DataFrame
        setting, other, metric, label, difference (setting minus other), low, high, p, p_holm, better ("" where the
        corrected p-value is above 1 - level, where neither direction is better or nothing could be tested), replicates.
        All rows are one family for Holm's correction: ask for what the conclusion rests on, not for everything.
        Low, high and p are NaN with fewer than two groups, or where a metric is undefined.

    Raises
    ------
    UsageError
        An unknown setting, metric or label.
    """
    chosen = list(pairs) if pairs is not None else list(itertools.combinations(bootstrap.settings, 2))
    rows = []
    for (setting, other), metric, label in itertools.product(chosen, metrics, labels):
        first, second = bootstrap.column(setting, metric, label), bootstrap.column(other, metric, label)
        drawn = first.replicates - second.replicates
        low, high, p_value = np.nan, np.nan, np.nan
        if bootstrap.groups > 1 and not np.isnan(first.value - second.value):
            low, high = (float(end) for end in percentile_ends(drawn, bootstrap.level))
            p_value = float(bootstrap_p_value(drawn))
        rows.append(
            {
                "setting": setting,
                "other": other,
                "metric": metric,
                "label": label,
                "difference": first.value - second.value,
                "low": low,
                "high": high,
                "p": p_value,
                "replicates": int((~np.isnan(drawn)).sum()),
            }
        )
    table = pd.DataFrame(rows)
    if not len(table):
        raise UsageError(f"nothing to compare: {len(bootstrap.settings)} settings and {len(metrics)} metrics")
    table.insert(8, "p_holm", holm(table["p"].to_numpy()))
    table.insert(9, "better", [_better(row, 1 - bootstrap.level) for row in table.to_dict("records")])
    return table


def too_few_replicates(table: pd.DataFrame, alpha: float = 0.05) -> str:
    """Return a sentence where no difference can stand after the correction however large it is, "" elsewhere.

    Parameters
    ----------
    table : DataFrame
        Of `paired_differences`.
    alpha : float
        Below which a corrected p-value counts.
    """
    tested = table[table["p"].notna()]
    if tested.empty:
        return ""
    count, replicates = len(tested), int(tested["replicates"].max())
    least = count * 2 / (replicates + 1)
    if least < alpha:
        return ""
    return (
        f"{replicates:,} resamples are too few to show a difference here: the corrected p-value of one of {count:,} "
        f"comparisons cannot be below {min(least, 1.0):.2g}; give {math.ceil(2 * count / alpha):,} replicates or more."
    )


def _better(row: dict, alpha: float) -> str:
    """Return the setting that is better, "" where that is not shown."""
    if not row["p_holm"] < alpha or row["difference"] == 0 or row["metric"] in _WITHOUT_DIRECTION:
        return ""
    return str(row["setting"] if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else row["other"])
