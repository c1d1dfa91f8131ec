"""Raw maps of evidence in, heatmaps that say what they are out: signed numbers become max(raw, 0) / max, or a note.

pytorch-grad-cam subtracts each map's minimum and adds 1e-7 before it divides by the maximum, which turns an even map
into contrast and dims maps of small gradients. Here a map is max(raw, 0) / max, as in the paper (Selvaraju et al., ICCV
2017); one without anything positive is empty, one that is everywhere the same is flat, and both say so. A gradient that
is exactly zero everywhere is no evidence of anything: an error, unless the empty map was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch

from analysis.cam.targets import Target
from engine.errors import ModelError
from engine.pixels import Geometry

FLAT = 1e-6
"""Spread of a map, as a share of its maximum, up to which it is called flat."""


class ZeroGradientError(ModelError):
    """No gradient reaches the spatial positions of the layer, so there is nothing to draw."""


class RawMaps(NamedTuple):
    """What a method gave for some images and targets.

    Parameters
    ----------
    raw : Tensor of float32, (b, targets, rows, columns)
        Signed, in units of the target, on the layer's grid; on the tower's device.
    scores : Tensor of float32, (b, targets)
        The targets' values.
    reached : Tensor of bool, (b, targets)
        Whether any gradient reached the layer's positions; true for methods that need none.
    """

    raw: torch.Tensor
    scores: torch.Tensor
    reached: torch.Tensor


@dataclass(frozen=True)
class HeatMap:
    """Evidence for one target in one image.

    Parameters
    ----------
    map : ndarray of float32, (h, w)
        max(raw, 0) / max, enlarged bilinearly to the model's input; 0..1, all zero where `empty`.
    raw : ndarray of float32, (grid h, grid w)
        As the method gave it on the layer's grid, signed, in units of the target.
    layer : str
        Dotted name of the module within the image tower, or the blocks that were read.
    method, target : str
        What made it and what it is for.
    score : float
        The target's value for this image.
    empty : bool
        Nothing positive anywhere: it points nowhere and must not be drawn as if it did.
    flat : bool
        Positive and the same everywhere: it says yes, and not where.
    note : str
        Why it is empty or flat, in words; "" else.
    """

    map: np.ndarray
    raw: np.ndarray
    layer: str
    method: str
    target: str
    score: float
    empty: bool = False
    flat: bool = False
    note: str = ""

    def on_original(self, geometry: Geometry) -> np.ndarray:
        """Return the map on the original image's pixels, float32 (H, W), NaN outside the model's crop."""
        # From the coarse grid at once: by way of the input size it would be smoothed twice.
        top = max(float(self.raw.max()), np.finfo(np.float32).tiny)
        return geometry.to_original(np.maximum(self.raw, 0) / top)


def heat_map(
    raw: np.ndarray, *, score: float, size: tuple[int, int], layer: str, method: str, target: str, note: str = ""
) -> HeatMap:
    """Return a raw map (rows, columns) as a heatmap of an input of this size, or as a stated empty or flat one.

    Parameters
    ----------
    note : str
        Why the map is empty, where that is known; else it is found out.

    Raises
    ------
    ModelError
        A value that is not finite.
    """
    raw = np.ascontiguousarray(raw, dtype=np.float32)
    if not np.isfinite(raw).all():
        raise ModelError(f"the heatmap of {target!r} by {method} at {layer!r} is not finite; see the weights")
    top, bottom = float(raw.max()), float(raw.min())
    if top <= 0:
        return HeatMap(
            map=np.zeros(size, dtype=np.float32),
            raw=raw,
            layer=layer,
            method=method,
            target=target,
            score=score,
            empty=True,
            note=note or f"empty: no position speaks for {target or 'the target'}",
        )
    flat = top - bottom <= FLAT * top
    enlarged = cv2.resize(np.maximum(raw, 0) / np.float32(top), size[::-1], interpolation=cv2.INTER_LINEAR)
    return HeatMap(
        map=enlarged,
        raw=raw,
        layer=layer,
        method=method,
        target=target,
        score=score,
        flat=flat,
        note="flat: the same everywhere, it does not say where" if flat else "",
    )


def heat_maps(
    found: RawMaps,
    targets: Sequence[Target],
    *,
    size: tuple[int, int],
    layer: str,
    method: str,
    unreached: str = "",
    advice: Callable[[], str] = str,
) -> list[list[HeatMap]]:
    """Return the heatmaps of some images, one list an image, in the targets' order.

    Parameters
    ----------
    unreached : str
        Note of maps that no gradient reached; "" makes them an error.
    advice : callable
        Gives what that error tells to do.

    Raises
    ------
    ZeroGradientError
    """
    raw, scores, reached = (values.detach().cpu().numpy() for values in found)
    if not unreached and not reached.all():
        name = targets[int(np.argwhere(~reached)[0][1])].name
        raise ZeroGradientError(
            f"the gradient of {name or 'the target'!r} is exactly zero at every position of {layer!r}: what the tower "
            f"pools does not depend on them, or the target's weights are zero. {advice()}".rstrip()
        )
    return [
        [
            heat_map(
                raw[image, place],
                score=float(scores[image, place]),
                size=size,
                layer=layer,
                method=method,
                target=target.name,
                note="" if reached[image, place] else unreached,
            )
            for place, target in enumerate(targets)
        ]
        for image in range(len(raw))
    ]
