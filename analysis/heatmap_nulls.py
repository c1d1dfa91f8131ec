"""What a heatmap has to beat before it means anything, beyond the priors of `analysis.localization`.

In come the maps of one setting for all findings; out go, for each finding, maps that know less: the mean map of other
patients (it has not seen this image), and the map of another label in the same image (it does not look for this
finding). `other_annotators` scores one annotator's region against another's: as far as people agree, and so about as
far as a map can be asked to go.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.localization import LocalizationScores, score_heatmap


def mean_maps_of_others(maps: Sequence[np.ndarray], groups: Sequence[str]) -> list[np.ndarray | None]:
    """Return, for each map, the mean of the maps of other groups, each brought to a maximum of 1.

    Parameters
    ----------
    maps : n arrays of float, (rows, columns)
        Raw maps of one setting and label on the model's grid; what is negative counts as 0.
    groups : (n,) str
        Patient of each.

    Returns
    -------
    list of ndarray of float32 (rows, columns), or None
        None where no other patient has one.
    """
    if not len(maps):
        return []
    stacked = np.maximum(np.asarray(maps, dtype=np.float64), 0)
    tops = stacked.max(axis=(1, 2), keepdims=True)
    shares = np.divide(stacked, tops, out=np.zeros_like(stacked), where=tops > 0)
    names = np.asarray(groups, dtype=object)
    found: list[np.ndarray | None] = []
    for name in names:
        others = names != name
        found.append(shares[others].mean(axis=0).astype(np.float32) if others.any() else None)
    return found


def other_label(label: str, names: Sequence[str], present: Sequence[str], rng: np.random.Generator) -> str | None:
    """Return a label to look for in vain: one that the image does not have, drawn evenly; None where there is none."""
    free = [name for name in names if name != label and name not in set(present)]
    return str(rng.choice(free)) if free else None


def other_annotators(
    regions: Mapping[str, np.ndarray], tolerance: float | None
) -> list[tuple[str, str, LocalizationScores]]:
    """Score each annotator's region as if it were a heatmap against each other's.

    Parameters
    ----------
    regions : mapping from annotator to ndarray of bool, (H, W)
        None of them empty.
    tolerance : float, optional
        Of the pointing game, in pixels.

    Returns
    -------
    list of (annotator, scored against, LocalizationScores)
        Both orders of every pair. The "peak" of a region is tied over all of it, so its pointing game is the share of
        the one region that lies in (or within the tolerance of) the other.
    """
    return [
        (one, other, score_heatmap(regions[one].astype(np.float32), regions[other], tolerance))
        for one, other in itertools.permutations(regions, 2)
    ]
