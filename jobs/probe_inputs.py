"""Cached tokens of a data set's samples, which the attention-pooling probe reads; those that are missing are computed.

Comes in: samples with an embedding, and a block. Goes out: the samples that have tokens, and all their tokens as the
cache has them, in float16: they are held in memory, twice while a probe is trained.
"""

from __future__ import annotations

import logging

import numpy as np

from engine.errors import DataError
from jobs import measuring
from jobs.probe_options import Config
from jobs.progress import Progress, spoken_bytes
from jobs.runs import Run
from jobs.study_settings import Material

log = logging.getLogger(__name__)


def tokens(material: Material, config: Config, record: Run, progress: Progress) -> tuple[Material, np.ndarray]:
    """Return the samples that have tokens, and what enters block `config.layer` of each, (n, t, width) float16.

    Raises
    ------
    UsageError
        The image tower has no tokens, or no such block.
    DataError
        No sample has tokens.
    """
    what = f"tokens@{config.layer}"
    with record.step(f"embed {what}") as step:
        measuring.embed(config, record, material.cache, material.dataset, material.encoder, what, progress, step)
    stored = material.cache.tokens(material.dataset, material.encoder, config.layer)
    if not len(stored):
        raise DataError(f"no sample of {material.dataset.called} has tokens; see {record.folder / 'failures.csv'}")
    log.info("tokens: %s in memory", spoken_bytes(int(np.prod(stored.shape)) * stored.dtype.itemsize))
    rows = stored.rows
    kept = Material(
        material.dataset.take(rows), material.encoder, material.features[rows], material.keys[rows], material.cache
    )
    return kept, stored[:]
