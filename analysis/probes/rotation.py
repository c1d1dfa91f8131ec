"""Features turned into the eigenbasis of their Gram matrix, once for all problems that share them.

In come features (n, d); out go the same samples in coordinates u (n, r), r = min(n, d), whose Gram matrix is diagonal,
and the way back for weights. Turning changes neither logits nor the ridge, shifting by the mean changes only the
intercept, and dividing by one scale s turns C into C s^2: so the problem stays exactly the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Deviations from the mean below this share of the largest value are rounding: the features are constant.
_ROUNDING = 1e-14


@dataclass(frozen=True)
class Rotation:
    """Rotated features and the way back.

    Parameters
    ----------
    u : Tensor of float64, (n, r)
        (x - mean) @ basis / scale. The largest mean of squares of a column is 1, unless the features are constant.
    mean : Tensor of float64, (d,)
    basis : Tensor of float64, (d, r)
        Orthonormal columns.
    scale : float
    """

    u: Tensor
    mean: Tensor
    basis: Tensor
    scale: float

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None = None) -> Rotation:
        """Turn features (n, d) float64; weights (n,) say which rows count for the mean and the basis."""
        share = torch.ones(len(x), dtype=x.dtype, device=x.device) if weight is None else weight
        share = share / share.sum()
        mean = share @ x
        centred = x - mean
        if len(x) < x.shape[1]:
            # What lies outside the rows' span lowers no ridge objective. QR keeps the span orthonormal.
            span = torch.linalg.qr(centred.T)[0]
            centred = centred @ span
        else:
            span = None
        spectrum, turn = torch.linalg.eigh(centred.T @ (centred * share[:, None]))
        scale = float(spectrum[-1].clamp(min=0).sqrt()) if len(spectrum) else 0.0
        if scale <= _ROUNDING * float(x.abs().max()):
            return cls(torch.zeros_like(centred), mean, turn if span is None else span @ turn, 1.0)
        return cls(centred @ turn / scale, mean, turn if span is None else span @ turn, scale)

    def back(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (..., d) and intercepts (...) for the features as they came."""
        turned = weight @ self.basis.T / self.scale
        return turned, bias - turned @ self.mean

    def forth(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (..., r) and intercepts (...) on rotated features, what lies outside their span left out."""
        return weight @ self.basis * self.scale, bias + weight @ self.mean
