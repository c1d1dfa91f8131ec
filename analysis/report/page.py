"""One self-contained HTML page from a run folder, and beside it Markdown, LaTeX and the CSV of each table.

Comes in: `analysis.run_record.RunRecord`. Goes out: ``report.html`` (pictures embedded, nothing fetched),
``report.md``, ``tables/*.csv`` and ``tables/settings-*.tex``. Numbers are only laid out here; none is computed that the
run did not record. A shareable page leaves out whatever shows or names single patients (`analysis.report.sharing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from analysis import figures, run_record
from analysis.report import latex, markdown, meaning, plain, point_map, questions, sharing, summary, theme
from analysis.report.account import cost_section, facts, provenance_section
from analysis.report.blocks import Cases, Neighbours, Note, Section, Sentences, all_tables, tidy
from analysis.report.pictures import MOST_CASES, MOST_QUERIES, case_view, query_view
from analysis.report.protocol import protocol_sections

PAGE, TEXT = "report.html", "report.md"
HOW_TO_READ_PANELS = (
    "Outlined: the annotated region; ring: the map's peak, which hits where it lies in the region or within the "
    "pointing game's tolerance of it. Hatched: outside what the model sees. Chosen by a seed, not by their looks."
)


def render_report(folder: str | Path, *, shareable: bool = False, out: str | Path | None = None) -> Path:
    """Write the report of a run from its results alone.

    Parameters
    ----------
    folder : path
        A run folder with results.jsonl, provenance.json and, where the steps ran, scores.npz, embedding_map.csv,
        retrieval.json, heatmaps.json, failures.csv.
    shareable : bool
        Leave out images, texts, sample ids and paths.
    out : path, optional
        Folder to write to; the run's own unless given, and ``shareable`` in it for a shareable report.

    Returns
    -------
    Path of the page.

    Raises
    ------
    engine.errors.UsageError, engine.errors.DataError
        If the folder is no run or a file in it is broken; if a shareable page would still name a sample.
    """
    record = run_record.read_run(folder)
    place = Path(out) if out is not None else record.folder / "shareable" if shareable else record.folder
    shown = sharing.without_patients(record) if shareable else record
    sections = report_sections(shown, shareable)
    view = page_view(shown, sections, shareable)
    texts = {PAGE: render("report.html.j2", view), TEXT: markdown.write_markdown(view["title"], view, sections)}
    texts |= latex.setting_tables(shown)
    tables = {
        table.csv: sharing.shared_frame(table.frame) if shareable else table.frame
        for section in sections
        for table in all_tables(section.blocks)
        if table.csv and not table.frame.empty
    }
    if shareable:
        sharing.check(record, [*texts.values(), *(frame.to_csv(index=False) for frame in tables.values())])
    (place / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        frame.to_csv(place / name, index=False)
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    return place / PAGE


def render(template: str, view: dict[str, Any]) -> str:
    """Return a page from its template, with the colours of `theme`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render({**view, "theme": theme})


def report_sections(record: run_record.RunRecord, shareable: bool = False) -> list[Section]:
    """Return the sections of a run's page in reading order; those without content are left out."""
    colours = setting_colours(record)
    sections: list[Section | None] = [meaning.meaning_section(record)]
    announced = plain.plain_tables(record)
    plainly = plain.plain_sections(announced, record.protocols)
    sections += plainly.pop("first", [])
    for place, protocol in enumerate(sorted(record.protocols, key=lambda name: name != "sound")):
        sections += protocol_sections(record, protocol, colours, announced, first=place == 0)
    sections += [_panels(record, shareable), _neighbours(record, shareable), _map(record, shareable)]
    sections += plainly.pop("questions", [])
    # Where tables on the data are announced, the sentences stand beside them.
    told = "data" in plain.told_beside_tables(record)
    said = None if told else _said(record, "data")
    split = questions.split_table(record.rows("split"))
    sections.append(Section("split", "The split", "Data and model", "", [split, said]))
    sections += plainly.pop("data", [])
    sections.append(cost_section(record))
    sections += plainly.pop("account", [])
    sections.append(provenance_section(record))
    return tidy(sections, shareable)


def page_view(record: run_record.RunRecord, sections: Sequence[Section], shareable: bool) -> dict[str, Any]:
    """Return everything that the template shows, by the template's names."""
    provenance = record.provenance
    return {
        "title": provenance.get("title") or "Study report",
        "subtitle": provenance.get("subtitle", ""),
        "facts": facts(record),
        "summary": summary.summary_view(record, setting_colours(record)),
        "sections": list(sections),
        "contents": contents(sections),
        "shareable": shareable,
        "version": provenance.get("versions", {}).get("fluoroscope", ""),
    }


def contents(sections: Sequence[Section]) -> list[tuple[str, list[Section]]]:
    """Return the table of contents: sections under their groups, neighbours of one group together."""
    grouped: list[tuple[str, list[Section]]] = []
    for section in sections:
        if not grouped or grouped[-1][0] != section.group:
            grouped.append((section.group, []))
        grouped[-1][1].append(section)
    return grouped


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


def _said(record: run_record.RunRecord, section: str) -> Sentences:
    rows = record.rows("sentence")
    return Sentences(list(dict.fromkeys(rows.loc[rows["section"] == section, "text"])))


def _panels(record: run_record.RunRecord, shareable: bool) -> Section | None:
    if not record.heatmaps or shareable:
        return None
    cases = [case_view(record, case) for case in record.heatmaps[:MOST_CASES]]
    blocks: list[Any] = [Cases(cases)]
    if len(cases) < len(record.heatmaps):
        blocks.append(Note(f"{len(cases)} of {len(record.heatmaps)} findings; the pictures of all lie in heatmaps/."))
    return Section("panels", "Heatmap panels", "Look", HOW_TO_READ_PANELS, blocks)


def _neighbours(record: run_record.RunRecord, shareable: bool) -> Section | None:
    if not record.retrieval or shareable:
        return None
    queries = [query_view(record, query) for query in record.retrieval[:MOST_QUERIES]]
    blocks: list[Any] = [Neighbours(queries)]
    if len(queries) < len(record.retrieval):
        blocks.append(Note(f"{len(queries)} of {len(record.retrieval)} queries; all of them stand in retrieval.json."))
    lead = "✓ and green: the neighbour shares a label with what was asked. ✗ and red: it does not."
    return Section("neighbours", "Nearest neighbours", "Look", lead, blocks)


def _map(record: run_record.RunRecord, shareable: bool) -> Section | None:
    drawn = point_map.point_map(record.embedding_map, record.label_names, shareable)
    if drawn is None:
        return None
    note = record.provenance.get("embedding_map", "Two-dimensional map of the image embeddings.")
    return Section("map", "Map of the embeddings", "Look", f"{note} Coloured by first positive label.", [drawn])
