"""Boxes and masks from COCO's JSON form: bbox, polygons, and run lengths (plain or compressed).

A file comes in; `Annotations` go out, with masks rasterised when they are asked for. Polygons follow the same rule as
boxes: a pixel belongs to one when its centre lies inside, and overlapping parts of one polygon cancel (even-odd).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.annotations import Annotations, SampleIds, matched_to_samples
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import last_part, read_file


def read_coco(path: str | Path, ids: SampleIds | None = None) -> Annotations:
    """Read boxes and masks from a COCO file.

    Parameters
    ----------
    ids : mapping, optional
        From ``file_name`` to the sample id, or to several; without it, file names are sample ids.

    Returns
    -------
    Annotations
        Labels are the names of the categories. An annotation without a bbox takes that of its mask.

    Raises
    ------
    UsageError
        No such file.
    DataError
        Not a COCO file, an annotation of an unknown image or category, or a box outside its image.
    """
    images, categories, annotations = _parts(path)
    rows, segments = [], []
    for number, annotation in enumerate(annotations):
        at = f"{last_part(str(path))} annotation {annotation.get('id', number)}"
        image = images.get(annotation.get("image_id"))
        label = categories.get(annotation.get("category_id"))
        if image is None or label is None:
            what, which = ("image_id", "images") if image is None else ("category_id", "categories")
            raise DataError(f"{at}: {what} {annotation.get(what)!r} is not among the file's {which}")
        segment = _Segment(at, annotation.get("segmentation"), image.height, image.width)
        box = annotation.get("bbox") or segment.box()
        if box is None:
            raise DataError(f"{at}: has neither a bbox nor a segmentation")
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(f"{at}: the bbox {box!r} is not four numbers x, y, width, height")
        rows.append((image.name, label, *box, last_part(str(path)), at, image.height, image.width, number))
        segments.append(segment)
    columns = ["image", "label", "x", "y", "width", "height", "source", "place", "of_height", "of_width", "segment"]
    boxes = matched_to_samples(pd.DataFrame(rows, columns=columns), ids, path)
    sizes = dict(zip(boxes["sample_id"], zip(boxes["of_height"], boxes["of_width"], strict=True), strict=True))
    masks = SegmentMasks(_segments_of_pairs(boxes, segments))
    read = Annotations(boxes.drop(columns=["of_height", "of_width", "segment"]), masks)
    read.check_inside(sizes)
    return read


def _segments_of_pairs(boxes: pd.DataFrame, segments: Sequence[_Segment]) -> dict[tuple[str, str], list[_Segment]]:
    """Return the segments of each sample and label that has one; what is only boxed there joins as its box."""
    outlined = boxes[[segments[number].given for number in boxes["segment"]]]
    of_pair: dict[tuple[str, str], list[_Segment]] = {
        pair: [] for pair in zip(outlined["sample_id"], outlined["label"], strict=True)
    }
    for row in boxes.itertuples():
        segment = segments[row.segment]
        if (row.sample_id, row.label) in of_pair:
            given = segment if segment.given else segment.filled((row.x, row.y, row.width, row.height))
            of_pair[(row.sample_id, row.label)].append(given)
    return of_pair


@dataclass(frozen=True)
class SegmentMasks:
    """A mask reader over segments: the union of all of one sample and label."""

    of_pair: Mapping[tuple[str, str], Sequence[_Segment]]

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        """Return a bool mask of the original image's size, or None where there is no segment."""
        segments = self.of_pair.get((sample_id, label))
        return None if not segments else np.logical_or.reduce([segment.mask() for segment in segments])


@dataclass(frozen=True)
class _Image:
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class _Segment:
    """One annotation's outline, kept as it stands in the file until it is asked for."""

    place: str
    content: Any
    height: int
    width: int

    @property
    def given(self) -> bool:
        return bool(self.content)

    def filled(self, box: Sequence[float]) -> _Segment:
        """Return the segment that is a box."""
        x, y, width, height = box
        return replace(self, content=[[x, y, x + width, y, x + width, y + height, x, y + height]])

    def mask(self) -> np.ndarray:
        if isinstance(self.content, dict):
            return self._run_lengths()
        mask = np.zeros((self.height, self.width), dtype=bool)
        for polygon in self.content:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1)
            if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
                raise DataError(
                    f"{self.place}: a polygon needs at least 3 points as x, y, x, y, ...; got {points.tolist()}"
                )
            mask |= polygon_mask(points.reshape(-1, 2), self.height, self.width)
        return mask

    def box(self) -> list[float] | None:
        if not self.given:
            return None
        if isinstance(self.content, list):
            corners = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in self.content])
            low, high = corners.min(axis=0), corners.max(axis=0)
            return [*low.tolist(), *(high - low).tolist()]
        rows, columns = np.nonzero(self.mask())
        if not len(rows):
            return None
        left, top = int(columns.min()), int(rows.min())
        return [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]

    def _run_lengths(self) -> np.ndarray:
        try:
            height, width = (int(side) for side in self.content["size"])
            counts = self.content["counts"]
            runs = decode_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.place}: its segmentation has no readable size and counts ({error})") from error
        if min(runs, default=0) < 0 or sum(runs) != height * width:
            raise DataError(f"{self.place}: its run lengths cover {sum(runs)} pixels of {width} x {height}")
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return which pixels have their centre inside a polygon (even-odd rule).

    Parameters
    ----------
    points : ndarray of float, (k, 2)
        x, y of the corners in pixels; the last is joined to the first.

    Returns
    -------
    ndarray of bool, (height, width)
    """
    crossings = np.zeros((height, width + 1), dtype=np.int32)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        low, high = sorted((y0, y1))
        # Rows whose centre lies in [low, high): a corner shared by two edges is then counted once.
        rows = np.arange(max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), height))
        if not len(rows):
            continue
        at = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        crossings[rows, np.clip(np.ceil(at - 0.5), 0, width).astype(int)] += 1
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1


def decode_counts(counts: str) -> list[int]:
    """Return the run lengths of COCO's compressed form.

    Each number is written in base 32 with a continuation bit, from the fourth on as the difference to the one two
    before (cocoapi, ``rleFrString``).
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            if position >= len(counts):
                raise ValueError("the counts end in the middle of a number")
            digit = ord(counts[position]) - 48
            value |= (digit & 0x1F) << shift
            more = bool(digit & 0x20)
            position, shift = position + 1, shift + 5
            if not more and digit & 0x10:
                value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


def _parts(path: str | Path) -> tuple[dict[Any, _Image], dict[Any, str], list[dict[str, Any]]]:
    """Return images by id, category names by id, and the annotations."""
    try:
        content = json.loads(read_file(path))
        images = {
            image["id"]: _Image(str(image["file_name"]), int(image["height"]), int(image["width"]))
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
