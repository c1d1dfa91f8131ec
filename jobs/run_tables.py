"""Tables of a run: a CSV in ``tables/`` and one result line that says what it holds.

Comes in: a tidy data frame, one figure or one comparison a row. Goes out: ``tables/<name>.csv`` and a line of kind
"table" with name, title, section, text (what the table holds, for a reader) and source (the CSV, as seen from the run
folder). So a report can show every table that a run left, also those that it has no layout of its own for.
"""

from __future__ import annotations

import pandas as pd

from jobs import runs


def write_table(
    run: runs.Run, name: str, frame: pd.DataFrame, *, title: str, text: str, section: str, protocol: str | None = None
) -> None:
    """Write a table and the line that announces it; nothing where it has no rows.

    Parameters
    ----------
    name : str
        Of the file, without its ending; safe as one.
    frame : DataFrame
        Numbers are written with six significant digits, what is undefined is left empty.
    title : str
        A few words.
    text : str
        What a row and its columns are, in a sentence or two.
    section : str
        Where its sentences stand (`jobs.study_records.sentence_rows`).
    protocol : str, optional
        "sound" or "paper", where it belongs to one of them.
    """
    if frame.empty:
        return
    source = f"tables/{name}.csv"
    frame.to_csv(run.path(source), index=False, float_format="%.6g")
    run.record("table", name=name, title=title, text=text, section=section, source=source, protocol=protocol)
