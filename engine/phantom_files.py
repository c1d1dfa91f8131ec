"""Phantoms as files, in the form in which Open-i publishes its radiographs.

A data set of phantoms comes in; a folder goes out that ``iu-xray:DIR`` reads back equal in pixels, texts, labels, boxes
and groups::

    ecgen-radiology/<n>.xml   one report a patient, with coded terms (MeSH/major) and the images it belongs to
    images/<image id>.png     8-bit grey
    masks/<image id>.<label>.png   what is visible of a finding: 255 inside, spaces in the label as "_"
    labels.csv                image, uid and the 14 labels as 0/1
    boxes.csv                 image, label, x, y, width, height in pixels
    README.txt                what this is and how it was made

The folder is built beside its place and renamed when it is whole, so it is there entirely or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import cv2
import numpy as np
import pandas as pd

from engine.dataset import Dataset
from engine.errors import DataError, UsageError
from engine.phantom import GENERATOR_VERSION

REPORTS, IMAGES, MASKS = "ecgen-radiology", "images", "masks"
SECTIONS = ("indication", "findings", "impression")
BOX_COLUMNS = ("image", "label", "x", "y", "width", "height")
# Fast and hardly larger: grain leaves little to compress.
PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)

REPORT_FORM = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id={uid}/>
   <pmcId id={number}/>
   <docSource>CXR</docSource>
   <IUXRId id={number}/>
   <title>fluoroscope phantoms</title>
   <note>Drawn by a program; no patient.</note>
   <MedlineCitation Owner="fluoroscope" Status="generated">
      <Article PubModel="Electronic">
         <ArticleTitle>fluoroscope phantoms</ArticleTitle>
         <Abstract>
            <AbstractText Label="COMPARISON"/>
            <AbstractText Label="INDICATION">{indication}</AbstractText>
            <AbstractText Label="FINDINGS">{findings}</AbstractText>
            <AbstractText Label="IMPRESSION">{impression}</AbstractText>
         </Abstract>
         <Language>eng</Language>
      </Article>
   </MedlineCitation>
   <MeSH>
{terms}
   </MeSH>
{images}
</eCitation>
"""
IMAGE_FORM = """   <parentImage id={image}>
      <figureId>F{number}</figureId>
      <caption>{view}</caption>
      <projection>{projection}</projection>
   </parentImage>"""
README_FORM = """Phantoms: chest radiographs drawn by a program, not taken of patients.

made from    {schema}
generator    {version}
images       {samples} of {groups} groups

Read them with the schema string iu-xray:<this folder>.
"""


def write_phantoms(
    dataset: Dataset, directory: str | os.PathLike[str], progress: Callable[[int], None] | None = None
) -> Path:
    """Write phantoms as PNG, XML, labels, boxes and masks.

    Parameters
    ----------
    dataset : Dataset
        Of ``phantom:``, whole or in part.
    directory : path
        Folder to make; must not exist, or be empty.
    progress : callable, optional
        Called with the count of images written so far.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UsageError
        The folder holds something, or the samples have no report columns (they are no phantoms).
    DataError
        The folder cannot be written, such as on a full disk; nothing is left behind.
    """
    target = Path(directory).absolute()
    _check(dataset, target)
    scratch = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        for folder in (REPORTS, IMAGES, MASKS):
            (scratch / folder).mkdir(parents=True)
        _write_images(dataset, scratch, progress)
        _write_reports(dataset, scratch)
        labels = pd.DataFrame(dataset.labels, columns=list(dataset.label_names))
        labels.insert(0, "image", dataset.ids)
        labels.insert(1, "uid", dataset.groups)
        labels.to_csv(scratch / "labels.csv", index=False)
        facts = {"samples": len(dataset), "groups": len(set(dataset.groups)), "version": GENERATOR_VERSION}
        (scratch / "README.txt").write_text(README_FORM.format(schema=dataset.schema, **facts), encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    except OSError as error:
        raise DataError(
            f"cannot write {len(dataset)} phantoms to {str(target)!r}: {error.strerror or error}; nothing was left "
            "there: free some space or name another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check(dataset: Dataset, target: Path) -> None:
    """Refuse what is not phantoms, and a place that is taken."""
    missing = [column for column in (*SECTIONS, "mesh") if column not in dataset.samples.columns]
    if missing:
        raise UsageError(f"only phantoms can be written, not {dataset.schema!r}, which has no {missing[0]!r}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"output {str(target)!r} exists and is not an empty folder; name another one, or remove it first"
        )


def _write_images(dataset: Dataset, folder: Path, progress: Callable[[int], None] | None) -> None:
    """Write pixels, masks and boxes; each phantom is drawn once."""
    pairs = dataset.annotations.pairs.drop_duplicates()
    labels_of = pairs.groupby("sample_id", sort=False)["label"].agg(list).to_dict()
    rows: list[tuple[object, ...]] = []
    for position, (sample_id, uri) in enumerate(zip(dataset.ids, dataset.samples["uri"], strict=True)):
        pixels = dataset.reader.read(uri)
        if not isinstance(pixels, np.ndarray):
            raise UsageError(f"only phantoms can be written, not the file {uri!r} of {dataset.schema!r}")
        _write_png(folder / IMAGES / f"{sample_id}.png", pixels)
        for label in labels_of.get(sample_id, ()):
            boxes = dataset.annotations.boxes_of(sample_id, label)
            rows += [(f"{sample_id}.png", label, *box) for box in boxes.astype(int).tolist()]
            mask = dataset.annotations.region(sample_id, label, *pixels.shape[:2])
            _write_png(folder / MASKS / f"{sample_id}.{label.replace(' ', '_')}.png", mask.astype(np.uint8) * 255)
        if progress is not None:
            progress(position + 1)
    pd.DataFrame(rows, columns=list(BOX_COLUMNS)).to_csv(folder / "boxes.csv", index=False)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    # Encoded in memory: OpenCV's own writer only says that something went wrong, not what.
    path.write_bytes(cv2.imencode(".png", pixels, PNG_OPTIONS)[1].tobytes())


def _write_reports(dataset: Dataset, folder: Path) -> None:
    """Write one XML file a patient, with all images of theirs."""
    for uid, samples in dataset.samples.groupby("group", sort=False):
        first = samples.iloc[0]
        number = str(uid).removeprefix("CXR")
        images = [
            IMAGE_FORM.format(
                image=quoteattr(sample.id), number=place, view=sample.view.capitalize(), projection=sample.projection
            )
            for place, sample in enumerate(samples.itertuples(), start=1)
        ]
        content = REPORT_FORM.format(
            uid=quoteattr(str(uid)),
            number=quoteattr(number),
            terms="\n".join(f"      <major>{escape(term)}</major>" for term in first["mesh"].split(";")),
            images="\n".join(images),
            **{section: escape(first[section]) for section in SECTIONS},
        )
        (folder / REPORTS / f"{number}.xml").write_text(content, encoding="utf-8")
