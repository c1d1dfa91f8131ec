"""Which weights learn how fast, how the rate goes with the steps, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.texts import TextSide
from analysis.finetuning.tower import TowerWithHead


def make_optimizer(model: TowerWithHead, texts: TextSide | None, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return AdamW over the free weights, in groups of one rate and one decay each."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}

    def add(weights: nn.Parameter, peak: float, plain: bool = False) -> None:
        decay = 0.0 if plain or (weights.ndim < 2 and not config.decay_all) else config.weight_decay
        group = groups.setdefault((peak, decay), {"params": [], "lr": peak, "peak": peak, "weight_decay": decay})
        group["params"].append(weights)

    for level, weights in model.layered_weights():
        add(weights, config.learning_rate * config.layer_decay**level)
    for weights in model.head.parameters():
        if weights.requires_grad:
            add(weights, config.learning_rate if config.head_rate is None else config.head_rate)
    for name, weights in [] if texts is None else texts.named_parameters():
        if weights.requires_grad:
            rate = config.learning_rate if config.text_rate is None else config.text_rate
            add(weights, rate, plain=name == "log_scale")
    return torch.optim.AdamW(list(groups.values()), lr=config.learning_rate, fused=True)


def rate_share(done: int, steps: int, config: FinetuneConfig) -> float:
    """Return the share of the peak rate at a step (from 0): linear warm-up, then a cosine to zero, or constant."""
    warm = round(config.warmup * steps)
    if done < warm:
        return (done + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


class RunningAverage:
    """Exponential running average of some weights.

    The decay starts small and grows to its final value, so that the first steps' weights are soon forgotten.

    Parameters
    ----------
    weights : mapping of name to Parameter
        Those that train.
    decay : float
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._weights = dict(weights)
        self.values = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.values.values()), [*self._weights.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model hold the average within the context."""
        with torch.no_grad():
            own = {name: value.detach().clone() for name, value in self._weights.items()}
            for name, value in self._weights.items():
                value.copy_(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._weights.items():
                    value.copy_(own[name])
