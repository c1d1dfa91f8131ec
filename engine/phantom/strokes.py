"""Drawing with operations whose result is the same on every machine.

Geometry is float64 and rounded to 1/16 pixel before it is drawn; shapes are filled, stroked and blurred as uint8; noise
is low-resolution integers enlarged with INTER_LINEAR_EXACT; layers are mixed by float32 `+` and `*`. Float blurs and
resizes, warps and NumPy's exp differ between builds in the last bits and are not used.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

BASE = 256.0
SHIFT = 4
Points = (
    np.ndarray
)  # (n, 2) float64, thorax units: 1/256 of the image's side at scale 1, origin mid-thorax, y downwards


def _spline_basis(steps: int) -> np.ndarray:
    """Return Catmull-Rom weights, (steps, 4)."""
    t = np.arange(steps, dtype=np.float64) / steps
    return np.stack(
        [
            (-t + 2 * t * t - t * t * t) / 2,
            (2 - 5 * t * t + 3 * t * t * t) / 2,
            (t + 4 * t * t - 3 * t * t * t) / 2,
            (t * t * t - t * t) / 2,
        ],
        axis=1,
    )


_BASIS = {steps: _spline_basis(steps) for steps in (3, 4, 5, 6, 8)}


def spline(points: Sequence[tuple[float, float]] | Points, closed: bool = False, steps: int = 6) -> Points:
    """Return a smooth curve through points, (m, 2) float64; also for many curves at once, (..., n, 2)."""
    knots = np.asarray(points, np.float64)
    if closed:
        padded = np.concatenate([knots[..., -1:, :], knots, knots[..., :2, :]], axis=-2)
    else:
        padded = np.concatenate([knots[..., :1, :], knots, knots[..., -1:, :]], axis=-2)
    basis = _BASIS[steps][:, :, None]
    pieces = padded.shape[-2] - 3
    curve = sum(padded[..., k : k + pieces, None, :] * basis[:, k] for k in range(4))
    curve = np.asarray(curve).reshape(*knots.shape[:-2], pieces * steps, 2)
    return curve if closed else np.concatenate([curve, knots[..., -1:, :]], axis=-2)


class _Rooms(threading.local):
    """Arrays that a thread draws one phantom after another in: fresh memory would cost a quarter of the time."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, int], np.ndarray] = {}


_rooms = _Rooms()


@dataclass(frozen=True)
class Frame:
    """Where the thorax lies in the image: turned by `angle` radians, scaled by wide and high, centred at x, y units."""

    size: int
    wide: float
    high: float
    angle: float
    x: float
    y: float

    @property
    def unit(self) -> float:
        """Pixels a unit."""
        return self.size / BASE

    def place(self, points: Points) -> np.ndarray:
        """Return points as int32 in 1/16 pixel, same shape."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        across, down = points[..., 0] * self.wide, points[..., 1] * self.high
        placed = np.stack([cosine * across - sine * down + self.x, sine * across + cosine * down + self.y], axis=-1)
        return np.ascontiguousarray(np.rint(placed * (self.unit * (1 << SHIFT))).astype(np.int32))

    def place_all(self, lines: Sequence[Points] | Points) -> list[np.ndarray]:
        """Return each of several lines or outlines placed."""
        if isinstance(lines, np.ndarray) or len(lines) == 1:
            return [self.place(line) for line in lines] if len(lines) == 1 else list(self.place(np.asarray(lines)))
        placed = self.place(np.concatenate(lines))
        ends = list(itertools.accumulate((len(line) for line in lines), initial=0))
        return [placed[start:end] for start, end in itertools.pairwise(ends)]

    def blank(self, reduction: int = 1) -> np.ndarray:
        """Return an empty uint8 layer; reduced layers serve wide blurs."""
        return np.zeros((self.size // reduction, self.size // reduction), np.uint8)

    def fill(self, layer: np.ndarray, outlines: Sequence[Points], value: int = 255) -> np.ndarray:
        """Fill closed outlines in a layer, in place; overlaps are filled too."""
        shrink = self.size // layer.shape[0]
        for placed in self.place_all(outlines):
            cv2.fillPoly(layer, [placed // shrink if shrink > 1 else placed], value, lineType=cv2.LINE_AA, shift=SHIFT)
        return layer

    def stroke(
        self,
        layer: np.ndarray,
        lines: Sequence[Points] | Points,
        width: float,
        value: int = 255,
        closed: bool = False,
        smooth: bool = True,
    ) -> np.ndarray:
        """Draw open (or closed) lines of a width in units, in place; not `smooth` is quicker, where a blur follows."""
        pixels = max(1, int(width * self.unit * (self.wide + self.high) / 2 + 0.5))
        kind = cv2.LINE_AA if smooth else cv2.LINE_8
        cv2.polylines(layer, self.place_all(lines), closed, value, thickness=pixels, lineType=kind, shift=SHIFT)
        return layer

    def blur(self, layer: np.ndarray, sigma: float) -> np.ndarray:
        """Return a layer blurred by sigma units."""
        pixels = sigma * self.unit * layer.shape[0] / self.size
        reach = 2 * int(2.5 * pixels + 0.5) + 1
        return cv2.GaussianBlur(layer, (reach, reach), pixels) if reach > 1 else layer

    def soft(self, outlines: Sequence[Points], sigma: float, value: int = 255) -> np.ndarray:
        """Return filled outlines with a soft edge, uint8 (size, size); wide blurs are made small and enlarged."""
        reduction = 8 if sigma >= 14 else 4 if sigma >= 5 else 2 if sigma >= 2.5 else 1
        layer = self.blur(self.fill(self.blank(reduction), outlines, value), sigma)
        return layer if reduction == 1 else self.enlarge(layer)

    def enlarge(self, layer: np.ndarray) -> np.ndarray:
        """Return a small uint8 layer at full size, bit for bit the same everywhere."""
        return cv2.resize(layer, (self.size, self.size), interpolation=cv2.INTER_LINEAR_EXACT)

    def cloud(self, rng: np.random.Generator, cells: int, depth: float) -> np.ndarray:
        """Return smooth noise of `cells` cells a side, float32 (size, size) in [-depth, depth], as `scaled` does."""
        noise = self.scaled(self.enlarge(noise_cells(rng, cells)), 2 * depth)
        noise -= np.float32(depth)
        return noise

    def room(self, name: str = "scratch") -> np.ndarray:
        """Return this thread's float32 array of a name, (size, size), with whatever is in it."""
        place = (name, self.size)
        if place not in _rooms.arrays:
            _rooms.arrays[place] = np.empty((self.size, self.size), np.float32)
        return _rooms.arrays[place]

    def scaled(self, layer: np.ndarray, full: float, name: str = "scratch") -> np.ndarray:
        """Return a uint8 layer as float32 whose 255 is `full`; valid until the same room is used again."""
        return np.multiply(layer, np.float32(full / 255), out=self.room(name))

    def add(self, target: np.ndarray, layer: np.ndarray, full: float) -> None:
        """Add a uint8 layer, whose 255 is `full`, to float32 `target` in place."""
        target += self.scaled(layer, full)


def noise_cells(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Return independent uint8 noise, (cells, cells)."""
    count = cells * cells
    words = rng.bit_generator.random_raw((count + 7) // 8).astype("<u8")
    return words.view(np.uint8)[:count].reshape(cells, cells)


def share(layer: np.ndarray) -> np.ndarray:
    """Return a uint8 layer as float32 in [0, 1]."""
    return layer * np.float32(1 / 255)
