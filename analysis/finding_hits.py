"""Does a heatmap find the findings that an annotator marked: counts for an F1 over findings.

In come a map and a region on the same pixels; out go counts of findings hit, missed and called in vain, which are added
up over images before they become an F1. A finding is one connected part of the region. Two readings of a map:

- by its peak: one call an image. The findings within the tolerance of the peak are hit; a peak that hits none is in
  vain. Of a tied peak, each pixel counts by its share.
- by its marked regions: every connected part of (map >= half its maximum) is a call. It hits a finding when at least a
  quarter of the marked part lies in it (intersection over the detected region, T = 0.25, as Wang et al., ChestX-ray8,
  CVPR 2017, score boxes), so a map that marks everything hits only what covers a quarter of it.

An empty map calls nothing: its findings are missed, and nothing is in vain.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

LEVEL = 0.5
"""Marked is what reaches this share of the map's maximum."""

HIT_SHARE = 0.25
"""Share of a marked part that must lie in a finding."""


class Hits(NamedTuple):
    """Findings hit, calls in vain, findings missed; fractions where a peak is tied."""

    hit: float
    vain: float
    missed: float


def f1(hit: np.ndarray | float, vain: np.ndarray | float, missed: np.ndarray | float) -> np.ndarray:
    """Return 2 hit / (2 hit + vain + missed), NaN where there is nothing to find and nothing called."""
    hit, vain, missed = (np.asarray(value, dtype=np.float64) for value in (hit, vain, missed))
    whole = 2 * hit + vain + missed
    return np.divide(2 * hit, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def peak_hits(heat: np.ndarray, region: np.ndarray, tolerance: float) -> Hits:
    """Return what the peak of a map finds.

    Parameters
    ----------
    heat : ndarray of float, (H, W)
        NaN where the model did not look.
    region : ndarray of bool, (H, W)
        In view of the model.
    tolerance : float
        In pixels, as in the pointing game.
    """
    findings = parts_of(region)
    top = np.nanmax(heat)
    if not top > 0:
        return Hits(0.0, 0.0, float(len(findings)))
    rows, columns = np.nonzero(heat == top)
    near = np.array([_distance(finding)[rows, columns] <= max(tolerance, 0) + 1e-3 for finding in findings])
    hit = float(near.mean(axis=1).sum()) if len(near) else 0.0
    vain = float(1 - near.any(axis=0).mean()) if len(near) else 1.0
    return Hits(hit, vain, len(findings) - hit)


def region_hits(heat: np.ndarray, region: np.ndarray, level: float = LEVEL, share: float = HIT_SHARE) -> Hits:
    """Return what the marked parts of a map find (arguments as in `peak_hits`)."""
    findings = parts_of(region)
    top = np.nanmax(heat)
    if not top > 0:
        return Hits(0.0, 0.0, float(len(findings)))
    marked = parts_of(np.nan_to_num(heat, nan=-np.inf) >= level * float(top))
    within = np.array([[(part & finding).sum() / part.sum() for finding in findings] for part in marked])
    hits = within.reshape(len(marked), len(findings)) >= share
    hit = float(hits.any(axis=0).sum())
    return Hits(hit, float((~hits.any(axis=1)).sum()), len(findings) - hit)


def parts_of(region: np.ndarray) -> list[np.ndarray]:
    """Return the connected parts of a region (pixels that touch, also at corners), (H, W) bool each."""
    count, names = cv2.connectedComponents(np.asarray(region, dtype=np.uint8), connectivity=8)
    return [names == number for number in range(1, count)]


def _distance(finding: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform((~finding).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
