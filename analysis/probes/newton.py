"""Truncated Newton for many logistic regressions at once: each product with the features serves all of them.

In come rotated features and, for each chain of problems, a row of signs and of weights, and the values of C in
ascending order; out go weights, intercepts and, for each problem, a bound on how far its objective still is above the
minimum. With signs s = +-1 and weights v (sample times class weight), a problem minimises scikit-learn's objective

    F(w, b) = C sum_i v_i softplus(-s_i z_i) + |w|^2 / 2,    z_i = o_i + u_i . w + b.

A chain is a row of the batch that goes from one C to the next, starting from the solutions it has. Each tick is one
product with the features forth and one back, for all chains, whatever each is at: an iteration of conjugate gradients,
or a gradient. None waits for another, and a chain that has its last C makes room for one that waits, so that products
stay wide.

The intercept is eliminated: conjugate gradients run on the Schur complement of w alone, at no product more, so what is
minimised is f(w) = min_b F(w, b). It is strongly convex with modulus 1, because the ridge is, hence
f(w) - min f <= |grad f(w)|^2 / 2 (which is also the duality gap at the dual point of these logits). This bound,
relative to the problem's own objective, ends a problem; no estimate of curvature enters it.

Sources: truncated Newton and the rule that ends its inner iterations, Nash and Sofer (1990), Operations Research
Letters 9; the bound by strong convexity, Boyd and Vandenberghe, Convex Optimization, 9.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from analysis.probes import loss
from analysis.probes.preconditioner import Preconditioner

# Conjugate gradients end where an iteration gains less than this share of the mean gain of those before.
LITTLE_GAIN = 0.15
# Inner iterations after which they are cut off, and the problem gets a preconditioner of its own, or a fresh one: at
# least so many, and this share of the iterations that its making costs.
PATIENCE = 8
SHARE_OF_COST = 0.15
# Close enough to the best intercept for the gradient's first-order correction to do the rest.
CLOSE_INTERCEPT = 1e-3


@dataclass(frozen=True)
class Chains:
    """P rows of problems, each to be solved for all values of C.

    Parameters
    ----------
    sign : Tensor, (P, n)
        +1 for positives, -1 for negatives.
    row_weight : Tensor, (P, n)
        Sample weight times class weight; 0 leaves a row out.
    c_grid : Tensor, (P, K)
        Ascending in each row.
    offset : Tensor, (P, n), or None
        Logits that are there before the features say anything.
    """

    sign: Tensor
    row_weight: Tensor
    c_grid: Tensor
    offset: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """Where the problems ended: weight (P, K, r); bias, objective, gap, iterations, products, converged (P, K) each.

    `gap` bounds the distance from the minimum, in units of the objective; `products` counts products with the features.
    """

    weight: Tensor
    bias: Tensor
    objective: Tensor
    gap: Tensor
    iterations: Tensor
    products: Tensor
    converged: Tensor

    @classmethod
    def empty(cls, count: int, levels: int, like: Tensor) -> Outcome:
        """Return an outcome to be filled, for tensors like the given one (P, r)."""
        number = like.new_full((count, levels), torch.nan)
        whole = torch.zeros(count, levels, dtype=torch.int64, device=like.device)
        weight = like.new_full((count, levels, like.shape[1]), torch.nan)
        return cls(weight, number, number.clone(), number.clone(), whole, whole.clone(), whole.bool())


@dataclass
class _State:
    """The chains at work; the first dimension of every tensor is theirs."""

    chain: Tensor
    level: Tensor
    sign: Tensor
    weighted: Tensor
    c: Tensor
    weight: Tensor
    bias: Tensor
    logits: Tensor
    objective: Tensor
    before_weight: Tensor
    before_bias: Tensor
    before_logits: Tensor
    residual: Tensor
    curvature: Tensor
    total: Tensor
    at_gradient: Tensor
    step: Tensor
    step_bias: Tensor
    along: Tensor
    left: Tensor
    direction: Tensor
    size: Tensor
    gained: Tensor
    enough: Tensor
    inner: Tensor
    iterations: Tensor
    products: Tensor
    lowest: Tensor
    waited: Tensor

    def take(self, keep: Tensor) -> _State:
        return _State(**{each.name: getattr(self, each.name)[keep] for each in fields(self)})


class ChainSolver:
    """Solves chains over one set of features.

    Parameters
    ----------
    u : Tensor, (n, r)
        Features rotated into the eigenbasis of their Gram matrix.
    across : Tensor, (r, n)
        The same, transposed in memory: a quarter faster to multiply by than a transposed view.
    chains : Chains
    preconditioner : Preconditioner
    tol : float
        A problem ends where its bound falls to `tol` times its objective.
    max_iter : int
        Newton iterations a problem.
    stuck : int
        Newton iterations without a bound half as high after which a problem counts as stuck in rounding.
    width : int, optional
        Chains at work at once; all unless given.
    """

    def __init__(
        self,
        u: Tensor,
        across: Tensor,
        chains: Chains,
        preconditioner: Preconditioner,
        *,
        tol: float,
        max_iter: int,
        stuck: int,
        width: int | None = None,
    ) -> None:
        self.u, self.across, self.chains, self.preconditioner = u, across, chains, preconditioner
        self.tol, self.max_iter, self.stuck = tol, max_iter, stuck
        self.tiny = torch.finfo(u.dtype).tiny
        self.width = len(chains.sign) if width is None else min(width, len(chains.sign))
        self.patience = max(PATIENCE, round(SHARE_OF_COST * preconditioner.cost()))

    def solve(self, weight: Tensor, bias: Tensor) -> Outcome:
        """Solve all chains, their first C from weights (P, r) and intercepts (P,)."""
        self.outcome = Outcome.empty(len(weight), self.chains.c_grid.shape[1], weight)
        self.start, self.entered = (weight, bias), 0
        self.state = self._empty()
        self._enter(torch.arange(self.width, device=weight.device))
        while len(self.state.chain):
            asked, moved, mean = self._multiply_forth()
            back = asked @ self.u
            gradients = self.state.at_gradient.nonzero()[:, 0]
            ended = self._conjugate(back, moved, mean)
            over = self._judge(gradients, back)
            if len(ended):
                self._step(ended)
            if len(over):
                self._leave(over)
        return self.outcome

    def _empty(self) -> _State:
        (rows, dimensions), like = self.u.shape, self.u
        whole = torch.zeros(self.width, dtype=torch.int64, device=like.device)
        made = {}
        for each in fields(_State):
            if each.name in ("sign", "weighted", "logits", "before_logits", "residual", "curvature", "along"):
                made[each.name] = like.new_zeros(self.width, rows)
            elif each.name in ("weight", "before_weight", "step", "left", "direction"):
                made[each.name] = like.new_zeros(self.width, dimensions)
            elif each.name in ("chain", "level", "inner", "iterations", "products", "waited"):
                made[each.name] = whole.clone()
            else:
                made[each.name] = like.new_zeros(self.width)
        return _State(**(made | {"at_gradient": whole.bool()}))

    def _enter(self, which: Tensor) -> None:
        """Put the next chains into these rows of the batch, each at its first C."""
        state, chains = self.state, self.chains
        new = torch.arange(self.entered, self.entered + len(which), device=which.device)
        self.entered += len(which)
        weight, bias = (each[new] for each in self.start)
        logits = torch.addmm(bias[:, None], weight, self.across)
        if chains.offset is not None:
            logits += chains.offset[new]
        state.chain[which], state.c[which] = new, chains.c_grid[new, 0]
        state.sign[which] = chains.sign[new]
        state.weighted[which] = chains.row_weight[new] * chains.c_grid[new, :1]
        for name, value in {"weight": weight, "bias": bias, "logits": logits}.items():
            getattr(state, name)[which] = value
            getattr(state, f"before_{name}")[which] = value
        for name in ("level", "iterations", "products", "waited"):
            getattr(state, name)[which] = 0
        state.lowest[which] = torch.inf
        self._arrive(which, state.sign[which], state.weighted[which], logits, None)

    def _leave(self, over: Tensor) -> None:
        """Give the rows of chains that are over to those that wait, and drop what is left."""
        self.preconditioner.release(self.state.chain[over])
        waiting = min(len(over), len(self.chains.sign) - self.entered)
        if waiting:
            self._enter(over[:waiting])
        if len(over) > waiting:
            keep = torch.ones_like(self.state.at_gradient)
            keep[over[waiting:]] = False
            self.state = self.state.take(keep)

    def _multiply_forth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is to be multiplied back (P, n), a residual or the curved direction; and the latter's logits.

        The logits (P, n) are those with the intercept following the direction; by how much it falls comes third (P,).
        """
        state = self.state
        moved = state.direction @ self.across
        asked = state.curvature * moved
        mean = asked.sum(1) / state.total
        asked.addcmul_(state.curvature, mean[:, None], value=-1)
        moved -= mean[:, None]
        gradients = state.at_gradient.nonzero()[:, 0]
        if len(gradients):
            asked[gradients] = state.residual[gradients]
        return asked, moved, mean

    def _conjugate(self, back: Tensor, moved: Tensor, mean: Tensor) -> Tensor:
        """Take one iteration of conjugate gradients where they run; return the rows where that was the last."""
        state = self.state
        running = ~state.at_gradient
        curved = back + state.direction
        bend = (state.direction * curved).sum(1).clamp_(min=self.tiny)
        length = torch.where(running, state.size / bend, 0)
        state.step.addcmul_(state.direction, length[:, None])
        state.step_bias.addcmul_(mean, length, value=-1)
        state.along.addcmul_(moved, length[:, None])
        state.left.addcmul_(curved, length[:, None], value=-1)
        gain = 0.5 * length * state.size
        state.gained += gain
        state.inner += running
        state.products += 2 * running
        little = gain * state.inner <= LITTLE_GAIN * state.gained
        close = 0.5 * state.left.square().sum(1) <= 0.1 * state.enough
        ended = running & (little | close | (state.inner >= self.patience))
        preconditioned = self.preconditioner.apply(state.chain, state.total, state.left)
        size = (state.left * preconditioned).sum(1)
        ratio = torch.where(running, size / state.size.clamp(min=self.tiny), 0)
        state.direction = torch.addcmul(preconditioned, state.direction, ratio[:, None])
        state.direction[state.at_gradient] = 0
        state.size = size
        return ended.nonzero()[:, 0]

    def _judge(self, which: Tensor, back: Tensor) -> Tensor:
        """Where gradients are there, record what is solved and send it on, or start Newton; return what is over."""
        state = self.state
        if not len(which):
            return which
        gradient = back[which] + state.weight[which]
        gap = 0.5 * gradient.square().sum(1)
        state.products[which] += 1
        lower = gap < 0.5 * state.lowest[which]
        state.waited[which] = torch.where(lower, 0, state.waited[which] + 1)
        state.lowest[which] = torch.where(lower, gap, state.lowest[which])
        given_up = (state.iterations[which] >= self.max_iter) | (state.waited[which] >= self.stuck)
        # It falls with each step, so the last one known tells where a new one need not be computed.
        open_ = (state.iterations[which] == 0) | given_up | (gap <= self.tol * state.objective[which])
        if bool(open_.any()):
            asked = which[open_]
            found = loss.losses(state.sign[asked], state.weighted[asked], state.logits[asked])
            state.objective[asked] = found + 0.5 * state.weight[asked].square().sum(1)
        objective = state.objective[which]
        converged = gap <= self.tol * objective
        done = converged | given_up
        solved = which[done]
        if len(solved):
            place = (state.chain[solved], state.level[solved])
            self.outcome.weight[place] = state.weight[solved]
            for name, value in {
                "bias": state.bias[solved], "iterations": state.iterations[solved], "objective": objective[done],
                "products": state.products[solved], "gap": gap[done], "converged": converged[done],
            }.items():  # fmt: skip
                getattr(self.outcome, name)[place] = value
        self._start_newton(which[~done], gradient[~done], self.tol * objective[~done])
        last = state.level[solved] + 1 == self.chains.c_grid.shape[1]
        if not bool(last.all()):
            self._next_c(solved[~last])
        return solved[last]

    def _start_newton(self, which: Tensor, gradient: Tensor, enough: Tensor) -> None:
        state = self.state
        if not len(which):
            return
        preconditioned = -self.preconditioner.apply(state.chain[which], state.total[which], gradient)
        state.left[which], state.direction[which] = -gradient, preconditioned
        state.size[which] = -(gradient * preconditioned).sum(1)
        state.enough[which] = enough
        state.iterations[which] += 1
        for name in ("step", "step_bias", "along", "gained", "inner"):
            getattr(state, name)[which] = 0
        state.at_gradient[which] = False

    def _next_c(self, which: Tensor) -> None:
        """Go to the next C, along the line through the last two solutions as far as that leads downhill."""
        state = self.state
        state.level[which] += 1
        before, chain = state.c[which], state.chain[which]
        state.c[which] = self.chains.c_grid[chain, state.level[which]]
        state.weighted[which] = self.chains.row_weight[chain] * state.c[which][:, None]
        state.residual[which] *= (state.c[which] / before)[:, None]
        state.iterations[which], state.products[which], state.waited[which] = 0, 0, 0
        state.lowest[which] = torch.inf
        state.step[which] = state.weight[which] - state.before_weight[which]
        state.step_bias[which] = state.bias[which] - state.before_bias[which]
        state.along[which] = state.logits[which] - state.before_logits[which]
        for name in ("weight", "bias", "logits"):
            getattr(state, f"before_{name}")[which] = getattr(state, name)[which]
        self._move(which)

    def _step(self, ended: Tensor) -> None:
        """Walk along the Newton step, and renew the preconditioners of those that took long."""
        state = self.state
        slow = ended[state.inner[ended] >= self.patience]
        self._move(ended)
        if len(slow):
            self.preconditioner.renew(state.chain[slow], state.curvature[slow])

    def _move(self, which: Tensor) -> None:
        state = self.state
        sign, weighted = state.sign[which], state.weighted[which]
        logits, along, step, weight = state.logits[which], state.along[which], state.step[which], state.weight[which]
        linear, square = (weight * step).sum(1), step.square().sum(1)
        start = (state.residual[which] * along).sum(1) + linear
        length, found = loss.search(sign, weighted, logits, along, start, linear, square)
        state.weight[which] = torch.addcmul(weight, step, length[:, None])
        state.bias[which] += length * state.step_bias[which]
        self._arrive(which, sign, weighted, logits, found)

    def _arrive(self, which: Tensor, sign: Tensor, weighted: Tensor, logits: Tensor, found: loss.Slopes | None) -> None:
        """Bring rows, whose signs, weights and logits are given, to their best intercept; prepare their gradients."""
        state = self.state
        found, shift = loss.centre(
            sign, weighted, logits, found or loss.slopes(sign, weighted, logits), CLOSE_INTERCEPT
        )
        state.logits[which] = logits
        state.bias[which] += shift
        state.curvature[which], state.total[which] = found.curvature, found.total
        state.residual[which] = found.without_intercept()
        state.at_gradient[which] = True
        state.direction[which] = 0
