"""What the measures of classes ask of classes, and how they are called in messages."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import DataError

NO_CLASS = -1


def checked_classes(
    features: Any, classes: np.ndarray, at_least: int = 1, names: tuple[str, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return classes as int64 and the positions of samples that have one.

    Parameters
    ----------
    features : array-like, (n, d)
    classes : ndarray of int, (n,)
        0 to L - 1, or -1 for none.
    at_least : int
        Classes that must be there.
    names : tuple of str, optional
        What the classes are called in messages.

    Raises
    ------
    DataError
        Shapes that do not fit, classes that are no numbers, or too few of them.
    """
    labels = np.asarray(classes)
    shape = tuple(features.shape) if hasattr(features, "shape") else np.shape(features)
    if len(shape) != 2 or labels.shape != shape[:1]:
        raise DataError(f"embeddings of shape {shape} and classes of shape {labels.shape} do not fit together")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"classes must be whole numbers (the first positive label), got {labels.dtype}")
    labels = labels.astype(np.int64)
    if len(labels) and labels.min() < NO_CLASS:
        raise DataError(f"class {labels.min()} of sample {labels.argmin()} is neither a number from 0 nor -1 for none")
    kept = np.flatnonzero(labels != NO_CLASS)
    if not len(kept):
        raise DataError("no sample has a class; distances need at least one positive label")
    present = np.unique(labels[kept])
    if len(present) < at_least:
        name = class_name(int(present[0]), names)
        said = name if names is None else repr(name)
        raise DataError(
            f"all {len(kept)} samples that have a class are of {said}, and {at_least} classes are needed; "
            "choose labels of which some samples are positive and some are not"
        )
    return labels, kept


def class_name(label: int, names: tuple[str, ...] | None) -> str:
    """Return a class's name, or its number where it has none."""
    return names[label] if names is not None and label < len(names) else f"class {label}"
