"""What the report shows beyond metrics: paired differences, thresholds, subgroups, the shape of the space, the split.

Comes in: result rows of the kinds that `jobs.study_analyses` writes. Goes out: tables. A kind that a run does not have
gives no table.
"""

from __future__ import annotations

import math

import pandas as pd

from analysis.report.tables import Cell, Row, Table, css, number, value_cell
from analysis.verdicts import ALPHA, FAMILY_TITLES

METRIC_TITLES = {
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "exact_match": "exact match",
    "hamming": "Hamming loss",
    "over_prediction": "said / true",
    "lrap": "LRAP",
    "coverage_error": "coverage error",
    "map": "mAP",
    "auroc_macro": "macro AUROC",
    "brier": "Brier score",
}
MEASURE_TITLES = {
    "silhouette": "silhouette ↑",
    "davies_bouldin": "Davies-Bouldin ↓",
    "fisher_ratio": "Fisher ratio ↑",
    "knn_purity": "kNN purity ↑",
    "knn_overlap": "kNN label overlap ↑",
    "hubness": "hubness (skewness) ↓",
    "antihubs": "share nobody's neighbour ↓",
    "hubs": "share neighbour of many ↓",
    "alignment": "alignment within classes ↓",
    "uniformity": "uniformity ↓",
    "separation": "label separation ↑",
    "overlap_contrast": "overlap contrast ↑",
    "overlap_slope": "overlap slope ↑",
    "rms_same": "distance, same labels",
    "rms_partial": "distance, some in common",
    "rms_disjoint": "distance, none in common",
}


def differences_table(rows: pd.DataFrame, protocol: str) -> Table | None:
    """Return one row a pair of settings, one column a metric: difference, interval, corrected p and who is better."""
    if rows.empty:
        return None
    metrics = list(dict.fromkeys(rows["metric"]))
    lines = []
    for (setting, other), part in rows.groupby(["setting", "other"], sort=False):
        of_metric = part.drop_duplicates("metric").set_index("metric")
        cells = [Cell(f"{setting} − {other}")]
        for metric in metrics:
            cells.append(_difference_cell(of_metric.loc[metric]) if metric in of_metric.index else Cell("–"))
        lines.append(Row(cells))
    columns = ["pair", *(METRIC_TITLES.get(metric, metric) for metric in metrics)]
    caption = (
        "Paired differences on the same resamples of patients, with their 95 % intervals; p is corrected by Holm over "
        "all of them. Where one is shown to be better, it is named."
    )
    return Table(columns, lines, caption, f"tables/differences-{protocol}.csv", rows.dropna(axis=1, how="all"))


def _difference_cell(row: pd.Series) -> Cell:
    if not _finite(row["value"]):
        return Cell("–")
    bounds = f"{number(row['low'])} – {number(row['high'])}" if _finite(row["low"]) and _finite(row["high"]) else ""
    p = f"p = {number(row['p_holm'])}" if _finite(row["p_holm"]) else ""
    better = f"{row['better']} is better" if isinstance(row["better"], str) and row["better"] else ""
    small = "; ".join(part for part in (bounds, p, better) if part)
    return Cell(number(row["value"]), small, float(row["value"]))


def thresholds_table(rows: pd.DataFrame, colours: dict[str, str], protocol: str) -> Table | None:
    """Return one row a family and setting, one column a decision metric."""
    if rows.empty:
        return None
    metrics = list(dict.fromkeys(rows["metric"]))
    lines = []
    for (family, setting), part in rows.groupby(["family", "setting"], sort=False):
        cells = [
            Cell(FAMILY_TITLES.get(str(family), str(family))),
            Cell(str(setting), colour=css(colours[str(setting)])),
        ]
        cells += [value_cell(part[part["metric"] == metric]) for metric in metrics]
        lines.append(Row(cells))
    columns = ["threshold", "setting", *(METRIC_TITLES.get(metric, metric) for metric in metrics)]
    caption = (
        "The same scores, cut in four ways; F1-optimal and prevalence-matched thresholds are chosen on validation. A "
        "cut at 0.5 means something for probabilities only."
    )
    return Table(columns, lines, caption, f"tables/thresholds-{protocol}.csv", rows.dropna(axis=1, how="all"))


def subgroup_table(rows: pd.DataFrame, gaps: pd.DataFrame, colours: dict[str, str], protocol: str) -> Table | None:
    """Return one row a subgroup and setting; beside the metrics how many samples and patients it has."""
    if rows.empty:
        return None
    metrics = [metric for metric in METRIC_TITLES if metric in set(rows["metric"])]
    lines = []
    for (column, subgroup, setting), part in rows.groupby(["column", "subgroup", "setting"], sort=False):
        first = part.iloc[0]
        cells = [
            Cell(f"{column}: {subgroup}", f"images: {int(first['n'])}, patients: {int(first['groups'])}"),
            Cell(str(setting), colour=css(colours[str(setting)])),
        ]
        cells += [value_cell(part[part["metric"] == metric]) for metric in metrics]
        lines.append(Row(cells, "" if first["compared"] else "baseline"))
    columns = ["subgroup", "setting", *(METRIC_TITLES[metric] for metric in metrics)]
    tested = gaps[gaps["p_holm"].notna()]
    shown = int((tested["p_holm"] < ALPHA).sum())
    caption = "Test split; grey: too few patients to compare."
    if len(tested):
        caption += (
            f" Of {len(tested)} gaps between best and worst subgroup {shown} are more than permuted subgroups give "
            "(corrected within each column)."
        )
    return Table(columns, lines, caption, f"tables/subgroups-{protocol}.csv", rows.dropna(axis=1, how="all"))


def space_table(rows: pd.DataFrame, colours: dict[str, str], protocol: str) -> Table | None:
    """Return one row a measure and one column an encoder; below each value its null and p-value."""
    overall = rows[rows["label"].isna()]
    if overall.empty:
        return None
    settings = list(dict.fromkeys(overall["setting"]))
    lines = []
    for metric in dict.fromkeys(overall["metric"]):
        part = overall[overall["metric"] == metric].drop_duplicates("setting").set_index("setting")
        cells = [Cell(MEASURE_TITLES.get(metric, str(metric).replace("_", " ")))]
        cells += [_measure_cell(part.loc[setting]) if setting in part.index else Cell("–") for setting in settings]
        lines.append(Row(cells))
    return Table(
        ["measure", *settings],
        lines,
        "Image embeddings of the test split. Below each value its 95 % interval by patient, then what permuted labels "
        "give and the share of permutations that reach the value.",
        f"tables/space-{protocol}.csv",
        rows.dropna(axis=1, how="all"),
    )


def retrieval_table(rows: pd.DataFrame, protocol: str) -> Table | None:
    """Return one row a kind of query and depth, one column an encoder, each value beside what chance gives."""
    if rows.empty:
        return None
    settings = list(dict.fromkeys(rows["setting"]))
    lines = []
    for metric in dict.fromkeys(rows["metric"]):
        part = rows[rows["metric"] == metric].drop_duplicates("setting").set_index("setting")
        cells = [Cell(str(metric))]
        for setting in settings:
            value = part["value"].get(setting)
            known = _finite(value)
            small = f"chance {number(part['null'].get(setting))}" if known else ""
            cells.append(Cell(number(value), small, float(value)) if known else Cell("–"))
        lines.append(Row(cells))
    caption = "Queries are the test split's; no image finds one of its own patient, and labels count alike (macro)."
    return Table(["search", *settings], lines, caption, f"tables/search-{protocol}.csv", rows.dropna(axis=1, how="all"))


def split_table(rows: pd.DataFrame) -> Table | None:
    """Return one row a label and one column a part of the split: positives and prevalence."""
    if rows.empty:
        return None
    parts = list(dict.fromkeys(rows["split"]))
    lines = []
    for label, of_label in rows.groupby("label", sort=False):
        by_part = of_label.set_index("split")
        cells = [Cell(str(label))]
        for part in parts:
            value, count = float(by_part.loc[part, "value"]), float(by_part.loc[part, "n"])
            cells.append(
                Cell(f"{100 * value:.2f} %", f"{round(value * count)} positives", sort=value, heat=min(1, value))
            )
        lines.append(Row(cells))
    caption = "Prevalence of each label in each part of the split."
    return Table(["label", *parts], lines, caption, "tables/split.csv", rows.dropna(axis=1, how="all"))


def _measure_cell(row: pd.Series) -> Cell:
    if not _finite(row["value"]):
        return Cell("–", str(row["note"] or ""))
    small = f"{number(row['low'])} – {number(row['high'])}" if _finite(row["low"]) else ""
    if _finite(row["null"]):
        small += f"{'; ' if small else ''}null {number(row['null'])}, p = {number(row['p'])}"
    return Cell(number(row["value"]), small, float(row["value"]))


def _finite(value: float | None) -> bool:
    return value is not None and not isinstance(value, str) and math.isfinite(value)
