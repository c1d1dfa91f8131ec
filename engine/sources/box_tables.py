"""Boxes and points from tables: any with named columns, and the layouts of three public sets, known by their header.

A CSV or parquet file comes in; `Annotations` in pixels of the original image go out. The layouts:

- RSNA Pneumonia Detection Challenge (``stage_2_train_labels.csv``): patientId, x, y, width, height, Target. A row of
  Target 1 is a box of the label "Lung Opacity", one of Target 0 an image in which nothing was marked.
- VinDr-CXR (``annotations_train.csv``, or Kaggle's ``train.csv``): image_id, class_name, x_min, y_min, x_max, y_max,
  and rad_id for the radiologist; a row "No finding" says that this radiologist marked nothing.
- NIH ChestX-ray14 (``BBox_List_2017.csv``): Image Index, Finding Label and four columns that the header runs together
  as ``Bbox [x,y,w,h]``. Its "Infiltrate" is called "Infiltration", as in the labels of the same set.

Whatever has another header needs the columns image, label, x, y, width, height, under these names or mapped to them.
Without width and height the rows are points.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from engine.annotations import COORDINATES, POINT, Annotations, Outside, SampleIds
from engine.errors import DataError
from engine.remote_files import last_part
from engine.sources.annotated_images import matched_to_samples
from engine.tables import constant_text, numbers_of, offer, place, read_table, require_columns, text_of

logger = logging.getLogger(__name__)

RSNA_LABEL = "Lung Opacity"
NOTHING_MARKED = "No finding"
NIH_SPELLING = {"Infiltrate": "Infiltration"}


@dataclass(frozen=True)
class Layout:
    """A public set's table of boxes.

    Parameters
    ----------
    name : str
    header : frozenset of str
        Columns by which it is known.
    columns : mapping
        From our names to the table's; x_end and y_end stand for the lower right corner.
    """

    name: str
    header: frozenset[str]
    columns: Mapping[str, str]


RSNA = Layout(
    "RSNA",
    frozenset({"patientId", "x", "y", "width", "height", "Target"}),
    {"image": "patientId", "x": "x", "y": "y", "width": "width", "height": "height"},
)
VINDR = Layout(
    "VinDr-CXR",
    frozenset({"image_id", "class_name", "x_min", "y_min", "x_max", "y_max"}),
    {
        "image": "image_id",
        "label": "class_name",
        "x": "x_min",
        "y": "y_min",
        "x_end": "x_max",
        "y_end": "y_max",
        "annotator": "rad_id",
    },
)
NIH = Layout(
    "NIH",
    frozenset({"Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"}),
    {"image": "Image Index", "label": "Finding Label", "x": "Bbox [x", "y": "y", "width": "w", "height": "h]"},
)
LAYOUTS = (RSNA, VINDR, NIH)


def read_box_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    ids: SampleIds | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    outside: Outside = "error",
) -> Annotations:
    """Read boxes or points from a CSV or parquet table, one row each, in pixels of the original image.

    Parameters
    ----------
    columns : mapping, optional
        From this function's names (image, label, x, y, width, height, source, annotator) to the table's. Names not
        mapped are taken as they are; the image column is the first of image, image_path, sample_id, id, filename, uid
        there is. Without any mapping the layouts of RSNA, VinDr-CXR and NIH are recognised by their header.
    ids : mapping, optional
        From what the image column holds (path, file name, id) to the sample id, or to several. Rows of other images are
        left out and counted in the log. Without it, the column holds sample ids.
    sizes : mapping from sample id to (height, width), optional
        Where given, boxes outside their image are refused (or, under ``outside="clip"``, counted) now.
    outside : "error" or "clip"
        See `Annotations`.

    Returns
    -------
    Annotations
        The annotator is the column annotator (rad_id, reader, radiologist) where there is one, else the source column.

    Raises
    ------
    DataError
        A missing column, a coordinate that is no number, an empty or misplaced box, or not one row of a known image.
    """
    table = read_table(path)
    layout = next((each for each in LAYOUTS if each.header <= set(table.columns)), None)
    if layout is None or columns:
        boxes = _plain_boxes(table, _plain_columns(table, dict(columns or {}), path), path)
    else:
        boxes = _boxes_of_layout(table, layout, path)
    annotations = Annotations(matched_to_samples(boxes, ids, path), outside=outside)
    if sizes is not None:
        annotations.check_inside(sizes)
    return annotations


def _plain_columns(table: pd.DataFrame, columns: dict[str, str], path: str | Path) -> dict[str, str]:
    """Return the table's name for each of ours; without width and height where it has neither."""
    guesses = {
        "image": ("image", "image_path", "sample_id", "id", "filename", "uid"),
        "source": ("source", "annotation_source"),
        "annotator": ("annotator", "rad_id", "reader", "radiologist"),
    }
    known = ("image", "label", *COORDINATES, "source", "annotator")
    for name in columns:
        if name not in known:
            raise DataError(f"a box table has no {name!r} to map a column to; {offer(name, known)}")
    wanted = {name: name for name in ("label", *COORDINATES)}
    for name, candidates in guesses.items():
        present = [candidate for candidate in candidates if candidate in table.columns]
        if present:
            wanted[name] = present[0]
    wanted.setdefault("image", "image")
    wanted.update(columns)
    sides = [column for column in table.columns if column.lower() in ("width", "height", "w", "h")]
    if not sides and {"x", "y"} <= set(table.columns) and not {"width", "height"} & set(columns):
        del wanted["width"], wanted["height"]
    require_columns(table, list(wanted.values()), path)
    return wanted


def _plain_boxes(table: pd.DataFrame, wanted: Mapping[str, str], path: str | Path) -> pd.DataFrame:
    """Return the rows of a table with named columns."""
    boxes = pd.DataFrame({"image": text_of(table[wanted["image"]]), "label": text_of(table[wanted["label"]])})
    numbers = {name: numbers_of(table, wanted[name], path) for name in COORDINATES if name in wanted}
    if "width" not in numbers:
        numbers = {"x": np.floor(numbers["x"]), "y": np.floor(numbers["y"])}
        boxes = boxes.assign(**numbers, width=1.0, height=1.0, shape=POINT)
    else:
        boxes = boxes.assign(**numbers)
    file = last_part(str(path))
    boxes["source"] = text_of(table[wanted["source"]]) if "source" in wanted else file
    named = wanted.get("annotator", wanted.get("source"))
    boxes["annotator"] = text_of(table[named]) if named else ""
    boxes["place"] = [place(path, row) for row in range(len(boxes))]
    return boxes


def _boxes_of_layout(table: pd.DataFrame, layout: Layout, path: str | Path) -> pd.DataFrame:
    """Return the boxes of a public set's table; rows that say that nothing was marked are counted in the log."""
    logger.info("%s has the layout of %s", path, layout.name)
    marked = _marked_rows(table, layout, path)
    if len(marked) < len(table):
        logger.info("%s: %d of %d rows mark nothing", path, len(table) - len(marked), len(table))
    columns = layout.columns
    boxes = pd.DataFrame({"image": text_of(marked[columns["image"]])}, index=marked.index)
    if layout is RSNA:
        boxes["label"] = constant_text(RSNA_LABEL, len(marked), marked.index)
    else:
        boxes["label"] = text_of(marked[columns["label"]])
    if layout is NIH:
        boxes["label"] = boxes["label"].replace(NIH_SPELLING)
    for name in ("x", "y", "width", "height", "x_end", "y_end"):
        if name in columns:
            boxes[name] = numbers_of(marked, columns[name], path)
    if "x_end" in boxes:
        boxes["width"], boxes["height"] = boxes["x_end"] - boxes["x"], boxes["y_end"] - boxes["y"]
        boxes = boxes.drop(columns=["x_end", "y_end"])
    annotator = columns.get("annotator", "")
    boxes["annotator"] = text_of(marked[annotator]) if annotator in marked else ""
    boxes["source"] = layout.name
    boxes["place"] = [place(path, row) for row in marked.index]
    return boxes.reset_index(drop=True)


def _marked_rows(table: pd.DataFrame, layout: Layout, path: str | Path) -> pd.DataFrame:
    """Return the rows that hold a box."""
    if layout is VINDR:
        return table[text_of(table["class_name"]).str.lower() != NOTHING_MARKED.lower()]
    if layout is not RSNA:
        return table
    target = numbers_of(table, "Target", path)
    corners = np.column_stack([text_of(table[name]) != "" for name in COORDINATES])
    unlike = (target != 0) & (target != 1) | ((target == 0) & corners.any(axis=1))
    if unlike.any():
        row = int(np.flatnonzero(unlike)[0])
        raise DataError(
            f"{place(path, row)}, column 'Target': {target[row]:g} beside {'a' if corners[row].any() else 'no'} box "
            f"({int(unlike.sum())} such rows); 1 means a box and 0 none"
        )
    return table[target == 1]
