"""Approximate inverses of the problems' Hessians: one eigenbasis shared by all, an inverse of its own for a slow one.

In the eigenbasis of the features' Gram matrix the Hessian of even curvature is diagonal, 1 + h lambda, with each
problem's own total curvature h. With rare positives and large C the curvature sits on few rows: of 7,470 rows some
1,000 hold 99 % of it. A problem that conjugate gradients find hard therefore gets the Hessian of those rows, inverted
once; it serves until it has aged.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of an inverse of its own, in multiples of the features' dimensions.
ROWS_PER_DIMENSION = 2


class Preconditioner:
    """Applies an approximate inverse Hessian to each problem's vector.

    Parameters
    ----------
    u : Tensor, (n, r)
        Rotated features.
    count : int
        Number of problems.
    room : int
        Most problems that may have an inverse (r, r) of their own.
    """

    def __init__(self, u: Tensor, count: int, room: int) -> None:
        self.u, self.room = u, room
        self.spectrum = u.square().mean(0)
        self.slot = torch.full((count,), -1, dtype=torch.int64, device=u.device)
        self.inverses = u.new_zeros(0, u.shape[1], u.shape[1])
        self.renewed = 0

    def apply(self, problem: Tensor, total: Tensor, vectors: Tensor) -> Tensor:
        """Return the approximate inverse Hessian of each problem (P,) times its vector (P, r), total curvature (P,)."""
        found = vectors / torch.addcmul(torch.ones_like(vectors), total[:, None], self.spectrum)
        slot = self.slot[problem]
        own = (slot >= 0).nonzero()[:, 0]
        if len(own):
            # In the order of the inverses, so that they are read in place and not gathered.
            placed = vectors.new_zeros(len(self.inverses), vectors.shape[1], 1)
            placed[slot[own], :, 0] = vectors[own]
            found[own] = (self.inverses @ placed)[slot[own], :, 0]
        return found

    def renew(self, problem: Tensor, curvature: Tensor) -> None:
        """Give problems (Q,) an inverse from their curvature (Q, n), as far as there is room."""
        new = problem[self.slot[problem] < 0][: self.room - len(self.inverses)]
        if len(new):
            self.slot[new] = torch.arange(len(new), device=new.device) + len(self.inverses)
            self.inverses = torch.cat([self.inverses, self.inverses.new_zeros(len(new), *self.inverses.shape[1:])])
        rows = min(len(self.u), ROWS_PER_DIMENSION * self.u.shape[1])
        most, place = curvature.topk(rows, dim=1, sorted=False)
        rest = (curvature.sum(1) - most.sum(1)).clamp(min=0)
        for row, slot in enumerate(self.slot[problem].tolist()):
            if slot >= 0:
                self.renewed += 1
                self.inverses[slot] = self._inverse(most[row], place[row], rest[row])

    def _inverse(self, curvature: Tensor, rows: Tensor, rest: Tensor) -> Tensor:
        """Return the inverse of 1 + sum of the rows' curvature, without the intercept, + even curvature of the rest."""
        root = curvature.sqrt()
        some = self.u[rows] * root[:, None]
        hessian = some.T @ some
        mean = root @ some
        hessian -= torch.outer(mean, mean / curvature.sum().clamp(min=torch.finfo(mean.dtype).tiny))
        hessian.diagonal().add_(1 + rest * self.spectrum)
        scale = hessian.diagonal().clamp(min=1).rsqrt()
        factor, failed = torch.linalg.cholesky_ex(hessian * scale[:, None] * scale)
        if bool(failed):  # lost to rounding: the diagonal alone still is a preconditioner
            return torch.diag(scale.square())
        return torch.cholesky_inverse(factor) * scale[:, None] * scale
