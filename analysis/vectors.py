"""What several rooms do to embeddings (n, d) before they compare them."""

from __future__ import annotations

import numpy as np

from engine.errors import DataError


def normalise_rows(features: np.ndarray) -> np.ndarray:
    """Return embeddings (n, d) as float64 of length 1; DataError for a row of length 0 or not finite."""
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2:
        raise DataError(f"embeddings must be a table (samples, dimensions), got shape {values.shape}")
    lengths = np.linalg.norm(values, axis=1)
    wrong = ~(np.isfinite(lengths) & (lengths > 0))
    if wrong.any():
        raise DataError(
            f"{wrong.sum()} embeddings cannot be normalised, first row {np.flatnonzero(wrong)[0]} of length "
            f"{lengths[wrong][0]}; compute them again in fp32"
        )
    return values / lengths[:, None]


def without_rounding(products: np.ndarray, largest: float = 1.0) -> np.ndarray:
    """Return products of rows rounded to 12 digits of the largest that they can be, so that equal ones are tied.

    In a matrix product the last bits depend on where a row stands, and would order rows that are the same.
    """
    unit = largest if largest > 0 else 1.0
    return np.round(products / unit, 12) * unit
