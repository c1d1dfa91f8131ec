"""What the report shows of one protocol: settings beside baselines, labels, distances, heatmap scores.

Comes in: a `RunRecord` and a protocol's name. Goes out: tables, drawings and sentences by the template's names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis import figures, run_record
from analysis.metrics.calibration import are_probabilities
from analysis.report import questions
from analysis.report.tables import Cell, Row, Table, css, number, setting_by_metric, value_cell

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
CHART_METRICS = (
    ("f1_macro", "macro F1 ↑"),
    ("lrap", "LRAP ↑"),
    ("map", "mAP ↑"),
    ("coverage_error", "coverage error ↓"),
)
LABEL_METRICS = (("precision", "P"), ("recall", "R"), ("f1", "F1"), ("auroc", "AUROC"), ("ap", "AP"))
LOCALIZATION_METRICS = (("pointing_game", "pointing game ↑"), ("energy", "energy in region ↑"), ("iou", "best IoU ↑"))
DISTANCE_METRICS = (
    ("inter", "inter ↑"),
    ("intra", "intra ↓"),
    ("ratio", "ratio ↑"),
    ("ratio_null", "ratio, labels permuted"),
)
EXPLANATIONS = {
    "sound": "Embeddings normalised, thresholds tuned on validation only, 95 % bootstrap intervals over patients. The "
    "grey rows are trivial baselines: a setting that does not beat them has learnt nothing that prevalences do "
    "not already tell.",
    "paper": "The published study's own steps: un-normalised dot products, per-image min-max scores cut at 0.5, no "
    "tuning. Italic rows are the published figures, on data and labels that are not public: beside, not equal.",
}


def protocol_view(record: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> dict[str, Any]:
    """Return what the template shows of one protocol."""
    metrics = record.rows("metric")
    metrics = metrics[metrics["protocol"] == protocol]
    overall, by_label = metrics[metrics["label"].isna()], metrics[metrics["label"].notna()]
    distances = record.rows("distance")
    distances = distances[distances["protocol"] == protocol]
    localization = record.rows("localization")
    localization = localization[localization["protocol"] == protocol]
    learnt = [setting for setting in dict.fromkeys(overall["setting"]) if colours[setting] != figures.FAINT]
    curves = reliability = ""

    def of_protocol(kind: str) -> pd.DataFrame:
        rows = record.rows(kind)
        return rows[rows["protocol"] == protocol]

    if record.scores is not None:
        chosen = [
            position
            for position, (setting, made) in enumerate(
                zip(record.scores.settings, record.scores.protocols, strict=True)
            )
            if made == protocol and setting in learnt
        ]
        if chosen:
            names = [record.scores.settings[position] for position in chosen]
            curves = figures.precision_recall_grid(
                record.scores.truth, record.scores.values[chosen], names, record.label_names, colours
            )
            # Cosines and logits say nothing of frequencies.
            sure = [position for position in chosen if are_probabilities(record.scores.values[position])]
            if sure:
                reliability = figures.reliability_panels(
                    record.scores.truth,
                    record.scores.values[sure],
                    [record.scores.settings[position] for position in sure],
                    colours,
                )
    rates = by_label[by_label["metric"].isin(["predicted_rate", "prevalence"])]
    rates = rates[rates["setting"].isin(learnt)]
    references = record.rows("reference") if protocol == "paper" else record.rows("reference").iloc[:0]
    sentences = record.rows("sentence")
    return {
        "name": protocol,
        "explanation": EXPLANATIONS.get(protocol, ""),
        "chart": figures.interval_chart(overall, CHART_METRICS, colours),
        "settings": settings_table(overall, distances, references, colours, protocol),
        "labels": label_table(by_label, record.label_names, learnt, colours, protocol),
        "curves": curves,
        "prediction": figures.prediction_bars(rates, record.label_names, learnt, colours) if len(rates) else "",
        "distances": setting_by_metric(
            distances,
            DISTANCE_METRICS,
            colours,
            f"tables/distances-{protocol}.csv",
            "Distances between and within classes on the test split.",
        )
        if len(distances)
        else None,
        "distance_sentences": list(sentences.loc[sentences["section"] == "distances", "text"]),
        "localization": setting_by_metric(
            localization[localization["label"].isna()],
            LOCALIZATION_METRICS,
            colours,
            f"tables/heatmaps-{protocol}.csv",
            "Mean over annotated findings, with 95 % bootstrap intervals over patients.",
        )
        if len(localization)
        else None,
        "localization_labels": localization_by_label(localization, colours, protocol),
        "differences": questions.differences_table(of_protocol("difference"), protocol),
        "difference_sentences": list(sentences.loc[sentences["section"] == "differences", "text"]),
        "thresholds": questions.thresholds_table(of_protocol("threshold"), colours, protocol),
        "threshold_sentences": list(sentences.loc[sentences["section"] == "thresholds", "text"]),
        "reliability": reliability,
        "subgroups": questions.subgroup_table(of_protocol("subgroup"), of_protocol("gap"), colours, protocol),
        "subgroup_sentences": list(sentences.loc[sentences["section"] == "subgroups", "text"]),
        "search": questions.retrieval_table(of_protocol("retrieval"), protocol),
        "space": questions.space_table(of_protocol("space"), colours, protocol),
        "heatmap_sentences": list(sentences.loc[sentences["section"] == "heatmaps", "text"]),
    }


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
    columns = ["setting"] + [f"{title} {arrows[direction]}" for _, title, direction in shown] + ["inter/intra ↑"]
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
