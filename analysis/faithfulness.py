"""Is what a heatmap marks what the model uses? Pixels are taken away in its order, and the target's value is watched.

In come an encoder, one image as the model sees it, a target and an order of its pixels; out go three numbers, in the
target's own units (a cosine, a logit), so methods are compared on the same images and targets and never across models:

- ROAD (Rong et al., ICML 2022), by pytorch-grad-cam's `ROADCombined`: (value after removing the least relevant pixels -
  after removing the most relevant) / 2, averaged over shares. Removed pixels are filled in from their surroundings, so
  that their outline gives nothing away. Larger is better; an order that means nothing gives 0.
- deletion and insertion (Petsiuk et al., RISE, BMVC 2018): the mean value while the most relevant pixels are replaced
  by the image's mean (lower is better), and while they are put back into a blurred image (higher is better).

Pixels are ordered by a map's rank, ties broken by a seed: a map that is zero over half the image would otherwise leave
it to the library whether a share removes none or all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADCombined
from torch import nn

if TYPE_CHECKING:
    from analysis.cam import Target
    from engine.encoder import Encoder

ROAD_SHARES = (50, 70, 90)
"""Per cent of the pixels that stay, in ROAD."""

STEPS = 16
"""Steps of insertion and deletion."""

BLUR_SHARE = 1 / 16
"""Standard deviation of the blur that insertion starts from, as a share of the image's side."""


class Faithfulness(NamedTuple):
    """How a target's value follows a map; in the target's units."""

    road: float
    deletion: float
    insertion: float


def relevance_order(heat: np.ndarray, seed: int) -> np.ndarray:
    """Return the rank of each pixel, 0 for the least relevant to 1 for the most, (h, w) float32, ties by the seed."""
    noise = np.random.Generator(np.random.PCG64(seed)).random(heat.size)
    order = np.lexsort((noise, heat.ravel()))
    ranks = np.empty(heat.size, dtype=np.float32)
    ranks[order] = np.linspace(0, 1, heat.size, dtype=np.float32)
    return ranks.reshape(heat.shape)


def faithfulness(encoder: Encoder, pixels: np.ndarray, target: Target, heat: np.ndarray, seed: int = 0) -> Faithfulness:
    """Return how well a map's order of pixels tells what the target's value rests on.

    Parameters
    ----------
    encoder : Encoder
    pixels : ndarray of uint8, (h, w, 3)
        What the model sees.
    target : Target
    heat : ndarray of float, (h, w)
        At the model's input size, such as `HeatMap.map`.
    seed : int
        Of ties and of ROAD's noise.
    """
    ranks = relevance_order(np.asarray(heat), seed)
    tower = _Tower(encoder)
    inputs = encoder.preprocess.normalise(torch.from_numpy(pixels.copy())[None]).to(encoder.device, torch.float32)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        road = ROADCombined(percentiles=list(ROAD_SHARES))(inputs, ranks[None], [target.score], tower)
        deletion = _scores(tower, target, encoder, _path(pixels, _grey(pixels), ranks))
        insertion = _scores(tower, target, encoder, _path(_blurred(pixels), pixels, ranks))
    return Faithfulness(float(np.asarray(road).reshape(-1)[0]), float(deletion.mean()), float(insertion.mean()))


class _Tower(nn.Module):
    """The image tower, with one raw embedding an image."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.visual = encoder.model.visual
        self.dtype = next(self.visual.parameters()).dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embedding = self.visual(images.to(self.dtype))
        return (embedding[0] if isinstance(embedding, tuple) else embedding).float()


def _path(start: np.ndarray, end: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return the images on the way from start to end, the most relevant pixels first, (STEPS + 1, h, w, 3) uint8."""
    cuts = 1 - np.linspace(0, 1, STEPS + 1)
    changed = ranks[None] > cuts[:, None, None].astype(np.float32)
    changed[-1] = True
    return np.where(changed[..., None], end[None], start[None]).astype(np.uint8)


def _scores(tower: _Tower, target: Target, encoder: Encoder, images: np.ndarray) -> np.ndarray:
    inputs = encoder.preprocess.normalise(torch.from_numpy(images)).to(encoder.device, torch.float32)
    return np.array([float(target.score(embedding)) for embedding in tower(inputs)])


def _grey(pixels: np.ndarray) -> np.ndarray:
    mean = pixels.reshape(-1, pixels.shape[-1]).mean(axis=0)
    return np.broadcast_to(np.round(mean).astype(np.uint8), pixels.shape)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), BLUR_SHARE * min(pixels.shape[:2]))
