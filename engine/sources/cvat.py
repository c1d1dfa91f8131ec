"""Boxes, outlines, masks and points from the XML of CVAT ("CVAT for images 1.1", as annotators export it).

A file comes in; `Annotations` go out. Boxes (turned ones too), polygons, ellipses and masks are drawn when they are
asked for (`engine.sources.segments`), points are kept as the pixels they lie in, and tags, which say nothing of a
place, are counted in the log. The annotator is the attribute "annotator" (or "reader", "radiologist") of a shape where
the task has one. What cannot be understood as a region (polylines, cuboids, skeletons, tracks of videos) is refused by
name: left out silently it would count as "nothing here".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from engine.annotations import POINT, Annotations, Outside, SampleIds
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import last_part, read_file
from engine.sources.annotated_images import AnnotatedImage, outlined
from engine.sources.segments import RowRuns, Segment

logger = logging.getLogger(__name__)

LARGEST_FILE = 512 * 2**20
SHAPES = ("box", "polygon", "ellipse", "mask", "points")
ANNOTATOR_NAMES = ("annotator", "reader", "radiologist")
ELLIPSE_CORNERS = 64
# Sides of an image beyond this are a mistake, and would ask for gigabytes when a mask is drawn.
LARGEST_SIDE = 100_000


def read_cvat(path: str | Path, ids: SampleIds | None = None, outside: Outside = "error") -> Annotations:
    """Read boxes, outlines, masks and points from a CVAT file.

    Parameters
    ----------
    ids : mapping, optional
        From the images' names to the sample id, or to several; without it, names are sample ids.
    outside : "error" or "clip"
        See `Annotations`.

    Raises
    ------
    UsageError
        No such file.
    DataError
        Not CVAT's XML for images, a shape that is no region, numbers that are none, or a shape outside its image.
    """
    root = _root(path)
    file = last_part(str(path))
    rows: list[tuple[Any, ...]] = []
    segments: list[Segment] = []
    tags = 0
    for number, element in enumerate(root.iter("image")):
        image = _image(element, file, number)
        for place, shape in enumerate(element):
            at = f"{file} image {image.name!r} shape {place + 1}"
            if shape.tag == "tag":
                tags += 1
                continue
            if shape.tag not in SHAPES:
                raise DataError(
                    f"{at}: a {shape.tag} is no region that a heatmap can be held against; draw it as one of "
                    f"{', '.join(SHAPES)}, or remove it"
                )
            label = _needed(shape, "label", at)
            marks, segment = _understood(shape, image, at)
            told = (file, at, _annotator(shape), image.height, image.width, len(segments))
            rows += [(image.name, label, *mark, *told) for mark in marks]
            segments.append(segment)
    if tags:
        logger.info("%s: %d tags of whole images say nothing of a place and are left out", path, tags)
    return outlined(rows, segments, ids, path, outside)


def _root(path: str | Path) -> Element:
    """Return the root element of a file that is CVAT's XML for images."""
    try:
        content = read_file(path)
    except ImageError as error:
        raise UsageError(f"no CVAT file {str(path)!r}: {error}") from error
    if len(content) > LARGEST_FILE:
        raise DataError(f"{str(path)!r} has {len(content)} bytes; CVAT files of up to {LARGEST_FILE} are read")
    try:
        root: Element = fromstring(content)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise DataError(f"{str(path)!r} is no XML that can be read ({type(error).__name__}: {error})") from error
    if root.tag != "annotations":
        raise DataError(f"{str(path)!r} is not CVAT's XML: it begins with {root.tag!r} and not with 'annotations'")
    if root.find("track") is not None:
        raise DataError(
            f"{str(path)!r} holds tracks of a video; export it as 'CVAT for images 1.1', which has one element an image"
        )
    return root


def _image(element: Element, file: str, number: int) -> AnnotatedImage:
    at = f"{file} image {element.get('name', number)!r}"
    height, width = (_number(element, side, at) for side in ("height", "width"))
    if not (0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise DataError(f"{at}: its size is {width:g} x {height:g} pixels; sides go from 1 to {LARGEST_SIDE}")
    return AnnotatedImage(_needed(element, "name", at), int(height), int(width))


def _understood(shape: Element, image: AnnotatedImage, at: str) -> tuple[list[tuple[Any, ...]], Segment]:
    """Return a shape's boxes as (x, y, width, height, "box" or "point"), and its outline (none of points and boxes)."""
    if shape.tag == "points":
        corners = np.array(list(_points(_needed(shape, "points", at), at)))
        marks = [(float(x), float(y), 1.0, 1.0, POINT) for x, y in np.floor(corners)]
        return marks, Segment(at, None, image.height, image.width)
    if shape.tag == "mask":
        runs = tuple(_run(text, at) for text in _needed(shape, "rle", at).split(","))
        sides = [int(_number(shape, side, at)) for side in ("left", "top", "width", "height")]
        segment = Segment(at, RowRuns(runs, *sides), image.height, image.width)
        box = segment.box()
        if box is None:
            raise DataError(f"{at}: its mask marks no pixel; remove it")
        return [(*box, "box")], segment
    corners, straight = _outline(shape, at)
    low, high = corners.min(axis=0), corners.max(axis=0)
    content = None if straight else [corners.reshape(-1).tolist()]
    return [(*low, *(high - low), "box")], Segment(at, content, image.height, image.width)


def _outline(shape: Element, at: str) -> tuple[np.ndarray, bool]:
    """Return the corners of a box, polygon or ellipse, (k, 2), and whether it is a box along the axes."""
    turn = math.radians(_number(shape, "rotation", at, 0.0))
    if shape.tag == "polygon":
        corners = np.array(list(_points(_needed(shape, "points", at), at)))
        if len(corners) < 3:
            raise DataError(f"{at}: a polygon needs at least 3 points, this one has {len(corners)}")
        return corners, False
    if shape.tag == "box":
        left, top, right, bottom = (_number(shape, name, at) for name in ("xtl", "ytl", "xbr", "ybr"))
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        if not turn:
            return corners, True
        centre = corners.mean(axis=0)
    else:
        centre = np.array([_number(shape, name, at) for name in ("cx", "cy")])
        radii = np.array([_number(shape, name, at) for name in ("rx", "ry")])
        angles = np.arange(ELLIPSE_CORNERS) * (2 * math.pi / ELLIPSE_CORNERS)
        corners = centre + radii * np.column_stack([np.cos(angles), np.sin(angles)])
    # Clockwise on the screen, where y points down: as CVAT turns its shapes.
    turned = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return (corners - centre) @ turned + centre, False


def _points(text: str, at: str) -> Iterator[tuple[float, float]]:
    for pair in text.split(";"):
        try:
            x, y = (float(value) for value in pair.split(","))
        except ValueError as error:
            raise DataError(f"{at}: {pair!r} is not a point x,y ({error})") from error
        if not (math.isfinite(x) and math.isfinite(y)):
            raise DataError(f"{at}: the point {pair!r} is not finite")
        yield x, y


def _run(text: str, at: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{at}: {text!r} among its run lengths is no whole number") from error


def _needed(element: Element, name: str, at: str) -> str:
    value = element.get(name)
    if value is None or not value.strip():
        raise DataError(f"{at}: the {element.tag} has no {name!r}")
    return value.strip()


def _number(element: Element, name: str, at: str, default: float | None = None) -> float:
    if default is not None and element.get(name) is None:
        return default
    text = _needed(element, name, at)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{at}: {name}={text!r} is not a finite number")
    return value


def _annotator(shape: Element) -> str:
    """Return who drew a shape, "" where its attributes do not say."""
    for attribute in shape.iter("attribute"):
        if (attribute.get("name") or "").strip().lower() in ANNOTATOR_NAMES and attribute.text:
            return attribute.text.strip()
    return ""
