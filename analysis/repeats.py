"""How much a figure moves when the split and the training are done again, beside the interval within one of them.

In come the metrics of every repeat (one row a repeat, setting and metric, with its interval); out go, a setting and
metric, the spread between repeats beside the half-width of the intervals within them, and in how many repeats one
setting stands above another. The interval of one run holds its split and its training fixed: where the spread between
repeats is larger, a conclusion drawn from one run's interval is drawn too soon (Bouthillier et al., Accounting for
Variance in Machine Learning Benchmarks, MLSys 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.metrics import LOWER_IS_BETTER
from analysis.sentences import TITLES, figure
from engine.errors import DataError

# An interval of 95 % reaches so many standard deviations to either side.
_DEVIATIONS = 1.959964


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Return mean and spread of each setting's metrics over repeats.

    Parameters
    ----------
    rows : DataFrame
        repeat, setting, metric, value, low, high; the ends may be NaN.

    Returns
    -------
    DataFrame
        setting, metric, repeats (in which the metric is defined), mean, deviation (sample standard deviation between
        repeats; NaN with fewer than two), lowest, highest, within (mean standard deviation that the repeats' own
        intervals stand for: their half-width over 1.96), ratio (deviation / within).
    """
    _check(rows)
    lines = []
    for (setting, metric), part in rows.groupby(["setting", "metric"], sort=False):
        values = part["value"].dropna().to_numpy(dtype=np.float64)
        widths = ((part["high"] - part["low"]) / (2 * _DEVIATIONS)).dropna().to_numpy(dtype=np.float64)
        deviation = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        within = float(widths.mean()) if len(widths) else float("nan")
        lines.append(
            {
                "setting": setting,
                "metric": metric,
                "repeats": len(values),
                "mean": float(values.mean()) if len(values) else float("nan"),
                "deviation": deviation,
                "lowest": float(values.min()) if len(values) else float("nan"),
                "highest": float(values.max()) if len(values) else float("nan"),
                "within": within,
                "ratio": deviation / within if within > 0 else float("nan"),
            }
        )
    return pd.DataFrame(lines)


def agreement_of_repeats(rows: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return in how many repeats one setting is better than another.

    Parameters
    ----------
    rows : DataFrame
        As for `spread`.
    pairs : sequence of (setting, other)

    Returns
    -------
    DataFrame
        setting, other, metric, repeats (in which both are defined), better (in how many the setting is better), mean
        (of the differences), lowest, highest.
    """
    _check(rows)
    wide = rows.pivot_table(index=["metric", "repeat"], columns="setting", values="value", sort=False)
    lines = []
    for setting, other in pairs:
        if setting not in wide or other not in wide:
            continue
        differences = (wide[setting] - wide[other]).dropna()
        for metric, part in differences.groupby(level="metric", sort=False):
            ahead = part < 0 if metric in LOWER_IS_BETTER else part > 0
            line = {"setting": setting, "other": other, "metric": metric, "repeats": len(part)}
            line |= {"better": int(ahead.sum()), "mean": float(part.mean())}
            lines.append(line | {"lowest": float(part.min()), "highest": float(part.max())})
    columns = ["setting", "other", "metric", "repeats", "better", "mean", "lowest", "highest"]
    return pd.DataFrame(lines, columns=columns)


def repeat_sentences(
    spreads: pd.DataFrame, agreements: pd.DataFrame, metrics: Sequence[str] = ("lrap", "f1_macro")
) -> list[str]:
    """Return how far repeats differ, and which comparisons come out the same in all of them."""
    sentences = []
    for metric in metrics:
        part = spreads[(spreads["metric"] == metric) & spreads["deviation"].notna()]
        told = [
            f"{row.setting} {figure(row.mean)} (between repeats {figure(row.deviation, 3)}, within one "
            f"{figure(row.within, 3)})"
            for row in part.itertuples()
        ]
        if told:
            count = int(part["repeats"].max())
            sentences.append(
                f"{TITLES.get(metric, metric)} over {count} repeats, mean and standard deviations: {'; '.join(told)}."
            )
        pairs = [
            f"{row.setting} better than {row.other} in {row.better} of {row.repeats} (difference {figure(row.mean)}, "
            f"{figure(row.lowest)} to {figure(row.highest)})"
            for row in agreements[agreements["metric"] == metric].itertuples()
        ]
        if pairs:
            sentences.append(f"By {TITLES.get(metric, metric)} over repeats: {'; '.join(pairs)}.")
    return sentences


def _check(rows: pd.DataFrame) -> None:
    missing = {"repeat", "setting", "metric", "value", "low", "high"} - set(rows.columns)
    if missing or rows.empty:
        raise DataError(
            f"no repeats to compare: {len(rows)} rows, columns missing: {', '.join(sorted(missing)) or '-'}"
        )
