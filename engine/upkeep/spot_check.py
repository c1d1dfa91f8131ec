"""Whether embeddings that others made are those of a model: some rows are computed again and compared.

Comes in: a source of rows and a loaded encoder. Goes out: the cosine of each compared row. Rows that were scaled to
length one are refused as well: the cache keeps embeddings as the model gives them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine import pixels
from engine.errors import DataError, ImageError, UsageError
from engine.extract import as_array
from engine.upkeep.importing import Source

LEAST_COSINE = 0.999
MOST_STRETCH = 0.01
SAMPLES = 32


def compare_with(encoder: Any, source: Source, samples: int = SAMPLES) -> np.ndarray:
    """Compute some rows of a source again.

    Parameters
    ----------
    encoder : EncoderLike
    source : Source
    samples : int
        Rows to compare, spread evenly over all files.

    Returns
    -------
    ndarray of float64, (m,)
        Cosines; fewer than asked for where images cannot be read.

    Raises
    ------
    UsageError
        Another dimension, other embeddings, or rows of another length than the model's.
    DataError
        No image of the chosen rows can be read.
    """
    if source.dim != encoder.dim:
        raise UsageError(f"rows of {source.dim} numbers are not those of {encoder.id}, which gives {encoder.dim}")
    wanted = np.unique(np.linspace(0, source.rows - 1, min(samples, source.rows)).astype(np.int64))
    names, given, computed = [], [], []
    seen, problem = 0, ""
    for pair, start, values, vectors in source.blocks():
        for row in wanted[(wanted >= seen) & (wanted < seen + len(values))] - seen:
            try:
                computed.append(_embedded(encoder, source, values[row]))
            except ImageError as error:
                problem = problem or str(error)
                continue
            given.append(np.asarray(vectors[row], np.float64))
            names.append(f"row {start + row} of {pair.vectors.name} ({values[row][:80]})")
        seen += len(values)
    if not names:
        raise DataError(
            f"none of {len(wanted)} rows can be compared with {encoder.id}: {problem}; say where the images are with "
            "--root"
        )
    theirs, ours = np.stack(given), np.stack(computed)
    lengths = np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1)
    cosines = (theirs * ours).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-12)
    worst = int(np.argmin(cosines))
    if not cosines[worst] >= LEAST_COSINE:
        raise UsageError(
            f"these are not the embeddings of {encoder.id}: {names[worst]} has a cosine of {cosines[worst]:.4f} to "
            f"what the model gives, less than {LEAST_COSINE}; leave out --encoder-id to import them under an id of "
            "their own"
        )
    if np.abs(lengths[0] / lengths[1] - 1).max() > MOST_STRETCH:
        raise UsageError(
            f"these embeddings point where those of {encoder.id} do but are scaled (lengths {lengths[0].min():.3g} to "
            f"{lengths[0].max():.3g}, the model's {lengths[1].min():.3g} to {lengths[1].max():.3g}); the cache keeps "
            "them as the model gives them: leave out --encoder-id to import them under an id of their own"
        )
    return cosines


def _embedded(encoder: Any, source: Source, value: str) -> np.ndarray:
    content = source.content(value)
    if isinstance(content, str):
        return as_array(encoder.encode_text([content]))[0].astype(np.float64)
    values = encoder.preprocess(pixels.decode(content))[0]
    return as_array(encoder.encode_pixels(values[None]))[0].astype(np.float64)
