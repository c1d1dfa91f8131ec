"""``table:FILE.csv|parquet``: one row a sample, with columns mapped to what the engine carries.

A table and the names of its columns come in. Labels are 0/1 columns (1 positive; 0, -1 and blank negative) or one
column with a list such as ``Edema;Pneumonia``. Boxes come from a second table or a COCO file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from engine.dataset import REQUIRED_COLUMNS, Dataset
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import is_url, last_part, local_path, parent
from engine.sources.annotation_files import read_annotations
from engine.sources.files import LARGEST_FILE, FileReader
from engine.sources.label_columns import read_label_columns
from engine.sources.remote import RemoteReader, open_reader
from engine.sources.sample_columns import (
    USUAL_COLUMNS,
    chosen_columns,
    joined_text,
    kept_rows,
    split_column,
    text_columns_of,
)
from engine.sources.schema import as_mapping, as_names, dataset_name
from engine.splits import check_split
from engine.tables import (
    TEXT,
    constant_text,
    numbers_of,
    place,
    read_table,
    require_columns,
    text_of,
)

logger = logging.getLogger(__name__)

# So many images, spread over the table, are looked for at opening: enough to find a wrong root, cheap for any size.
PROBED_IMAGES = 16


def open_table(
    path: str,
    *,
    schema: str,
    root: str | None = None,
    id: str | None = None,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    group: str | None = None,
    view: str | None = None,
    split: str | None = None,
    labels: str | Sequence[str] | None = None,
    label_names: str | Sequence[str] | None = None,
    separator: str = ";",
    keep: str | Mapping[str, Any] | None = None,
    boxes: str | Sequence[str] | None = None,
    boxes_columns: str | Mapping[str, str] | None = None,
    coco: str | Sequence[str] | None = None,
    label_map: str | Mapping[str, str] | None = None,
    boxes_outside: str = "error",
    size: str | Sequence[str] | None = None,
    max_bytes: int | str = LARGEST_FILE,
    follow_links: bool | str = True,
) -> Dataset:
    """Open a table of samples.

    Parameters
    ----------
    path : str
        A ``.csv``, ``.tsv`` or ``.parquet`` file, or the URL of one.
    root : str
        Folder or URL that the image paths are relative to; where the table lies by default.
    id, image, group, view, split : str
        Names of columns; "" for none. Not given, the usual names are taken (`USUAL_COLUMNS`) where the table has them.
        Without an id column the image path is the id, without a group column each sample is its own group.
    text : str or list of str
        One column, or several that are joined by a space.
    labels : list of str, or str
        Several 0/1 columns, or one column that holds lists of names (or is itself 0/1).
    label_names : list of str
        Order and extent of the labels, where `labels` is a column of lists; all names that occur, sorted, by default.
    separator : str
        Between the names of a list.
    keep : mapping of column to value or list of values
        Only rows that have it; ``keep=view:PA`` in a schema.
    boxes, coco : str
        Boxes, masks or points: tables (see `read_box_table`, which knows the layouts of RSNA, VinDr-CXR and NIH), COCO
        files (``.json``) or CVAT files (``.xml``), as found from here or from the table's folder. Several, with commas
        between them, are several annotators'. `coco` says that a file of any name is COCO's.
    boxes_columns : mapping
        From image, label, x, y, width, height, source to the box table's columns.
    label_map : mapping
        Old to new names of the boxes' labels, such as ``{"Lung_Opacity": "Pneumonia"}``.
    boxes_outside : {"error", "clip"}
        What becomes of boxes that reach outside their image by more than a pixel; see `Annotations`.
    size : two str
        Columns of the images' width and height in pixels, to check boxes with; "width" and "height" where there are.
    max_bytes, follow_links
        See `FileReader`.

    Returns
    -------
    Dataset
        Columns that were not used stay among its samples.

    Raises
    ------
    UsageError
        No such table, root or file of boxes.
    DataError
        A named column that is absent, an id twice, a label or split that is not known, or no image below the root.
    """
    path = local_path(path)
    file = path if is_url(path) else os.path.abspath(os.path.expanduser(path))
    beside_it = parent(file) if is_url(file) else os.path.dirname(file)
    table = read_table(file)
    if not len(table):
        raise DataError(f"the table {file!r} has no rows")
    chosen = chosen_columns(table, file, id=id, image=image, group=group, view=view, split=split)
    text_columns = text_columns_of(table, file, text)
    if not chosen["image"] and not text_columns:
        known = ", ".join(USUAL_COLUMNS["image"])
        raise DataError(f"{file!r} has no column of images ({known}); name it: image=COLUMN (or text=COLUMN)")
    # The index keeps the line of each row, for messages.
    table = kept_rows(table, as_mapping("keep", keep), file)
    reader = open_reader(root or beside_it, schema, max_bytes, follow_links)

    samples = _samples(table, chosen, text_columns, file)
    names, values, used = read_label_columns(table, file, labels, as_names(label_names), separator)
    extra = [column for column in table.columns if column not in REQUIRED_COLUMNS and column not in used]
    samples = pd.concat([samples, table[extra].reset_index(drop=True)], axis=1)
    _check_root(samples["uri"], reader, file)
    if chosen["split"]:
        check_split(samples["group"], samples["split"])

    annotations = read_annotations(
        samples,
        beside_it,
        boxes=boxes,
        boxes_columns=boxes_columns,
        coco=coco,
        label_map=label_map,
        boxes_outside=boxes_outside,
        sizes=_sizes(samples, table, file, size) if boxes else None,
    )
    notes = () if chosen["group"] else ("no column of patients was named, so each sample is its own group",)
    for note in notes:
        logger.info("%s: %s", schema, note)
    return Dataset(
        schema=schema,
        name=dataset_name("table", file, root=reader.root, keep=keep, id=id, image=image),
        samples=samples,
        label_names=names,
        labels=values,
        reader=reader,
        annotations=annotations,
        notes=notes,
    )


def _samples(table: pd.DataFrame, chosen: Mapping[str, str], text_columns: Sequence[str], file: str) -> pd.DataFrame:
    """Return the required columns."""
    blank = constant_text("", len(table), table.index)
    # Each column once: roles that share a column, such as id and image, then share its memory.
    texts = {column: text_of(table[column]) for column in {*chosen.values(), *text_columns} - {""}}
    columns = {role: texts[column] if column else blank for role, column in chosen.items()}
    ids = columns["id"] if chosen["id"] else columns["image"]
    if not chosen["id"] and not chosen["image"]:
        ids = "row-" + pd.Series(table.index, index=table.index).astype(TEXT)
    _check_ids(ids, file, chosen["id"] or chosen["image"])
    group = columns["group"].where(columns["group"] != "", ids)
    return pd.DataFrame(
        {
            "id": ids,
            "uri": columns["image"],
            "text": joined_text([texts[column] for column in text_columns], blank),
            "group": group,
            "view": columns["view"],
            "split": split_column(columns["split"], file, chosen["split"]),
        }
    ).reset_index(drop=True)


def _check_ids(ids: pd.Series, file: str, column: str) -> None:
    if (ids == "").any():
        line = int(ids.index[int(np.flatnonzero(ids == "")[0])])
        raise DataError(f"{place(file, line)}, column {column!r}: the id is blank; name another id column: id=COLUMN")
    twice = ids[ids.duplicated(keep=False)]
    if len(twice):
        first = ids.index[ids == twice.iloc[0]][:2]
        raise DataError(
            f"{place(file, int(first[0]))} and line {int(first[1]) + 2}, column {column!r}: the id {twice.iloc[0]!r} "
            f"occurs more than once ({twice.nunique()} such ids); name another id column (id=COLUMN) or remove rows"
        )


def _check_root(uris: pd.Series, reader: FileReader | RemoteReader, file: str) -> None:
    """Raise DataError when not one of some spread images is there: then the root is wrong, not the images."""
    named = np.flatnonzero(uris != "")
    if not len(named):
        return
    spread = named[np.unique(np.linspace(0, len(named) - 1, PROBED_IMAGES).astype(int))]
    probed = uris.iloc[spread].tolist()
    for uri in probed:
        try:
            reader.fingerprint(uri)
        except ImageError:
            continue
        return
    says = "say which folder the paths are relative to: root=FOLDER"
    if any(".." in uri.split("/") for uri in probed):
        says = "paths with '..' are not followed: write them relative to a folder that holds all images, and " + says
    raise DataError(
        f"none of {len(probed)} images that {last_part(file)!r} names is below {reader.root!r}, first {probed[0]!r}; "
        f"{says}"
    )


def _sizes(
    samples: pd.DataFrame, table: pd.DataFrame, file: str, size: str | Sequence[str] | None
) -> dict[str, tuple[int, int]] | None:
    """Return the (height, width) of each image from the table, None where it does not say."""
    columns = as_names(size)
    if size is None and {"width", "height"} <= set(table.columns):
        columns = ["width", "height"]
    if not columns:
        return None
    if len(columns) != 2:
        raise UsageError(f"size={size!r} must name two columns: width and height")
    require_columns(table, columns, file)
    widths, heights = (numbers_of(table, column, file, blank=0.0) for column in columns)
    known = (widths > 0) & (heights > 0)
    return {
        sample_id: (int(height), int(width))
        for sample_id, height, width in zip(samples["id"][known], heights[known], widths[known], strict=True)
    }
