"""What a page is made of: sections of blocks, which the HTML and the Markdown writer both lay out.

A section is built by a function that returns `Section` with its blocks in reading order; a block that has nothing to
show is None and is left out, and so is a section without blocks. So a new question needs one function and no change of
a template. Blocks that show single patients are marked ``private`` and are what a shareable page leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from analysis.report.tables import Table

_ID = re.compile(r'id="(f[0-9a-f]{10}-)')


@dataclass(frozen=True)
class Note:
    """A paragraph in grey: how to read what follows."""

    text: str
    kind: ClassVar[str] = "note"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "heading"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Sentences:
    """Sentences drawn from the numbers by fixed rules."""

    items: Sequence[str]
    kind: ClassVar[str] = "sentences"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Drawing:
    """An inline SVG of `analysis.figures`, with the text below it."""

    svg: str
    caption: str = ""
    kind: ClassVar[str] = "drawing"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Matrix:
    """A square table of values between labels, shaded by value.

    Parameters
    ----------
    labels : sequence of str, length L
    values : ndarray of float, (L, L)
        NaN and the diagonal are left blank.
    caption, csv : str
    """

    labels: Sequence[str]
    values: np.ndarray
    caption: str
    csv: str = ""
    kind: ClassVar[str] = "matrix"
    private: ClassVar[bool] = False

    def rows(self) -> Iterator[tuple[str, list[tuple[str, float | None]]]]:
        """Return each label with text and shade (0 to 1) of its cells."""
        apart = self.values[~np.eye(len(self.labels), dtype=bool)]
        known = apart[np.isfinite(apart)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        digits = 1 if high >= 10 else 2
        for row, label in enumerate(self.labels):
            cells: list[tuple[str, float | None]] = []
            for column, value in enumerate(self.values[row]):
                if row == column or not np.isfinite(value):
                    cells.append(("", None))
                else:
                    cells.append((f"{value:.{digits}f}", (float(value) - low) / (high - low) if high > low else 0.5))
            yield label, cells


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line."""

    items: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Code:
    """Text to copy, such as a command or a config."""

    text: str
    title: str = ""
    kind: ClassVar[str] = "code"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Details:
    """Blocks that open on demand; printed open, unless they are ``long``."""

    title: str
    blocks: Sequence[Any]
    long: bool = False
    kind: ClassVar[str] = "details"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Cases:
    """Heatmap panels of single samples (`analysis.report.pictures.case_view`)."""

    cases: Sequence[dict[str, Any]]
    kind: ClassVar[str] = "cases"
    private: ClassVar[bool] = True


@dataclass(frozen=True)
class Neighbours:
    """Contact sheets: a query and what was found (`analysis.report.pictures.query_view`)."""

    queries: Sequence[dict[str, Any]]
    kind: ClassVar[str] = "neighbours"
    private: ClassVar[bool] = True


@dataclass(frozen=True)
class PointMap:
    """Maps of the embeddings that tell on hover which sample a point is (`analysis.report.point_map`)."""

    panels: Sequence[dict[str, Any]]
    legend: Sequence[dict[str, Any]]
    data: str
    alt: str
    kind: ClassVar[str] = "map"
    private: ClassVar[bool] = False


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Parameters
    ----------
    anchor : str
        Its id in the page, which links lead to.
    title : str
    group : str
        Heading over it in the table of contents.
    lead : str
        One or two sentences on what is asked and how to read the answer.
    blocks : sequence of block or None
    """

    anchor: str
    title: str
    group: str = ""
    lead: str = ""
    blocks: Sequence[Any] = field(default_factory=tuple)


def tidy(sections: Sequence[Section | None], shareable: bool = False) -> list[Section]:
    """Return the sections that have something to show, without absent (and, shareable, without private) blocks."""
    kept = []
    drawn: dict[str, int] = {}
    for section in sections:
        if section is None:
            continue
        blocks = _with_own_ids(_present(section.blocks, shareable), drawn)
        if any(block.kind not in ("note", "heading") for block in blocks):
            kept.append(Section(section.anchor, section.title, section.group, section.lead, blocks))
    return kept


def all_tables(blocks: Sequence[Any]) -> Iterator[Table]:
    """Return the tables among blocks, also those inside details."""
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Details):
            yield from all_tables(block.blocks)


def _with_own_ids(blocks: Sequence[Any], drawn: dict[str, int]) -> list[Any]:
    """Return the blocks with other ids in a drawing that equals an earlier one: ids in one page must not meet."""
    found: list[Any] = []
    for block in blocks:
        if isinstance(block, Drawing):
            prefix = _ID.search(block.svg)
            if prefix is not None:
                count = drawn[prefix[1]] = drawn.get(prefix[1], -1) + 1
                if count:
                    svg = block.svg.replace(prefix[1], f"{prefix[1][:-1]}{chr(96 + count)}-")
                    block = Drawing(svg, block.caption)
        elif isinstance(block, Details):
            block = Details(block.title, _with_own_ids(block.blocks, drawn), block.long)
        found.append(block)
    return found


def _present(blocks: Sequence[Any], shareable: bool) -> list[Any]:
    kept: list[Any] = []
    for block in blocks:
        if block is None or (shareable and block.private):
            continue
        if isinstance(block, Details):
            inner = _present(block.blocks, shareable)
            if inner:
                kept.append(Details(block.title, inner, block.long))
        elif not (isinstance(block, Sentences) and not block.items):
            kept.append(block)
    # A heading with nothing below it announces nothing.
    return [
        block
        for place, block in enumerate(kept)
        if block.kind != "heading" or (place + 1 < len(kept) and kept[place + 1].kind != "heading")
    ]
