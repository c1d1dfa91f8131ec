"""Weighted logistic loss of many problems over the same rows: its slopes, its best intercept, and steps along a line.

Everything here is elementwise on logits (P, n), one row a problem, and needs no product with the features. Signs are +1
for positives and -1 for negatives; weights hold C, sample and class weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Slope that a line search may leave, relative to the slope at its start.
SLOPE_LEFT = 0.5
MOST_TRIALS = 40
MOST_CENTRINGS = 60


class Slopes(NamedTuple):
    """First (P, n) and second (P, n) derivative of the loss in the logits, and their sums over the rows (P,) each."""

    residual: Tensor
    curvature: Tensor
    pull: Tensor
    total: Tensor

    def without_intercept(self) -> Tensor:
        """Return the residual (P, n) at the best intercept, to first order in what the intercept lacks."""
        return torch.addcmul(self.residual, self.curvature, -(self.pull / self.total)[:, None])


def slopes(sign: Tensor, weighted: Tensor, logits: Tensor) -> Slopes:
    """Return the derivatives; exact where a sample is far on the right side, because signs enter before the sigmoid."""
    signed = logits * sign
    wrong = signed.neg_().sigmoid_()
    pulled = weighted * wrong
    curvature = torch.addcmul(pulled, pulled, wrong, value=-1)
    residual = pulled.mul_(sign).neg_()
    total = curvature.sum(1).clamp_(min=torch.finfo(logits.dtype).tiny)
    return Slopes(residual, curvature, residual.sum(1), total)


def losses(sign: Tensor, weighted: Tensor, logits: Tensor) -> Tensor:
    """Return the weighted loss (P,); softplus is taken as linear where that changes nothing in float64."""
    return (weighted * torch.nn.functional.softplus(-sign * logits, threshold=40)).sum(1)


def centre(sign: Tensor, weighted: Tensor, logits: Tensor, found: Slopes, close: float) -> tuple[Slopes, Tensor]:
    """Move the logits, in place, to the best intercept within `close`; return the slopes there and the shifts (P,).

    Newton steps of at most 1: then the logistic curvature changes by less than a factor of e, and the steps converge.
    """
    moved = torch.zeros_like(found.total)
    for _ in range(MOST_CENTRINGS):
        shift = (-found.pull / found.total).clamp_(-1, 1)
        if not bool((shift.abs() > close).any()):
            break
        logits += shift[:, None]
        moved += shift
        found = slopes(sign, weighted, logits)
    return found, moved


def search(
    sign: Tensor, weighted: Tensor, logits: Tensor, along: Tensor, start: Tensor, linear: Tensor, square: Tensor
) -> tuple[Tensor, Slopes]:
    """Walk along a line until the slope has fallen to half, by Newton between bounds; the logits move in place.

    Only slopes are compared, never objectives, so that rounding does not stop it close to the minimum.

    Parameters
    ----------
    logits, along : Tensor, (P, n)
    start : Tensor, (P,)
        Slope at the beginning; where it is not negative nothing moves.
    linear, square : Tensor, (P,)
        The ridge's slope along the line is linear + length * square.

    Returns
    -------
    length : Tensor, (P,)
    Slopes
        At the new logits.
    """
    downhill = start < 0
    length = downhill.to(logits.dtype)
    logits += length[:, None] * along
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    found = slopes(sign, weighted, logits)
    for _ in range(MOST_TRIALS):
        slope = (found.residual * along).sum(1) + linear + length * square
        enough = ~downhill | (slope.abs() <= SLOPE_LEFT * start.abs())
        if bool(enough.all()):
            break
        low = torch.where(slope < 0, torch.maximum(low, length), low)
        high = torch.where(slope > 0, torch.minimum(high, length), high)
        bend = (found.curvature * along.square()).sum(1) + square
        newton = torch.minimum(length - slope / bend, 4 * length)
        middle = torch.where(high.isfinite(), 0.5 * (low + high), 2 * length)
        outside = (newton <= low) | (newton >= high)
        following = torch.where(enough, length, torch.where(outside, middle, newton))
        logits += (following - length)[:, None] * along
        length = following
        found = slopes(sign, weighted, logits)
    return length, found
