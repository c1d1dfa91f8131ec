"""Tables of settings: overall metrics beside baselines and published figures, figures of each label, heatmaps by label.

Comes in: a protocol's result rows. Goes out: `Table`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analysis import figures
from analysis.report.tables import Cell, Row, Table, css, number, value_cell

OVERALL_METRICS = (
    ("f1_macro", "macro F1", "up"),
    ("exact_match", "exact match", "up"),
    ("lrap", "LRAP", "up"),
    ("coverage_error", "coverage error", "down"),
    ("map", "mAP", "up"),
    ("auroc_macro", "macro AUROC", "up"),
    ("f1_micro", "micro F1", "up"),
    ("minutes", "minutes", "down"),
)
LABEL_METRICS = (("precision", "P"), ("recall", "R"), ("f1", "F1"), ("auroc", "AUROC"), ("ap", "AP"))


def settings_table(
    overall: pd.DataFrame, distances: pd.DataFrame, references: pd.DataFrame, colours: dict[str, str], protocol: str
) -> Table:
    """Return one row a setting, baselines and published figures below, and one column a metric."""
    arrows = {"up": "↑", "down": "↓"}
    shown = [entry for entry in OVERALL_METRICS if entry[0] in set(overall["metric"])]
    settings = sorted(dict.fromkeys(overall["setting"]), key=lambda setting: colours[setting] == figures.FAINT)
    rows = []
    for setting in settings:
        part = overall[overall["setting"] == setting]
        cells = [Cell(setting, colour=css(colours[setting]))]
        cells += [value_cell(part[part["metric"] == metric]) for metric, _, _ in shown]
        apart = distances[(distances["setting"] == setting) & (distances["metric"] == "ratio")]
        rows.append(Row([*cells, value_cell(apart)], "baseline" if colours[setting] == figures.FAINT else ""))
    for setting in dict.fromkeys(references["setting"]):
        part = references[references["setting"] == setting]
        cells = [Cell(f"published: {setting}")]
        cells += [value_cell(part[part["metric"] == metric]) for metric, _, _ in shown]
        rows.append(Row([*cells, value_cell(part[part["metric"] == "ratio"])], "reference"))
    titles = [(title, direction) for _, title, direction in shown] + [("inter/intra", "up")]
    # An arrow alone on a line of the head says nothing.
    columns = ["setting"] + [f"{title}\N{NO-BREAK SPACE}{arrows[direction]}" for title, direction in titles]
    return Table(
        columns,
        rows,
        "Test split. Below each value its 95 % interval, resampling patients.",
        f"tables/settings-{protocol}.csv",
        pd.concat([overall, references]).dropna(axis=1, how="all"),
    )


def label_table(
    by_label: pd.DataFrame, labels: Sequence[str], settings: Sequence[str], colours: dict[str, str], protocol: str
) -> Table:
    """Return one row a label, and the metrics of each setting beside one another."""
    values = by_label.drop_duplicates(["setting", "metric", "label"]).set_index(["setting", "metric", "label"])["value"]
    positives = by_label[by_label["metric"] == "positives"].drop_duplicates("label").set_index("label")["value"]
    columns = ["label", "positives"] + [f"{setting} {short}" for setting in settings for _, short in LABEL_METRICS]
    rows = []
    for label in labels:
        count = float(positives.get(label, math.nan))
        cells = [
            Cell(label),
            Cell("–" if math.isnan(count) else f"{count:.0f}", sort=None if math.isnan(count) else count),
        ]
        for setting in settings:
            for metric, _ in LABEL_METRICS:
                value = float(values.get((setting, metric, label), math.nan))
                known = math.isfinite(value)
                cells.append(Cell(number(value, 2), sort=value if known else None, heat=value if known else None))
        rows.append(Row(cells))
    return Table(
        columns,
        rows,
        "Test split, per label; shade follows the value. A label with a handful of positives has no stable figure.",
        f"tables/labels-{protocol}.csv",
        by_label.dropna(axis=1, how="all"),
    )


def localization_by_label(localization: pd.DataFrame, colours: dict[str, str], protocol: str) -> Table | None:
    """Return the pointing game of each label and setting; None where nothing was scored by label."""
    rows = localization[localization["label"].notna()]
    if rows.empty:
        return None
    settings = list(dict.fromkeys(rows["setting"]))
    lines = []
    for label in dict.fromkeys(rows["label"]):
        part = rows[(rows["label"] == label) & (rows["metric"] == "pointing_game")]
        count = part["n"].dropna()
        cells = [Cell(str(label)), Cell(f"{int(count.iloc[0])}" if len(count) else "–")]
        for setting in settings:
            found = part[part["setting"] == setting]
            cell = value_cell(found)
            cells.append(Cell(cell.text, cell.small, cell.sort, cell.sort))
        lines.append(Row(cells))
    return Table(
        ["label", "n", *settings],
        lines,
        "Pointing game by label.",
        f"tables/heatmaps-by-label-{protocol}.csv",
        rows.dropna(axis=1, how="all"),
    )
