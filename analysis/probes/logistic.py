"""L2-regularised logistic regression for every (row weighting x class weighting x label x C) at once.

In come features (n, d), truth (n, L), one row of sample weights for each fold or seed, class weightings and values of
C; out go weights, intercepts and the account of each problem. The objective is exactly scikit-learn's,

    C sum_i v_i log(1 + exp(-s_i (x_i w + b))) + |w|^2 / 2,    v_i = sample weight * class weight, s_i = +-1,

with a free intercept. `analysis.probes.newton` solves them in float32; then each is judged anew in float64, and what
does not reach the tolerance goes on in float64. A problem is converged where its objective is proved to be at most
`tol` (relative) above the minimum. Tiles of problems keep the working memory within a budget.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.probes import loss, newton
from analysis.probes.inputs import check_features, to_tensor
from analysis.probes.preconditioner import Preconditioner
from analysis.probes.rotation import Rotation
from analysis.probes.threads import each_on_a_core, threads_for
from engine.errors import DataError, UsageError

logger = logging.getLogger(__name__)

CLASS_WEIGHTS = ("none", "balanced")
TOLERANCE = 1e-6
# Chains that a core works on at once: so many make a product wide enough, and its rows stay in the core's cache.
_WIDTH = 48
# Chains that make a core of its own worth while.
_FEWEST_A_CORE = 8
# Numbers of a float64 block that is judged at once: 4 MB, which allocators hand out again.
_JUDGED_AT_ONCE = 1 << 19
# Tensors (P, n) and (P, r) that a chain holds while it is solved, temporary ones among them.
_ROW_TENSORS, _DIMENSION_TENSORS = 16, 12
# Newton iterations without progress before float32 leaves a problem to float64, and float64 gives it up.
_STUCK = {torch.float32: 10, torch.float64: 40}
# The first pass aims below the tolerance, so that what it calls converged still is when judged in float64.
_AIM = 0.7
# Total weights C * sum of squares that float32 holds with room to spare.
_FLOAT32_RANGE = (1e-25, 1e25)


@dataclass(frozen=True)
class LogisticFits:
    """Solutions of a sweep over G row weightings, W class weightings, L labels and K values of C.

    Parameters
    ----------
    weight : ndarray of float64, (G, W, L, K, d)
    bias, objective, gap, gradient_norm : ndarray of float64, (G, W, L, K)
        `gap` bounds the objective's distance from its minimum; `gradient_norm` is that of the objective at the best
        intercept. Both are computed in float64.
    iterations, products : ndarray of int64, (G, W, L, K)
        Newton iterations, and products with the features.
    converged : ndarray of bool, (G, W, L, K)
        Whether `gap` is at most `tol` times the objective. Where C times the sum of squares of a feature is beyond
        1e24, rounding in float64 is too coarse to prove it.
    trained : ndarray of bool, (G, W, L)
        False where the rows that count hold one class only: then the weights are 0 and the intercept is the log-odds of
        the weighted share of positives, half a sample added to either side. Counted as converged.
    polished : ndarray of bool, (G, W, L, K)
        Whether float64 was needed.
    c_grid, class_weights, label_names : tuple
        The axes' values.
    """

    weight: np.ndarray
    bias: np.ndarray
    objective: np.ndarray
    gap: np.ndarray
    gradient_norm: np.ndarray
    iterations: np.ndarray
    products: np.ndarray
    converged: np.ndarray
    trained: np.ndarray
    polished: np.ndarray
    c_grid: tuple[float, ...]
    class_weights: tuple[str, ...]
    label_names: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Return one row a problem: rows, class_weight, label, C, and what is known of its convergence."""
        groups, levels = self.bias.shape[0], self.bias.shape[-1]
        axes = pd.MultiIndex.from_product(
            [range(groups), self.class_weights, self.label_names, self.c_grid],
            names=["rows", "class_weight", "label", "C"],
        )
        names = ("converged", "iterations", "products", "objective", "gap", "gradient_norm", "polished")
        columns = {name: getattr(self, name).reshape(-1) for name in names}
        columns["trained"] = np.repeat(self.trained.reshape(-1), levels)
        return pd.DataFrame(columns, index=axes).reset_index()

    def unfinished(self) -> list[str]:
        """Return the problems that are not converged, as "label at C = ..."."""
        return [
            f"{self.label_names[label]} at C = {self.c_grid[level]:g}"
            for _, _, label, level in np.argwhere(~self.converged)
        ]


def solve_logistic(
    x: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    c_grid: Sequence[float],
    *,
    row_weights: np.ndarray | Tensor | None = None,
    class_weights: Sequence[str] = ("none",),
    offset: np.ndarray | Tensor | None = None,
    label_names: Sequence[str] | None = None,
    tol: float = TOLERANCE,
    max_iter: int = 200,
    memory: int = 1 << 30,
    precision: str = "auto",
) -> LogisticFits:
    """Solve every combination of row weighting, class weighting, label and C.

    Parameters
    ----------
    x : array or tensor of float, (n, d)
        Features as they are to be used; a CUDA tensor is worked on where it lies.
    y : array or tensor of 0/1, (n, L)
    c_grid : sequence of float, length K
        Inverse strengths of the ridge, above 0.
    row_weights : array or tensor of float, (G, n), optional
        Sample weights of each fold or seed, 0 for rows left out; all ones if not given.
    class_weights : sequence of "none" | "balanced"
        As scikit-learn: "balanced" gives a class the weight of all counted rows over twice its own.
    offset : array or tensor of float, (n, L), optional
        Logits that are added before the features say anything.
    label_names : sequence of str, length L, optional
        For messages.
    tol : float
        Bound on the distance from the minimum, relative to the objective.
    max_iter : int
        Newton iterations a problem, in float32 and once more in float64.
    memory : int
        Bytes of working memory, beyond four copies of the features and the result; a tile holds one problem at least.
    precision : "auto" | "float64"
        "auto" starts in float32.

    Returns
    -------
    LogisticFits

    Raises
    ------
    DataError
        Shapes do not fit, a value is not finite, or a weighting counts no row.
    UsageError
        A C or weight that is not positive, or an unknown class weighting.
    """
    features, truth = to_tensor(x), to_tensor(y, like=x)
    names = tuple(label_names) if label_names is not None else tuple(f"label {k}" for k in range(truth.shape[-1]))
    weights = torch.ones(1, len(features)) if row_weights is None else to_tensor(row_weights)
    weights = weights.to(features.device, torch.float64)
    shift = None if offset is None else to_tensor(offset).to(features.device, torch.float64)
    grid = tuple(float(c) for c in c_grid)
    _check(features, truth, names, weights, shift, grid, class_weights)
    problem = _Sweep(features.double(), truth.bool(), weights, shift, grid, tuple(class_weights), names, tol, max_iter)
    with threads_for(features.numel() * len(weights) * truth.shape[1]):
        return problem.solve(memory, precision)


class _Sweep:
    """The checked input and the result as it fills, problems in a row: chains (P = G W L) by C (K)."""

    def __init__(
        self, x: Tensor, y: Tensor, weights: Tensor, offset: Tensor | None, grid: tuple[float, ...],
        class_weights: tuple[str, ...], names: tuple[str, ...], tol: float, max_iter: int,
    ) -> None:  # fmt: skip
        self.y, self.weights, self.offset, self.names = y, weights, offset, names
        self.tol, self.max_iter, self.class_weights, self.grid = tol, max_iter, class_weights, grid
        self.rotation = Rotation.of(x, weights.mean(0))
        # Ascending C, so that each starts from its neighbour's solution; put back in the caller's order at the end.
        self.order = np.argsort(grid, kind="stable")
        self.c = torch.tensor(grid, dtype=torch.float64, device=x.device)[torch.as_tensor(self.order.copy())]
        self.c = self.c * self.rotation.scale**2
        self.shape = (len(weights), len(class_weights), y.shape[1])
        count, levels, r = int(np.prod(self.shape)), len(grid), self.rotation.u.shape[1]
        axes = torch.meshgrid(*(torch.arange(size, device=x.device) for size in self.shape), indexing="ij")
        self.group, self.weighting, self.label = (axis.reshape(-1) for axis in axes)
        positive = weights @ y.double()
        everything = weights.sum(1)[:, None]
        self.positive = positive[self.group, self.label]
        self.negative = (everything - positive)[self.group, self.label].clamp(min=0)
        self.trained = (weights @ y.double() > 0)[self.group, self.label]
        self.trained &= (weights @ (~y).double() > 0)[self.group, self.label]
        self.out = newton.Outcome.empty(count, levels, torch.empty(count, r, dtype=torch.float64, device=x.device))
        self.polished = torch.zeros_like(self.out.converged)

    def solve(self, memory: int, precision: str) -> LogisticFits:
        n, r = self.rotation.u.shape
        chains = self.trained.nonzero()[:, 0]
        dtype = torch.float64 if precision == "float64" or not self._suits_float32() else torch.float32
        u = self.rotation.u.to(dtype)
        across = u.T.contiguous()
        cores = torch.get_num_threads() if u.device.type == "cpu" else 1
        cores = max(1, min(cores, len(chains) // _FEWEST_A_CORE))
        # Rare labels take longest: they go first, and each core gets as many of them.
        hardest = torch.minimum(self.positive, self.negative)[chains].argsort(stable=True)
        dealt = [chains[hardest[core::cores]] for core in range(cores)]
        width = tile_width(n, r, dtype.itemsize, memory // cores)
        turns = zip_longest(*(part.split(width) for part in dealt))
        tiles = [tile for turn in turns for tile in turn if tile is not None]
        each_on_a_core(lambda tile: self._solve_tile(u, across, tile, dtype), tiles, cores)
        most = min(tile_width(n, r, 8, memory // cores), max(1, _JUDGED_AT_ONCE // max(1, n)))
        each_on_a_core(self._judge, chains.split(max(1, most // len(self.grid))), cores)
        levels = torch.arange(len(self.grid), device=u.device)
        left = (~self.out.converged & self.trained[:, None]).nonzero()
        if len(left):
            logger.debug("%d of %d problems go on in float64", len(left), len(chains) * len(levels))
            for pairs in left.split(tile_width(n, r, 8, memory)):
                self._polish(pairs[:, 0], pairs[:, 1])
        return self._result()

    def _suits_float32(self) -> bool:
        low, high = _FLOAT32_RANGE
        weights = self.weights[self.weights > 0]
        return bool((self.c[0] * weights.min() > low) & (self.c[-1] * weights.sum() < high))

    def _rows(self, chains: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return signs, weights and offsets (P, n) of some chains."""
        y = self.y.T[self.label[chains]]
        sign = y.to(dtype) * 2 - 1
        balanced = torch.tensor([kind == "balanced" for kind in self.class_weights], device=y.device)
        everything = self.positive + self.negative
        even = torch.ones_like(everything)
        of_positive = torch.where(balanced[self.weighting], everything / (2 * self.positive), even)[chains]
        of_negative = torch.where(balanced[self.weighting], everything / (2 * self.negative), even)[chains]
        of_class = torch.where(y, of_positive[:, None], of_negative[:, None])
        weight = (self.weights[self.group[chains]] * of_class).to(dtype)
        offset = None if self.offset is None else self.offset.T[self.label[chains]].to(dtype)
        return sign, weight, offset

    def _solve_tile(self, u: Tensor, across: Tensor, chains: Tensor, dtype: torch.dtype) -> None:
        sign, weight, offset = self._rows(chains, dtype)
        grid = self.c.to(dtype).repeat(len(chains), 1)
        width = min(len(chains), _WIDTH) if u.device.type == "cpu" else len(chains)
        solver = newton.ChainSolver(
            u, across, newton.Chains(sign, weight, grid, offset), Preconditioner(u),
            tol=_AIM * self.tol, max_iter=self.max_iter, stuck=_STUCK[dtype], width=width,
        )  # fmt: skip
        share = (weight * (sign > 0)).sum(1) / weight.sum(1)
        bias = torch.logit(share) if offset is None else torch.zeros_like(share)
        found = solver.solve(torch.zeros(len(chains), u.shape[1], dtype=dtype, device=u.device), bias)
        self.out.weight[chains], self.out.bias[chains] = found.weight.double(), found.bias.double()
        self.out.iterations[chains], self.out.products[chains] = found.iterations, found.products

    def _judge(self, chains: Tensor) -> None:
        """Bring each problem to its best intercept in float64, and bound its distance from the minimum there."""
        u, levels = self.rotation.u, len(self.grid)
        sign, weight, offset = (
            None if each is None else each.repeat_interleave(levels, 0) for each in self._rows(chains, torch.float64)
        )
        assert sign is not None and weight is not None  # only the offset may be None
        flat = self.out.weight[chains].flatten(0, 1)
        weighted = weight.mul_(self.c.repeat(len(chains))[:, None])
        logits = flat @ u.T + self.out.bias[chains].flatten()[:, None]
        if offset is not None:
            logits += offset
        found, shift = loss.centre(sign, weighted, logits, loss.slopes(sign, weighted, logits), 1e-9)
        gap = 0.5 * (found.without_intercept() @ u + flat).square().sum(1)
        objective = loss.losses(sign, weighted, logits) + 0.5 * flat.square().sum(1)
        shape = (len(chains), levels)
        self.out.bias[chains] += shift.view(shape)
        self.out.gap[chains], self.out.objective[chains] = gap.view(shape), objective.view(shape)
        self.out.converged[chains] = (gap <= self.tol * objective).view(shape)

    def _polish(self, chains: Tensor, levels: Tensor) -> None:
        u = self.rotation.u
        sign, weight, offset = self._rows(chains, torch.float64)
        problems = newton.Chains(sign, weight, self.c[levels][:, None], offset)
        inverses = Preconditioner(u)
        solver = newton.ChainSolver(
            u, u.T.contiguous(), problems, inverses, tol=self.tol, max_iter=self.max_iter, stuck=_STUCK[torch.float64]
        )
        found = solver.solve(self.out.weight[chains, levels], self.out.bias[chains, levels])
        for name in ("weight", "bias", "objective", "gap", "converged"):
            getattr(self.out, name)[chains, levels] = getattr(found, name)[:, 0]
        self.out.iterations[chains, levels] += found.iterations[:, 0]
        self.out.products[chains, levels] += found.products[:, 0]
        self.polished[chains, levels] = True

    def _result(self) -> LogisticFits:
        rotation, out = self.rotation, self.out
        weight, bias = rotation.back(out.weight, out.bias)
        prior = torch.log((self.positive + 0.5) / (self.negative + 0.5))
        one_class = ~self.trained
        weight[one_class], bias[one_class] = 0, prior[one_class][:, None]
        if self.offset is not None:
            bias[one_class] = 0
        out.converged[one_class] = True
        for each in (out.objective, out.gap):
            each /= rotation.scale**2
            each[one_class] = torch.nan
        back = np.argsort(self.order)

        def shaped(values: Tensor) -> np.ndarray:
            return values.cpu().numpy().reshape(*self.shape, len(self.grid), *values.shape[2:])[:, :, :, back]

        return LogisticFits(
            weight=shaped(weight), bias=shaped(bias), objective=shaped(out.objective), gap=shaped(out.gap),
            gradient_norm=np.sqrt(2 * shaped(out.gap)), iterations=shaped(out.iterations),
            products=shaped(out.products), converged=shaped(out.converged),
            trained=self.trained.cpu().numpy().reshape(self.shape), polished=shaped(self.polished),
            c_grid=self.grid, class_weights=self.class_weights, label_names=self.names,
        )  # fmt: skip


def tile_width(rows: int, dimensions: int, itemsize: int, memory: int) -> int:
    """Return how many chains are solved at once within some bytes of working memory; at least one."""
    one = itemsize * (_ROW_TENSORS * rows + _DIMENSION_TENSORS * dimensions + dimensions**2)
    return max(1, memory // max(1, one))


def _check(
    x: Tensor, y: Tensor, names: tuple[str, ...], weights: Tensor, offset: Tensor | None, grid: tuple[float, ...],
    class_weights: Sequence[str],
) -> None:  # fmt: skip
    check_features(x, "features")
    if y.ndim != 2 or len(y) != len(x) or y.shape[1] != len(names):
        raise DataError(
            f"features {tuple(x.shape)}, labels {tuple(y.shape)} and {len(names)} label names do not fit together; "
            "labels are a table with a row for each row of the features"
        )
    if not bool(((y == 0) | (y == 1)).all()):
        raise DataError("labels must be 0 or 1; map uncertain and blank values to 0 first")
    if weights.ndim != 2 or weights.shape[1] != len(x):
        raise DataError(f"row weights {tuple(weights.shape)} for {len(x)} rows; give one row of weights a fold")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise DataError("row weights must be finite and not negative")
    if not bool((weights.sum(1) > 0).all()):
        raise DataError(f"row weighting {int((weights.sum(1) == 0).nonzero()[0, 0])} counts no row at all")
    if offset is not None and (offset.shape != y.shape or not bool(offset.isfinite().all())):
        raise DataError(f"offsets {tuple(offset.shape)} must be finite and have the labels' shape {tuple(y.shape)}")
    if not grid or not all(0 < c < np.inf for c in grid):
        raise UsageError(f"values of C must be above 0, finite, and at least one, got {list(grid)}")
    unknown = [kind for kind in class_weights if kind not in CLASS_WEIGHTS]
    if unknown or not class_weights:
        raise UsageError(f"unknown class weighting {unknown}; known: {', '.join(CLASS_WEIGHTS)}")
