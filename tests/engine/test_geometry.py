"""Geometry against brute force: where a dot, drawn into an image, turns up in the input, and the other way round."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UsageError
from engine.geometry import Geometry
from engine.pixels import Preprocess, decode

MODES = ["shortest", "longest", "squash"]
SHAPES = [(300, 211), (211, 300), (97, 641), (640, 99), (1023, 77), (224, 224), (61, 53), (17, 29)]


def preprocess_of(mode: str, size: int | tuple[int, int] = 64) -> Preprocess:
    return Preprocess.from_cfg({"size": size, "resize_mode": mode, "interpolation": "bilinear"})


def centroid(weights: np.ndarray) -> tuple[float, float]:
    """x and y of the centre of mass, in continuous coordinates."""
    weights = np.nan_to_num(weights.astype(float))
    y, x = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    return float((x * weights).sum() / weights.sum()), float((y * weights).sum() / weights.sum())


def blob(shape: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * radius**2))).astype(np.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [64, (48, 80)], ids=str)
def test_points__land_where_a_drawn_blob_turns_up(mode, shape, size):
    preprocess = preprocess_of(mode, size)
    x, y, width, height = preprocess.geometry(*shape).visible_box()
    # the blob must stay inside of what is seen, or its centre of mass moves
    at_x, at_y = x + 0.55 * width, y + 0.45 * height
    radius = max(1.0, min(width, height) / 16)
    pixels, geometry = preprocess(decode(blob(shape, at_x, at_y, radius)))
    expected = geometry.points_to_input([at_x, at_y])
    # a pixel of the input is what the centre of mass can be told to
    np.testing.assert_allclose(centroid(pixels[..., 0]), expected, atol=0.75)
    np.testing.assert_allclose(geometry.points_to_original(expected), [at_x, at_y])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes__cover_the_bright_pixels_of_a_drawn_box(mode, shape):
    preprocess = preprocess_of(mode)
    left, top, width, height = preprocess.geometry(*shape).visible_box()
    box = np.round([left + width * 0.3, top + height * 0.2, max(1, width * 0.5), max(1, height * 0.6)]).astype(int)
    drawn = np.zeros(shape, np.uint8)
    drawn[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
    pixels, geometry = preprocess(decode(drawn))
    carried = geometry.boxes_to_input(box[None])[0]
    bright = pixels[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    found = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    np.testing.assert_allclose(carried, found, atol=1.01)
    np.testing.assert_allclose(geometry.boxes_to_original(carried[None])[0], box, atol=1e-9)


def test_boxes__outside_of_the_crop_have_no_area():
    geometry = preprocess_of("shortest").geometry(100, 400)
    np.testing.assert_allclose(geometry.visible_box(), [150, 0, 100, 100])
    boxes = np.array([[0, 10, 50, 50], [140, 0, 20, 100], [160, 20, 10, 10]])
    carried = geometry.boxes_to_input(boxes)
    np.testing.assert_allclose(carried[0, 2:], [0, 38.4 - 6.4])
    np.testing.assert_allclose(carried[1], [0, 0, 6.4, 64])
    np.testing.assert_allclose(carried[2], [6.4, 12.8, 6.4, 6.4])
    unclipped = geometry.boxes_to_input(boxes, clip=False)
    np.testing.assert_allclose(unclipped[0], [-96, 6.4, 32, 32])
    np.testing.assert_allclose(geometry.boxes_to_original(unclipped), boxes)


def test_boxes__of_padding_are_clipped_to_the_image():
    geometry = preprocess_of("longest").geometry(100, 400)
    assert geometry.crop == (-24, 0, 64, 64)
    np.testing.assert_allclose(geometry.boxes_to_original([[0, 0, 64, 64]]), [[0, 0, 400, 100]])
    np.testing.assert_allclose(geometry.boxes_to_original([[0, 0, 64, 64]], clip=False), [[0, -150, 400, 400]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_original__brings_the_preprocessed_blob_back(mode, shape):
    preprocess = preprocess_of(mode)
    x, y, width, height = preprocess.geometry(*shape).visible_box()
    at_x, at_y = x + 0.55 * width, y + 0.45 * height
    drawn = blob(shape, at_x, at_y, max(1.0, min(width, height) / 12))
    pixels, geometry = preprocess(decode(drawn))
    carried = geometry.to_original(pixels[..., 0].astype(float))
    assert carried.shape == shape
    assert carried.dtype == np.float32
    tolerance = 0.75 / np.array(geometry.scale)[::-1] + 0.5
    assert (np.abs(np.subtract(centroid(carried), (at_x, at_y))) <= tolerance).all()
    peak_y, peak_x = np.unravel_index(np.nanargmax(carried), shape)
    assert (np.abs(np.subtract((peak_x + 0.5, peak_y + 0.5), (at_x, at_y))) <= tolerance + 0.5).all()


@pytest.mark.parametrize("mode", MODES)
def test_to_original__same_for_every_odd_size_as_looking_each_pixel_up(mode):
    rng = np.random.default_rng(0)
    for shape in [(31, 57), (57, 31), (200, 90), (9, 300)]:
        geometry = preprocess_of(mode, (60, 44)).geometry(*shape)
        grid = rng.random((5, 7))
        carried = geometry.to_original(grid)
        for row, column in rng.integers(0, shape, (200, 2)):
            x, y = geometry.points_to_input([column + 0.5, row + 0.5])
            if not (0 <= x < 44 and 0 <= y < 60):
                assert np.isnan(carried[row, column])
                continue
            if max(np.array(geometry.scale) * (5 / 60, 7 / 44)) > 1:
                continue
            cell_x, cell_y = np.clip(x * 7 / 44 - 0.5, 0, 6), np.clip(y * 5 / 60 - 0.5, 0, 4)
            x0, y0 = min(int(cell_x), 5), min(int(cell_y), 3)
            fx, fy = cell_x - x0, cell_y - y0
            corner = grid[y0 : y0 + 2, x0 : x0 + 2]
            expected = (1 - fy) * ((1 - fx) * corner[0, 0] + fx * corner[0, 1]) + fy * (
                (1 - fx) * corner[1, 0] + fx * corner[1, 1]
            )
            assert carried[row, column] == pytest.approx(expected, abs=1e-5)


def test_to_original__one_bright_cell_of_a_coarse_grid():
    geometry = preprocess_of("shortest", 224).geometry(1000, 1500)
    grid = np.zeros((14, 14))
    grid[3, 11] = 1.0
    carried = geometry.to_original(grid)
    assert np.isnan(carried[:, :250]).all() and np.isnan(carried[:, 1250:]).all()
    assert not np.isnan(carried[:, 250:1250]).any()
    row, column = np.unravel_index(np.nanargmax(carried), carried.shape)
    assert abs(row + 0.5 - 3.5 * 1000 / 14) <= 1
    assert abs(column + 0.5 - (250 + 11.5 * 1000 / 14)) <= 1.5


def test_to_original__keeps_a_constant_and_the_mean():
    for mode in MODES:
        geometry = preprocess_of(mode).geometry(333, 127)
        carried = geometry.to_original(np.full((8, 8), 0.25))
        seen = carried[~np.isnan(carried)]
        np.testing.assert_allclose(seen, 0.25, rtol=1e-6)
        rows, columns = geometry.visible_pixels()
        assert seen.size == (rows.stop - rows.start) * (columns.stop - columns.start)


def test_to_original__finer_grid_than_the_original_averages():
    geometry = preprocess_of("squash", 64).geometry(8, 8)
    grid = np.zeros((64, 64))
    grid[::2] = 1.0
    np.testing.assert_allclose(geometry.to_original(grid), 0.5, atol=0.02)


def test_to_original__huge_aspect_sees_at_least_one_pixel():
    for shape in [(1, 10_000), (10_000, 1), (2, 9_999), (3, 5)]:
        for mode in MODES:
            carried = preprocess_of(mode, 224).geometry(*shape).to_original(np.ones((7, 7)))
            assert carried.shape == shape
            seen = carried[~np.isnan(carried)]
            assert seen.size
            np.testing.assert_allclose(seen, 1, rtol=1e-6)


def test_array__comes_back_equal():
    geometry = preprocess_of("longest", (48, 80)).geometry(123, 4567)
    array = geometry.to_array()
    assert array.shape == (8,) and array.dtype == np.int32
    assert Geometry.from_array(array) == geometry


def test_wrong_values_are_refused():
    geometry = preprocess_of("squash").geometry(10, 10)
    with pytest.raises(UsageError, match="shape"):
        geometry.to_original(np.zeros((2, 2, 2)))
    with pytest.raises(UsageError, match="x, y, width, height"):
        geometry.boxes_to_input(np.zeros(4))
    with pytest.raises(UsageError, match="8 numbers"):
        Geometry.from_array(np.zeros(7))
    with pytest.raises(UsageError, match="at least one pixel"):
        Geometry((0, 3), (1, 1), (0, 0, 1, 1))
