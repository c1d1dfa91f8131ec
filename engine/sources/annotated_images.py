"""Rows of an annotation file brought to the samples of a data set.

Rows that name images in the file's own way come in, with what the data set calls them; rows by sample id go out. What
belongs to other images is left out and counted, and a file of which nothing matches is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from engine.annotations import SampleIds
from engine.errors import DataError

logger = logging.getLogger(__name__)


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
