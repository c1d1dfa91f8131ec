"""One page for several runs: what they are, in what they differ, and their figures side by side.

Comes in: `RunRecord`s and, where the runs were tested on the same samples, paired differences computed beforehand
(`jobs.compare`). Goes out: ``report.html``, ``report.md`` and the CSV of each table in a folder of its own. Settings
are named by run, "demo: Linear probe"; where the runs are not comparable the page says why and shows no difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis import curves, figures, run_record
from analysis.comparison import too_few_replicates
from analysis.report import markdown, meaning, questions, sharing
from analysis.report.blocks import Drawing, Note, Section, Sentences, all_tables, tidy
from analysis.report.page import PAGE, TEXT, contents, render, setting_colours
from analysis.report.protocol import CHART_METRICS, DISTANCE_METRICS, LOCALIZATION_METRICS
from analysis.report.setting_tables import settings_table
from analysis.report.tables import Cell, Row, Table, number, setting_by_metric

KINDS = ("metric", "distance", "localization")
UNTOLD = frozenset({"title", "subtitle", "cache"})
MOST_DRAWN = 6


@dataclasses.dataclass(frozen=True)
class Paired:
    """Paired differences between settings of all runs, or why there are none.

    Parameters
    ----------
    differences : DataFrame
        Of `analysis.comparison.paired_differences`, settings named by run; empty where they were not computed.
    note : str
        On how many samples they rest, or why they were not computed.
    """

    differences: pd.DataFrame
    note: str


def run_names(records: Sequence[run_record.RunRecord]) -> list[str]:
    """Return a short name for each run: its folder's, or its number beside it where two are the same."""
    names = [record.folder.resolve().name for record in records]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]


def render_comparison(
    records: Sequence[run_record.RunRecord], paired: Paired, out: Path, *, shareable: bool = False
) -> Path:
    """Write the comparison of runs into a folder and return the page.

    Parameters
    ----------
    records : sequence of RunRecord
        At least two; the first is what the others are held against.
    paired : Paired
    out : Path
    shareable : bool
        Leave out paths.
    """
    names = run_names(records)
    shown = [sharing.without_patients(record) for record in records] if shareable else list(records)
    joined = joined_record(shown, names)
    colours = setting_colours(joined)
    protocols = joined.protocols
    sections = tidy(
        [
            runs_section(shown, names),
            differences_section(paired),
            *(section for protocol in protocols for section in protocol_sections(joined, protocol, colours)),
            cost_section(shown, names),
            meaning.meaning_section(joined),
        ],
        shareable,
    )
    view = {
        "title": "Comparison of " + " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])),
        "subtitle": paired.note,
        "facts": [
            {"name": "runs", "value": str(len(records))},
            {"name": "settings", "value": str(sum(colour != figures.FAINT for colour in colours.values()))},
            {"name": "protocols", "value": ", ".join(protocols)},
        ],
        "said": said(paired),
        "sections": sections,
        "contents": contents(sections),
        "version": shown[0].provenance.get("versions", {}).get("fluoroscope", ""),
    }
    texts = {PAGE: render("comparison.html.j2", view), TEXT: markdown.write_markdown(view["title"], view, sections)}
    if shareable:
        for record in records:
            sharing.check(record, list(texts.values()))
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for section in sections:
        for table in all_tables(section.blocks):
            if table.csv and not table.frame.empty:
                table.frame.to_csv(out / table.csv, index=False)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return out / PAGE


def joined_record(records: Sequence[run_record.RunRecord], names: Sequence[str]) -> run_record.RunRecord:
    """Return one record with the result rows of all runs, settings named by run; baselines of the first only."""
    parts = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        rows = record.results[record.results["kind"].isin(KINDS)]
        if place:
            rows = rows[rows["baseline"] != True]  # noqa: E712 - a column of objects
        trivial = rows["baseline"].eq(True)
        parts.append(rows.assign(setting=rows["setting"].where(trivial, name + ": " + rows["setting"].astype(str))))
    labels = [label for label in records[0].label_names if all(label in record.label_names for record in records)]
    empty = pd.DataFrame()
    return dataclasses.replace(
        records[0],
        provenance={"label_names": labels},
        results=pd.concat(parts, ignore_index=True),
        scores=None,
        embedding_map=empty,
        distances=empty,
        retrieval=[],
        heatmaps=[],
        failures=empty,
    )


def said(paired: Paired) -> list[str]:
    """Return the pairs of which one is shown to be better, or that none is."""
    rows = paired.differences
    if rows.empty:
        return []
    better = rows[rows["better"] != ""]
    if better.empty:
        told = f"None of {len(rows)} paired differences stands after Holm's correction."
        return list(filter(None, [told, too_few_replicates(rows)]))
    return [f"{len(better)} of {len(rows)} paired differences stand after Holm's correction."] + [
        f"{row.better} is better by {questions.METRIC_TITLES.get(str(row.metric), str(row.metric))} than "
        f"{row.other if row.better == row.setting else row.setting}: difference {number(abs(row.difference))}, "
        f"corrected p = {number(row.p_holm)}."
        for row in better.itertuples()
    ]


def runs_section(records: Sequence[run_record.RunRecord], names: Sequence[str]) -> Section:
    """Return what each run is, and which values of their configs differ."""
    facts = [_facts_of(record) for record in records]
    shown = [key for key in facts[0] if any(fact.get(key) for fact in facts)]
    rows = [Row([Cell(key), *(Cell(fact.get(key) or "–") for fact in facts)]) for key in shown]
    frame = pd.DataFrame(
        [{"what": key, **dict(zip(names, (fact.get(key) for fact in facts), strict=True))} for key in shown]
    )
    table = Table(["what", *names], rows, "What was run.", "tables/runs.csv", frame, prose=True)
    configs = [_flat(yaml.safe_load(record.config_text) or {}) for record in records]
    keys = [
        key for key in dict.fromkeys(key for config in configs for key in config) if key.split(".")[0] not in UNTOLD
    ]
    differing = [key for key in keys if len({str(config.get(key, "–")) for config in configs}) > 1]
    lines = [Row([Cell(key), *(Cell(str(config.get(key, "–"))) for config in configs)]) for key in differing]
    values = [
        {"key": key, **{name: config.get(key) for name, config in zip(names, configs, strict=True)}}
        for key in differing
    ]
    caption = "Values of the resolved configs that are not the same."
    changed = Table(["key", *names], lines, caption, "tables/differing.csv", pd.DataFrame(values), prose=True)
    same = Sentences(["The resolved configs are the same."])
    return Section("runs", "The runs", "", "", [table, changed if differing else same])


def protocol_sections(joined: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> list[Section | None]:
    """Return what all runs have under one protocol."""
    return [
        settings_section(joined, protocol, colours),
        labels_section(joined, protocol, colours),
        further_section(joined, protocol, colours),
    ]


def settings_section(joined: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> Section:
    """Return all runs' settings of one protocol side by side."""
    rows = _of(joined, "metric", protocol)
    overall = rows[rows["label"].isna()]
    none = joined.rows("reference").iloc[:0]
    return Section(
        f"settings-{protocol}",
        "Settings side by side",
        f"Protocol: {protocol}",
        "Trivial baselines are those of the first run. Intervals that overlap say nothing of a difference on the same "
        "images; the paired differences below do.",
        [
            Drawing(figures.interval_chart(overall, CHART_METRICS, colours)),
            settings_table(overall, _of(joined, "distance", protocol), none, colours, protocol),
        ],
    )


def differences_section(paired: Paired) -> Section:
    """Return the paired differences, or why there are none."""
    rows = paired.differences
    if rows.empty:
        return Section("differences", "Paired differences", "", "", [Sentences([paired.note])])
    rows = rows.rename(columns={"difference": "value"})
    table = questions.differences_table(rows, "all")
    return Section("differences", "Paired differences", "", paired.note, [table])


def labels_section(joined: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> Section | None:
    """Return each label's metrics by run and setting; of the first settings where there are more than colours."""
    rows = _of(joined, "metric", protocol)
    rows = rows[rows["label"].notna()]
    settings = [name for name in dict.fromkeys(rows["setting"]) if colours[name] != figures.FAINT]
    if not settings or rows.empty:
        return None
    drawn = settings[:MOST_DRAWN]
    more = f" {len(drawn)} of {len(settings)} settings are drawn." if len(drawn) < len(settings) else ""
    caption = "Most frequent label first, test positives in brackets; grey ticks: what a random ranking reaches." + more
    return Section(
        f"labels-{protocol}",
        "Label by label",
        f"Protocol: {protocol}",
        "",
        [Drawing(curves.label_strips(rows, joined.label_names, drawn, colours), caption)],
    )


def further_section(joined: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> Section:
    """Return distances and heatmap scores of all runs."""
    distances, found = _of(joined, "distance", protocol), _of(joined, "localization", protocol)
    found = found[found["label"].isna()]
    blocks: list[Any] = []
    if len(distances):
        caption = "Distances between and within classes on the test split."
        csv = f"tables/distances-{protocol}.csv"
        blocks.append(setting_by_metric(distances, DISTANCE_METRICS, colours, csv, caption))
    if len(found):
        caption = "Heatmaps against the truth: mean over annotated findings."
        csv = f"tables/heatmaps-{protocol}.csv"
        blocks.append(setting_by_metric(found, LOCALIZATION_METRICS, colours, csv, caption))
    return Section(f"further-{protocol}", "Distances and heatmaps", f"Protocol: {protocol}", "", blocks)


def cost_section(records: Sequence[run_record.RunRecord], names: Sequence[str]) -> Section:
    """Return the seconds of each step by run."""
    costs = [record.rows("cost").groupby("step", sort=False)["seconds"].sum() for record in records]
    steps = list(dict.fromkeys(step for cost in costs for step in cost.index))
    rows = []
    for step in steps:
        cells = [Cell(str(step))]
        for cost in costs:
            known = step in cost.index
            cells.append(Cell(number(cost[step], 1), sort=float(cost[step])) if known else Cell("–"))
        rows.append(Row(cells))
    frame = pd.DataFrame(
        {"step": steps, **{name: cost.reindex(steps).to_numpy() for name, cost in zip(names, costs, strict=True)}}
    )
    note = Note("Seconds of each step; runs of different machines do not compare.")
    table = Table(["step", *names], rows, "Seconds.", "tables/cost.csv", frame) if rows else None
    return Section("cost", "Time", "", "", [note, table])


def _of(record: run_record.RunRecord, kind: str, protocol: str) -> pd.DataFrame:
    rows = record.rows(kind)
    return rows[rows["protocol"] == protocol]


def _facts_of(record: run_record.RunRecord) -> dict[str, str]:
    provenance = record.provenance
    dataset, split = provenance.get("dataset", {}), provenance.get("split", {})
    counts = split.get("counts", {})
    return {
        "title": str(provenance.get("title", "")),
        "encoders": "; ".join(str(encoder.get("id")) for encoder in provenance.get("encoders", [])),
        "data": str(dataset.get("schema", "")),
        "samples": f"{dataset.get('n', 0):,} of {dataset.get('groups', 0):,} patients",
        "split": f"{split.get('how', '')}, digest {split.get('digest', '')}",
        "train / val / test": " / ".join(f"{counts.get(name, 0):,}" for name in ("train", "val", "test")),
        "failed samples": f"{len(record.failures):,}",
        "version": str(provenance.get("versions", {}).get("fluoroscope", "")),
        "git commit": str(provenance.get("git_commit") or ""),
        "started": str(provenance.get("started", "")),
        "minutes": number(float(provenance.get("seconds", 0) or 0) / 60, 1),
    }


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested config values by dotted key."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
