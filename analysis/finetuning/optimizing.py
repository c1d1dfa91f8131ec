"""Which weights learn how fast, and how the rate goes with the steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.tower import TowerWithHead


def make_optimizer(model: TowerWithHead, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return AdamW over the free weights, in groups of one rate and one decay each."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for share, weights in model.layered_weights():
        _add_to_group(groups, weights, config.learning_rate * config.layer_decay**share, config)
    head_rate = config.head_rate if config.head_rate is not None else config.learning_rate
    for weights in model.head.parameters():
        _add_to_group(groups, weights, head_rate, config)
    return torch.optim.AdamW(list(groups.values()), lr=config.learning_rate)


def rate_share(done: int, steps: int, config: FinetuneConfig) -> float:
    """Return the share of the peak rate at a step (from 0): linear warm-up, then a cosine to zero, or constant."""
    warm = round(config.warmup * steps)
    if done < warm:
        return (done + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


def _add_to_group(
    groups: dict[tuple[float, float], dict[str, Any]], weights: nn.Parameter, peak: float, config: FinetuneConfig
) -> None:
    decay = config.weight_decay if config.decay_all or weights.ndim > 1 else 0.0
    group = groups.setdefault((peak, decay), {"params": [], "lr": peak, "peak": peak, "weight_decay": decay})
    group["params"].append(weights)
