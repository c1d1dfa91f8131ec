"""Scores against loops over pixels, and the nulls against what they are meant to know."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from analysis import finding_hits, localization
from engine.errors import DataError


def a_map(seed: int, height: int = 17, width: int = 23, crop: bool = True) -> np.ndarray:
    heat = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    heat = np.round(heat * 8) / 8  # coarse values, so that the peak is tied
    if crop:
        heat[:, :3] = np.nan
        heat[:, -2:] = np.nan
    return heat


def a_region(seed: int, height: int = 17, width: int = 23) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000)
    region = np.zeros((height, width), dtype=bool)
    for _ in range(2):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        region[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = True
    region[8, 10] = True  # in view of every crop
    return region


def brute_pointing(heat: np.ndarray, region: np.ndarray, tolerance: float) -> float:
    seen = [(r, c) for r in range(heat.shape[0]) for c in range(heat.shape[1]) if not math.isnan(heat[r, c])]
    top = max(heat[p] for p in seen)
    peaks = [p for p in seen if heat[p] == top]
    targets = [p for p in seen if region[p]]
    if not targets:
        return float("nan")
    hits = [any(math.dist(p, q) <= tolerance for q in targets) for p in peaks]
    return sum(hits) / len(hits)


def brute_overlaps(heat: np.ndarray, region: np.ndarray, threshold: float) -> tuple[float, float]:
    seen = [(r, c) for r in range(heat.shape[0]) for c in range(heat.shape[1]) if not math.isnan(heat[r, c])]
    top = max(float(heat[p]) for p in seen)
    marked = {p for p in seen if float(heat[p]) >= threshold * top}
    truth = {p for p in seen if region[p]}
    common = len(marked & truth)
    return common / len(marked | truth), 2 * common / (len(marked) + len(truth))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("crop", [True, False], ids=["cropped", "whole"])
def test_scores_equal_loops_over_pixels(seed: int, crop: bool) -> None:
    heat, region = a_map(seed, crop=crop), a_region(seed)
    for tolerance in (0.0, 1.0, 1.5, 4.0):
        assert localization.pointing_game(heat, region, tolerance) == pytest.approx(
            brute_pointing(heat, region, tolerance), nan_ok=True
        )
    visible = ~np.isnan(heat)
    energy = sum(float(v) for v in heat[visible & region]) / sum(float(v) for v in heat[visible])
    assert localization.energy_inside(heat, region) == pytest.approx(energy)
    curve, dice = np.transpose([brute_overlaps(heat, region, t) for t in localization.THRESHOLDS])
    found = localization.overlap_curves(heat, region)
    np.testing.assert_allclose(found.iou, curve, rtol=1e-12)
    np.testing.assert_allclose(found.dice, dice, rtol=1e-12)

    scores = localization.score_heatmap(heat, region, tolerance=1.5)
    assert scores.best_iou == pytest.approx(max(curve)) and scores.best_dice == pytest.approx(max(dice))
    if max(curve) > 0:
        assert scores.best_threshold == localization.THRESHOLDS[list(curve).index(max(curve))]
    assert (scores.iou, scores.dice) == pytest.approx(brute_overlaps(heat, region, 0.5))
    assert scores.pixel_ap == pytest.approx(average_precision_score(region[visible], heat[visible]), abs=1e-12)
    assert scores.region_visible == pytest.approx((region & visible).sum() / region.sum())
    assert scores.region_share == pytest.approx((region & visible).sum() / visible.sum())
    assert not scores.empty


def test_map_that_is_the_region_scores_one() -> None:
    region = a_region(3)
    scores = localization.score_heatmap(region.astype(np.float32), region, tolerance=0)
    assert (scores.pointing_game, scores.energy, scores.iou, scores.best_iou) == (1, 1, 1, 1)


def test_flat_map_scores_what_a_random_point_does() -> None:
    region = a_region(4)
    scores = localization.score_heatmap(np.full(region.shape, 0.25, dtype=np.float32), region, tolerance=0)
    assert scores.pointing_game == pytest.approx(region.mean())
    assert scores.energy == pytest.approx(region.mean())


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_empty_map_is_a_miss_and_is_named_empty(value: float) -> None:
    region = a_region(5)
    scores = localization.score_heatmap(np.full(region.shape, value, dtype=np.float32), region)
    assert (scores.pointing_game, scores.energy, scores.iou, scores.best_iou) == (0, 0, 0, 0)
    assert math.isnan(scores.best_threshold)
    assert scores.empty


def test_negative_values_carry_no_energy() -> None:
    heat = np.array([[1.0, -5.0], [1.0, 0.0]], dtype=np.float32)
    region = np.array([[True, True], [False, False]])
    assert localization.energy_inside(heat, region) == 0.5


def test_region_outside_the_crop_is_said_and_not_scored() -> None:
    heat = np.ones((8, 8), dtype=np.float32)
    heat[:, :4] = np.nan
    region = np.zeros((8, 8), dtype=bool)
    region[2:4, 0:2] = True
    scores = localization.score_heatmap(heat, region)
    assert scores.region_visible == 0
    assert all(math.isnan(v) for v in (scores.pointing_game, scores.energy, scores.iou, scores.best_iou))


def test_half_visible_region_is_scored_on_its_visible_half() -> None:
    heat = np.zeros((8, 8), dtype=np.float32)
    heat[:, :4] = np.nan
    heat[2:4, 4:6] = 1
    region = np.zeros((8, 8), dtype=bool)
    region[2:4, 2:6] = True
    scores = localization.score_heatmap(heat, region, tolerance=0)
    assert (scores.region_visible, scores.iou, scores.energy) == (0.5, 1, 1)


def test_shapes_that_differ_are_refused_with_both_named() -> None:
    with pytest.raises(DataError, match=r"\(4, 4\).*\(5, 4\)"):
        localization.pointing_game(np.zeros((4, 4)), np.zeros((5, 4), dtype=bool))
    with pytest.raises(DataError, match="saw nothing"):
        localization.energy_inside(np.full((4, 4), np.nan), np.ones((4, 4), dtype=bool))


def test_centre_prior_peaks_at_the_middle_and_is_symmetric() -> None:
    prior = localization.centre_prior(21, 31)
    assert np.unravel_index(prior.argmax(), prior.shape) == (10, 15)
    assert prior.dtype == np.float32 and prior.max() == 1
    np.testing.assert_array_equal(prior, prior[::-1])
    np.testing.assert_array_equal(prior, prior[:, ::-1])


def test_location_prior_is_the_mean_of_the_masks_in_the_common_frame() -> None:
    small = np.zeros((32, 32), dtype=bool)
    small[:16, :16] = True
    large = np.zeros((128, 64), dtype=bool)
    large[:64] = True
    prior = localization.location_prior([small, large], grid=32)
    expected = np.zeros((32, 32))
    expected[:16, :16] = 1.0
    expected[:16, 16:] = 0.5
    np.testing.assert_allclose(prior, expected, atol=1e-6)
    placed = localization.place_prior(prior, 64, 64)
    assert placed.shape == (64, 64)
    assert placed[:30, :30].min() == pytest.approx(1) and placed[34:, :].max() == 0


def test_location_prior_is_the_area_mean_of_a_brute_force_sum() -> None:
    region = np.random.default_rng(0).random((40, 60)) > 0.5
    prior = localization.location_prior([region], grid=20)
    expected = region.reshape(20, 2, 20, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(prior, expected, atol=1e-6)


def test_location_prior_follows_the_thorax_frame() -> None:
    region = np.zeros((100, 100), dtype=bool)
    region[40:50, 20:30] = True
    prior = localization.location_prior([region], frames=[(20, 40, 40, 40)], grid=40)
    assert prior[:10, :10].min() == 1 and prior.sum() == pytest.approx(100)
    placed = localization.place_prior(prior, 200, 100, frame=(50, 100, 40, 40))
    expected = np.zeros((200, 100), dtype=np.float32)
    expected[100:110, 50:60] = 1
    np.testing.assert_allclose(placed, expected, atol=1e-6)


def test_frame_that_reaches_outside_the_image_counts_it_as_nothing() -> None:
    prior = localization.location_prior([np.ones((10, 10), dtype=bool)], frames=[(-10, -10, 20, 20)], grid=20)
    assert prior.sum() == pytest.approx(100)
    assert prior[10:, 10:].min() == 1
    placed = localization.place_prior(np.ones((20, 20), dtype=np.float32), 10, 10, frame=(5, -5, 20, 10))
    assert placed.sum() == 25 and placed[:5, 5:].min() == 1


def test_location_prior_without_regions_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one"):
        localization.location_prior([])


def test_random_map_depends_on_its_generator_only() -> None:
    one = localization.random_map(32, 48, (4, 6), np.random.Generator(np.random.PCG64(1)))
    same = localization.random_map(32, 48, (4, 6), np.random.Generator(np.random.PCG64(1)))
    other = localization.random_map(32, 48, (4, 6), np.random.Generator(np.random.PCG64(2)))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (32, 48) and (one != other).any()


def test_nulls_are_scored_where_the_model_looked() -> None:
    heat = a_map(1)
    null = localization.in_view_of(localization.centre_prior(*heat.shape), heat)
    np.testing.assert_array_equal(np.isnan(null), np.isnan(heat))


@pytest.mark.parametrize("seed", range(6))
def test_pixel_ap_equals_scikit_learn_on_smooth_and_tied_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heat = rng.random((40, 30)).astype(np.float32)
    if seed % 2:
        heat = np.maximum(np.round(heat * 5) - 2, 0).astype(np.float32)
    region = rng.random((40, 30)) < 0.2
    found = localization.pixel_average_precision(heat, region)
    assert found == pytest.approx(average_precision_score(region.ravel(), heat.ravel()), abs=1e-12)


def test_overlaps_take_thresholds_in_any_order() -> None:
    heat, region = a_map(7), a_region(7)
    cuts = np.array([0.8, 0.1, 0.5, 1.0])
    found = localization.overlap_curves(heat, region, cuts)
    np.testing.assert_allclose(found.iou, [brute_overlaps(heat, region, cut)[0] for cut in cuts])


def test_findings_by_the_peak_and_by_marked_regions() -> None:
    region = np.zeros((20, 30), dtype=bool)
    region[2:6, 2:6] = region[2:6, 20:24] = region[14:18, 10:14] = True  # three findings
    heat = np.zeros((20, 30), dtype=np.float32)
    heat[3:5, 3:5] = 1.0  # inside the first finding
    heat[2:6, 18:22] = 0.8  # half of it inside the second
    heat[10:12, 0:2] = 0.7  # in vain
    heat[14:20, 8:24] = 0.6  # 16 of 96 pixels in the third: too large to be a hit
    heat[0, 29] = 0.4  # below half the maximum: no call
    scores = localization.score_heatmap(heat, region, tolerance=0)
    assert (scores.peak_hit, scores.peak_vain, scores.peak_missed) == (1, 0, 2)
    assert (scores.region_hit, scores.region_vain, scores.region_missed) == (2, 2, 1)
    assert finding_hits.f1(scores.region_hit, scores.region_vain, scores.region_missed) == pytest.approx(4 / 7)


def test_peak_beside_every_finding_is_in_vain_unless_within_the_tolerance() -> None:
    region = np.zeros((12, 12), dtype=bool)
    region[2:4, 2:4] = True
    heat = np.zeros((12, 12), dtype=np.float32)
    heat[6, 3] = 1
    assert finding_hits.peak_hits(heat, region, 2.0) == (0, 1, 1)
    assert finding_hits.peak_hits(heat, region, 3.0) == (1, 0, 0)
    heat[2, 2] = 1  # a tied peak: half of it hits
    assert finding_hits.peak_hits(heat, region, 2.0) == (0.5, 0.5, 0.5)


def test_empty_map_calls_nothing() -> None:
    region = np.zeros((6, 6), dtype=bool)
    region[1, 1] = region[4, 4] = True
    scores = localization.score_heatmap(np.zeros((6, 6), dtype=np.float32), region)
    assert (scores.peak_hit, scores.peak_vain, scores.peak_missed) == (0, 0, 2)
    assert (scores.region_hit, scores.region_vain, scores.region_missed) == (0, 0, 2)
    assert (scores.pixel_ap, scores.best_dice) == (0, 0)


def test_point_is_scored_by_the_peak_alone() -> None:
    region = np.zeros((16, 16), dtype=bool)
    region[5, 5] = True
    heat = np.zeros((16, 16), dtype=np.float32)
    heat[6, 6] = 1
    scores = localization.score_heatmap(heat, region, tolerance=2, point=True)
    assert (scores.pointing_game, scores.peak_hit, scores.peak_vain) == (1, 1, 0)
    assert all(math.isnan(getattr(scores, name)) for name in localization.OF_EXTENT)


def test_image_without_annotation_is_an_error_and_not_a_score() -> None:
    with pytest.raises(DataError, match="not annotated in this image"):
        localization.score_heatmap(np.ones((4, 4), dtype=np.float32), np.zeros((4, 4), dtype=bool))
