"""Metrics as tables that a person reads: settings side by side with intervals, and a setting's labels.

Comes in: metrics as rows (setting, metric, label, value, low, high). Goes out: one row a setting, or a label.
"""

from __future__ import annotations

import pandas as pd

OVERALL = {
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "exact_match": "exact match",
    "lrap": "LRAP",
    "coverage_error": "coverage",
    "map": "mean AP",
    "auroc_macro": "mean AUROC",
}
PER_LABEL = ("positives", "precision", "recall", "f1", "auroc", "ap")


def overall_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return one row a setting and one column a metric, each value with its interval."""
    overall = metrics[metrics["label"].isna()]
    rows = []
    for setting, part in overall.groupby("setting", sort=False):
        by_metric = part.set_index("metric")
        rows.append(
            {
                "setting": setting,
                **{title: with_interval(by_metric, name) for name, title in OVERALL.items() if name in by_metric.index},
            }
        )
    return pd.DataFrame(rows)


def subgroup_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return for each column of the samples one row a subgroup, with its counts and its metrics with intervals.

    Parameters
    ----------
    rows : DataFrame
        Result lines of kind "subgroup": column, subgroup, n, groups, metric, value, low, high.
    """
    tables = {}
    for column, part in rows.groupby("column", sort=False) if len(rows) else []:
        lines = []
        for subgroup, of_one in part.groupby("subgroup", sort=False):
            by_metric, first = of_one.set_index("metric"), of_one.iloc[0]
            shown = {
                title: with_interval(by_metric, name) for name, title in OVERALL.items() if name in by_metric.index
            }
            lines.append({str(column): subgroup, "images": int(first["n"]), "patients": int(first["groups"]), **shown})
        tables[f"By {column}, with 95 % intervals by patient"] = pd.DataFrame(lines)
    return tables


def label_table(metrics: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Return one row a label of a setting."""
    part = metrics[(metrics["setting"] == setting) & metrics["label"].notna()]
    rows = []
    for label, of_label in part.groupby("label", sort=False):
        values = of_label.set_index("metric")["value"]
        row = {"label": label, **{name: values.get(name) for name in PER_LABEL}}
        row["positives"] = int(row["positives"])
        rows.append(row)
    return pd.DataFrame(rows)


def undefined_sentences(metrics: pd.DataFrame, setting: str) -> list[str]:
    """Return which labels of a setting have no AUROC or AP, and why, as sentences; [] where all have."""
    part = metrics[(metrics["setting"] == setting) & metrics["label"].notna()]
    undefined = part[part["value"].isna()]
    no_auroc, no_ap = (set(undefined.loc[undefined["metric"] == name, "label"]) for name in ("auroc", "ap"))
    said = []
    # Average precision needs a positive sample, AUROC a negative one, too.
    for lacking, figures, needed in ((no_ap, "AUROC or AP", "positive"), (no_auroc - no_ap, "AUROC", "negative")):
        if lacking:
            named = [label for label in dict.fromkeys(part["label"]) if label in lacking]
            said.append(f"no {figures} for labels without a {needed} test sample: {', '.join(named)}")
    return said


def with_interval(by_metric: pd.DataFrame, name: str) -> str:
    """Return "0.741 (0.702-0.779)", without the interval where there is none, "" without a value."""
    value, low, high = (by_metric.loc[name, column] for column in ("value", "low", "high"))
    if pd.isna(value):
        return ""
    return f"{value:.3f}" if pd.isna(low) or pd.isna(high) else f"{value:.3f} ({low:.3f}-{high:.3f})"
