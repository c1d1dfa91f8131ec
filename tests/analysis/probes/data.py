"""Embeddings and labels with the study's prevalences, for the probes' tests."""

from __future__ import annotations

import numpy as np

# Images of each label in the study, of 3,818: 120:1 between the extremes.
STUDY_COUNTS = (2400, 516, 415, 216, 165, 163, 129, 127, 70, 68, 56, 49, 31, 20)


def study_like(rows: int, dimensions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings (rows, dimensions) with a decaying spectrum, off the origin, and labels (rows, 14)."""
    generator = np.random.default_rng(seed)
    spectrum = np.arange(1, dimensions + 1) ** -0.5
    hidden = generator.normal(size=(rows, dimensions)) * spectrum
    y = np.zeros((rows, len(STUDY_COUNTS)), dtype=bool)
    for label, count in enumerate(STUDY_COUNTS):
        signal = hidden @ generator.normal(size=dimensions)
        score = signal / signal.std() + generator.normal(size=rows)
        y[np.argsort(score)[-round(count / 3818 * rows) :], label] = True
    turn = np.linalg.qr(generator.normal(size=(dimensions, dimensions)))[0]
    return hidden @ turn + 0.1 * generator.normal(size=dimensions), y
