"""One self-contained HTML page from a run folder.

Comes in: `analysis.run_record.RunRecord`. Goes out: ``report.html`` (pictures embedded, nothing fetched) and the CSV
beside each table. Numbers are only laid out here; none is computed that the run did not record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from analysis import figures, run_record
from analysis.report import questions
from analysis.report.account import cost_table, facts, failure_table, provenance_lines
from analysis.report.pictures import case_view, query_view
from analysis.report.plain import plain_tables, told_beside_tables
from analysis.report.protocol import protocol_view
from analysis.report.tables import Table

BESIDE_THEIR_TABLES = ("distances", "heatmaps", "thresholds", "subgroups", "differences", "space")


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
    view = page_view(record)
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


def page_view(record: run_record.RunRecord) -> dict[str, Any]:
    """Return everything that the template shows, by the template's names."""
    colours = setting_colours(record)
    provenance = record.provenance
    protocols = [protocol_view(record, name, colours) for name in record.protocols]
    cases = [case_view(record, case) for case in record.heatmaps]
    costs = record.rows("cost")
    plain = plain_tables(record)
    beside = told_beside_tables(record).union(BESIDE_THEIR_TABLES)
    sections = [("summary", "Summary")]
    for part in protocols:
        suffix = f" ({part['name']})" if len(protocols) > 1 else ""
        sections += [(f"settings-{part['name']}", "Settings" + suffix), (f"labels-{part['name']}", "Labels" + suffix)]
        for name, title in (("thresholds", "Thresholds"), ("subgroups", "Subgroups"), ("distances", "Distances")):
            sections += [(f"{name}-{part['name']}", title + suffix)] if part[name] else []
        for name, title in (("space", "Space"), ("search", "Search")):
            sections += [(f"{name}-{part['name']}", title + suffix)] if part[name] else []
        sections += [(f"heatmaps-{part['name']}", "Heatmaps" + suffix)] if part["localization"] else []
    sections += [("panels", "Panels")] if cases else []
    sections += [("retrieval", "Neighbours")] if record.retrieval else []
    sections += [("map", "Map")] if len(record.embedding_map) else []
    sections += [("split", "Split")] if len(record.rows("split")) else []
    sections += [("tables", "Further tables")] if plain else []
    sections += [("cost", "Cost"), ("provenance", "Provenance")]
    headline = [str(text) for text in record.rows("sentence")["text"] if text]
    return {
        "title": provenance.get("title") or "Study report",
        "subtitle": provenance.get("subtitle", ""),
        "facts": facts(record),
        "sections": sections if headline else sections[1:],
        "headline": [
            str(row.text) for row in record.rows("sentence").itertuples() if row.section not in beside
        ],
        "split": questions.split_table(record.rows("split")),
        "protocols": protocols,
        "cases": cases,
        "retrieval": [query_view(record, query) for query in record.retrieval],
        "embedding": figures.embedding_panels(record.embedding_map, record.label_names)
        if len(record.embedding_map)
        else "",
        "embedding_note": provenance.get("embedding_map", "Two-dimensional map of the image embeddings."),
        "plain": plain,
        "cost": cost_table(costs),
        "cost_chart": figures.cost_bars(costs) if len(costs) else "",
        "failures": failure_table(record.failures) if len(record.failures) else None,
        "provenance": provenance_lines(provenance),
        "command": provenance.get("command", ""),
        "config": record.config_text,
        "version": provenance.get("versions", {}).get("fluoroscope", ""),
    }


def setting_colours(record: run_record.RunRecord) -> dict[str, str]:
    """Return a colour for each setting, the faint one for trivial baselines; the same all over the page."""
    rows = record.results[record.results["kind"].isin(["metric", "distance", "localization"])]
    colours: dict[str, str] = {}
    for row in rows.itertuples():
        if row.setting not in colours:
            learnt = sum(colour != figures.FAINT for colour in colours.values())
            colours[row.setting] = (
                figures.FAINT if row.baseline is True else figures.SERIES[learnt % len(figures.SERIES)]
            )
    return colours
