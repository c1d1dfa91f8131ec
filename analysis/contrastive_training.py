"""The loop that trains two towers with `analysis.contrastive`: AdamW, warm-up and cosine by step, running average.

In come the model and batches; out goes the running average of the model's weights. No files, no data set, no metrics.
A step may take several batches side by side, each in a thread of its own: on a few cores that are shared with other
work this was about one and a half times as fast as splitting every operation over the cores.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from analysis import contrastive
from engine.errors import UsageError

log = logging.getLogger(__name__)


class RunningAverage:
    """Exponential running average of a model's weights.

    The decay starts small and grows to its final value, so that the first steps' weights are soon forgotten.
    """

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        values = [value for value in model.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(averages, values, 1 - decay)


def learning_rate(done: float, config: contrastive.ContrastiveConfig) -> float:
    """Return the rate after a share `done` of the training: linear warm-up, then a cosine to its final value."""
    warm = config.warmup_steps / config.steps
    if done < warm:
        return config.learning_rate * (done + 1 / config.steps) / warm
    fall = min(1.0, (done - warm) / max(1e-9, 1 - warm))
    low = config.final_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall)))


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those with weight decay (matrices) and those without (norms, biases, scales, positions)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                free = parameter.ndim < 2 or "embedding" in name
                (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(
    model: Any,
    batches: Iterable[contrastive.ContrastiveBatch],
    label_count: int,
    config: contrastive.ContrastiveConfig,
    on_step: Callable[[int, dict[str, float], Any], None] | None = None,
) -> Any:
    """Train the model in place and return the running average of its weights.

    Parameters
    ----------
    model : open_clip model
        On its device, in float32.
    batches : iterable of ContrastiveBatch
        At least ``config.steps * config.parallel`` of them, on the model's device.
    label_count : int
        Number of label names, L.
    on_step : callable, optional
        Called after each step with its number, {"loss", "captions", "names", "regions", "rate", "seconds"} and the
        averaged model.

    Raises
    ------
    UsageError
        If the batches end before the steps do, or the loss is no longer a number.
    """
    device = model.logit_scale.device
    objective = contrastive.ContrastiveObjective(label_count, config).to(device)
    groups = parameter_groups([model, objective], config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average = RunningAverage(model, config.average_decay)
    model.train()
    source = iter(batches)
    begun = time.perf_counter()
    limit = math.inf if config.limit_minutes is None else 60 * config.limit_minutes
    with _workers(config.parallel) as workers:
        for step in range(config.steps):
            started = time.perf_counter()
            done = max(step / config.steps, (started - begun) / limit)
            if done >= 1:
                log.warning("stopped after %d of %d steps: limit_minutes %s", step, config.steps, config.limit_minutes)
                break
            together = list(itertools.islice(source, config.parallel))
            if len(together) < config.parallel:
                raise UsageError(
                    f"the batches ended after {step} steps of {config.steps}: give more data or fewer steps"
                )
            rate = learning_rate(done, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = _set_gradients(objective, model, parameters, together, done, workers)
            if not math.isfinite(terms["loss"]):
                raise UsageError(
                    f"the loss is {terms['loss']} at step {step}: lower learning_rate {config.learning_rate}"
                )
            nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(config.max_logit_scale))
            average.update(model)
            if on_step is not None:
                on_step(step, {**terms, "rate": rate, "seconds": time.perf_counter() - started}, average.model)
    return average.model


@contextlib.contextmanager
def _workers(parallel: int) -> Iterator[ThreadPoolExecutor | None]:
    """Give threads for batches computed side by side, each with an equal share of the cores."""
    if parallel == 1:
        yield None
        return
    before = torch.get_num_threads()
    share = max(1, before // parallel)
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(parallel, initializer=torch.set_num_threads, initargs=(share,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def _set_gradients(
    objective: contrastive.ContrastiveObjective,
    model: Any,
    parameters: list[nn.Parameter],
    together: list[contrastive.ContrastiveBatch],
    done: float,
    workers: ThreadPoolExecutor | None,
) -> dict[str, float]:
    """Set the parameters' gradients to the mean over the batches, added up in their order; return the mean terms."""

    def one(batch: contrastive.ContrastiveBatch) -> tuple[tuple[torch.Tensor | None, ...], dict[str, float]]:
        loss, terms = objective(model, batch, done)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return gradients, {"loss": float(loss.detach()), **terms}

    results = list(map(one, together)) if workers is None else list(workers.map(one, together))
    for parameter, *gradients in zip(parameters, *(gradients for gradients, _ in results), strict=True):
        known = [gradient for gradient in gradients if gradient is not None]
        parameter.grad = sum(known[1:], known[0]) / len(together) if known else None
    return {name: sum(terms[name] for _, terms in results) / len(results) for name in results[0][1]}
