"""Tables that a run announces (kind "table") shown as they are: no table of a run is invisible.

Comes in: a `RunRecord`. Goes out: for each announced table its title, what it holds, its rows and the sentences of its
section. A table that the page lays out by itself is left out by its name (`LAID_OUT`).
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis import run_record
from analysis.report.tables import Cell, Row, Table, number

LAID_OUT: frozenset[str] = frozenset()
MOST_ROWS = 400


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
        said = [] if section in told else list(sentences.loc[sentences["section"] == section, "text"])
        told.add(section)
        suffix = f" (protocol {line.protocol})" if isinstance(line.protocol, str) else ""
        table = _table(record.table(str(line.source)), str(line.text), str(line.source))
        found.append({"title": f"{line.title}{suffix}", "table": table, "sentences": said})
    return found


def told_beside_tables(record: run_record.RunRecord) -> set[str]:
    """Return the sections whose sentences stand beside an announced table."""
    return {str(section) for section in record.rows("table")["section"].dropna()}


def _table(frame: pd.DataFrame, text: str, source: str) -> Table:
    rows = [Row([_cell(value) for value in line]) for line in frame.head(MOST_ROWS).itertuples(index=False)]
    shown = f" The first {MOST_ROWS} of {len(frame)} rows." if len(frame) > MOST_ROWS else ""
    return Table([str(column).replace("_", " ") for column in frame.columns], rows, text + shown, source)


def _cell(value: Any) -> Cell:
    if pd.isna(value):
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float):
        whole = float(value).is_integer()
        return Cell(f"{int(value):,}" if whole else number(float(value)), sort=float(value))
    return Cell(str(value))
