"""Where findings lie: boxes and masks by sample and label, in pixels of the original image.

Comes in from a table, a COCO file or a phantom; goes out to heatmap scores and figures. Coordinates are continuous,
with the origin at the top left corner of the top left pixel, so pixel (row, column) covers [column, column + 1) x
[row, row + 1) and belongs to a region when its centre does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from engine.errors import DataError
from engine.tables import numbers_of, offer, place, read_table, require_columns, text_of

logger = logging.getLogger(__name__)

BOX_COLUMNS = ("sample_id", "label", "x", "y", "width", "height", "source", "place")
COORDINATES = ("x", "y", "width", "height")

# Boxes that others scaled and rounded reach over the edge by a fraction of a pixel; more than that is a mistake.
EDGE_TOLERANCE = 1.0

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
        Columns sample_id, label (str), x, y, width, height (float, original pixels), source (str), and optionally place
        (file and line, for messages).
    mask_reader : callable, optional
        ``mask_reader(sample_id, label)`` gives a bool array (height, width) of the original image's size, or None where
        there is no mask; picklable.
    box_source : BoxSource, optional
        Stands in for `boxes` where those are made on demand.
    """

    def __init__(
        self,
        boxes: pd.DataFrame | None = None,
        mask_reader: MaskReader | None = None,
        box_source: BoxSource | None = None,
    ) -> None:
        self.mask_reader = mask_reader
        self.box_source = box_source
        self._boxes = None if boxes is None and box_source is not None else _checked_boxes(boxes)
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
            self._boxes = _checked_boxes(pd.concat(made, ignore_index=True) if made else None)
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
            A mask of another size, or a box outside the image.
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
        _check_inside(rows, np.full(len(rows), height), np.full(len(rows), width))
        region = np.zeros((height, width), dtype=bool)
        for x, y, box_width, box_height in rows[list(COORDINATES)].to_numpy(dtype=np.float64):
            left, right = _covered_pixels(x, box_width, width)
            top, bottom = _covered_pixels(y, box_height, height)
            region[top:bottom, left:right] = True
        return region

    def check_inside(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise DataError for the first box that lies outside its image.

        Parameters
        ----------
        sizes : mapping from sample id to (height, width) in pixels
            Samples that are not in it are not checked.
        """
        known = self.boxes[self.boxes["sample_id"].isin(list(sizes))]
        measured = np.array([sizes[sample_id] for sample_id in known["sample_id"]], dtype=np.float64).reshape(-1, 2)
        _check_inside(known, measured[:, 0], measured[:, 1])

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
        masks = None if self.mask_reader is None else _RenamedMasks(self.mask_reader, dict(names), self.labels)
        if self._boxes is None and self.box_source is not None:
            return Annotations(None, masks, _RenamedBoxes(self.box_source, dict(names)))
        return Annotations(_with_names(self.boxes, names), masks)

    def of_samples(self, sample_ids: Sequence[str]) -> Annotations:
        """Return the annotations of these samples only; boxes made on demand are made now."""
        return Annotations(self.boxes[self.boxes["sample_id"].isin(list(sample_ids))], self.mask_reader)

    def _positions(self, sample_id: str) -> np.ndarray:
        if self._rows_of is None:
            self._rows_of = self.pairs.groupby("sample_id", sort=False).indices
        return self._rows_of.get(sample_id, np.zeros(0, dtype=np.int64))

    def _box_rows(self, sample_id: str, label: str | None) -> pd.DataFrame:
        if self._boxes is None and self.box_source is not None:
            rows = self.box_source.boxes_of(sample_id) if len(self._positions(sample_id)) else _checked_boxes(None)
        else:
            rows = self.boxes.iloc[self._positions(sample_id)]
        return rows if label is None else rows[rows["label"] == label]


def read_box_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    ids: SampleIds | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> Annotations:
    """Read boxes from a CSV or parquet table, one row a box, in pixels of the original image.

    Parameters
    ----------
    columns : mapping, optional
        From this function's names (image, label, x, y, width, height, source) to the table's. Names not mapped are
        taken as they are; the image column is the first of image, image_path, sample_id, id, filename, uid there is.
    ids : mapping, optional
        From what the image column holds (path, file name, id) to the sample id, or to several. Rows of other images are
        left out and counted in the log. Without it, the column holds sample ids.
    sizes : mapping from sample id to (height, width), optional
        Where given, boxes outside their image are refused now.

    Raises
    ------
    DataError
        A missing column, a coordinate that is no number, an empty or misplaced box, or not one row of a known image.
    """
    table = read_table(path)
    wanted = _box_table_columns(table, dict(columns or {}), path)
    boxes = pd.DataFrame({"image": text_of(table[wanted["image"]]), "label": text_of(table[wanted["label"]])})
    for name in COORDINATES:
        boxes[name] = numbers_of(table, wanted[name], path)
    boxes["source"] = text_of(table[wanted["source"]]) if "source" in wanted else Path(path).name
    boxes["place"] = [place(path, row) for row in range(len(boxes))]
    annotations = Annotations(matched_to_samples(boxes, ids, path))
    if sizes is not None:
        annotations.check_inside(sizes)
    return annotations


def rows_with_sample_ids(rows: pd.DataFrame, ids: SampleIds | None) -> pd.DataFrame:
    """Return the rows whose "image" is known, once for each of its samples, with the column sample_id instead."""
    if ids is None:
        return rows.rename(columns={"image": "sample_id"})
    found = rows.assign(sample_id=rows["image"].map(lambda image: _as_list(ids.get(image))))
    return found.explode("sample_id").dropna(subset=["sample_id"]).drop(columns="image").reset_index(drop=True)


def matched_to_samples(rows: pd.DataFrame, ids: SampleIds | None, path: str | Path) -> pd.DataFrame:
    """Return the rows of known images; DataError where the file names images but not one of them is known."""
    if ids is None:
        return rows_with_sample_ids(rows, ids)
    known = rows["image"].isin(list(ids))
    if len(rows) and not known.any():
        example = next(iter(ids), "")
        raise DataError(
            f"none of the {len(rows)} annotations in {str(path)!r} belongs to an image of the data set: the file names "
            f"images like {rows['image'].iloc[0]!r}, the data set like {example!r}; name the column that matches"
        )
    if not known.all():
        logger.info(
            "%s: %d of %d annotations belong to images outside this data set", path, int((~known).sum()), len(rows)
        )
    return rows_with_sample_ids(rows, ids)


def _box_table_columns(table: pd.DataFrame, columns: dict[str, str], path: str | Path) -> dict[str, str]:
    """Return the table's name for each of ours."""
    known = ("image", "label", *COORDINATES, "source")
    for name in columns:
        if name not in known:
            raise DataError(f"a box table has no {name!r} to map a column to; {offer(name, known)}")
    guesses = {
        "image": ("image", "image_path", "sample_id", "id", "filename", "uid"),
        "source": ("source", "annotation_source"),
    }
    wanted = {name: name for name in ("label", *COORDINATES)}
    for name, candidates in guesses.items():
        present = [candidate for candidate in candidates if candidate in table.columns]
        if present:
            wanted[name] = present[0]
    wanted.setdefault("image", "image")
    wanted.update(columns)
    require_columns(table, list(wanted.values()), path)
    return wanted


def _checked_boxes(boxes: pd.DataFrame | None) -> pd.DataFrame:
    """Return the boxes with all columns and plain dtypes; DataError for one that is empty or not finite."""
    if boxes is None:
        boxes = pd.DataFrame({name: [] for name in BOX_COLUMNS})
    boxes = boxes.reset_index(drop=True)
    for name, filler in (("source", ""), ("place", "")):
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
    outside = (corners[:, :2] < -EDGE_TOLERANCE).any(axis=1)
    if outside.any():
        row = boxes.iloc[int(np.flatnonzero(outside)[0])]
        raise DataError(
            f"{_where(row)}: it begins outside the image; boxes are x, y of the top left corner in original pixels"
        )
    return boxes


def _check_inside(rows: pd.DataFrame, heights: np.ndarray, widths: np.ndarray) -> None:
    """Raise DataError for the first of these boxes that reaches out of its image of (heights, widths)."""
    corners = rows[list(COORDINATES)].to_numpy(dtype=np.float64).reshape(-1, 4)
    over = (corners[:, 0] + corners[:, 2] > widths + EDGE_TOLERANCE) | (
        corners[:, 1] + corners[:, 3] > heights + EDGE_TOLERANCE
    )
    if over.any():
        first = int(np.flatnonzero(over)[0])
        raise DataError(
            f"{_where(rows.iloc[first])}: it reaches outside the image, which is {int(widths[first])} x "
            f"{int(heights[first])} pixels ({int(over.sum())} such boxes); boxes must be in pixels of the original "
            "image, not of a larger or resized one"
        )


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


def _as_list(found: str | Sequence[str] | None) -> list[str]:
    if found is None:
        return []
    return [found] if isinstance(found, str) else list(found)


def _with_names(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    return table.assign(label=[names.get(label, label) for label in table["label"]])


class _RenamedMasks:
    """Masks under other label names; a name that several old ones share has their union."""

    def __init__(self, reader: MaskReader, names: dict[str, str], labels: tuple[str, ...]) -> None:
        self.reader = reader
        self.old_names: dict[str, list[str]] = {}
        for label in labels:
            self.old_names.setdefault(names.get(label, label), []).append(label)

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        masks = [self.reader(sample_id, old) for old in self.old_names.get(label, [])]
        present = [mask for mask in masks if mask is not None]
        return np.logical_or.reduce(present) if present else None


class _RenamedBoxes:
    """A box source under other label names."""

    def __init__(self, source: BoxSource, names: dict[str, str]) -> None:
        self.source = source
        self.names = names

    def pairs(self) -> pd.DataFrame:
        return _with_names(self.source.pairs(), self.names)

    def boxes_of(self, sample_id: str) -> pd.DataFrame:
        return _with_names(self.source.boxes_of(sample_id), self.names)
