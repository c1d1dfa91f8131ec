"""What the probes take in: arrays, data frames or tensors; and the sentence that says what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError


def to_tensor(values: Any, like: Any = None) -> Tensor:
    """Return values as a tensor, on the device of `like` where that is a tensor; nothing is copied that need not be."""
    if isinstance(values, Tensor):
        found = values.detach()
    else:
        array = np.asarray(values)
        found = torch.from_numpy(array if array.flags.writeable else array.copy())
    return found.to(like.device) if isinstance(like, Tensor) else found


def on_device(values: np.ndarray, device: str | torch.device) -> np.ndarray | Tensor:
    """Return an array as a tensor on a CUDA device where one is named, else as it is: solvers work where it lies."""
    place = torch.device(device)
    return to_tensor(values).to(place) if place.type == "cuda" else values


def check_features(x: Tensor, which: str) -> None:
    """Raise DataError where features are not a table of finite numbers with rows and columns."""
    if x.ndim != 2:
        raise DataError(f"{which} must be a table (samples, dimensions), got shape {tuple(x.shape)}")
    if not x.numel():
        raise DataError(f"{which} of shape {tuple(x.shape)}: there is nothing to train on")
    wrong = ~torch.isfinite(x)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{which}: {int(wrong.any(1).sum())} embeddings are not finite, first row {row}, dimension {column}; "
            "compute them again"
        )
