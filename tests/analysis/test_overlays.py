"""What a drawn heatmap must and must not show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import overlays
from engine.errors import DataError

GREY = np.full((200, 300), 120, dtype=np.uint8)


def a_heat() -> np.ndarray:
    heat = np.zeros((200, 300), dtype=np.float32)
    heat[80:120, 140:180] = 1
    heat[:, :50] = np.nan
    return heat


def test_image_is_untouched_where_there_is_no_evidence() -> None:
    picture = overlays.overlay(GREY, a_heat(), side=300, mark_peak=False)
    assert picture.shape == (200, 300, 3) and picture.dtype == np.uint8
    assert (picture[10:60, 60:290] == 120).all()


def test_strongest_evidence_has_the_scales_last_colour_at_its_opacity() -> None:
    picture = overlays.overlay(GREY, a_heat(), side=300, opacity=0.5, mark_peak=False)
    expected = 0.5 * 120 + 0.5 * overlays.heat_colours()[-1].astype(float)
    np.testing.assert_allclose(picture[100, 160], expected, atol=1)


def test_area_outside_the_crop_is_darker_and_hatched() -> None:
    picture = overlays.overlay(GREY, a_heat(), side=300, mark_peak=False)
    outside = picture[:, :50, 0]
    assert outside.max() < 120 and len(np.unique(outside)) == 2


def test_flat_and_empty_maps_draw_without_a_peak() -> None:
    for value in (0.0, -1.0):
        picture = overlays.overlay(GREY, np.full(GREY.shape, value, dtype=np.float32), side=300)
        assert (picture == 120).all()
    flat = overlays.overlay(GREY, np.full(GREY.shape, 0.3, dtype=np.float32), side=300)
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


def test_ring_lies_at_the_peak() -> None:
    heat = np.zeros((100, 100), dtype=np.float32)
    heat[30, 70] = 1e-6
    with_ring = overlays.overlay(GREY[:100, :100], heat, side=400, opacity=0)
    changed = np.argwhere((with_ring != 120).any(axis=2))
    np.testing.assert_allclose(changed.mean(axis=0), (30.5 * 4 - 0.5, 70.5 * 4 - 0.5), atol=0.6)


def test_box_lies_where_its_pixels_are_at_any_size() -> None:
    box = overlays.Box(60, 40, 120, 80)
    for side in (150, 300, 600):
        picture = overlays.overlay(GREY, boxes=[box], side=side)
        changed = np.argwhere((picture != 120).any(axis=2))
        scale = side / 300
        low, high = changed.min(axis=0), changed.max(axis=0) + 1
        np.testing.assert_allclose((low + high) / 2, (80 * scale, 120 * scale), atol=1)
        np.testing.assert_allclose(high - low, (80 * scale, 120 * scale), atol=8 + side / 200)


def test_outline_follows_the_mask_and_leaves_its_inside_free() -> None:
    mask = np.zeros(GREY.shape, dtype=bool)
    mask[50:150, 100:200] = True
    picture = overlays.overlay(GREY, mask=mask, side=300)
    changed = (picture != 120).any(axis=2)
    assert not changed[60:140, 110:190].any()
    assert changed[45:55, 150].any() and changed[100, 195:205].any()


@pytest.mark.parametrize("corner", [(0, 0), (280, 0), (0, 185), (280, 185)])
def test_labels_stay_inside_the_picture(corner: tuple[int, int]) -> None:
    box = overlays.Box(*corner, 20, 15, label="Enlarged Cardiomediastinum")
    plain = overlays.overlay(GREY, boxes=[overlays.Box(*corner, 20, 15)], side=300)
    labelled = overlays.overlay(GREY, boxes=[box], side=300)
    plate = (labelled == np.array(overlays.TRUTH)).all(axis=2) & (plain != labelled).any(axis=2)
    assert plate.sum() > 500


def test_colour_images_and_tiny_images_draw() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (5, 9, 3), dtype=np.uint8)
    assert overlays.overlay(colour, np.ones((5, 9), dtype=np.float32), side=90).shape == (50, 90, 3)


def test_map_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(7, 7\).*\(200, 300\)"):
        overlays.overlay(GREY, np.zeros((7, 7), dtype=np.float32))


def test_sheet_holds_every_panel(tmp_path: Path) -> None:
    panels = [
        overlays.Panel("Radiograph"),
        overlays.Panel("Zero-shot", a_heat(), ("pointing game hit", "energy 0.2")),
        overlays.Panel("Fine-tuning under a name that does not fit", a_heat() * 0, (), note="empty: " + "w " * 80),
    ]
    one = overlays.sheet(GREY, panels, boxes=[overlays.Box(60, 40, 120, 80, "Edema")], title="Edema", side=240)
    two = overlays.sheet(GREY, panels * 3, side=240)
    assert one.shape[1] > 3 * 240 and two.shape[0] > one.shape[0]
    overlays.save_picture(one, tmp_path / "new" / "sheet.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "sheet.png")), one)
    with pytest.raises(DataError, match="at least one panel"):
        overlays.sheet(GREY, [])
