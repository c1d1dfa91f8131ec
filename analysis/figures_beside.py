"""Every figure beside what it must be read against: its interval, the best trivial baseline, its null.

A bootstrap of settings and baselines and the settings' nulls come in; one row a setting and metric goes out, with the
paired difference to the baseline that is best in that metric. "Best" is chosen on the same test samples, which favours
the baseline; it is meant to.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.bootstrap import Bootstrap
from analysis.metrics import LOWER_IS_BETTER
from analysis.nulls import Nulls
from analysis.sentences import best_of


def beside_baselines(
    bootstrap: Bootstrap, nulls: Nulls, baselines: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """Return one row a setting and overall metric.

    Parameters
    ----------
    bootstrap : Bootstrap
        Of settings and baselines.
    nulls : Nulls
        Of the settings.
    baselines : sequence of str
        Names in the bootstrap; not empty.
    metrics : sequence of str
        Overall metrics. One that is undefined for a setting has a row without numbers.

    Returns
    -------
    DataFrame
        setting, metric, value, low, high, baseline, baseline_value, difference, difference_low, difference_high,
        verdict ("better", "worse" or "not told apart", by the interval of the difference), null, null_low, null_high,
        p, n.
    """
    rows = []
    for setting in nulls.settings:
        for metric in metrics:
            value, low, high, _ = bootstrap.interval(setting, metric)
            best = best_of(bootstrap, baselines, metric)
            difference = bootstrap.difference(setting, best, metric)
            null = nulls.null(setting, metric)
            rows.append(
                {
                    "setting": setting,
                    "metric": metric,
                    "value": value,
                    "low": low,
                    "high": high,
                    "baseline": best,
                    "baseline_value": bootstrap.interval(best, metric).value,
                    "difference": difference.value,
                    "difference_low": difference.low,
                    "difference_high": difference.high,
                    "verdict": _verdict(difference.low, difference.high, metric),
                    "null": null.value,
                    "null_low": null.low,
                    "null_high": null.high,
                    "p": null.p,
                    "n": bootstrap.samples,
                }
            )
    return pd.DataFrame(rows)


def _verdict(low: float, high: float, metric: str) -> str:
    if not (low > 0 or high < 0):
        return "not told apart"
    return "better" if (low > 0) != (metric in LOWER_IS_BETTER) else "worse"
