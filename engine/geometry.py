"""Where a pixel of the model's input lies in the original image, and back.

Preprocessing scales an image to `resized` and cuts `crop` out of that (or pads where the crop reaches over the edge).
Kept beside the pixels, this carries boxes forward to what the model saw, and heatmaps back to the pixels in which the
radiologist drew. "Original" is the image as it is displayed: after its EXIF orientation has been applied.

Coordinates are continuous, pixel i covers [i, i + 1), origin top left, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.errors import UsageError

ARRAY_LENGTH = 8


@dataclass(frozen=True)
class Geometry:
    """One image's way through preprocessing.

    Parameters
    ----------
    original : (height, width)
        Pixels of the image as displayed.
    resized : (height, width)
        Pixels of the whole image after scaling, before the crop.
    crop : (top, left, height, width)
        The model's input in pixels of the resized image; top and left are negative where the input was padded.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if min(*self.original, *self.resized, *self.crop[2:]) < 1:
            raise UsageError(f"a geometry needs sizes of at least one pixel, not {self}")

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.crop[2], self.crop[3]

    @property
    def scale(self) -> tuple[float, float]:
        """Input pixels per original pixel, down and across."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    def to_array(self) -> np.ndarray:
        """Return it as int32 (8,): original h w, resized h w, crop top left h w."""
        return np.array([*self.original, *self.resized, *self.crop], dtype=np.int32)

    @classmethod
    def from_array(cls, values: np.ndarray) -> Geometry:
        """Return the geometry that `to_array` wrote down."""
        numbers = [int(value) for value in np.asarray(values).ravel()]
        if len(numbers) != ARRAY_LENGTH:
            raise UsageError(f"a geometry is kept as {ARRAY_LENGTH} numbers, not {len(numbers)}")
        height, width, resized_height, resized_width, top, left, crop_height, crop_width = numbers
        return cls((height, width), (resized_height, resized_width), (top, left, crop_height, crop_width))

    # -- Points and boxes --------------------------------------------------------------------------------------------

    def points_to_input(self, points: np.ndarray) -> np.ndarray:
        """Carry points (..., 2) of x, y in original pixels to the model's input; they may lie outside of it."""
        scale_y, scale_x = self.scale
        return np.asarray(points, dtype=np.float64) * (scale_x, scale_y) - (self.crop[1], self.crop[0])

    def points_to_original(self, points: np.ndarray) -> np.ndarray:
        """Carry points (..., 2) of x, y in the model's input to original pixels."""
        scale_y, scale_x = self.scale
        in_resized = np.asarray(points, dtype=np.float64) + np.array([self.crop[1], self.crop[0]])
        return in_resized / (scale_x, scale_y)

    def boxes_to_input(self, boxes: np.ndarray, *, clip: bool = True) -> np.ndarray:
        """Carry boxes to the model's input.

        Parameters
        ----------
        boxes : ndarray (k, 4)
            x, y, width, height in original pixels.
        clip : bool
            Cut off what the model does not see; a box that it sees nothing of gets width and height zero.

        Returns
        -------
        ndarray of float64 (k, 4)
            x, y, width, height in input pixels.
        """
        height, width = self.input_size
        return _map_boxes(boxes, self.points_to_input, (width, height) if clip else None)

    def boxes_to_original(self, boxes: np.ndarray, *, clip: bool = True) -> np.ndarray:
        """Carry boxes (k, 4) of x, y, width, height in input pixels back, by default clipped to the image."""
        height, width = self.original
        return _map_boxes(boxes, self.points_to_original, (width, height) if clip else None)

    # -- What the model sees -----------------------------------------------------------------------------------------

    def visible_box(self) -> np.ndarray:
        """Return the part of the original that the model sees as float64 (4,): x, y, width, height."""
        height, width = self.input_size
        return self.boxes_to_original(np.array([[0, 0, width, height]]))[0]

    def visible_pixels(self) -> tuple[slice, slice]:
        """Return the rows and columns of original pixels whose centres the model sees."""
        return (
            _visible(self.original[0], self.scale[0], self.crop[0], self.crop[2]),
            _visible(self.original[1], self.scale[1], self.crop[1], self.crop[3]),
        )

    def to_original(self, heatmap: np.ndarray) -> np.ndarray:
        """Carry a map over the model's input back to the original image.

        Parameters
        ----------
        heatmap : ndarray of float (h', w')
            On any grid that spans the whole input: the input's own pixels, or a coarser one such as 14 x 14 patches.

        Returns
        -------
        ndarray of float32 (H, W)
            In original pixels; NaN where the model saw nothing, which is not the same as an answer of zero. Between the
            grid's cell centres values are interpolated linearly, beyond the outer ones they are held; where the grid is
            finer than the original, cells are averaged with a triangle as wide as the pixel.

        Raises
        ------
        UsageError
            The map is not two-dimensional.
        """
        values = np.asarray(heatmap, dtype=np.float32)
        if values.ndim != 2 or 0 in values.shape:
            raise UsageError(f"a heatmap has shape (h, w), not {values.shape}")
        rows, columns = self.visible_pixels()
        carried = np.full(self.original, np.nan, dtype=np.float32)
        down = _interpolation(rows, self.scale[0], self.crop[0], self.crop[2], values.shape[0])
        across = _interpolation(columns, self.scale[1], self.crop[1], self.crop[3], values.shape[1])
        carried[rows, columns] = down @ values @ across.T
        return carried


def _map_boxes(
    boxes: np.ndarray, carry: Callable[[np.ndarray], np.ndarray], limits: tuple[int, int] | None
) -> np.ndarray:
    values = np.asarray(boxes, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 4:
        raise UsageError(f"boxes have shape (k, 4): x, y, width, height; not {values.shape}")
    corners = carry(np.stack([values[:, :2], values[:, :2] + values[:, 2:]], axis=1))
    if limits is not None:
        corners = np.clip(corners, 0, limits)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)


def _visible(length: int, scale: float, start: int, extent: int) -> slice:
    """Return the pixels of one axis whose centres fall into the crop, or the one that the crop lies in."""
    centres = (np.arange(length) + 0.5) * scale - start
    inside = np.flatnonzero((centres >= 0) & (centres < extent))
    if inside.size == 0:
        nearest = int(np.argmin(np.abs(centres - extent / 2)))
        return slice(nearest, nearest + 1)
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _interpolation(pixels: slice, scale: float, start: int, extent: int, cells: int) -> np.ndarray:
    """Return float32 weights (pixels, cells) that carry one axis of a grid over the input to original pixels."""
    per_input_pixel = cells / extent
    positions = ((np.arange(pixels.start, pixels.stop) + 0.5) * scale - start) * per_input_pixel - 0.5
    positions = np.clip(positions, 0, cells - 1)
    reach = max(1.0, scale * per_input_pixel)
    weights = np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(cells)) / reach)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
