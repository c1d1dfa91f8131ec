"""One finding on one sheet: the image, the annotation, each setting's map, and how the maps differ.

In come an image, heatmaps on its own pixels and what was annotated; out goes a uint8 RGB picture. The first row reads
from the bare image by way of the annotation to the maps, with the scores under each; below stands, for each pair of
settings, where the one has more heat and where the other, in orange and blue, which every kind of colour vision tells
apart. Differences are between maps brought to a maximum of 1, because settings speak in different units.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from analysis import overlays
from analysis.overlays import FAINT_INK, INK, PAPER, Box, fitted, font_of
from engine.errors import DataError

MORE = "PuOr_r"
"""Matplotlib's diverging scale from purple-blue (less) to orange (more); its middle is not drawn."""

MOST_PAIRS = 3

AnyMap = TypeVar("AnyMap")


@dataclass(frozen=True)
class Map:
    """One setting's heatmap.

    Parameters
    ----------
    setting : str
    heat : ndarray of float, (H, W)
        On the original image's pixels, NaN outside the model's crop.
    lines : sequence of str
        Scores, written under it.
    note : str
        Why it is empty or flat; "" else.
    """

    setting: str
    heat: np.ndarray
    lines: Sequence[str] = ()
    note: str = ""


def pairs(maps: Sequence[AnyMap]) -> list[tuple[AnyMap, AnyMap]]:
    """Return the pairs of settings whose difference is drawn, the first one as the one that is taken away."""
    return list(itertools.combinations(maps, 2))[:MOST_PAIRS]


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return one map minus another, each brought to a maximum of 1 first, -1..1, NaN where either is.

    Parameters
    ----------
    one, other : ndarray of float, (H, W)
    """
    return _share(one) - _share(other)


def difference_overlay(
    image: np.ndarray,
    apart: np.ndarray,
    *,
    boxes: Sequence[Box] = (),
    mask: np.ndarray | None = None,
    side: int = 360,
    opacity: float = 0.8,
) -> np.ndarray:
    """Draw a difference of maps over an image: orange where it is positive, blue-purple where negative.

    Parameters
    ----------
    image : ndarray of uint8, (H, W) or (H, W, 3)
    apart : ndarray of float, (H, W)
        Of `difference`.
    boxes, mask, side
        As in `overlays.overlay`.

    Returns
    -------
    ndarray of uint8, (h, w, 3)
    """
    seen = ~np.isnan(apart)
    # The ground: the image as `overlay` shows it where a map is zero, with what is out of view hatched.
    ground = overlays.overlay(image, np.where(seen, 0.0, np.nan), side=side, mark_peak=False).astype(np.float32)
    height, width = ground.shape[:2]
    shrink = cv2.INTER_AREA if height < apart.shape[0] else cv2.INTER_LINEAR
    value = cv2.resize(np.where(seen, apart, 0).astype(np.float32), (width, height), interpolation=shrink)
    alpha = (opacity * np.abs(value) ** 0.75)[:, :, None]
    mixed = ground * (1 - alpha) + _diverging(value) * alpha
    picture = np.round(np.clip(mixed, 0, 255)).astype(np.uint8)
    # The truth is drawn last, in its own colour, on the picture's pixels.
    scale = side / max(apart.shape)
    drawn = [
        replace(box, x=box.x * scale, y=box.y * scale, width=box.width * scale, height=box.height * scale)
        for box in boxes
    ]
    if mask is not None:
        soft = cv2.resize(np.asarray(mask, dtype=np.float32), (width, height), interpolation=shrink)
        mask = soft >= 0.5
    return overlays.overlay(picture, boxes=drawn, mask=mask, side=max(height, width))


def comparison(
    image: np.ndarray,
    maps: Sequence[Map],
    *,
    boxes: Sequence[Box] = (),
    mask: np.ndarray | None = None,
    title: str = "",
    subtitle: str = "",
    side: int = 300,
) -> np.ndarray:
    """Draw image, annotation and the settings' maps side by side, and their differences below.

    Parameters
    ----------
    image : ndarray of uint8, (H, W) or (H, W, 3)
    maps : sequence of Map
        At least one; differences are drawn of every pair, at most `MOST_PAIRS` of them.
    boxes, mask
        What was annotated.
    title, subtitle : str
    side : int
        Longer side of each picture, in pixels.

    Returns
    -------
    ndarray of uint8, (h, w, 3)
    """
    if not maps:
        raise DataError("a comparison needs at least one setting's map")
    annotated = bool(len(boxes)) or mask is not None
    cells = [_Cell("Radiograph", overlays.overlay(image, side=side), ())]
    if annotated:
        kind = "outlined" if mask is not None else "boxed"
        cells.append(_Cell("Annotation", overlays.overlay(image, boxes=boxes, mask=mask, side=side), (kind,)))
    for each in maps:
        picture = overlays.overlay(image, each.heat, boxes=boxes, mask=mask, side=side, note=each.note)
        cells.append(_Cell(each.setting, picture, tuple(each.lines)))
    below = []
    for one, other in pairs(maps):
        apart = difference(other.heat, one.heat)
        picture = difference_overlay(image, apart, boxes=boxes, mask=mask, side=side)
        largest = float(np.nanmax(np.abs(apart)))
        below.append(_Cell(f"{other.setting} − {one.setting}", picture, (f"largest difference {largest:.2f}",)))
    unseen = any(bool(np.isnan(each.heat).any()) for each in maps)
    return _composed(cells, below, title, subtitle, side, annotated, unseen)


@dataclass(frozen=True)
class _Cell:
    title: str
    picture: np.ndarray
    lines: tuple[str, ...]


def _composed(
    cells: Sequence[_Cell],
    below: Sequence[_Cell],
    title: str,
    subtitle: str,
    side: int,
    annotated: bool,
    unseen: bool,
) -> np.ndarray:
    unit = side / 300
    margin, gap = round(20 * unit), round(14 * unit)
    big, middle, small = (font_of(round(size * unit), bold) for size, bold in ((18, True), (14, True), (11.5, False)))
    height, width = cells[0].picture.shape[:2]
    named, line = round(23 * unit), round(16 * unit)
    lines = max(len(cell.lines) for cell in cells)
    head = margin + (round(27 * unit) if title else 0) + (round(24 * unit) if subtitle else 0)
    first = named + height + round(6 * unit) + lines * line + gap
    second = named + height + round(6 * unit) + line + gap if below else 0
    foot = round(30 * unit)
    total = (2 * margin + len(cells) * width + (len(cells) - 1) * gap, head + first + second + foot + margin // 2)
    canvas = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(canvas)
    top = round(margin * 0.7)
    if title:
        draw.text((margin, top), fitted(title, big, total[0] - 2 * margin), font=big, fill=INK)
        top += round(27 * unit)
    if subtitle:
        draw.text((margin, top), fitted(subtitle, small, total[0] - 2 * margin), font=small, fill=FAINT_INK)
    # Differences stand at the right, under the maps that they are of.
    rows = [(head, 0, cells), (head + first, len(cells) - len(below), below)]
    for upper, start, row in rows:
        for place, cell in enumerate(row):
            left = margin + (start + place) * (width + gap)
            draw.text((left, upper), fitted(cell.title, middle, width), font=middle, fill=INK)
            canvas.paste(Image.fromarray(cell.picture), (left, upper + named))
            for number, text in enumerate(cell.lines):
                at = (left, upper + named + height + round(5 * unit) + number * line)
                draw.text(at, fitted(text, small, width), font=small, fill=FAINT_INK)
    if below:
        room = (len(cells) - len(below)) * (width + gap) - gap
        _explain_difference(canvas, draw, (margin, head + first + named), room, unit)
    at = (margin, total[1] - foot)
    overlays.draw_key(draw, canvas, at, unit, heat=True, truth=annotated, unseen=unseen)
    return np.asarray(canvas)


def _explain_difference(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], room: int, unit: float
) -> None:
    """Write what the second row shows, with its scale, into the room left of it."""
    if room < 120 * unit:
        return
    bold, small = font_of(round(14 * unit), True), font_of(round(11.5 * unit))
    left, top = at
    draw.text((left, top), fitted("How the maps differ", bold, room), font=bold, fill=INK)
    wide, high = min(room, round(230 * unit)), round(12 * unit)
    ramp = np.repeat(np.linspace(-1, 1, wide, dtype=np.float32)[None], high, axis=0)
    alpha = (0.8 * np.abs(ramp) ** 0.75)[:, :, None]
    canvas.paste(
        Image.fromarray(np.round(110 * (1 - alpha) + _diverging(ramp) * alpha).astype(np.uint8)),
        (left, top + round(30 * unit)),
    )
    marks = (("−1", 0.0, "lm"), ("0", 0.5, "mm"), ("+1", 1.0, "rm"))
    for text, share, anchor in marks:
        draw.text((left + share * wide, top + round(52 * unit)), text, font=small, fill=FAINT_INK, anchor=anchor)
    told = (
        "Orange: more heat in the setting named first.",
        "Blue: more heat in the setting named second.",
        "Each map is brought to a maximum of 1 before.",
    )
    for number, text in enumerate(told):
        where = (left, top + round(68 * unit) + number * round(17 * unit))
        draw.text(where, fitted(text, small, room), font=small, fill=FAINT_INK)


def _share(heat: np.ndarray) -> np.ndarray:
    positive = np.maximum(heat, 0)
    top = np.nanmax(positive)
    return positive / top if top > 0 else positive


def _diverging(value: np.ndarray) -> np.ndarray:
    """Return the colours of values in -1..1, (h, w, 3) float32, 0..255; small values have the hue of large ones."""
    # The scale's middle is white, which over a radiograph would look like a finding.
    strong = np.where(value >= 0, 0.72 + 0.13 * value, 0.28 + 0.13 * value)
    return (matplotlib.colormaps[MORE](strong)[..., :3] * 255).astype(np.float32)
