"""Boxes, masks and points from COCO's JSON form: bbox, polygons, run lengths (plain or compressed), keypoints.

A file comes in; `Annotations` go out, with masks drawn when they are asked for (`engine.sources.segments`). COCO has no
word for the annotator; where an annotation (or its "attributes") has the key "annotator", it is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.annotations import POINT, Annotations, Outside, SampleIds
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import last_part, read_file
from engine.sources.annotated_images import AnnotatedImage, outlined
from engine.sources.segments import Segment


def read_coco(path: str | Path, ids: SampleIds | None = None, outside: Outside = "error") -> Annotations:
    """Read boxes and masks from a COCO file.

    Parameters
    ----------
    ids : mapping, optional
        From ``file_name`` to the sample id, or to several; without it, file names are sample ids.
    outside : "error" or "clip"
        See `Annotations`.

    Returns
    -------
    Annotations
        Labels are the names of the categories. An annotation without a bbox takes that of its mask; one with neither
        takes its visible keypoints as points.

    Raises
    ------
    UsageError
        No such file.
    DataError
        Not a COCO file, an annotation of an unknown image or category, or a box outside its image.
    """
    images, categories, annotations = _parts(path)
    rows: list[tuple[Any, ...]] = []
    segments: list[Segment] = []
    file = last_part(str(path))
    for number, annotation in enumerate(annotations):
        at = f"{file} annotation {annotation.get('id', number)}"
        image = images.get(annotation.get("image_id"))
        label = categories.get(annotation.get("category_id"))
        if image is None or label is None:
            what, which = ("image_id", "images") if image is None else ("category_id", "categories")
            raise DataError(f"{at}: {what} {annotation.get(what)!r} is not among the file's {which}")
        segment = Segment(at, annotation.get("segmentation"), image.height, image.width)
        box = annotation.get("bbox") or segment.box()
        marks = _boxed(box) if box is not None else _points(annotation.get("keypoints"), at)
        if box is None and not marks:
            raise DataError(f"{at}: has neither a bbox nor a segmentation")
        if not marks:
            raise DataError(f"{at}: the bbox {box!r} is not four numbers x, y, width, height")
        rows += [(image.name, label, *mark, file, at, _annotator(annotation), *image.size, number) for mark in marks]
        segments.append(segment)
    return outlined(rows, segments, ids, path, outside)


Mark = tuple[float, float, float, float, str]


def _boxed(box: Any) -> list[Mark]:
    """Return a bbox as x, y, width, height, "box"; nothing where it is no four numbers."""
    four = isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    return [(box[0], box[1], box[2], box[3], "box")] if four else []


def _points(keypoints: Any, at: str) -> list[Mark]:
    """Return the visible ones of COCO's keypoints (x, y, visibility, ...) as the pixels they lie in."""
    if not keypoints:
        return []
    try:
        points = np.asarray(keypoints, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError) as error:
        raise DataError(f"{at}: its keypoints are not x, y, visibility, x, y, visibility, ... ({error})") from error
    return [(float(np.floor(x)), float(np.floor(y)), 1.0, 1.0, POINT) for x, y, seen in points if seen > 0]


def _annotator(annotation: Mapping[str, Any]) -> str:
    attributes = annotation.get("attributes")
    told = annotation.get("annotator", attributes.get("annotator") if isinstance(attributes, Mapping) else None)
    return "" if told is None else str(told)


def _parts(path: str | Path) -> tuple[dict[Any, AnnotatedImage], dict[Any, str], list[dict[str, Any]]]:
    """Return images by id, category names by id, and the annotations."""
    try:
        content = json.loads(read_file(path))
        images = {
            image["id"]: AnnotatedImage(str(image["file_name"]), int(image["height"]), int(image["width"]))
            for image in content["images"]
        }
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        return images, categories, list(content["annotations"])
    except ImageError as error:
        raise UsageError(f"no COCO file {str(path)!r}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{str(path)!r} is not COCO JSON with images, categories and annotations ({type(error).__name__}: {error})"
        ) from error
