"""Where findings lie: boxes, masks and points by sample, label and annotator, in pixels of the original image.

Comes in from a table, a COCO or CVAT file (`engine.sources`) or a phantom; goes out to heatmap scores and figures.
Coordinates are continuous, with the origin at the top left corner of the top left pixel, so pixel (row, column) covers
[column, column + 1) x [row, row + 1) and belongs to a region when its centre does. A point is kept as the pixel it
lies in.

A box that reaches outside its image by more than a pixel was made for an image of another size more often than not, so
it is an error; under ``outside="clip"`` it is cut at the edge and counted in the log, and only one that lies wholly
outside is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import pandas as pd

from engine.errors import DataError
from engine.tables import offer

logger = logging.getLogger(__name__)

BOX_COLUMNS = ("sample_id", "label", "x", "y", "width", "height", "source", "place")
COORDINATES = ("x", "y", "width", "height")
FILLERS = {"source": "", "place": "", "annotator": "", "shape": "box"}
POINT = "point"

# Boxes that others scaled and rounded reach over the edge by a fraction of a pixel; more than that is a mistake.
EDGE_TOLERANCE = 1.0

Outside = Literal["error", "clip"]
MaskReader = Callable[[str, str], "np.ndarray | None"]
SampleIds = Mapping[str, "str | Sequence[str]"]


class BoxSource(Protocol):
    """Boxes that cost something to make, such as those of phantoms, which have to be drawn; must be picklable."""

    def pairs(self) -> pd.DataFrame:
        """Return the columns sample_id and label of everything that has a box, without making one."""

    def boxes_of(self, sample_id: str) -> pd.DataFrame:
        """Return the boxes of one sample with the columns of `BOX_COLUMNS`."""


class Annotations:
    """Boxes and masks of a data set.

    Parameters
    ----------
    boxes : DataFrame, optional
        Columns sample_id, label (str), x, y, width, height (float, original pixels), and optionally source (str), place
        (file and line, for messages), annotator (str, "" where nobody is named) and shape ("box" or "point").
    mask_reader : callable, optional
        ``mask_reader(sample_id, label)`` gives a bool array (height, width) of the original image's size, or None where
        there is no mask; picklable. Where it knows annotators, ``mask_reader.of_annotator(name)`` is the reader of one.
    box_source : BoxSource, optional
        Stands in for `boxes` where those are made on demand.
    outside : "error" or "clip"
        What becomes of boxes that lie partly outside their image.
    """

    def __init__(
        self,
        boxes: pd.DataFrame | None = None,
        mask_reader: MaskReader | None = None,
        box_source: BoxSource | None = None,
        outside: Outside = "error",
    ) -> None:
        self.mask_reader = mask_reader
        self.box_source = box_source
        self.outside = outside
        self._boxes = None if boxes is None and box_source is not None else _checked_boxes(boxes, outside)
        self._pairs = None if self._boxes is None else self._boxes[["sample_id", "label"]]
        self._rows_of: dict[str, np.ndarray] | None = None

    @classmethod
    def empty(cls) -> Annotations:
        """Return annotations of nothing."""
        return cls()

    @property
    def boxes(self) -> pd.DataFrame:
        """All boxes; made now, sample by sample, where they come from a `BoxSource`."""
        if self._boxes is None:
            assert self.box_source is not None
            made = [self.box_source.boxes_of(sample_id) for sample_id in self.sample_ids()]
            self._boxes = _checked_boxes(pd.concat(made, ignore_index=True) if made else None, self.outside)
        return self._boxes

    @property
    def pairs(self) -> pd.DataFrame:
        """Columns sample_id and label of everything annotated; cheap even where boxes are made on demand."""
        if self._pairs is None:
            assert self.box_source is not None
            self._pairs = self.box_source.pairs()[["sample_id", "label"]].reset_index(drop=True)
        return self._pairs

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the annotated labels, in the order in which they first appear."""
        return tuple(self.pairs["label"].drop_duplicates())

    def sample_ids(self, label: str | None = None) -> list[str]:
        """Return the ids of the samples that have an annotation (of a label), in the order of first appearance."""
        pairs = self.pairs if label is None else self.pairs[self.pairs["label"] == label]
        return list(pairs["sample_id"].drop_duplicates())

    def has(self, sample_id: str, label: str) -> bool:
        """Tell whether a label is annotated in a sample."""
        pairs = self.pairs.iloc[self._positions(sample_id)]
        return bool((pairs["label"] == label).any())

    def annotators(self, sample_id: str, label: str) -> tuple[str, ...]:
        """Return who annotated a label in a sample, in the order of first appearance; the unnamed are one, ""."""
        rows = self._box_rows(sample_id, label)
        if "annotator" not in rows:
            return ("",) if len(rows) else ()
        return tuple(dict.fromkeys(rows["annotator"]))

    def by_annotator(self, annotator: str) -> Annotations:
        """Return the annotations of one annotator; DataError for a name that nobody has.

        Masks stay where their reader knows annotators, or where there is only this one.
        """
        names = sorted(set(self.boxes["annotator"]))
        if annotator not in names:
            raise DataError(f"nobody is named {annotator!r} in these annotations; {offer(annotator, names)}")
        masks = self.mask_reader
        if masks is not None and len(names) > 1:
            masks = masks.of_annotator(annotator) if hasattr(masks, "of_annotator") else None
        return Annotations(self.boxes[self.boxes["annotator"] == annotator], masks, outside=self.outside)

    def only_points(self, sample_id: str, label: str) -> bool:
        """Tell whether a label was only pointed at in a sample, so that nothing can be said of its extent."""
        rows = self._box_rows(sample_id, label)
        return "shape" in rows and bool(len(rows)) and bool((rows["shape"] == POINT).all())

    def boxes_of(self, sample_id: str, label: str | None = None) -> np.ndarray:
        """Return the boxes of a sample (and label): x, y, width, height in original pixels.

        Returns
        -------
        ndarray of float64, (k, 4)
            k is 0 where there are none.
        """
        rows = self._box_rows(sample_id, label)
        return rows[list(COORDINATES)].to_numpy(dtype=np.float64).reshape(-1, 4)

    def region(self, sample_id: str, label: str, height: int, width: int) -> np.ndarray:
        """Return which pixels of the original image a label covers: its mask where there is one, else its boxes' union.

        Parameters
        ----------
        height, width : int
            Size of the original image in pixels.

        Returns
        -------
        ndarray of bool, (height, width)
            All False where the label is not annotated in that sample.

        Raises
        ------
        DataError
            A mask of another size, or a box outside the image (wholly, where boxes are clipped).
        """
        mask = self.mask_reader(sample_id, label) if self.mask_reader is not None else None
        if mask is not None:
            if mask.shape != (height, width):
                raise DataError(
                    f"the mask of {label!r} in sample {sample_id!r} is {mask.shape[1]} x {mask.shape[0]} pixels but "
                    f"its image is {width} x {height}; masks must be given in pixels of the original image"
                )
            return mask.astype(bool, copy=False)
        rows = self._box_rows(sample_id, label)
        _check_inside(rows, np.full(len(rows), height), np.full(len(rows), width), self.outside)
        region = np.zeros((height, width), dtype=bool)
        for x, y, box_width, box_height in rows[list(COORDINATES)].to_numpy(dtype=np.float64):
            left, right = _covered_pixels(x, box_width, width)
            top, bottom = _covered_pixels(y, box_height, height)
            region[top:bottom, left:right] = True
        return region

    def check_inside(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise DataError for the first box outside its image; where boxes are clipped, count them in the log.

        Parameters
        ----------
        sizes : mapping from sample id to (height, width) in pixels
            Samples that are not in it are not checked.
        """
        known = self.boxes[self.boxes["sample_id"].isin(list(sizes))]
        measured = np.array([sizes[sample_id] for sample_id in known["sample_id"]], dtype=np.float64).reshape(-1, 2)
        over = _check_inside(known, measured[:, 0], measured[:, 1], self.outside)
        if over:
            logger.warning("%d of %d boxes reach outside their image and are cut at its edge", over, len(known))

    def renamed(self, names: Mapping[str, str]) -> Annotations:
        """Return the annotations with other label names; several old names may become one.

        Raises
        ------
        DataError
            A name that no annotation has.
        """
        for old in names:
            if old not in self.labels and len(self.pairs):
                raise DataError(
                    f"label_map renames {old!r}, but no box or mask has that label; {offer(old, self.labels)}"
                )
        if not names or not len(self.pairs):
            return self
        masks = None if self.mask_reader is None else _RenamedMasks(self, dict(names))
        if self._boxes is None and self.box_source is not None:
            return Annotations(None, masks, _RenamedBoxes(self.box_source, dict(names)), self.outside)
        return Annotations(_with_names(self.boxes, names), masks, outside=self.outside)

    def of_samples(self, sample_ids: Sequence[str]) -> Annotations:
        """Return the annotations of these samples only; boxes made on demand are made now."""
        kept = self.boxes[self.boxes["sample_id"].isin(list(sample_ids))]
        return Annotations(kept, self.mask_reader, outside=self.outside)

    def _positions(self, sample_id: str) -> np.ndarray:
        if self._rows_of is None:
            self._rows_of = self.pairs.groupby("sample_id", sort=False).indices
        return self._rows_of.get(sample_id, np.zeros(0, dtype=np.int64))

    def _box_rows(self, sample_id: str, label: str | None) -> pd.DataFrame:
        if self._boxes is None and self.box_source is not None:
            known = len(self._positions(sample_id)) > 0
            rows = self.box_source.boxes_of(sample_id) if known else _checked_boxes(None, "error")
        else:
            rows = self.boxes.iloc[self._positions(sample_id)]
        return rows if label is None else rows[rows["label"] == label]


def _checked_boxes(boxes: pd.DataFrame | None, outside: Outside) -> pd.DataFrame:
    """Return the boxes with all columns and plain dtypes; DataError for one that is empty or not finite."""
    if boxes is None:
        boxes = pd.DataFrame({name: [] for name in BOX_COLUMNS})
    boxes = boxes.reset_index(drop=True)
    for name, filler in FILLERS.items():
        if name not in boxes.columns:
            boxes = boxes.assign(**{name: filler})
    missing = [name for name in BOX_COLUMNS if name not in boxes.columns]
    if missing:
        raise DataError(f"boxes lack the columns {missing}; they need {', '.join(BOX_COLUMNS[:6])}")
    boxes = boxes.astype(dict.fromkeys(COORDINATES, np.float64) | {"sample_id": object, "label": object})
    corners = boxes[list(COORDINATES)].to_numpy()
    wrong = ~np.isfinite(corners).all(axis=1) | (corners[:, 2:] <= 0).any(axis=1)
    if wrong.any():
        row = boxes.iloc[int(np.flatnonzero(wrong)[0])]
        raise DataError(
            f"{_where(row)}: width and height must be positive ({int(wrong.sum())} such boxes); "
            "are the columns x, y, width, height, or two corners?"
        )
    if outside == "clip":
        beyond = (corners[:, :2] + corners[:, 2:] <= 0).any(axis=1)
    else:
        beyond = (corners[:, :2] < -EDGE_TOLERANCE).any(axis=1)
    if beyond.any():
        row = boxes.iloc[int(np.flatnonzero(beyond)[0])]
        raise DataError(
            f"{_where(row)}: it begins outside the image; boxes are x, y of the top left corner in original pixels"
        )
    return boxes


def _check_inside(rows: pd.DataFrame, heights: np.ndarray, widths: np.ndarray, outside: Outside) -> int:
    """Raise DataError for the first of these boxes that may not be in its image; return how many reach out of it."""
    corners = rows[list(COORDINATES)].to_numpy(dtype=np.float64).reshape(-1, 4)
    ends = corners[:, :2] + corners[:, 2:]
    limits = np.column_stack([widths, heights]).reshape(-1, 2)
    over = ((ends > limits + EDGE_TOLERANCE) | (corners[:, :2] < -EDGE_TOLERANCE)).any(axis=1)
    refused = over if outside == "error" else ((corners[:, :2] >= limits) | (ends <= 0)).any(axis=1)
    if refused.any():
        first = int(np.flatnonzero(refused)[0])
        how = "reaches" if outside == "error" else "lies wholly"
        hint = "; boxes_outside=clip cuts them at the edge, if that is what they need" if outside == "error" else ""
        raise DataError(
            f"{_where(rows.iloc[first])}: it {how} outside the image, which is {int(widths[first])} x "
            f"{int(heights[first])} pixels ({int(refused.sum())} such boxes); boxes must be in pixels of the original "
            f"image, not of a larger or resized one{hint}"
        )
    return int(over.sum())


def _where(row: pd.Series) -> str:
    """Return a box as messages name it."""
    at = f"{row['place']}: " if row["place"] else ""
    shown = ", ".join(f"{name} {row[name]:g}" for name in COORDINATES)
    return f"{at}the box ({shown}) of {row['label']!r} in {row['sample_id']!r}"


def _covered_pixels(start: float, length: float, limit: int) -> tuple[int, int]:
    """Return the half-open range of pixels whose centres lie in [start, start + length); at least one."""
    first = int(np.ceil(start - 0.5))
    last = int(np.ceil(start + length - 0.5))
    if last <= first:  # thinner than a pixel and between two centres: the pixel it lies in
        first = int(np.floor(start))
        last = first + 1
    return min(max(first, 0), limit - 1), max(min(last, limit), 1)


def _with_names(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    return table.assign(label=[names.get(label, label) for label in table["label"]])


class _RenamedMasks:
    """Masks under other label names; a name that several old ones share has their union, boxes joining masks."""

    def __init__(self, annotations: Annotations, names: dict[str, str]) -> None:
        self.annotations = annotations
        self.names = names
        self.old_names: dict[str, list[str]] = {}
        for label in annotations.labels:
            self.old_names.setdefault(names.get(label, label), []).append(label)

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        reader = self.annotations.mask_reader
        old_names = self.old_names.get(label, [])
        masks = [None if reader is None else reader(sample_id, old) for old in old_names]
        drawn = [mask for mask in masks if mask is not None]
        if not drawn:
            return None
        boxed = [old for old, mask in zip(old_names, masks, strict=True) if mask is None]
        height, width = drawn[0].shape
        return np.logical_or.reduce(drawn + [self.annotations.region(sample_id, old, height, width) for old in boxed])

    def of_annotator(self, annotator: str) -> MaskReader:
        """Return the masks of one annotator."""
        return _RenamedMasks(self.annotations.by_annotator(annotator), self.names)


class _RenamedBoxes:
    """A box source under other label names."""

    def __init__(self, source: BoxSource, names: dict[str, str]) -> None:
        self.source = source
        self.names = names

    def pairs(self) -> pd.DataFrame:
        return _with_names(self.source.pairs(), self.names)

    def boxes_of(self, sample_id: str) -> pd.DataFrame:
        return _with_names(self.source.boxes_of(sample_id), self.names)
