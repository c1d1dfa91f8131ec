"""What the tests of fine-tuning learn: bright quarters, and texts that name them."""

from __future__ import annotations

from typing import Any

import numpy as np

LABELS = ("left", "right")


def a_task(encoder: Any, count: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dim noise, with a bright upper left quarter for the first label and a bright lower right one for the second."""
    rng = np.random.default_rng(seed)
    height, width = encoder.preprocess.size
    pixels = rng.integers(0, 60, (count, height, width, 3), dtype=np.uint8)
    y = rng.integers(0, 2, (count, 2))
    pixels[y[:, 0] == 1, : height // 2, : width // 2] += 150
    pixels[y[:, 1] == 1, height // 2 :, width // 2 :] += 150
    return pixels, y


def texts_of(y: np.ndarray) -> list[str]:
    """Name what is there; every seventh image has no text."""
    said = [" and ".join(np.array(["left opacity", "right effusion"])[row == 1]) or "clear lung" for row in y]
    return ["" if number % 7 == 3 else text for number, text in enumerate(said)]
