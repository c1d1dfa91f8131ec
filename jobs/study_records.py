"""Numbers of a study as result lines: one tidy row a value, the form that reports and comparisons read.

Comes in: bootstraps, distances, localization tables. Goes out: dicts with ``kind`` for `jobs.runs.Run.record_all`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from analysis.bootstrap import Bootstrap
from analysis.nulls import Nulls
from analysis.sentences import best_of

Row = dict[str, Any]

# The same whoever the truth is dealt to.
WITHOUT_NULL = frozenset({"prevalence", "predicted_rate", "positives", "over_prediction"})


def metric_rows(
    bootstrap: Bootstrap, protocol: str, baselines: Collection[str], nulls: Nulls | None = None, split: str = "test"
) -> list[Row]:
    """Return one row a setting, metric and label, with intervals and nulls.

    Parameters
    ----------
    bootstrap : Bootstrap
    protocol : str
        "sound" or "paper".
    baselines : collection of str
        Which of its settings are trivial baselines.
    nulls : Nulls, optional
        Of the other settings: null, null_low, null_high and p of their rows.
    split : str
        Where the metrics were taken.
    """
    rows = []
    for row in bootstrap.table().to_dict("records"):
        label = row["label"] if isinstance(row["label"], str) else None
        beside: Row = {}
        if nulls is not None and row["setting"] in nulls.settings and row["metric"] not in WITHOUT_NULL:
            null = nulls.null(row["setting"], row["metric"], label)
            beside = {"null": null.value, "null_low": null.low, "null_high": null.high, "p": null.p}
        rows.append(
            {
                "kind": "metric",
                "protocol": protocol,
                "setting": row["setting"],
                "baseline": row["setting"] in baselines,
                "split": split,
                "metric": row["metric"],
                "label": label,
                "value": number(row["value"]),
                "low": number(row["low"]),
                "high": number(row["high"]),
                "n": row["n"],
                **{name: number(value) for name, value in beside.items()},
            }
        )
    return rows


def difference_rows(table: pd.DataFrame, protocol: str) -> list[Row]:
    """Return one row a paired difference between settings.

    Parameters
    ----------
    table : DataFrame
        Of `analysis.comparison.paired_differences`.
    protocol : str
    """
    return [
        {
            "kind": "difference",
            "protocol": protocol,
            "split": "test",
            **{name: row[name] for name in ("setting", "other", "metric", "better")},
            "value": number(row["difference"]),
            **{name: number(row[name]) for name in ("low", "high", "p", "p_holm")},
        }
        for row in table.to_dict("records")
    ]


def minutes_row(protocol: str, setting: str, seconds: float) -> Row:
    """Return the row of a setting's own time, training and scoring, in minutes."""
    return {
        "kind": "metric",
        "protocol": protocol,
        "setting": setting,
        "baseline": False,
        "split": "test",
        "metric": "minutes",
        "label": None,
        "value": seconds / 60,
    }


def reference_rows(table: pd.DataFrame, source: str) -> list[Row]:
    """Return published figures as rows.

    Parameters
    ----------
    table : DataFrame
        Columns setting, metric, value.
    source : str
        Where they were published.
    """
    return [
        {
            "kind": "reference",
            "setting": row.setting,
            "metric": row.metric,
            "value": number(row.value),
            "source": source,
        }
        for row in table.itertuples()
    ]


def margin_rows(
    bootstrap: Bootstrap, settings: Sequence[str], baselines: Sequence[str], metrics: Sequence[str], protocol: str
) -> list[Row]:
    """Return each setting's paired difference to the best trivial baseline of each metric, as result lines.

    Parameters
    ----------
    bootstrap : Bootstrap
        With the settings and the baselines.
    settings, baselines, metrics : sequence of str
        Names in it; overall metrics.
    protocol : str
    """
    rows = []
    for setting in settings:
        for metric in metrics:
            best = best_of(bootstrap, baselines, metric)
            found = bootstrap.difference(setting, best, metric)
            rows.append(
                {"kind": "margin", "protocol": protocol, "split": "test", "setting": setting, "other": best,
                 "metric": metric, "value": number(found.value), "low": number(found.low), "high": number(found.high)}
            )  # fmt: skip
    return rows


def sentence_rows(section: str, sentences: Collection[str], protocol: str | None = None) -> list[Row]:
    """Return sentences drawn from the numbers, under their section of the report (of one protocol, where given)."""
    of_protocol = {"protocol": protocol} if protocol else {}
    return [{"kind": "sentence", "section": section, **of_protocol, "text": text} for text in sentences]


def number(value: float | None) -> float | None:
    """Return a finite number, or None where there is none (JSON has no NaN)."""
    return None if value is None or not math.isfinite(value) else float(value)
