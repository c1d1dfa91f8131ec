"""Rows of an annotation file brought to the samples of a data set.

Rows that name images in the file's own way come in, with what the data set calls them; rows by sample id go out, or
whole `Annotations` where the file says how large its images are and what is outlined in them. What belongs to other
images is left out and counted, and a file of which nothing matches is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from engine.annotations import Annotations, Outside, SampleIds
from engine.errors import DataError
from engine.sources.segments import Segment, segment_masks

logger = logging.getLogger(__name__)

OUTLINED = ["image", "label", "x", "y", "width", "height", "shape", "source", "place", "annotator"]
OUTLINED += ["of_height", "of_width", "segment"]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image as its annotation file names it, with its size in pixels."""

    name: str
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def outlined(
    rows: Sequence[tuple[Any, ...]],
    segments: Sequence[Segment],
    ids: SampleIds | None,
    path: str | Path,
    outside: Outside,
) -> Annotations:
    """Return the annotations of a file that outlines findings, held against the sizes of its images.

    Parameters
    ----------
    rows : sequence of tuples
        In the order of `OUTLINED`; the last one is which of `segments` is the row's.
    segments : sequence of Segment
    ids, path
        See `matched_to_samples`.
    outside : "error" or "clip"
        See `Annotations`.

    Raises
    ------
    DataError
        A box outside its image, or not one row of a known image.
    """
    boxes = matched_to_samples(pd.DataFrame(rows, columns=OUTLINED), ids, path)
    sizes = dict(zip(boxes["sample_id"], zip(boxes["of_height"], boxes["of_width"], strict=True), strict=True))
    masks = segment_masks(boxes, segments)
    read = Annotations(boxes.drop(columns=["of_height", "of_width", "segment"]), masks, outside=outside)
    read.check_inside(sizes)
    return read


def matched_to_samples(rows: pd.DataFrame, ids: SampleIds | None, path: str | Path) -> pd.DataFrame:
    """Return the rows of known images, once for each of an image's samples, "image" replaced by "sample_id".

    Parameters
    ----------
    ids : mapping, optional
        From what the column "image" holds to the sample id, or to several; without it, it holds sample ids.

    Raises
    ------
    DataError
        The file names images, but not one of them is known.
    """
    if ids is None:
        return rows.rename(columns={"image": "sample_id"})
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
    found = rows.assign(sample_id=rows["image"].map(lambda image: _as_list(ids.get(image))))
    return found.explode("sample_id").dropna(subset=["sample_id"]).drop(columns="image").reset_index(drop=True)


def _as_list(found: str | Sequence[str] | None) -> list[str]:
    if found is None:
        return []
    return [found] if isinstance(found, str) else list(found)
