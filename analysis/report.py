"""One self-contained HTML page from a run folder.

Comes in: `analysis.run_record.RunRecord`. Goes out: ``report.html`` (pictures embedded, nothing fetched) and the CSV
beside each table. Numbers are only laid out here; none is computed that the run did not record.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from analysis import figures, run_record

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


@dataclass(frozen=True)
class Cell:
    """One table cell: text, a smaller second line, a sort value, a shade between 0 and 1, a dot of colour."""

    text: str
    small: str = ""
    sort: float | None = None
    heat: float | None = None
    colour: str = ""


@dataclass(frozen=True)
class Row:
    """Cells and the CSS class of their line."""

    cells: list[Cell]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the template lays it out, with the name of its CSV."""

    columns: list[str]
    rows: list[Row]
    caption: str
    csv: str = ""
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)


def render_report(folder: str | Path) -> Path:
    """Write ``report.html`` and ``tables/*.csv`` into a run folder from its results alone.

    Parameters
    ----------
    folder : path
        A run folder with results.jsonl, provenance.json and, where the steps ran, scores.npz, embedding_map.csv,
        retrieval.json, heatmaps.json, failures.csv.

    Returns
    -------
    Path of the page.

    Raises
    ------
    engine.errors.UsageError, engine.errors.DataError
        If the folder is no run or a file in it is broken.
    """
    record = run_record.read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    view = _view(record)
    tables = record.folder / "tables"
    tables.mkdir(exist_ok=True)
    for table in _tables_of(view):
        if table.csv and not table.frame.empty:
            table.frame.to_csv(record.folder / table.csv, index=False)
    page = record.folder / "report.html"
    page.write_text(environment.get_template("report.html.j2").render(view), encoding="utf-8")
    return page


def _tables_of(view: dict[str, Any]) -> list[Table]:
    found = [value for value in view.values() if isinstance(value, Table)]
    for part in view["protocols"]:
        found += [value for value in part.values() if isinstance(value, Table)]
    return found


def _view(record: run_record.RunRecord) -> dict[str, Any]:
    colours = _colours(record)
    provenance = record.provenance
    protocols = [_protocol(record, name, colours) for name in record.protocols]
    cases = [_case(record, case) for case in record.heatmaps]
    costs = record.rows("cost")
    sections = [("summary", "Summary")]
    for part in protocols:
        suffix = f" ({part['name']})" if len(protocols) > 1 else ""
        sections += [(f"settings-{part['name']}", "Settings" + suffix), (f"labels-{part['name']}", "Labels" + suffix)]
        sections += [(f"distances-{part['name']}", "Distances" + suffix)] if part["distances"] else []
        sections += [(f"heatmaps-{part['name']}", "Heatmaps" + suffix)] if part["localization"] else []
    sections += [("panels", "Panels")] if cases else []
    sections += [("retrieval", "Neighbours")] if record.retrieval else []
    sections += [("map", "Map")] if len(record.embedding_map) else []
    sections += [("cost", "Cost"), ("provenance", "Provenance")]
    headline = [str(text) for text in record.rows("sentence")["text"] if text]
    return {
        "title": provenance.get("title") or "Study report",
        "subtitle": provenance.get("subtitle", ""),
        "facts": _facts(record),
        "sections": sections if headline else sections[1:],
        "headline": [
            str(row.text)
            for row in record.rows("sentence").itertuples()
            if row.section not in ("distances", "heatmaps")
        ],
        "protocols": protocols,
        "cases": cases,
        "retrieval": [_query(record, query) for query in record.retrieval],
        "embedding": figures.embedding_panels(record.embedding_map, record.label_names)
        if len(record.embedding_map)
        else "",
        "embedding_note": provenance.get("embedding_map", "Two-dimensional map of the image embeddings."),
        "cost": _cost_table(costs),
        "cost_chart": figures.cost_bars(costs) if len(costs) else "",
        "failures": _failure_table(record.failures) if len(record.failures) else None,
        "provenance": _provenance_lines(provenance),
        "command": provenance.get("command", ""),
        "config": record.config_text,
        "version": provenance.get("versions", {}).get("fluoroscope", ""),
    }


def _colours(record: run_record.RunRecord) -> dict[str, str]:
    rows = record.results[record.results["kind"].isin(["metric", "distance", "localization"])]
    colours: dict[str, str] = {}
    for row in rows.itertuples():
        if row.setting not in colours:
            learnt = sum(colour != figures.FAINT for colour in colours.values())
            colours[row.setting] = (
                figures.FAINT if row.baseline is True else figures.SERIES[learnt % len(figures.SERIES)]
            )
    return colours


def _css(colour: str) -> str:
    return "var(--muted)" if colour == figures.FAINT else f"var(--series-{figures.SERIES.index(colour) + 1})"


def _protocol(record: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> dict[str, Any]:
    metrics = record.rows("metric")
    metrics = metrics[metrics["protocol"] == protocol]
    overall, by_label = metrics[metrics["label"].isna()], metrics[metrics["label"].notna()]
    distances = record.rows("distance")
    distances = distances[distances["protocol"] == protocol]
    localization = record.rows("localization")
    localization = localization[localization["protocol"] == protocol]
    learnt = [setting for setting in dict.fromkeys(overall["setting"]) if colours[setting] != figures.FAINT]
    curves = ""
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
    rates = by_label[by_label["metric"].isin(["predicted_rate", "prevalence"])]
    rates = rates[rates["setting"].isin(learnt)]
    references = record.rows("reference") if protocol == "paper" else record.rows("reference").iloc[:0]
    sentences = record.rows("sentence")
    return {
        "name": protocol,
        "explanation": EXPLANATIONS.get(protocol, ""),
        "chart": figures.interval_chart(overall, CHART_METRICS, colours),
        "settings": _settings_table(overall, distances, references, colours, protocol),
        "labels": _label_table(by_label, record.label_names, learnt, colours, protocol),
        "curves": curves,
        "prediction": figures.prediction_bars(rates, record.label_names, learnt, colours) if len(rates) else "",
        "distances": _setting_by_metric(
            distances,
            DISTANCE_METRICS,
            colours,
            f"tables/distances-{protocol}.csv",
            "Distances between and within classes on the test split.",
        )
        if len(distances)
        else None,
        "distance_sentences": list(sentences.loc[sentences["section"] == "distances", "text"]),
        "localization": _setting_by_metric(
            localization[localization["label"].isna()],
            LOCALIZATION_METRICS,
            colours,
            f"tables/heatmaps-{protocol}.csv",
            "Mean over annotated findings, with 95 % bootstrap intervals over patients.",
        )
        if len(localization)
        else None,
        "localization_labels": _localization_by_label(localization, colours, protocol),
        "heatmap_sentences": list(sentences.loc[sentences["section"] == "heatmaps", "text"]),
    }


def _number(value: float, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"


def _value_cell(rows: pd.DataFrame) -> Cell:
    if rows.empty or not math.isfinite(rows["value"].iloc[0]):
        return Cell("–")
    row = rows.iloc[0]
    bounded = pd.notna(row["low"]) and pd.notna(row["high"])
    small = f"{_number(row['low'])} – {_number(row['high'])}" if bounded else ""
    return Cell(_number(row["value"]), small, float(row["value"]))


def _settings_table(
    overall: pd.DataFrame, distances: pd.DataFrame, references: pd.DataFrame, colours: dict[str, str], protocol: str
) -> Table:
    arrows = {"up": "↑", "down": "↓"}
    shown = [entry for entry in OVERALL_METRICS if entry[0] in set(overall["metric"])]
    settings = sorted(dict.fromkeys(overall["setting"]), key=lambda setting: colours[setting] == figures.FAINT)
    rows = []
    for setting in settings:
        part = overall[overall["setting"] == setting]
        cells = [Cell(setting, colour=_css(colours[setting]))]
        cells += [_value_cell(part[part["metric"] == metric]) for metric, _, _ in shown]
        apart = distances[(distances["setting"] == setting) & (distances["metric"] == "ratio")]
        rows.append(Row([*cells, _value_cell(apart)], "baseline" if colours[setting] == figures.FAINT else ""))
    for setting in dict.fromkeys(references["setting"]):
        part = references[references["setting"] == setting]
        cells = [Cell(f"published: {setting}")]
        cells += [_value_cell(part[part["metric"] == metric]) for metric, _, _ in shown]
        rows.append(Row([*cells, _value_cell(part[part["metric"] == "ratio"])], "reference"))
    columns = ["setting"] + [f"{title} {arrows[direction]}" for _, title, direction in shown] + ["inter/intra ↑"]
    return Table(
        columns,
        rows,
        "Test split. Below each value its 95 % interval, resampling patients.",
        f"tables/settings-{protocol}.csv",
        pd.concat([overall, references]).dropna(axis=1, how="all"),
    )


def _label_table(
    by_label: pd.DataFrame, labels: Sequence[str], settings: Sequence[str], colours: dict[str, str], protocol: str
) -> Table:
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
                cells.append(Cell(_number(value, 2), sort=value if known else None, heat=value if known else None))
        rows.append(Row(cells))
    return Table(
        columns,
        rows,
        "Test split, per label; shade follows the value. A label with a handful of positives has no stable figure.",
        f"tables/labels-{protocol}.csv",
        by_label.dropna(axis=1, how="all"),
    )


def _setting_by_metric(
    rows: pd.DataFrame, metrics: Sequence[tuple[str, str]], colours: dict[str, str], csv: str, caption: str
) -> Table:
    lines = []
    for setting in dict.fromkeys(rows["setting"]):
        part = rows[rows["setting"] == setting]
        faint = colours[setting] == figures.FAINT
        count = part["n"].dropna()
        cells = [Cell(setting, f"n = {int(count.iloc[0])}" if len(count) else "", colour=_css(colours[setting]))]
        cells += [_value_cell(part[part["metric"] == metric]) for metric, _ in metrics]
        lines.append(Row(cells, "baseline" if faint else ""))
    return Table(["setting", *(title for _, title in metrics)], lines, caption, csv, rows.dropna(axis=1, how="all"))


def _localization_by_label(localization: pd.DataFrame, colours: dict[str, str], protocol: str) -> Table | None:
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
            cell = _value_cell(found)
            cells.append(Cell(cell.text, cell.small, cell.sort, cell.sort))
        lines.append(Row(cells))
    return Table(
        ["label", "n", *settings],
        lines,
        "Pointing game by label.",
        f"tables/heatmaps-by-label-{protocol}.csv",
        rows.dropna(axis=1, how="all"),
    )


def _case(record: run_record.RunRecord, case: dict[str, Any]) -> dict[str, Any]:
    label = case["label"]
    panels = [
        {
            "image": _picture(record.folder, case["image"]),
            "setting": "Original",
            "caption": "",
            "alt": f"Radiograph {case['id']} with the annotated region of {label}",
        }
    ]
    for panel in case["panels"]:
        if panel.get("empty"):
            caption = panel.get("note") or "the map is empty: its gradient is zero everywhere"
        elif panel.get("pointing") is None:
            caption = "the region lies outside what the model sees"
        else:
            share = float(panel["pointing"])
            hit = {1.0: "peak hits", 0.0: "peak misses"}.get(share, f"{share:.2f} of a tied peak hits")
            caption = f"{hit} · energy {panel['energy']:.2f} · IoU {panel['iou']:.2f}"
            caption += f" · {panel['note']}" if panel.get("note") else ""
        panels.append(
            {
                "image": _picture(record.folder, panel["file"]),
                "setting": panel["setting"],
                "caption": caption,
                "alt": f"Heatmap of {label}, {panel['setting']}: {caption}",
            }
        )
    shown = f"{label} (protocol: {case['protocol']})" if len(record.protocols) > 1 else label
    return {"id": case["id"], "label": shown, "panels": panels}


def _query(record: run_record.RunRecord, query: dict[str, Any]) -> dict[str, Any]:
    asked = query["query"]
    title = (
        f"Text “{asked['text']}”"
        if "text" in asked
        else f"Image {asked['id']} ({', '.join(asked.get('labels', [])) or 'no label'})"
    )
    hits = []
    for hit in query["hits"]:
        labels = ", ".join(hit["labels"]) or "no label"
        hits.append(
            {
                "image": _picture(record.folder, hit["thumbnail"]) if hit.get("thumbnail") else "",
                "alt": f"Neighbour {hit['id']}: {labels}",
                "score": f"{hit['score']:.3f}",
                "labels": labels,
                "style": "yes" if hit["match"] else "no",
            }
        )
    return {"title": title, "hits": hits}


def _picture(folder: Path, relative: str) -> str:
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return ""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _cost_table(costs: pd.DataFrame) -> Table:
    def size(value: float) -> str:
        if value is None or not math.isfinite(value):
            return "–"
        for unit in ("B", "kB", "MB", "GB"):
            if abs(value) < 1000 or unit == "GB":
                return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
            value /= 1000
        return ""

    rows = []
    for row in costs.itertuples():
        rows.append(
            Row(
                [
                    Cell(str(row.step)),
                    Cell(_number(row.seconds, 1), sort=row.seconds),
                    Cell(
                        "–" if pd.isna(row.items) else f"{int(row.items):,}",
                        sort=None if pd.isna(row.items) else row.items,
                    ),
                    Cell(
                        "–" if pd.isna(row.rate) else f"{row.rate:,.0f}", sort=None if pd.isna(row.rate) else row.rate
                    ),
                    Cell("–" if pd.isna(row.reused) else f"{int(row.reused):,}"),
                    Cell(size(np.nan if pd.isna(row.bytes) else row.bytes)),
                    Cell(size(np.nan if pd.isna(row.peak_memory) else row.peak_memory)),
                ]
            )
        )
    columns = ["step", "seconds", "items", "items a second", "from cache", "written", "peak memory"]
    return Table(
        columns,
        rows,
        "Peak memory is the process's highest resident size up to the end of the step.",
        "tables/cost.csv",
        costs.dropna(axis=1, how="all"),
    )


def _failure_table(failures: pd.DataFrame) -> Table:
    columns = [column for column in ("id", "uri", "what", "reason") if column in failures]
    rows = [Row([Cell(str(value)) for value in line]) for line in failures[columns].head(200).itertuples(index=False)]
    return Table(columns, rows, f"{len(failures)} failures, the first 200 shown; all of them in failures.csv.")


def _facts(record: run_record.RunRecord) -> list[dict[str, str]]:
    provenance = record.provenance
    dataset, split = provenance.get("dataset", {}), provenance.get("split", {})
    counts = split.get("counts", {})
    facts = [
        ("samples", f"{dataset.get('n', 0):,}"),
        ("patients", f"{dataset.get('groups', 0):,}"),
        ("train / val / test", " / ".join(f"{counts.get(name, 0):,}" for name in ("train", "val", "test"))),
        ("labels", str(len(record.label_names))),
        ("imbalance", dataset.get("imbalance", "–")),
        ("failed samples", f"{len(record.failures):,}"),
        ("total time", f"{provenance.get('seconds', 0) / 60:.1f} min"),
    ]
    return [{"name": name, "value": value} for name, value in facts]


def _provenance_lines(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    def flat(value: Any) -> str:
        if isinstance(value, dict):
            return " · ".join(
                f"{key} {flat(entry)}" for key, entry in value.items() if not isinstance(entry, dict | list)
            )
        if isinstance(value, list):
            return "; ".join(flat(entry) for entry in value)
        return str(value)

    lines = [("encoders", "; ".join(str(encoder.get("id")) for encoder in provenance.get("encoders", [])))]
    for name in ("dataset", "split", "versions", "machine", "git_commit", "started", "finished"):
        if provenance.get(name):
            lines.append((name.replace("_", " "), flat(provenance[name])))
    return lines
