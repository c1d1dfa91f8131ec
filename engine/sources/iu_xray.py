"""``iu-xray:PATH``: Open-i's Indiana chest radiographs with their reports.

A folder in one of two layouts comes in, recognised by what is there:

- official: XML reports in ``ecgen-radiology/``, flat, or in ``NLMCXR_reports.tgz`` (read without unpacking it), and
  PNG files named ``<image id>.png`` anywhere below. It goes first where both are there: it has all reports.
- Kaggle: ``indiana_reports.csv``, ``indiana_projections.csv`` and ``images/images_normalized/<filename>``.

Views come from the projections table, which may also lie beside official files. Without it they are unknown, and said
to be: captions describe the examination ("PA and lateral" stands under both images), DICOM's ViewPosition is wrong for
1,367 laterals, and file numbers are right for 92 % only. `guess_views` takes those numbers all the same.

uid, report and patient are one and the same, and the group.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from engine.dataset import Dataset
from engine.errors import DataError
from engine.labels import STUDY_LABELS
from engine.sources.annotation_files import read_annotations
from engine.sources.files import LARGEST_FILE, FileReader, count_suffixes, existing_folder, is_image, walk_files
from engine.sources.iu_label_choice import AUTO, AUTOMATIC, FILE, LABEL_SOURCES, choose_labels
from engine.sources.mask_files import find_masks
from engine.sources.openi import (
    PROJECTIONS_TABLE,
    REPORTS_TABLE,
    SECTIONS,
    Reports,
    find_table,
    find_xml,
    image_id_of,
    kaggle_file_of,
    read_kaggle,
    read_official,
    read_projections,
)
from engine.sources.schema import as_choice, as_flag, as_integer, dataset_name

logger = logging.getLogger(__name__)

VIEWS = ("frontal", "lateral", "all")
IMAGES = ("any", "required", "ignore")
LAYOUTS = ("official", "kaggle")
# How an image's last number tells its view where no table does; right for 92 % of the images in the Kaggle table.
VIEW_OF_NUMBER = {
    "1001": "frontal",
    "4004": "frontal",
    "2002": "frontal",
    "2001": "lateral",
    "1002": "lateral",
    "3001": "lateral",
    "3003": "lateral",
}


def open_iu_xray(
    path: str,
    *,
    schema: str,
    view: str = "frontal",
    images: str = "any",
    labels: str | None = None,
    label_source: str = "auto",
    unlabelled: str = "drop",
    text: str = "findings+impression",
    layout: str | None = None,
    guess_views: bool | str = False,
    boxes: str | Sequence[str] | None = None,
    boxes_columns: str | dict[str, str] | None = None,
    coco: str | Sequence[str] | None = None,
    label_map: str | dict[str, str] | None = None,
    boxes_outside: str = "error",
    max_bytes: int | str = LARGEST_FILE,
    follow_links: bool | str = True,
) -> Dataset:
    """Open Open-i's radiographs and reports.

    Parameters
    ----------
    path : str
        Folder in the official or the Kaggle layout.
    view : {"frontal", "lateral", "all"}
        Which images. Under "all", reports that name no image are samples too, with text alone.
    images : {"any", "required", "ignore"}
        What becomes of images whose file is absent. any: they stay samples (column image_present False), their text can
        be embedded, their image becomes a listed failure. required: they are left out and counted; an error when all
        are absent. ignore: one sample a report, text alone.
    labels : str
        A labels file (see `read_labels`), as found from here or from the folder. Without it ``labels.csv`` or
        ``labels.json`` in the folder.
    label_source : {"auto", "file", "mesh", "torchxrayvision"}
        Where the labels come from: the labels file; ``MeSH/major`` (see `engine.sources.mesh`); or ``MeSH/automatic``
        as torchxrayvision reads it (see `engine.sources.txrv`; official reports only). auto: the file where there is
        one, else mesh. What the others say goes into columns of its own (see `engine.sources.label_sources`).
    unlabelled : {"drop", "no-finding"}
        What becomes of reports that the labels file does not know, where labels come from it.
    text : str
        Sections joined by a space: findings, impression, indication, comparison, joined by "+".
    layout : {"official", "kaggle"}
        Where the folder holds both; official by default.
    guess_views : bool
        Whether to take the view from an image's number where no table says it.
    boxes, boxes_columns, coco, label_map, boxes_outside
        As for `open_table`; without them ``boxes.csv`` in the folder, where there is one. Masks that lie beside the
        boxes in ``masks/`` go with them (see `engine.sources.mask_files`).
    max_bytes, follow_links
        See `FileReader`.

    Returns
    -------
    Dataset
        Ids are Open-i's image ids (the uid for text alone), groups its uids; further columns indication, comparison,
        findings, impression, mesh, caption, image_present, and labelled (False where nobody looked for labels).

    Raises
    ------
    UsageError
        No such folder or file, or an option that is not known.
    DataError
        Neither layout, no image of that view, or labels of other reports.
    """
    as_choice("view", view, VIEWS)
    as_choice("images", images, IMAGES)
    as_choice("unlabelled", unlabelled, ("drop", "no-finding"))
    as_choice("label_source", label_source, LABEL_SOURCES)
    sections = [as_choice("text", part.strip(), SECTIONS) for part in text.replace(" ", "+").split("+") if part.strip()]
    root = existing_folder(path, schema)
    files = walk_files(root)
    read = _read_reports(root, files, schema, layout)
    notes = list(read.notes)

    table = _with_files(read.images, files)
    if as_flag("guess_views", guess_views):
        table = _with_guessed_views(table, notes)
    if images == "ignore":
        table = read.reports[["uid"]].assign(image=read.reports["uid"], file="", view="", caption="", present=False)
    else:
        table = _of_view(table, read.reports, view, schema, notes)
        table = _present_images(table, images, files, schema, notes)
    samples = _samples(table, read.reports, sections)

    chosen = choose_labels(samples, root, files, labels, label_source, schema, notes)
    values, labelled = chosen.values, chosen.known
    samples = samples.assign(labelled=labelled, **chosen.columns)
    if not labelled.all() and unlabelled == "drop" and chosen.source == FILE:
        notes.append(f"{int((~labelled).sum())} samples are not in the labels file and were left out")
        samples, values = samples[labelled].reset_index(drop=True), values[labelled]
    annotations = read_annotations(
        samples,
        root,
        boxes=boxes or (os.path.join(root, "boxes.csv") if "boxes.csv" in files and not coco else None),
        boxes_columns=boxes_columns,
        coco=coco,
        label_map=label_map,
        boxes_outside=boxes_outside,
        aliases={kaggle_file_of(image): image for image in samples["id"]},
        masks=find_masks(root, files, samples["id"]),
    )
    for note in notes:
        logger.info("%s: %s", schema, note)
    return Dataset(
        schema=schema,
        name=dataset_name(
            "iu-xray",
            root,
            view=view,
            images=images,
            labels=labels,
            label_source=None if label_source == AUTO else label_source,
            text=text,
            layout=layout,
        ),
        samples=samples,
        label_names=STUDY_LABELS,
        labels=values,
        reader=FileReader(root, as_integer("max_bytes", max_bytes, 1), as_flag("follow_links", follow_links)),
        annotations=annotations,
        notes=tuple(notes),
    )


def _read_reports(root: str, files: list[str], schema: str, layout: str | None) -> Reports:
    """Read reports and images in the layout that is there."""
    if layout is not None:
        as_choice("layout", layout, LAYOUTS)
    official, kaggle = bool(find_xml(files)), find_table(files, REPORTS_TABLE) is not None
    if layout == "official" or (layout is None and official):
        if not official:
            raise DataError(f"{schema!r}: no XML report and no NLMCXR_reports.tgz below {root!r} (layout=official)")
        read = read_official(root, files)
        projections = find_table(files, PROJECTIONS_TABLE, "projections.csv")
        if projections is None:
            return read
        views = read_projections(os.path.join(root, projections))
        of_image = dict(zip(views["image"], views["view"], strict=True))
        known = [of_image.get(image) or view for image, view in read.images[["image", "view"]].itertuples(index=False)]
        return read._replace(images=read.images.assign(view=known))
    if layout == "kaggle" or kaggle:
        return read_kaggle(root, files)
    holds = f"it holds {count_suffixes(files)} files" if files else "it is empty"
    raise DataError(
        f"{schema!r}: neither layout of IU-Xray is below {root!r}: {holds}. Expected XML reports or NLMCXR_reports.tgz "
        f"or {REPORTS_TABLE} with {PROJECTIONS_TABLE}; for other images use folder: or table:"
    )


def _with_files(images: pd.DataFrame, files: list[str]) -> pd.DataFrame:
    """Return the images with the path of each one's file (the first, where there are several) and if it is present."""
    path_of: dict[str, str] = {}
    for name in files:
        if is_image(name):
            path_of.setdefault(image_id_of(name), name)
    present = images["image"].isin(list(path_of))
    paths = [path_of.get(image, file) for image, file in zip(images["image"], images["file"], strict=True)]
    return images.assign(file=paths, present=present)


def _with_guessed_views(images: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    numbers = images["image"].str.rpartition("-")[2]
    guessed = numbers.map(lambda number: VIEW_OF_NUMBER.get(number, ""))
    unknown = images["view"] == ""
    notes.append(
        f"{int((unknown & (guessed != '')).sum())} views were guessed from file numbers (right for about 92 %)"
    )
    return images.assign(view=images["view"].where(~unknown, guessed))


def _of_view(images: pd.DataFrame, reports: pd.DataFrame, view: str, schema: str, notes: list[str]) -> pd.DataFrame:
    """Return the images of a view; under "all" with a row for each report that names no image."""
    without = reports["uid"][~reports["uid"].isin(images["uid"])]
    if view == "all":
        rows = pd.DataFrame({"uid": without, "image": without, "file": "", "view": "", "caption": "", "present": False})
        merged = pd.concat([images, rows], ignore_index=True)
        if len(without):
            notes.append(f"{len(without)} reports name no image and are samples of text alone")
            # The reports' own order, which is the projections table's in the Kaggle layout.
            order = dict(zip(reports["uid"], range(len(reports)), strict=True))
            merged = merged.sort_values("uid", key=lambda uids: uids.map(order), kind="stable").reset_index(drop=True)
        return merged
    chosen = images["view"] == view
    unknown = int((images["view"] == "").sum())
    if not chosen.any():
        raise DataError(
            f"{schema!r}: no {view} image is known; of {len(images)} images the view of {unknown} is unknown. Put "
            f"{PROJECTIONS_TABLE} beside the reports, or say view=all, guess_views=true, or images=ignore (texts alone)"
        )
    if unknown:
        notes.append(f"{unknown} images of unknown view were left out (view=all keeps them)")
    left = len(set(reports["uid"]) - set(images["uid"][chosen]))
    if left:
        notes.append(f"{left} reports have no {view} image and were left out (view=all keeps them)")
    return images[chosen].reset_index(drop=True)


def _present_images(table: pd.DataFrame, images: str, files: list[str], schema: str, notes: list[str]) -> pd.DataFrame:
    """Return the table with or without absent images, and say how many they are."""
    named = table["file"] != ""
    absent = int((named & ~table["present"]).sum())
    if not absent:
        return table if images == "any" else table[table["present"]].reset_index(drop=True)
    archive = next((name for name in files if re.search(r"png[^/]*\.(tgz|tar\.gz|tar)$", name, re.IGNORECASE)), None)
    step = f"unpack {archive}" if archive else "put the PNG files (NLMCXR_png.tgz, or Kaggle's) below the folder"
    first = table["file"][named & ~table["present"]].iloc[0]
    if images == "required":
        if absent == int(named.sum()):
            raise DataError(
                f"{schema!r}: not one of the {absent} images is there, first {first!r}; {step}, or say "
                "images=ignore for the reports alone"
            )
        notes.append(f"{absent} of {int(named.sum())} images are absent and were left out, first {first!r}; {step}")
        return table[table["present"]].reset_index(drop=True)
    notes.append(
        f"{absent} of {int(named.sum())} images are absent (column image_present), first {first!r}; {step}, or say "
        "images=required to leave them out"
    )
    return table


def _samples(table: pd.DataFrame, reports: pd.DataFrame, sections: list[str]) -> pd.DataFrame:
    """Return the required columns, and the report's own beside them."""
    of_report = reports.set_index("uid").reindex(table["uid"]).fillna("").reset_index(drop=True)
    text = of_report[sections[0]] if sections else pd.Series([""] * len(table), dtype=object)
    for section in sections[1:]:
        gap = np.where((text != "") & (of_report[section] != ""), " ", "")
        text = text + gap + of_report[section]
    samples = pd.DataFrame(
        {
            "id": table["image"],
            "uri": table["file"],
            "text": text,
            "group": table["uid"],
            "view": table["view"],
            "split": "",
            "image_present": table["present"].astype(bool),
            "caption": table["caption"],
        }
    )
    told = [*SECTIONS, "mesh", *([AUTOMATIC] if AUTOMATIC in of_report else [])]
    samples = pd.concat([samples, of_report[told]], axis=1)
    return samples.astype({name: object for name in samples.columns if name != "image_present"})
