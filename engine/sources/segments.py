"""Outlines of findings as annotation files hold them, drawn as masks when they are asked for.

In come polygons and run lengths; out go bool masks of the original image. Polygons follow the same rule as boxes: a
pixel belongs to one when its centre lies inside, and overlapping parts of one polygon cancel (even-odd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from engine.errors import DataError


@dataclass(frozen=True)
class RowRuns:
    """Run lengths of a rectangle within an image, row by row, beginning with the pixels that are not marked."""

    runs: tuple[int, ...]
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Segment:
    """One annotation's outline, kept as it stands in the file until it is asked for.

    Parameters
    ----------
    place : str
        File and annotation, for messages.
    content : list of polygons, mapping or RowRuns
        Polygons as x, y, x, y, ...; COCO's run lengths (size and counts, column by column); or those of a rectangle.
        Empty where the annotation has no outline.
    height, width : int
        Of the image.
    """

    place: str
    content: Any
    height: int
    width: int

    @property
    def given(self) -> bool:
        """Whether there is an outline."""
        return bool(self.content)

    def filled(self, box: Sequence[float]) -> Segment:
        """Return the segment that is a box (x, y, width, height)."""
        x, y, width, height = box
        return replace(self, content=[[x, y, x + width, y, x + width, y + height, x, y + height]])

    def mask(self) -> np.ndarray:
        """Return a bool mask (height, width); DataError for an outline that cannot be drawn."""
        if isinstance(self.content, RowRuns):
            return self._rectangle(self.content)
        if isinstance(self.content, Mapping):
            return self._run_lengths(self.content)
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
        """Return x, y, width, height around the outline, None where there is none or it is empty."""
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

    def _run_lengths(self, content: Mapping[str, Any]) -> np.ndarray:
        try:
            height, width = (int(side) for side in content["size"])
            counts = content["counts"]
            runs = decode_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.place}: its segmentation has no readable size and counts ({error})") from error
        if (height, width) != (self.height, self.width):
            raise DataError(
                f"{self.place}: its run lengths are of {width} x {height} pixels, its image is of {self.width} x "
                f"{self.height}; masks must be given in pixels of the original image"
            )
        return _marked(runs, height * width, f"{width} x {height}", self.place).reshape(width, height).T

    def _rectangle(self, content: RowRuns) -> np.ndarray:
        right, bottom = content.left + content.width, content.top + content.height
        if content.left < 0 or content.top < 0 or right > self.width or bottom > self.height:
            raise DataError(
                f"{self.place}: its mask (left {content.left}, top {content.top}, width {content.width}, height "
                f"{content.height}) reaches outside the image, which is {self.width} x {self.height} pixels"
            )
        size = f"{content.width} x {content.height}"
        marked = _marked(content.runs, content.width * content.height, size, self.place)
        mask = np.zeros((self.height, self.width), dtype=bool)
        mask[content.top : bottom, content.left : right] = marked.reshape(content.height, content.width)
        return mask


@dataclass(frozen=True)
class SegmentMasks:
    """A mask reader over segments: the union of all of one sample and label.

    Parameters
    ----------
    of_pair : mapping from (sample id, label) to (annotator, Segment) of each annotation
    """

    of_pair: Mapping[tuple[str, str], Sequence[tuple[str, Segment]]]

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        """Return a bool mask of the original image's size, or None where there is no segment."""
        segments = self.of_pair.get((sample_id, label))
        return None if not segments else np.logical_or.reduce([segment.mask() for _, segment in segments])

    def of_annotator(self, annotator: str) -> SegmentMasks:
        """Return the masks of one annotator."""
        kept = {
            pair: [(name, segment) for name, segment in segments if name == annotator]
            for pair, segments in self.of_pair.items()
        }
        return SegmentMasks({pair: segments for pair, segments in kept.items() if segments})


def segment_masks(boxes: pd.DataFrame, segments: Sequence[Segment]) -> SegmentMasks:
    """Return the masks of each sample and label that has an outline; what is only boxed there joins as its box.

    Parameters
    ----------
    boxes : DataFrame
        Columns sample_id, label, annotator, x, y, width, height, and segment: which of `segments` is the row's.
    """
    outlined = boxes[[segments[number].given for number in boxes["segment"]]]
    of_pair: dict[tuple[str, str], list[tuple[str, Segment]]] = {
        pair: [] for pair in zip(outlined["sample_id"], outlined["label"], strict=True)
    }
    for row in boxes.itertuples():
        segment = segments[row.segment]
        if (row.sample_id, row.label) in of_pair:
            given = segment if segment.given else segment.filled((row.x, row.y, row.width, row.height))
            of_pair[(row.sample_id, row.label)].append((row.annotator, given))
    return SegmentMasks(of_pair)


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


def _marked(runs: Sequence[int], pixels: int, size: str, at: str) -> np.ndarray:
    """Return run lengths as one bool a pixel; DataError where they do not cover the size."""
    if min(runs, default=0) < 0 or sum(runs) != pixels:
        raise DataError(f"{at}: its run lengths cover {sum(runs)} pixels of {size}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)
