"""Boxes and masks of a data set from the files that its options name: tables, COCO JSON or CVAT XML.

Samples and file names come in; `Annotations` by sample id go out. A file may name images in any usual way. Several
files are several annotators', unless the files themselves say who drew what.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from engine.annotations import Annotations, MaskReader, Outside
from engine.errors import UsageError
from engine.remote_files import is_url, join, last_part, local_path
from engine.sources.box_tables import read_box_table
from engine.sources.coco import read_coco
from engine.sources.cvat import read_cvat
from engine.sources.schema import as_choice, as_mapping, as_names


def read_annotations(
    samples: pd.DataFrame,
    folder: str,
    *,
    boxes: str | Sequence[str] | None,
    boxes_columns: str | Mapping[str, str] | None,
    coco: str | Sequence[str] | None,
    label_map: str | Mapping[str, str] | None,
    boxes_outside: str = "error",
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
    boxes, boxes_columns, coco, label_map, boxes_outside
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
        See `read_box_table`, `read_coco` and `read_cvat`.
    """
    renames = as_mapping("label_map", label_map)
    if boxes and coco:
        raise UsageError("boxes come from boxes=FILE or from coco=FILE, not from both")
    if not boxes and not coco:
        if renames:
            raise UsageError("label_map renames the labels of boxes, but neither boxes=FILE nor coco=FILE is given")
        return Annotations.empty()
    ids = {**(aliases or {}), **image_names(samples)}
    outside: Outside = "clip" if as_choice("boxes_outside", boxes_outside, ("error", "clip")) == "clip" else "error"
    columns = as_mapping("boxes_columns", boxes_columns)
    read = []
    for name in as_names(coco or boxes):
        file = beside(name, folder)
        kind = os.path.splitext(last_part(file))[1].lower()
        if coco or kind == ".json":
            found = read_coco(file, ids, outside)
        elif kind == ".xml":
            found = read_cvat(file, ids, outside)
        else:
            tabled = read_box_table(file, columns, ids, sizes, outside)
            found = Annotations(tabled.boxes, masks, outside=outside)
        read.append((last_part(file), found))
    return joined(read).renamed(renames)


def joined(read: Sequence[tuple[str, Annotations]]) -> Annotations:
    """Return the annotations of several files as one; where a file names no annotator, it stands for one.

    Parameters
    ----------
    read : sequence of (file's name, Annotations)
    """
    if len(read) == 1:
        return read[0][1]
    tables = []
    for file, found in read:
        boxes = found.boxes
        tables.append(boxes.assign(annotator=boxes["annotator"].where(boxes["annotator"] != "", file)))
    together = pd.concat(tables, ignore_index=True)
    masks = _JoinedMasks(tuple(read)) if any(found.mask_reader is not None for _, found in read) else None
    return Annotations(together, masks, outside=read[0][1].outside)


@dataclass(frozen=True)
class _JoinedMasks:
    """The union of several files' masks; a file that only boxes a finding joins as its boxes' pixels."""

    files: tuple[tuple[str, Annotations], ...]

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        readers = [each.mask_reader for _, each in self.files if each.mask_reader is not None]
        masks = [mask for reader in readers if (mask := reader(sample_id, label)) is not None]
        if not masks:
            return None
        boxed = [each.region(sample_id, label, *masks[0].shape) for _, each in self.files]
        return np.logical_or.reduce(boxed)

    def of_annotator(self, annotator: str) -> _JoinedMasks:
        kept = []
        for file, each in self.files:
            named = set(each.boxes["annotator"])
            if annotator in named:
                kept.append((file, each.by_annotator(annotator)))
            elif annotator == file and "" in named:
                kept.append((file, each.by_annotator("")))
        return _JoinedMasks(tuple(kept))


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
