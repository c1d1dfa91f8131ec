"""Tables as the page lays them out: cells with a sort value, a shade, a second line; and the CSV beside each.

Comes in: tidy result rows. Goes out: `Table`. Numbers are only laid out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd

from analysis import figures

# A page of a large study must still open and scroll; what is not shown is said, and stands in the CSV.
MOST_ROWS = 200


@dataclass(frozen=True)
class Cell:
    """One table cell: text, a smaller second line, a sort value, a shade (0 to 1), a dot of colour, or just words."""

    text: str
    small: str = ""
    sort: float | None = None
    heat: float | None = None
    colour: str = ""
    wordy: bool = False


@dataclass(frozen=True)
class Row:
    """Cells and the CSS class of their line."""

    cells: list[Cell]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table as the template lays it out, with the name of its CSV.

    Parameters
    ----------
    columns : list of str
    rows : list of Row
        At most `MOST_ROWS` are shown; the CSV has all.
    caption : str
    csv : str
        Where in the run folder its numbers lie, "" for none.
    frame : DataFrame
        What is written there.
    private : bool
        Whether it tells of single patients, and is left out of what is shared.
    prose : bool
        Whether its cells are sentences: set to the left and wrapped.
    """

    columns: list[str]
    rows: list[Row]
    caption: str
    csv: str = ""
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    private: bool = False
    prose: bool = False
    kind: ClassVar[str] = "table"

    @property
    def shown(self) -> list[Row]:
        """The rows that the page shows."""
        return self.rows[:MOST_ROWS]

    @property
    def left_out(self) -> int:
        """How many rows the page does not show."""
        return len(self.rows) - len(self.shown)


def css(colour: str) -> str:
    """Return the page's CSS variable of a figure colour."""
    return "var(--muted)" if colour == figures.FAINT else f"var(--series-{figures.SERIES.index(colour) + 1})"


def number(value: float, digits: int = 3) -> str:
    """Return a number for reading; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"


def size(value: float) -> str:
    """Return a number of bytes for reading."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def value_cell(rows: pd.DataFrame) -> Cell:
    """Return the first row's value with its interval below; a dash where there is none."""
    if rows.empty or not math.isfinite(rows["value"].iloc[0]):
        return Cell("–")
    row = rows.iloc[0]
    bounded = pd.notna(row["low"]) and pd.notna(row["high"])
    small = f"{number(row['low'])} – {number(row['high'])}" if bounded else ""
    return Cell(number(row["value"]), small, float(row["value"]))


def setting_by_metric(
    rows: pd.DataFrame, metrics: Sequence[tuple[str, str]], colours: dict[str, str], csv: str, caption: str
) -> Table:
    """Return one row a setting and one column a metric, each value with its interval."""
    lines = []
    for setting in dict.fromkeys(rows["setting"]):
        part = rows[rows["setting"] == setting]
        faint = colours[setting] == figures.FAINT
        count = part["n"].dropna()
        cells = [Cell(setting, f"n = {int(count.iloc[0])}" if len(count) else "", colour=css(colours[setting]))]
        cells += [value_cell(part[part["metric"] == metric]) for metric, _ in metrics]
        lines.append(Row(cells, "baseline" if faint else ""))
    return Table(["setting", *(title for _, title in metrics)], lines, caption, csv, rows.dropna(axis=1, how="all"))
