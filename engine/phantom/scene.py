"""The scene into which findings are drawn: how much air is left, what is added, and which pixels each label changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.phantom.anatomy import Thorax
from engine.phantom.case import LEFT, LOWER, MIDDLE, UPPER
from engine.phantom.strokes import Frame, Points, spline


@dataclass
class Scene:
    """One phantom in the making.

    Parameters
    ----------
    frame : Frame
    thorax : Thorax
    rng : Generator
        The acquisition's random numbers.
    air : ndarray of float32, (size, size)
        Air in the beam's way, 0 to 1. A finding replaces some of it, so borders vanish where it is used up (the
        silhouette sign).
    dense : ndarray of float32, (size, size)
        Attenuation on top of soft tissue: bone, metal.
    masks : dict of label to bool (size, size)
        Pixels that a finding visibly changed.
    """

    frame: Frame
    thorax: Thorax
    rng: np.random.Generator
    air: np.ndarray
    dense: np.ndarray
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    def between(self, low: float, high: float) -> float:
        """Return one uniform random number."""
        return low + (high - low) * float(self.rng.random())

    def mark(self, label: str, visible: np.ndarray) -> None:
        """Add pixels (bool) to a label's mask."""
        self.masks[label] = self.masks[label] | visible if label in self.masks else visible

    def spot(self, side: int, zone: int, across: float) -> tuple[float, float]:
        """Return a point of the lung: `across` runs from 0 at the mid-line to 1 at the wall."""
        base = self.thorax.base_of(side)
        y = {UPPER: -60.0, MIDDLE: -20.0, LOWER: base - 30.0}[zone]
        y += self.between(-9, 9)
        wall = float(self.thorax.wall(y))
        inner = 14.0
        if zone == LOWER:
            inner = 24.0 if side != LEFT else min(self.thorax.heart[1] * 0.8 + self.thorax.turn, 52.0)
        return side * (inner + (wall - inner) * across), y

    def blob(self, x: float, y: float, wide: float, high: float, rough: float = 0.25) -> Points:
        """Return an irregular round outline."""
        radius = 1 - rough + 2 * rough * self.rng.random(9)
        angle = np.arange(9) * (2 * np.pi / 9)
        return spline(
            np.stack([x + wide * radius * np.cos(angle), y + high * radius * np.sin(angle)], axis=1),
            closed=True,
            steps=4,
        )

    def replace_air(self, label: str | None, opacity: np.ndarray, visible_from: float = 0.12) -> None:
        """Put tissue in the place of air: `opacity` float32 in [0, 1], which is used up; None marks nothing."""
        opacity *= self.air
        self.air -= opacity
        if label is not None:
            self.mark(label, opacity > np.float32(visible_from))

    def add_dense(self, label: str, layer: np.ndarray, strength: float, visible_from: int = 60) -> None:
        """Add a uint8 layer of bone or metal, and mark where it is seen."""
        self.frame.add(self.dense, layer, strength)
        self.mark(label, layer > visible_from)

    def cloudy(self, layer: np.ndarray, cells: int, depth: float) -> np.ndarray:
        """Return a uint8 layer as float32 opacity with cloudy unevenness of `depth` in [0, 1]."""
        cloud = self.frame.cloud(self.rng, cells, depth / 2).copy()
        cloud += np.float32(1 - depth / 2)
        cloud *= self.frame.scaled(layer, 1.0)
        return cloud
