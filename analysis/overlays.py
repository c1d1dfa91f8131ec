"""Heatmaps drawn over the original image, with boxes, masks and scores, side by side for several settings.

In come an image and heatmaps on its own pixels (NaN outside the model's crop); out go uint8 RGB arrays. Nothing here
computes a score. The map's colour says its value (a perceptual scale) and so does its opacity: where there is no
evidence the radiograph is seen as it is. What lay outside the model's crop is dimmed and hatched: no heat there means
"not looked at", not "nothing found".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.errors import DataError

TRUTH = (64, 224, 255)
"""Colour of boxes, outlines and their labels: far from every colour of the heat scale."""

HALO = (8, 12, 16)
INK, FAINT_INK, PAPER = (24, 28, 33), (104, 112, 121), (255, 255, 255)

# Inferno starts black, which over a dark radiograph is no colour at all, and ends near white, which over bright tissue
# is none either; both ends are left out.
_SCALE_START, _SCALE_END = 0.28, 0.95


@dataclass(frozen=True)
class Box:
    """A box to draw: x, y, width, height in pixels of the original image, and a label ("" for none)."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Parameters
    ----------
    title : str
        The setting, such as "Linear probe".
    heat : ndarray of float, (H, W), or None
        On the original image's pixels, NaN outside the crop; None draws the image with the truth alone.
    lines : sequence of str
        Written under the title: scores.
    note : str
        Written across the picture: why a map is empty.
    """

    title: str
    heat: np.ndarray | None = None
    lines: Sequence[str] = ()
    note: str = ""


def overlay(
    image: np.ndarray,
    heat: np.ndarray | None = None,
    *,
    boxes: Sequence[Box] = (),
    mask: np.ndarray | None = None,
    side: int = 512,
    opacity: float = 0.72,
    mark_peak: bool = True,
    note: str = "",
) -> np.ndarray:
    """Draw a heatmap and the truth over an image.

    Parameters
    ----------
    image : ndarray of uint8, (H, W) or (H, W, 3)
        The original image.
    heat : ndarray of float, (H, W), optional
        NaN outside the model's crop; colours run from 0 to its maximum.
    boxes : sequence of Box
    mask : ndarray of bool, (H, W), optional
        Its outline is drawn.
    side : int
        Longer side of the picture, in pixels; the image is scaled to it.
    opacity : float
        Of the strongest heat, 0..1.
    mark_peak : bool
        Draw a small ring at the map's maximum (at the middle of a tied one, nothing where it is flat or empty).
    note : str
        Written across the lower edge.

    Returns
    -------
    ndarray of uint8, (h, w, 3)
    """
    image = np.asarray(image)
    for name, array in (("heatmap", heat), ("mask", mask)):
        if array is not None and np.shape(array) != image.shape[:2]:
            raise DataError(
                f"a {name} of shape {np.shape(array)} does not lie on an image of shape {image.shape[:2]}; carry it to "
                "the original image's pixels first"
            )
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(image, (width, height), interpolation=shrink)
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    if heat is not None:
        picture = _blend(picture, _resized(heat, height, width), opacity)
    line = max(1.2, side / 240)
    if mask is not None:
        _draw_outline(picture, mask, line)
    for box in boxes:
        _draw_box(picture, box, scale, line)
    if heat is not None and mark_peak:
        _draw_peak(picture, heat, scale, line)
    canvas = Image.fromarray(picture)
    _draw_labels(canvas, boxes, scale)
    if note:
        _draw_note(canvas, note)
    return np.asarray(canvas)


def sheet(
    image: np.ndarray,
    panels: Sequence[Panel],
    *,
    boxes: Sequence[Box] = (),
    mask: np.ndarray | None = None,
    title: str = "",
    subtitle: str = "",
    side: int = 360,
    columns: int | None = None,
) -> np.ndarray:
    """Draw several settings side by side over the same image, each with its title and scores.

    Parameters
    ----------
    image, boxes, mask
        As in `overlay`; the same truth stands in every panel.
    panels : sequence of Panel
        In reading order.
    title, subtitle : str
        Of the sheet: the sample and the label.
    side : int
        Longer side of each picture, in pixels.
    columns : int, optional
        Panels in a row; by default all up to five, more are broken evenly.

    Returns
    -------
    ndarray of uint8, (h, w, 3)
    """
    if not panels:
        raise DataError("a sheet needs at least one panel")
    rows = 1 if columns is None else -(-len(panels) // columns)
    if columns is None:
        rows = -(-len(panels) // 5)
        columns = -(-len(panels) // rows)
    # Labels stand once: on the bare image where there is one, else on the first panel.
    labelled = next((place for place, panel in enumerate(panels) if panel.heat is None), 0)
    bare = [replace(box, label="") for box in boxes]
    pictures = [
        overlay(image, panel.heat, boxes=boxes if place == labelled else bare, mask=mask, side=side, note=panel.note)
        for place, panel in enumerate(panels)
    ]
    unit = side / 360
    margin, gap = round(22 * unit), round(16 * unit)
    big, middle, small = (font_of(round(size * unit), bold) for size, bold in ((19, True), (15, True), (12.5, False)))
    line_height = round(17 * unit)
    head = margin + (round(28 * unit) if title else 0) + (round(24 * unit) if subtitle else 0)
    caption = round(26 * unit) + line_height * max(len(panel.lines) for panel in panels) + round(6 * unit)
    height, width = pictures[0].shape[:2]
    foot = round(44 * unit)
    total_width = 2 * margin + columns * width + (columns - 1) * gap
    total_height = head + rows * (height + caption) + (rows - 1) * gap + foot
    canvas = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = round(margin * 0.8)
    if title:
        draw.text((margin, top), fitted(title, big, total_width - 2 * margin), font=big, fill=INK)
        top += round(28 * unit)
    if subtitle:
        draw.text((margin, top), fitted(subtitle, small, total_width - 2 * margin), font=small, fill=FAINT_INK)
    for place, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
        row, column = divmod(place, columns)
        left = margin + column * (width + gap)
        upper = head + row * (height + caption + gap)
        draw.text((left, upper), fitted(panel.title, middle, width), font=middle, fill=INK)
        for number, line in enumerate(panel.lines):
            at = (left, upper + round(22 * unit) + number * line_height)
            draw.text(at, fitted(line, small, width), font=small, fill=FAINT_INK)
        canvas.paste(Image.fromarray(picture), (left, upper + caption))
    heats = [panel.heat for panel in panels if panel.heat is not None]
    draw_key(
        draw,
        canvas,
        (margin, total_height - foot + round(14 * unit)),
        unit,
        heat=bool(heats),
        truth=bool(len(boxes)) or mask is not None,
        unseen=any(np.isnan(heat).any() for heat in heats),
    )
    return np.asarray(canvas)


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write a picture, (h, w, 3) uint8, as PNG or by the path's suffix; its folder is made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=path.suffix == ".png")


@lru_cache(maxsize=1)
def heat_colours() -> np.ndarray:
    """Return the heat scale from nothing to the maximum, (256, 3) uint8."""
    scale = matplotlib.colormaps["inferno"](np.linspace(_SCALE_START, _SCALE_END, 256))[:, :3]
    return np.round(scale * 255).astype(np.uint8)


@lru_cache(maxsize=32)
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the sheets' font in a size in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), max(8, size))


def _resized(heat: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the map at the picture's size; what is not in view stays NaN and does not bleed into what is."""
    visible = ~np.isnan(heat)
    shrink = cv2.INTER_AREA if height < heat.shape[0] else cv2.INTER_LINEAR
    weight = cv2.resize(visible.astype(np.float32), (width, height), interpolation=shrink)
    value = cv2.resize(np.where(visible, heat, 0).astype(np.float32), (width, height), interpolation=shrink)
    return np.where(weight >= 0.5, value / np.maximum(weight, 1e-6), np.nan).astype(np.float32)


def _blend(picture: np.ndarray, heat: np.ndarray, opacity: float) -> np.ndarray:
    visible = ~np.isnan(heat)
    top = float(heat[visible].max()) if visible.any() else 0.0
    share = np.clip(np.where(visible, heat, 0) / top, 0, 1) if top > 0 else np.zeros(heat.shape)
    colour = heat_colours()[np.round(share * 255).astype(np.uint8)].astype(np.float32)
    # Opacity rises faster than the value at first, so that middling heat is seen, but starts at nothing.
    alpha = (opacity * share**0.75)[:, :, None].astype(np.float32)
    mixed = picture.astype(np.float32) * (1 - alpha) + colour * alpha
    if not visible.all():
        rows, columns = np.indices(heat.shape)
        period = max(6, round(max(heat.shape) / 48))
        hatched = ((rows + columns) % period) < max(1, period / 6)
        dimmed = picture.astype(np.float32) * 0.42
        dimmed[hatched] = dimmed[hatched] * 0.72 + 255 * 0.16
        mixed[~visible] = dimmed[~visible]
    return np.round(mixed).astype(np.uint8)


_FRACTION_BITS = 4
_FINER = 2
"""Lines are drawn this many times larger and scaled down, since OpenCV knows whole widths only."""


def _fixed(points: np.ndarray) -> np.ndarray:
    """Return points in the finer picture's fixed-point form, so that lines lie on fractions of a pixel."""
    return np.round((points * _FINER - 0.5) * 2**_FRACTION_BITS).astype(np.int32)


def _blank(picture: np.ndarray) -> np.ndarray:
    """Return an empty mask to draw lines in, larger than the picture."""
    return np.zeros((picture.shape[0] * _FINER, picture.shape[1] * _FINER), dtype=np.uint8)


def _paint(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lay a colour over the picture where a larger mask says 255."""
    size = (picture.shape[1], picture.shape[0])
    cover = cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.float32)[:, :, None] / 255
    picture[:] = np.round(picture * (1 - cover) + np.array(colour, dtype=np.float32) * cover)


def _draw_lines(picture: np.ndarray, curves: Sequence[np.ndarray], line: float) -> None:
    """Draw closed curves in the truth's colour on a dark halo, which keeps them legible on any ground."""
    fixed = [_fixed(curve) for curve in curves]
    for colour, thickness in ((HALO, line + 1.6), (TRUTH, line)):
        mask = _blank(picture)
        cv2.polylines(mask, fixed, True, 255, max(1, round(thickness * _FINER)), cv2.LINE_AA, _FRACTION_BITS)
        _paint(picture, mask, colour)


def _draw_box(picture: np.ndarray, box: Box, scale: float, line: float) -> None:
    corners = np.array(
        [
            (box.x, box.y),
            (box.x + box.width, box.y),
            (box.x + box.width, box.y + box.height),
            (box.x, box.y + box.height),
        ]
    )
    _draw_lines(picture, [corners * scale], line)


def _draw_outline(picture: np.ndarray, mask: np.ndarray, line: float) -> None:
    height, width = picture.shape[:2]
    # The mask is smoothed at the picture's size: a staircase of source pixels is not what its author meant.
    soft = cv2.resize(np.asarray(mask, dtype=np.float32), (width * 2, height * 2), interpolation=cv2.INTER_LINEAR)
    found, _ = cv2.findContours((soft >= 0.5).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    curves = [(contour[:, 0, :].astype(np.float64) + 0.5) / 2 for contour in found]
    if curves:
        _draw_lines(picture, curves, line)


def _draw_peak(picture: np.ndarray, heat: np.ndarray, scale: float, line: float) -> None:
    visible = ~np.isnan(heat)
    values = heat[visible]
    if not len(values) or values.max() <= 0 or values.max() == values.min():
        return
    rows, columns = np.nonzero(np.where(visible, heat, -np.inf) == values.max())
    centre = _fixed(np.array([(columns.mean() + 0.5) * scale, (rows.mean() + 0.5) * scale]))
    at = (int(centre[0]), int(centre[1]))
    radius = round(2.8 * line * _FINER * 2**_FRACTION_BITS)
    for colour, thickness in ((HALO, line + 1.4), ((255, 255, 255), line)):
        mask = _blank(picture)
        cv2.circle(mask, at, radius, 255, max(1, round(thickness * _FINER)), cv2.LINE_AA, _FRACTION_BITS)
        _paint(picture, mask, colour)


def _draw_labels(canvas: Image.Image, boxes: Sequence[Box], scale: float) -> None:
    """Write each box's label on a small plate at its upper edge, inside the picture and clear of earlier plates."""
    draw = ImageDraw.Draw(canvas)
    font = font_of(round(max(canvas.size) / 38))
    pad = max(2, font.size // 4)
    taken: list[tuple[float, float, float, float]] = []
    for box in boxes:
        if not box.label:
            continue
        text = fitted(box.label, font, canvas.width - 2 * pad)
        wide, high = font.getlength(text) + 2 * pad, font.size + 1.4 * pad
        left = min(max(0.0, box.x * scale), canvas.width - wide)
        above, inside = box.y * scale - high - 1, box.y * scale + 1
        below = (box.y + box.height) * scale + 1
        for upper in (above, below, inside):
            plate = (left, upper, left + wide, upper + high)
            free = all(
                plate[2] <= other[0] or plate[0] >= other[2] or plate[3] <= other[1] or plate[1] >= other[3]
                for other in taken
            )
            if upper >= 0 and plate[3] <= canvas.height and free:
                break
        taken.append(plate)
        draw.rectangle(plate, fill=TRUTH)
        draw.text((left + pad, plate[1] + high / 2), text, font=font, fill=(4, 26, 34), anchor="lm")


def _draw_note(canvas: Image.Image, note: str) -> None:
    font = font_of(round(max(canvas.size) / 32))
    pad = font.size // 2
    lines = wrapped(note, font, canvas.width - 2 * pad)
    high = round(len(lines) * font.size * 1.35 + 1.4 * pad)
    ground = Image.new("RGB", (canvas.width, high), (12, 14, 17))
    box = (0, canvas.height - high)
    canvas.paste(ground, box, Image.new("L", ground.size, 205))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        at = (pad, canvas.height - high + 0.7 * pad + number * font.size * 1.35)
        draw.text(at, line, font=font, fill=(240, 242, 244))


def draw_key(
    draw: ImageDraw.ImageDraw,
    canvas: Image.Image,
    at: tuple[int, int],
    unit: float,
    *,
    heat: bool,
    truth: bool,
    unseen: bool,
) -> None:
    """Draw what the colours mean, in one line at the sheet's foot."""
    font = font_of(round(11.5 * unit))
    left, top = at
    # Small pictures still get a key: below this its boxes would have no inside.
    high, space = max(8, round(12 * unit)), round(7 * unit)

    def write(text: str) -> None:
        nonlocal left
        draw.text((left, top + high / 2), text, font=font, fill=FAINT_INK, anchor="lm")
        left += round(font.getlength(text) + 26 * unit)

    if heat:
        draw.text((left, top + high / 2), "no evidence", font=font, fill=FAINT_INK, anchor="lm")
        left += round(font.getlength("no evidence") + space)
        wide = round(110 * unit)
        ground = np.full((high, wide, 3), 110, dtype=np.uint8)
        ramp = np.repeat(np.linspace(0, 1, wide, dtype=np.float32)[None], high, axis=0)
        canvas.paste(Image.fromarray(_blend(ground, ramp, 0.9)), (left, top))
        left += wide + space
        write("the map's maximum (ring)")
    if truth:
        draw.rectangle((left, top + 1, left + round(18 * unit), top + high - 1), outline=HALO, width=4)
        draw.rectangle((left + 1, top + 2, left + round(18 * unit) - 1, top + high - 2), outline=TRUTH, width=2)
        left += round(18 * unit) + space
        write("annotated")
    if unseen:
        tile = np.full((high, round(18 * unit), 3), 130, dtype=np.uint8)
        canvas.paste(Image.fromarray(_blend(tile, np.full(tile.shape[:2], np.nan, np.float32), 0)), (left, top))
        left += tile.shape[1] + space
        write("outside the model's view")


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text, cut with an ellipsis where it is wider than it may be."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the text broken into lines that are no wider than they may be."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
