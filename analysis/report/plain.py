"""Tables that a run announces (kind "table"), each with a place in the page: no table of a run is invisible.

Comes in: a `RunRecord`. Goes out: for each announced table its title, what it holds, its rows and the sentences of its
section; and whole sections of them. A table that the page lays out by itself is left out by its name (`LAID_OUT`). A
section that is not known here stands under "Further questions", so a new question needs no change here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from analysis import run_record
from analysis.report.blocks import Details, Heading, Section, Sentences
from analysis.report.sharing import is_private
from analysis.report.tables import Cell, Row, Table, number, size
from analysis.sentences import TITLES, with_protocol

LAID_OUT: frozenset[str] = frozenset()
# Sections of a protocol, which show the tables announced for them at their own end.
OF_A_PROTOCOL = (
    "settings",
    "differences",
    "labels",
    "thresholds",
    "subgroups",
    "distances",
    "space",
    "search",
    "heatmaps",
)
LONG_TEXT = 40
IN_BYTES = frozenset({"bytes", "peak_memory"})
# Longer tables open on demand, so that the page can be read in one go.
LONG_TABLE = 24


class Place(NamedTuple):
    """Where a section of announced tables stands: part of the page, group and title."""

    part: str
    group: str
    title: str
    lead: str = ""


PLACES = {
    "reference": Place(
        "first",
        "",
        "Beside the published study",
        "The published table beside ours under the same protocol, and what is not as in the study.",
    ),
    "claims": Place("first", "", "The study's claims", "Each claim has a test of its own, with its interval."),
    "seeds": Place(
        "first",
        "",
        "Over seeds and splits",
        "How far the figures move when split and training are drawn again, beside the interval within one split.",
    ),
    "sensitivity": Place(
        "first",
        "",
        "When a choice changes",
        "Thresholds, prompts, normalisation and label source, each changed alone.",
    ),
    "annotations": Place("questions", "Look", "Annotations"),
    "data": Place("data", "Data and model", "The data"),
    "data_card": Place("data", "Data and model", "Data card"),
    "label_sources": Place("data", "Data and model", "Label sources"),
    "model_card": Place("data", "Data and model", "Model card"),
    "model": Place("data", "Data and model", "The model"),
    "cost": Place("account", "Account", "What each step cost"),
}


def plain_tables(record: run_record.RunRecord) -> list[dict[str, Any]]:
    """Return title, text, table and sentences of every announced table that has no layout of its own.

    Raises
    ------
    DataError
        A CSV that the run announces is missing or cannot be read.
    """
    found: list[dict[str, Any]] = []
    sentences = record.rows("sentence")
    told: set[str] = set()
    for line in record.rows("table").itertuples():
        if line.name in LAID_OUT:
            continue
        section = str(line.section)
        rows = sentences[sentences["section"] == section]
        said = [] if section in told else list(map(with_protocol, rows["text"], rows["protocol"]))
        told.add(section)
        protocol = line.protocol if isinstance(line.protocol, str) else ""
        suffix = f" (protocol {protocol})" if protocol else ""
        table = _table(record.table(str(line.source)), str(line.text), str(line.source))
        found.append(
            {
                "title": f"{line.title}{suffix}",
                "table": table,
                "sentences": list(dict.fromkeys(said)),
                "section": section,
                "home": _home(section, protocol),
                "protocol": protocol,
            }
        )
    return found


def plain_sections(announced: Sequence[dict[str, Any]], protocols: Sequence[str]) -> dict[str, list[Section]]:
    """Return announced tables as sections, by part of the page ("first", "questions", "data", "account").

    Those of a protocol's own section are left to it (`blocks_of`).

    Parameters
    ----------
    announced : sequence of dict
        Of `plain_tables`.
    protocols : sequence of str
        The run's; titles name theirs where there are several.
    """
    shown = [part for part in announced if part["home"] not in OF_A_PROTOCOL]
    parts: dict[str, list[Section]] = {}
    for name in dict.fromkeys(part["home"] for part in shown):
        place = _place(name)
        blocks: list[Any] = []
        for part in shown:
            if part["home"] == name:
                title = part["title"] if len(protocols) > 1 else _without_protocol(part)
                blocks += [Sentences(part["sentences"]), *_shown(title, part["table"])]
        anchor = "told-" + re.sub(r"[^a-z0-9]+", "-", name.lower())
        parts.setdefault(place.part, []).append(Section(anchor, place.title, place.group, place.lead, blocks))
    return parts


def blocks_of(announced: Sequence[dict[str, Any]], section: str, protocol: str, first: bool) -> list[Any]:
    """Return the announced tables of a protocol's section; those of no protocol go to the ``first`` one shown."""
    blocks: list[Any] = []
    for part in announced:
        if part["home"] == section and (part["protocol"] == protocol or (first and not part["protocol"])):
            # The section tells its own sentences itself.
            said = [Sentences(part["sentences"])] if part["section"] != section else []
            blocks += [*said, *_shown(_without_protocol(part), part["table"])]
    return blocks


def _shown(title: str, table: Table) -> list[Any]:
    if len(table.rows) > LONG_TABLE:
        return [Details(f"{title} ({len(table.rows):,} rows)", [table], long=True)]
    return [Heading(title), table]


def _without_protocol(part: dict[str, Any]) -> str:
    return str(part["title"]).removesuffix(f" (protocol {part['protocol']})")


def _home(section: str, protocol: str) -> str:
    """Return the section of the page that an announced section belongs to."""
    if section == "labels" and not protocol:
        return "label_sources"
    return {"figures": "settings"}.get(section, section)


def told_beside_tables(record: run_record.RunRecord) -> set[str]:
    """Return the sections whose sentences stand beside an announced table."""
    return {str(section) for section in record.rows("table")["section"].dropna()}


def _place(section: str) -> Place:
    known = PLACES.get(section.lower().replace(" ", "_"))
    title = section.replace("_", " ")
    return known or Place("questions", "Further questions", title[:1].upper() + title[1:])


def _table(frame: pd.DataFrame, text: str, source: str) -> Table:
    names = [str(column) for column in frame.columns]
    rows = [
        Row([_cell(value, name) for name, value in zip(names, line, strict=True)])
        for line in frame.itertuples(index=False)
    ]
    columns = [str(column).replace("_", " ") for column in frame.columns]
    wordy = any(
        frame[column].astype(str).str.len().max() > LONG_TEXT for column in frame.select_dtypes(exclude="number")
    )
    return Table(columns, rows, text, source, private=is_private(frame), prose=bool(wordy))


def _size_cell(value: Any) -> Cell:
    return Cell("–") if pd.isna(value) else Cell(size(float(value)), sort=float(value))


def _cell(value: Any, column: str) -> Cell:
    if column in IN_BYTES:
        return _size_cell(value)
    if pd.isna(value):
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        whole = float(value).is_integer()
        return Cell(f"{int(value):,}" if whole else number(float(value)), sort=float(value))
    return Cell(TITLES.get(str(value), str(value)) if column == "metric" else str(value), wordy=True)
