"""What a training learns from: rows of the source, truth, and which of them train and choose, all checked.

In come what the caller gives; out go a `Material`, and the hash by which a checkpoint is known to belong to it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from analysis import metrics
from analysis.finetuning.inputs import RowSource
from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.texts import Captions
from analysis.heads import LinearHead
from engine.errors import DataError
from engine.keys import short_hash

if TYPE_CHECKING:
    from engine.encoder import Encoder

log = logging.getLogger(__name__)


class Material:
    """Rows, truth, who trains and who chooses, and which labels can be learnt.

    Parameters
    ----------
    source : RowSource, n rows
    y : ndarray of 0/1, (n, L)
    train, val : ndarray of int
        Positions, or masks.
    names : tuple of str, length L, or empty

    Raises
    ------
    DataError
        Rows in both parts, an empty part, shapes that do not fit.
    """

    def __init__(
        self, source: RowSource, y: np.ndarray, train: np.ndarray, val: np.ndarray, names: tuple[str, ...]
    ) -> None:
        truth = metrics.check_truth(y)
        train, val = _checked_rows(train, "train", len(truth)), _checked_rows(val, "val", len(truth))
        both = np.intersect1d(train, val)
        if len(both):
            raise DataError(f"{len(both)} rows are in both train and val, first {both[0]}: validation must be unseen")
        if len(source) != len(truth):
            raise DataError(f"{len(source)} images but {len(truth)} rows of labels")
        names = names or tuple(str(label) for label in range(truth.shape[1]))
        if len(names) != truth.shape[1]:
            raise DataError(f"{len(names)} label names for {truth.shape[1]} labels")
        self.source, self.truth, self.train, self.val, self.names = source, truth, train, val, names
        positive = truth[train].sum(axis=0)
        self.untrained = tuple(name for name, count in zip(names, positive, strict=True) if not count)

    def check_positives(self) -> None:
        """Say which labels have no positive in training; raise DataError where none has."""
        if len(self.untrained) == len(self.names):
            raise DataError(
                f"none of the {len(self.names)} labels has a positive among the {len(self.train)} training samples; "
                "look at the labels or take another split"
            )
        if self.untrained:
            log.warning(
                "no positives in training, so the head learns nothing but absence of: %s", ", ".join(self.untrained)
            )

    def digest(self) -> str:
        """Hash of rows and truth."""
        parts = [self.truth.astype(np.int8).tobytes(), self.train.tobytes(), self.val.tobytes()]
        return short_hash(b"".join(parts).hex() + "\n".join(self.names))


def fingerprint(
    encoder: Encoder,
    material: Material,
    config: FinetuneConfig,
    head: LinearHead | None,
    captions: Captions | None,
) -> str:
    """Hash of all that decides how a training goes: a checkpoint belongs to one of them."""
    start = "" if head is None else head.weight.tobytes().hex() + head.bias.tobytes().hex()
    texts = "" if captions is None else "\n".join(captions.texts) + captions.of_row.tobytes().hex()
    parts = (encoder.id, material.digest(), json.dumps(asdict(config)), start, texts)
    return short_hash("\n".join(parts))


def _checked_rows(rows: np.ndarray, part: str, count: int) -> np.ndarray:
    """Return row numbers of one part, from positions or a mask."""
    places = np.asarray(rows)
    places = np.flatnonzero(places) if places.dtype == bool else places.astype(np.int64)
    if not len(places):
        raise DataError(f"fine-tuning needs samples in {part}, there are none; look at the split")
    if len(np.unique(places)) != len(places) or places.min() < 0 or places.max() >= count:
        raise DataError(f"the rows of {part} must differ and lie in 0..{count - 1}")
    return places
