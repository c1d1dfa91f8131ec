"""All that changes from step to step, as one thing that can be written down and set again, to the bit.

In come the parts of a training; out goes a state of tensors and plain values (`Numbers.state`), from which another
process goes on (`Numbers.restore`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from analysis.finetuning.optimizing import RunningAverage, make_optimizer
from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.result import History, Weights
from analysis.finetuning.texts import TextSide
from analysis.finetuning.tower import TowerWithHead


class Position(NamedTuple):
    """Where a training stands: before a step of an epoch, with the epoch's loss so far and its order of samples."""

    epoch: int
    step: int = 0
    total: float = 0.0
    order: np.ndarray | None = None

    @property
    def described(self) -> str:
        """Where that is, in words."""
        return f"epoch {self.epoch}, before step {self.step} in it"


@dataclass
class Numbers:
    """Weights and all that moves with them.

    Parameters
    ----------
    weights : dict of str to Parameter
        All that train, of towers and head.
    optimizer : Optimizer
    scaler : GradScaler
    average : RunningAverage or None
    history : History
    order_rng, draw_rng : numpy Generator
        Of the samples' order and of augmentation: two streams, so that the one does not depend on the other.
    device : torch.device
    micro_batch : int
        Samples that go through at once.
    training_seconds, images_through
        For the rate.
    seconds : float
        All that went into the training before this state, also in processes that were stopped.
    """

    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: RunningAverage | None
    history: History
    order_rng: np.random.Generator
    draw_rng: np.random.Generator
    device: torch.device
    micro_batch: int
    training_seconds: float = 0.0
    images_through: int = 0
    seconds: float = 0.0

    @classmethod
    def at_start(
        cls,
        model: TowerWithHead,
        texts: TextSide | None,
        scaler: torch.amp.GradScaler,
        config: FinetuneConfig,
        device: torch.device,
        micro_batch: int,
    ) -> Numbers:
        """Return the numbers before the first step."""
        weights = model.free_weights
        for name, value in [] if texts is None else texts.named_parameters():
            if value.requires_grad:
                weights[f"texts.{name}"] = value
        return cls(
            weights=weights,
            optimizer=make_optimizer(model, texts, config),
            scaler=scaler,
            average=RunningAverage(weights, config.ema_decay) if config.ema_decay is not None else None,
            history=History(config),
            order_rng=np.random.Generator(np.random.PCG64(config.seed)),
            draw_rng=np.random.Generator(np.random.PCG64([config.seed, 1])),
            device=device,
            micro_batch=micro_batch,
        )

    def copied_weights(self) -> Weights:
        """Return the weights as they are now, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.weights.items()}

    def set_weights(self, values: Weights) -> None:
        """Set the weights."""
        with torch.no_grad():
            for name, value in self.weights.items():
                value.copy_(values[name])

    def state(self, position: Position) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        cuda = self.device.type == "cuda"
        average = self.average
        return {
            "epoch": position.epoch,
            "step": position.step,
            "total": position.total,
            "order": None if position.order is None else torch.from_numpy(position.order),
            "weights": {name: value.detach() for name, value in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if average is None else {"steps": average.steps, "values": average.values},
            "order_rng": json.dumps(self.order_rng.bit_generator.state),
            "draw_rng": json.dumps(self.draw_rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": json.dumps(self.history.state()),
            "micro_batch": self.micro_batch,
            "training_seconds": self.training_seconds,
            "images_through": self.images_through,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> Position:
        """Set everything as a state says, with the best weights beside it; return where that was."""
        self.set_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.steps = state["average"]["steps"]
            for name, value in state["average"]["values"].items():
                self.average.values[name].copy_(value)
        self.order_rng.bit_generator.state = json.loads(state["order_rng"])
        self.draw_rng.bit_generator.state = json.loads(state["draw_rng"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.history.restore(json.loads(state["history"]), state["best_weights"])
        self.micro_batch = state["micro_batch"]
        self.training_seconds, self.images_through = state["training_seconds"], state["images_through"]
        self.seconds = state.get("seconds", 0.0)  # checkpoints of earlier versions do not say
        order = None if state["order"] is None else state["order"].numpy()
        return Position(state["epoch"], state["step"], state["total"], order)
