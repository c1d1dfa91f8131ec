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
    """

    def __init__(self, u: Tensor) -> None:
        self.u = u
        self.spectrum = u.square().mean(0)
        self.inverses: dict[int, Tensor] = {}  # (r, r), by problem

    def cost(self) -> float:
        """Return what an inverse costs, in iterations of conjugate gradients over all rows."""
        rows, dimensions = self.u.shape
        return (min(rows, ROWS_PER_DIMENSION * dimensions) + dimensions) * dimensions / (2 * max(1, rows))

    def apply(self, problem: Tensor, total: Tensor, vectors: Tensor) -> Tensor:
        """Return the approximate inverse Hessian of each problem (P,) times its vector (P, r), total curvature (P,)."""
        found = vectors / torch.addcmul(torch.ones_like(vectors), total[:, None], self.spectrum)
        if self.inverses:
            for row, one in enumerate(problem.tolist()):
                if one in self.inverses:
                    torch.mv(self.inverses[one], vectors[row], out=found[row])
        return found

    def renew(self, problem: Tensor, curvature: Tensor) -> None:
        """Give problems (Q,) an inverse from their curvature (Q, n)."""
        for row, one in enumerate(problem.tolist()):
            self.inverses[one] = self._inverse(curvature[row])

    def release(self, problem: Tensor) -> None:
        """Free the inverses of problems that are solved."""
        for one in problem.tolist():
            self.inverses.pop(one, None)

    def _inverse(self, curvature: Tensor) -> Tensor:
        """Return the inverse of 1 + the Hessian of the rows of most curvature (n,) + even curvature of the rest."""
        most, rows = curvature.topk(min(len(self.u), ROWS_PER_DIMENSION * self.u.shape[1]), sorted=False)
        rest = (curvature.sum() - most.sum()).clamp(min=0)
        root = most.sqrt()
        some = self.u[rows] * root[:, None]
        hessian = some.T @ some
        mean = root @ some
        hessian -= torch.outer(mean, mean / most.sum().clamp(min=torch.finfo(mean.dtype).tiny))
        hessian.diagonal().add_(1 + rest * self.spectrum)
        scale = hessian.diagonal().clamp(min=1).rsqrt()
        factor, failed = torch.linalg.cholesky_ex(hessian * scale[:, None] * scale)
        if bool(failed):  # lost to rounding: the diagonal alone still is a preconditioner
            return torch.diag(scale.square())
        return torch.cholesky_inverse(factor) * scale[:, None] * scale
