"""Many small heatmaps over one image in a grid: all labels of an image, or all blocks of a tower, a row a setting.

Comes in: the image, and bands of rows of cells, each a map on the original image's pixels (NaN outside the model's
crop), lines under it and a note where there is no map. Goes out: a uint8 RGB array. Every map is coloured from 0 to its
own maximum, which the foot says: colours tell where, not how much; how much stands under the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from analysis import overlays
from engine.errors import DataError


@dataclass(frozen=True)
class Cell:
    """One small picture.

    Parameters
    ----------
    heat : ndarray of float, (H, W), or None
        None draws the bare image.
    lines : sequence of str
        Written under it.
    note : str
        Why there is nothing to see; the picture is then dimmed and crossed by it.
    mask : ndarray of bool, (H, W), optional
        Outline of the truth for this cell.
    boxes : sequence of Box
        Truth for this cell.
    """

    heat: np.ndarray | None = None
    lines: Sequence[str] = ()
    note: str = ""
    mask: np.ndarray | None = None
    boxes: Sequence[overlays.Box] = ()


@dataclass(frozen=True)
class Band:
    """Rows that share their column titles.

    Parameters
    ----------
    columns : sequence of str
    rows : sequence of (title, cells)
        As many cells as columns.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def bands_of(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], most: int) -> list[Band]:
    """Return columns broken into bands of at most this many, as even as they come."""
    count = -(-len(columns) // most)
    size = -(-len(columns) // count)
    return [
        Band(columns[start : start + size], [(title, cells[start : start + size]) for title, cells in rows])
        for start in range(0, len(columns), size)
    ]


def map_grid(
    image: np.ndarray, bands: Sequence[Band], *, title: str = "", subtitle: str = "", side: int = 170
) -> np.ndarray:
    """Draw the grid.

    Parameters
    ----------
    image : ndarray of uint8, (H, W) or (H, W, 3)
    bands : sequence of Band
    title, subtitle : str
    side : int
        Longer side of each picture, in pixels.

    Returns
    -------
    ndarray of uint8, (h, w, 3)

    Raises
    ------
    DataError
        No cells, or a row that has not one a column.
    """
    if not bands or not all(band.columns and band.rows for band in bands):
        raise DataError("a grid of maps needs at least one cell")
    if any(len(cells) != len(band.columns) for band in bands for _, cells in band.rows):
        raise DataError("a row of a grid of maps needs one cell a column")
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    margin, gap = 22, 8
    big, strong, small = (overlays.font_of(size, bold) for size, bold in ((19, True), (12, True), (11, False)))
    names = [name for band in bands for name, _ in band.rows]
    left = margin + max(round(max(small.getlength(part) for part in _words(name))) for name in names) + 12
    heads = [2 + 15 * max(len(overlays.wrapped(column, strong, width)) for column in band.columns) for band in bands]
    deep = [[height + 4 + 14 * max(len(cell.lines) for cell in cells) for _, cells in band.rows] for band in bands]
    top = margin + (30 if title else 0) + (24 if subtitle else 0)
    total_height = (
        top + sum(head + sum(rows) + gap * len(rows) + 10 for head, rows in zip(heads, deep, strict=True)) + 44
    )
    wide = left + max(len(band.columns) for band in bands) * (width + gap) - gap + margin
    least = 2 * margin + round(max(big.getlength(title), small.getlength(subtitle), 620))
    total_width = max(wide, least)
    canvas = Image.new("RGB", (total_width, total_height), overlays.PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text(
            (margin, margin - 4), overlays.fitted(title, big, total_width - 2 * margin), font=big, fill=overlays.INK
        )
    if subtitle:
        at = (margin, margin + (26 if title else 0))
        draw.text(at, overlays.fitted(subtitle, small, total_width - 2 * margin), font=small, fill=overlays.FAINT_INK)
    for band, head, rows in zip(bands, heads, deep, strict=True):
        for place, column in enumerate(band.columns):
            lines = overlays.wrapped(column, strong, width)
            for number, line in enumerate(lines):
                at = (left + place * (width + gap), top + head - 3 - 15 * (len(lines) - number))
                draw.text(at, overlays.fitted(line, strong, width), font=strong, fill=overlays.INK)
        top += head
        for (name, cells), deep_row in zip(band.rows, rows, strict=True):
            for number, part in enumerate(_words(name)):
                draw.text((margin, top + height / 2 - 8 + 14 * number), part, font=small, fill=overlays.INK)
            for place, cell in enumerate(cells):
                corner = (left + place * (width + gap), top)
                canvas.paste(Image.fromarray(_picture(image, cell, side)), corner)
                for number, line in enumerate(cell.lines):
                    at = (corner[0], top + height + 2 + 14 * number)
                    draw.text(at, overlays.fitted(line, small, width), font=small, fill=overlays.FAINT_INK)
            top += deep_row + gap
        top += 10
    everything = [cell for band in bands for _, cells in band.rows for cell in cells]
    heats = [cell.heat for cell in everything if cell.heat is not None]
    overlays.draw_key(
        draw,
        canvas,
        (margin, total_height - 34),
        1.0,
        heat=bool(heats),
        truth=any(cell.mask is not None or len(cell.boxes) for cell in everything),
        unseen=any(np.isnan(heat).any() for heat in heats),
    )
    return np.asarray(canvas)


def _picture(image: np.ndarray, cell: Cell, side: int) -> np.ndarray:
    if not cell.note:
        return overlays.overlay(image, cell.heat, boxes=cell.boxes, mask=cell.mask, side=side)
    bare = overlays.overlay(image, boxes=cell.boxes, mask=cell.mask, side=side)
    canvas = Image.fromarray((bare * 0.45).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    font = overlays.font_of(11)
    lines = overlays.wrapped(cell.note, font, canvas.width - 12)
    for number, line in enumerate(lines):
        at = (canvas.width / 2, canvas.height / 2 + 14 * (number - (len(lines) - 1) / 2))
        draw.text(at, line, font=font, fill=(240, 242, 244), anchor="mm")
    return np.asarray(canvas)


def _words(name: str) -> list[str]:
    """Return a row's title in its lines."""
    return name.split("\n")
