"""A sheet of small images in rows: what was asked for at the left, what was found beside it, captions below.

Comes in: rows of cells, each an image (or none) and lines of text. Goes out: one RGB image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE = 168, 10, 15
PAPER, INK, FAINT, FRAME = (255, 255, 255), (20, 20, 20), (110, 110, 110), (176, 60, 30)
FONT_SIZE = 12


@dataclass(frozen=True)
class Cell:
    """One place of the sheet.

    Parameters
    ----------
    image : PIL image of 8 bits, or None
        None for a query that is a text: its caption stands in the middle.
    caption : sequence of str
        Lines below the image; the first in ink, further ones in grey. Too long ones are cut.
    """

    image: Image.Image | None
    caption: Sequence[str] = ()


def draw_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Return the sheet, RGB; the first cell of each row, the query, has a frame.

    Parameters
    ----------
    rows : sequence of sequences of Cell
        Of any lengths.
    """
    columns = max((len(row) for row in rows), default=1)
    lines = max((len(cell.caption) for row in rows for cell in row if cell.image is not None), default=0)
    height = SIDE + lines * LINE + GAP
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, max(len(rows), 1) * (height + GAP) + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            left, top = GAP + column * (SIDE + GAP), GAP + number * (height + GAP)
            _draw_cell(sheet, pen, font, cell, left, top)
            if column == 0:
                pen.rectangle((left - 3, top - 3, left + SIDE + 2, top + SIDE + 2), outline=FRAME, width=2)
    return sheet


def _draw_cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, font: object, cell: Cell, left: int, top: int) -> None:
    if cell.image is None:
        lines = _wrapped(pen, font, " ".join(cell.caption))
        for number, line in enumerate(lines[: SIDE // LINE - 1]):
            pen.text((left + 4, top + 4 + number * LINE), line, INK, font=font)  # type: ignore[arg-type]
        return
    picture = cell.image.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
    for number, line in enumerate(cell.caption):
        place = (left, top + SIDE + 2 + number * LINE)
        pen.text(place, _cut(pen, font, line), INK if number == 0 else FAINT, font=font)  # type: ignore[arg-type]


def _cut(pen: ImageDraw.ImageDraw, font: object, text: str, width: int = SIDE) -> str:
    if pen.textlength(text, font=font) <= width:  # type: ignore[arg-type]
        return text
    while text and pen.textlength(text + "…", font=font) > width:  # type: ignore[arg-type]
        text = text[:-1]
    return text + "…"


def _wrapped(pen: ImageDraw.ImageDraw, font: object, text: str) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font=font) <= SIDE - 8:  # type: ignore[arg-type]
            lines[-1] = longer
        else:
            lines.append(_cut(pen, font, word, SIDE - 8))
    return lines
