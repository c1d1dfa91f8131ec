"""Boxes and masks of a data set from the files that its options name: a table of boxes, or COCO.

Samples and file names come in; `Annotations` by sample id go out. A file may name images in any usual way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import pandas as pd

from engine.annotations import Annotations, MaskReader, read_box_table
from engine.errors import UsageError
from engine.remote_files import is_url, join, local_path
from engine.sources.coco import read_coco
from engine.sources.schema import as_mapping


def read_annotations(
    samples: pd.DataFrame,
    folder: str,
    *,
    boxes: str | None,
    boxes_columns: str | Mapping[str, str] | None,
    coco: str | None,
    label_map: str | Mapping[str, str] | None,
    aliases: Mapping[str, str] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    masks: MaskReader | None = None,
) -> Annotations:
    """Read boxes and masks.

    Parameters
    ----------
    samples : DataFrame
        With the columns id and uri.
    folder : str
        Where the files are looked for when they are not found from the working folder.
    boxes, boxes_columns, coco, label_map
        See `engine.sources.table.open_table`.
    aliases : mapping
        Further names of images, to sample ids.
    sizes : mapping from sample id to (height, width)
        Against which boxes are checked now.
    masks : MaskReader
        Masks that lie beside a table of boxes, under the labels' names before `label_map`.

    Raises
    ------
    UsageError
        Both kinds of file, label_map without either, or no such file.
    DataError
        See `read_box_table` and `read_coco`.
    """
    renames = as_mapping("label_map", label_map)
    if boxes and coco:
        raise UsageError("boxes come from boxes=TABLE or from coco=FILE, not from both")
    if not boxes and not coco:
        if renames:
            raise UsageError("label_map renames the labels of boxes, but neither boxes=TABLE nor coco=FILE is given")
        return Annotations.empty()
    ids = {**(aliases or {}), **image_names(samples)}
    if coco:
        return read_coco(beside(coco, folder), ids=ids).renamed(renames)
    columns = as_mapping("boxes_columns", boxes_columns)
    read = read_box_table(beside(boxes or "", folder), columns, ids, sizes)
    return Annotations(read.boxes, masks).renamed(renames)


def image_names(samples: pd.DataFrame) -> dict[str, str]:
    """Return from every name that an annotation file may use for an image (id, path, file name, stem) to the sample id.

    A name that several samples share, such as one file name in two folders, is left out.
    """
    forms: dict[str, set[str]] = {}
    for sample_id, uri in zip(samples["id"], samples["uri"], strict=True):
        base = uri.replace("\\", "/").rpartition("/")[2]
        for name in {uri, base, os.path.splitext(base)[0]} - {""}:
            forms.setdefault(name, set()).add(sample_id)
    names = {name: next(iter(owners)) for name, owners in forms.items() if len(owners) == 1}
    return names | {sample_id: sample_id for sample_id in samples["id"]}


def beside(name: str, folder: str) -> str:
    """Return a file as found from the working folder or, failing that, from the data set's."""
    if is_url(name):
        return local_path(name)
    path = os.path.expanduser(name)
    if is_url(folder) and not os.path.exists(path):
        return join(folder, name)
    return path if os.path.isabs(path) or os.path.exists(path) else os.path.join(folder, path)
