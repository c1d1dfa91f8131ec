"""Overlap of a heatmap with a region at every threshold, from one histogram, and its area under precision and recall.

In come a map and a region in view of the model, as flat arrays; out go IoU and Dice at each threshold, and the average
precision over pixels. A threshold is a share of the map's maximum. Each pixel is put into its bin once, inside and
outside the region apart; sums from the top bin down then count the marked pixels at all thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THRESHOLDS = np.round(np.arange(0.01, 1.005, 0.01), 2)
"""Cuts as shares of the map's maximum, (100,) float64."""


class Overlaps(NamedTuple):
    """Overlap at each threshold, (T,) float64 each."""

    iou: np.ndarray
    dice: np.ndarray


def overlaps(values: np.ndarray, inside: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> Overlaps:
    """Return IoU and Dice of (value >= threshold x maximum) with a region, at all thresholds by one histogram.

    Parameters
    ----------
    values : ndarray of float, (n,)
        Of the pixels in view; the maximum must be above 0.
    inside : ndarray of bool, (n,)
        Which of them lie in the region; at least one.
    thresholds : ndarray of float, (T,)
        In (0, 1], in any order.
    """
    cuts = np.asarray(thresholds, dtype=np.float64)
    order = np.argsort(cuts, kind="stable")
    # A pixel's bin is the number of levels that it reaches.
    bins = np.searchsorted(cuts[order] * float(values.max()), values, side="right")
    hits = _reached(bins[inside], len(cuts))
    marked = hits + _reached(bins[~inside], len(cuts))
    size = int(inside.sum())
    iou, dice = np.empty(len(cuts)), np.empty(len(cuts))
    iou[order] = hits / (marked + size - hits)
    dice[order] = 2 * hits / (marked + size)
    return Overlaps(iou, dice)


def average_precision(values: np.ndarray, inside: np.ndarray) -> float:
    """Return the average precision of the pixels' values for lying in a region, as scikit-learn defines it.

    The sum over distinct values, from the largest down, of the precision there times the recall gained; pixels of equal
    value count together.

    Parameters
    ----------
    values : ndarray of float, (n,)
    inside : ndarray of bool, (n,)
        At least one true.
    """
    # Both parts are sorted apart: that is less work than sorting all with their truth.
    within, beyond = np.sort(values[inside]), np.sort(values[~inside])
    distinct, counts = np.unique(within, return_counts=True)
    found = np.cumsum(counts[::-1])[::-1]
    false = len(beyond) - np.searchsorted(beyond, distinct, side="left")
    return float((counts * (found / (found + false))).sum() / len(within))


def _reached(bins: np.ndarray, count: int) -> np.ndarray:
    """Return how many of the binned pixels reach each level, (count,) int64."""
    histogram = np.bincount(bins, minlength=count + 1)
    return histogram[::-1].cumsum()[::-1][1:]
