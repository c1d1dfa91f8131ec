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
        self.taken = 0
        self.inverses = u.new_zeros(0, u.shape[1], u.shape[1])

    def cost(self) -> float:
        """Return what an inverse costs, in iterations of conjugate gradients over all rows."""
        rows, dimensions = self.u.shape
        return (min(rows, ROWS_PER_DIMENSION * dimensions) + dimensions) * dimensions / (2 * max(1, rows))

    def apply(self, problem: Tensor, total: Tensor, vectors: Tensor) -> Tensor:
        """Return the approximate inverse Hessian of each problem (P,) times its vector (P, r), total curvature (P,)."""
        found = vectors / torch.addcmul(torch.ones_like(vectors), total[:, None], self.spectrum)
        slot = self.slot[problem]
        own = (slot >= 0).nonzero()[:, 0]
        if len(own):
            # In the order of the inverses, so that they are read in place and not gathered.
            # As rows, since the inverses are symmetric: one row times a matrix is several times faster than the column.
            placed = vectors.new_zeros(self.taken, 1, vectors.shape[1])
            placed[slot[own], 0] = vectors[own]
            found[own] = torch.bmm(placed, self.inverses[: self.taken])[slot[own], 0]
        return found

    def renew(self, problem: Tensor, curvature: Tensor) -> None:
        """Give problems (Q,) an inverse from their curvature (Q, n), as far as there is room."""
        new = problem[self.slot[problem] < 0][: self.room - self.taken]
        if len(new):
            self.slot[new] = torch.arange(len(new), device=new.device) + self.taken
            self.taken += len(new)
            if self.taken > len(self.inverses):
                size = min(self.room, max(self.taken, 2 * len(self.inverses)))
                more = self.inverses.new_zeros(size - len(self.inverses), *self.inverses.shape[1:])
                self.inverses = torch.cat([self.inverses, more])
        rows = min(len(self.u), ROWS_PER_DIMENSION * self.u.shape[1])
        most, place = curvature.topk(rows, dim=1, sorted=False)
        rest = (curvature.sum(1) - most.sum(1)).clamp(min=0)
        for row, slot in enumerate(self.slot[problem].tolist()):
            if slot >= 0:
                self.inverses[slot] = self._inverse(most[row], place[row], rest[row])

    def release(self, problem: Tensor) -> None:
        """Free the inverses of problems that are solved; the last ones move into the gaps, so none is read idly."""
        for slot in sorted((value for value in self.slot[problem].tolist() if value >= 0), reverse=True):
            self.taken -= 1
            if slot < self.taken:
                self.inverses[slot] = self.inverses[self.taken]
            self.slot[self.slot == slot] = -1
            self.slot[self.slot == self.taken] = slot

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
