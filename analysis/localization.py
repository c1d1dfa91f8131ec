"""Scores of a heatmap against an annotated region, and the nulls that belong beside them.

In come a heatmap and a region on the pixels of the original image, (H, W) each; out go scores of one image. A heatmap
is NaN where the model did not look (outside its crop). Those pixels are left out of every score, because no map could
have marked them, and the share of the region that was in view is said beside the scores: nothing is lost unseen.

- pointing game (Zhang et al., ECCV 2016): does the peak lie in the region, within a tolerance? A peak of several pixels
  counts by the share of them that hits, so a flat map scores what a random point would.
- energy in the region (Wang et al., Score-CAM, 2020): the share of the map's mass that lies in it.
- IoU and Dice of the map, cut at a share of its maximum, with the region: at each threshold, and at the image's best
  one (`analysis.threshold_curves`).
- average precision over pixels: how well the map ranks them, whatever its scale.
- findings hit, missed and called in vain, for an F1 over findings (`analysis.finding_hits`).

An empty map (nothing positive in view) points nowhere and is a miss in all of them: it does not get a random point's
score. A point says where a finding is and not how far it reaches, so maps are held against it by their peak alone.

Radiologists' boxes of one finding overlap each other with IoU 0 to 0.76, and findings have their usual places. So no
score means anything alone: `centre_prior`, `location_prior` (where the label usually lies), `random_map` and the region
of another annotator are maps like any other and go through the same functions (more of them:
`analysis.heatmap_nulls`). Best IoU and Dice are chosen in sight of the truth and are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np

from analysis.finding_hits import Hits, peak_hits, region_hits
from analysis.threshold_curves import THRESHOLDS, Overlaps, average_precision, overlaps
from engine.errors import DataError

TOLERANCE_SHARE = 16 / 256
"""Default tolerance of the pointing game: this share of the image's shorter side (16 pixels at 256)."""

OF_EXTENT = (
    "energy",
    "iou",
    "best_iou",
    "best_threshold",
    "dice",
    "best_dice",
    "pixel_ap",
    "region_hit",
    "region_vain",
    "region_missed",
)
"""Scores that a point cannot give."""

_HALF = int(np.flatnonzero(THRESHOLDS == 0.5)[0])


@dataclass(frozen=True)
class LocalizationScores:
    """Scores of one heatmap against one region.

    Parameters
    ----------
    pointing_game : float
        Share of the peak's pixels that lie in the region within the tolerance; 0 or 1 unless the peak is tied.
    energy : float
        Share of the map's positive mass in the region, 0..1.
    iou : float
        Intersection over union of (map >= half its maximum) and the region.
    best_iou, best_threshold : float
        The largest IoU over `THRESHOLDS`, and where (the lowest such threshold; NaN for an empty map).
    dice, best_dice : float
        The same for the Dice coefficient.
    pixel_ap : float
        Average precision of the pixels in view, as scikit-learn's `average_precision_score` gives it.
    peak_hit, peak_vain, peak_missed, region_hit, region_vain, region_missed : float
        Findings hit, calls in vain and findings missed, by the peak and by the regions that reach half the maximum.
    region_visible : float
        Share of the region's pixels that lie inside the model's crop. 0: the scores are NaN, nothing could be scored.
    region_share : float
        Share of the pixels in view that the region covers: what a uniform map scores in energy.
    empty : bool
        Nothing positive in view.
    """

    pointing_game: float
    energy: float
    iou: float
    best_iou: float
    best_threshold: float
    region_visible: float
    region_share: float
    empty: bool
    dice: float
    best_dice: float
    pixel_ap: float
    peak_hit: float
    peak_vain: float
    peak_missed: float
    region_hit: float
    region_vain: float
    region_missed: float

    def as_dict(self) -> dict[str, float | bool]:
        """Return the fields by name."""
        return asdict(self)


def pointing_game(heat: np.ndarray, region: np.ndarray, tolerance: float = 0.0) -> float:
    """Return the share of the heatmap's peak that hits the region.

    Parameters
    ----------
    heat : ndarray of float, (H, W)
        NaN where the model did not look.
    region : ndarray of bool, (H, W)
    tolerance : float
        In pixels: a peak at most this far (Euclidean, between pixel centres) from a pixel of the region hits.

    Returns
    -------
    float
        0..1; 0 for an empty map; NaN where the region has no pixel in view.
    """
    heat, region, visible = _checked(heat, region)
    if not region.any():
        return float("nan")
    positive = np.where(visible, heat, -np.inf)
    top = positive.max()
    if top <= 0:
        return 0.0
    rows, columns = np.nonzero(positive == top)
    if tolerance <= 0:
        return float(region[rows, columns].mean())
    away = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((away[rows, columns] <= tolerance + 1e-3).mean())


def energy_inside(heat: np.ndarray, region: np.ndarray) -> float:
    """Return the share of the map's positive mass that lies in the region (arguments as in `pointing_game`)."""
    heat, region, visible = _checked(heat, region)
    if not region.any():
        return float("nan")
    positive = np.where(visible, np.maximum(heat, 0), 0).astype(np.float64)
    mass = positive.sum()
    return float(positive[region].sum() / mass) if mass > 0 else 0.0


def overlap_curves(heat: np.ndarray, region: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> Overlaps:
    """Return IoU and Dice of (map >= threshold x its maximum) with the region at each threshold.

    Parameters
    ----------
    heat, region : ndarray, (H, W)
        As in `pointing_game`.
    thresholds : ndarray of float, (T,)
        Shares of the map's maximum, in (0, 1].

    Returns
    -------
    Overlaps
        (T,) float64 each: zeros for an empty map; NaN where the region has no pixel in view.
    """
    heat, region, visible = _checked(heat, region)
    count = len(np.asarray(thresholds))
    values = heat[visible]
    if not region.any() or not values.max() > 0:
        nothing = np.full(count, 0.0 if region.any() else np.nan)
        return Overlaps(nothing, nothing)
    return overlaps(values, region[visible], thresholds)


def pixel_average_precision(heat: np.ndarray, region: np.ndarray) -> float:
    """Return the average precision of the pixels in view; 0 for an empty map, NaN where no pixel of the region is."""
    heat, region, visible = _checked(heat, region)
    values = heat[visible]
    if not region.any():
        return float("nan")
    return average_precision(values, region[visible]) if values.max() > 0 else 0.0


def score_heatmap(
    heat: np.ndarray, region: np.ndarray, tolerance: float | None = None, *, point: bool = False
) -> LocalizationScores:
    """Return all scores of one heatmap against one region.

    Parameters
    ----------
    heat : ndarray of float, (H, W)
        On the pixels of the original image, NaN outside the model's crop.
    region : ndarray of bool, (H, W)
        Mask or union of boxes (`engine.annotations.Annotations.region`).
    tolerance : float, optional
        Of the pointing game, in pixels; by default `TOLERANCE_SHARE` of the shorter side.
    point : bool
        The annotator pointed (`Annotations.only_points`): what speaks of extent is NaN.

    Raises
    ------
    DataError
        The region is empty: an image without annotation has nothing to be scored against.
    """
    whole = int(np.asarray(region, dtype=bool).sum())
    if not whole:
        raise DataError(
            "the region has no pixel: this label is not annotated in this image, so its heatmap cannot be scored; ask "
            "Annotations.has(sample, label) first"
        )
    heat, region, visible = _checked(heat, region)
    if tolerance is None:
        tolerance = TOLERANCE_SHARE * min(heat.shape)
    nothing = Hits(float("nan"), float("nan"), float("nan"))
    by_peak = peak_hits(heat, region, tolerance) if region.any() else nothing
    by_region = region_hits(heat, region) if region.any() else nothing
    curves = overlap_curves(heat, region)
    best, best_dice = (int(np.nan_to_num(curve, nan=-1.0).argmax()) for curve in curves)
    scores = LocalizationScores(
        pointing_game=pointing_game(heat, region, tolerance),
        energy=energy_inside(heat, region),
        iou=float(curves.iou[_HALF]),
        best_iou=float(curves.iou[best]),
        best_threshold=float(THRESHOLDS[best]) if curves.iou[best] > 0 else float("nan"),
        region_visible=float(region.sum() / whole),
        region_share=float(region.sum() / visible.sum()),
        empty=not bool((heat[visible] > 0).any()),
        dice=float(curves.dice[_HALF]),
        best_dice=float(curves.dice[best_dice]),
        pixel_ap=pixel_average_precision(heat, region),
        peak_hit=by_peak.hit,
        peak_vain=by_peak.vain,
        peak_missed=by_peak.missed,
        region_hit=by_region.hit,
        region_vain=by_region.vain,
        region_missed=by_region.missed,
    )
    nowhere: dict[str, Any] = dict.fromkeys(OF_EXTENT, float("nan"))
    return replace(scores, **nowhere) if point else scores


def centre_prior(height: int, width: int, spread: float = 0.25) -> np.ndarray:
    """Return a Gaussian bump at the middle of the image: the map that knows only how radiographs are centred.

    Parameters
    ----------
    height, width : int
        Of the original image, in pixels.
    spread : float
        Standard deviation as a share of each side.

    Returns
    -------
    ndarray of float32, (height, width)
        Maximum 1.
    """
    down = ((np.arange(height) + 0.5) / height - 0.5) / spread
    across = ((np.arange(width) + 0.5) / width - 0.5) / spread
    bump = np.exp(-0.5 * (down[:, None] ** 2 + across[None, :] ** 2))
    return (bump / bump.max()).astype(np.float32)


def location_prior(
    regions: Iterable[np.ndarray], frames: Iterable[Sequence[float]] | None = None, grid: int = 64
) -> np.ndarray:
    """Return the mean region of a label in training: where it usually lies, before looking at the image.

    Parameters
    ----------
    regions : iterable of ndarray of bool, (H, W)
        Of training samples only, never of the patient that is scored. Sizes may differ.
    frames : iterable of (x, y, width, height), optional
        The thorax in each image, in its pixels; by default the whole image. The prior lives in the frame's coordinates.
    grid : int
        Its resolution.

    Returns
    -------
    ndarray of float32, (grid, grid)
        Share of the training samples whose region covers each cell; `place_prior` lays it on an image.

    Raises
    ------
    DataError
        Where there is no region at all.
    """
    total = np.zeros((grid, grid))
    count = 0
    boxes = iter(frames) if frames is not None else None
    for region in regions:
        frame = next(boxes) if boxes is not None else (0, 0, region.shape[1], region.shape[0])
        total += _into_frame(np.asarray(region, dtype=np.float32), frame, grid)
        count += 1
    if not count:
        raise DataError("a location prior needs at least one annotated training region; there is none for this label")
    return (total / count).astype(np.float32)


def place_prior(prior: np.ndarray, height: int, width: int, frame: Sequence[float] | None = None) -> np.ndarray:
    """Lay a `location_prior` on an image of (height, width) pixels, in its frame (x, y, width, height), zero outside.

    Returns
    -------
    ndarray of float32, (height, width)
    """
    x, y, w, h = _whole_frame(frame if frame is not None else (0, 0, width, height))
    placed = np.zeros((height, width), dtype=np.float32)
    scaled = cv2.resize(np.asarray(prior, dtype=np.float32), (w, h), interpolation=cv2.INTER_LINEAR)
    top, left = max(0, y), max(0, x)
    bottom, right = min(height, y + h), min(width, x + w)
    if bottom > top and right > left:
        placed[top:bottom, left:right] = scaled[top - y : bottom - y, left - x : right - x]
    return placed


def random_map(height: int, width: int, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return uniform noise on a patch grid, enlarged like a heatmap: the map that knows nothing.

    Returns
    -------
    ndarray of float32, (height, width)
    """
    noise = rng.random(grid, dtype=np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)


def in_view_of(null: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a null map that is NaN where the heatmap is, so that both are scored on the same pixels."""
    return np.where(np.isnan(heat), np.float32(np.nan), null.astype(np.float32))


def _checked(heat: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the map, the region's pixels in view, and the pixels in view."""
    heat = np.asarray(heat)
    region = np.asarray(region, dtype=bool)
    if heat.ndim != 2 or heat.shape != region.shape:
        raise DataError(
            f"a heatmap of shape {heat.shape} cannot be scored against a region of shape {region.shape}; bring both to "
            "the original image's pixels (HeatMap.on_original)"
        )
    visible = ~np.isnan(heat)
    if not visible.any():
        raise DataError("the heatmap is NaN everywhere: its geometry says that the model saw nothing of this image")
    return heat, region & visible, visible


def _whole_frame(frame: Sequence[float]) -> tuple[int, int, int, int]:
    x, y, width, height = frame
    left, top = round(x), round(y)
    return left, top, max(1, round(x + width) - left), max(1, round(y + height) - top)


def _into_frame(region: np.ndarray, frame: Sequence[float], grid: int) -> np.ndarray:
    """Return the region within a frame as area means on a grid; what lies outside the image counts as 0."""
    x, y, width, height = _whole_frame(frame)
    top, left = max(0, -y), max(0, -x)
    bottom, right = max(0, y + height - region.shape[0]), max(0, x + width - region.shape[1])
    padded = np.pad(region, ((top, bottom), (left, right)))
    cut = padded[y + top : y + top + height, x + left : x + left + width]
    # INTER_AREA is an exact area mean only when shrinking, so a small frame is first enlarged by whole numbers.
    repeat_y, repeat_x = -(-grid // height), -(-grid // width)
    if repeat_y > 1 or repeat_x > 1:
        cut = cut.repeat(repeat_y, axis=0).repeat(repeat_x, axis=1)
    return cv2.resize(cut, (grid, grid), interpolation=cv2.INTER_AREA)
