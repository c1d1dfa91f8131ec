"""What fine-tuning leaves, and the history of its epochs: which was best, and for how long nothing has improved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch

from analysis.finetuning.recipe import MONITORS, FinetuneConfig
from analysis.heads import LinearHead
from engine.errors import DataError

log = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FinetuneResult:
    """What training left.

    Parameters
    ----------
    state : dict of str to Tensor
        The image tower's weights at its best epoch, in float32 on the CPU, by their names in the tower; adapters are
        merged in.
    head : LinearHead
        Of the same epoch.
    history : DataFrame
        One row an epoch: epoch, train_loss, bce, map, auroc_macro, lrap (validation; contrastive where images are held
        against texts), rate, seconds, best.
    best_epoch : int
        From 1; 0 where a head was handed in and nothing improved on it.
    seconds : float
        All in all, of which `frozen_seconds` went into the part that does not train, and `earlier_seconds` passed in
        processes that were stopped, up to the checkpoint that this one went on from.
    images : int
        Training images through an optimiser step, without those in processes that were stopped.
    images_per_second : float
        Training images through an optimiser step, over the seconds of the training loops alone.
    trained_weights, all_weights : int
        How many numbers of the tower were free, and how many it has.
    config : FinetuneConfig
    micro_batch : int
        How many samples went through at once.
    text_state : dict of str to Tensor
        After a contrast, what it changed beside the image tower: ``logit_scale``, and the text tower where that was
        free; by their names in the whole model.
    untrained_labels : tuple of str
        Labels without a positive in training, of which the head knows nothing.
    """

    state: Weights
    head: LinearHead
    history: pd.DataFrame
    best_epoch: int
    seconds: float
    frozen_seconds: float
    images: int
    images_per_second: float
    trained_weights: int
    all_weights: int
    config: FinetuneConfig
    micro_batch: int
    text_state: Weights = field(default_factory=dict)
    untrained_labels: tuple[str, ...] = ()
    earlier_seconds: float = 0.0

    @property
    def model_state(self) -> Weights:
        """What changed, by the names of the whole open_clip model; for `engine.model_folder.save_model_folder`."""
        return {**{f"visual.{name}": value for name, value in self.state.items()}, **self.text_state}

    def card(self) -> dict[str, Any]:
        """Return what training did as plain values, for the model folder's card."""
        best = self.history[self.history["epoch"] == self.best_epoch]
        return {
            "objective": self.config.objective
            + (f" + {self.config.contrastive_weight:g} contrastive" if self.config.contrastive_weight else ""),
            "validation": {name: float(best[name].iloc[0]) for name in MONITORS if name in best},
            "best_epoch": self.best_epoch,
            "epochs_run": int(self.history["epoch"].max()),
            "recipe": asdict(self.config),
            "untrained_labels": list(self.untrained_labels),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.images_per_second, 2),
            "trained_weights": self.trained_weights,
            "all_weights": self.all_weights,
        }


class History:
    """What each epoch gave, which was best, and its weights.

    Parameters
    ----------
    config : FinetuneConfig
    """

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self.best_weights: Weights | None = None
        self.best_epoch = self.waited = 0
        self._best = -math.inf

    def state(self) -> dict[str, Any]:
        """Return everything but the weights, as plain values."""
        return {"rows": self.rows, "best_epoch": self.best_epoch, "waited": self.waited, "best": self._best}

    def restore(self, state: dict[str, Any], best_weights: Weights | None) -> None:
        """Go on from a state and the weights that belong to it."""
        self.rows, self.best_epoch, self.waited = list(state["rows"]), state["best_epoch"], state["waited"]
        self._best, self.best_weights = state["best"], best_weights

    def add(
        self,
        epoch: int,
        train_loss: float,
        scores: dict[str, float],
        rate: float,
        seconds: float,
        weights: Callable[[], Weights],
    ) -> bool:
        """Note an epoch; its weights are taken where it is the best so far. Return whether it is."""
        monitor = self.config.monitor
        if not math.isfinite(scores[monitor]):
            raise DataError(
                f"fine-tuning: the validation metric {monitor!r} is {scores[monitor]}; with no positives of any label "
                "in validation take monitor bce, or another split"
            )
        value = scores[monitor] if MONITORS[monitor] else -scores[monitor]
        improved = value > self._best + (self.config.min_improvement if self.rows else 0.0)
        if improved:
            self._best, self.best_epoch, self.best_weights, self.waited = value, epoch, weights(), 0
        else:
            self.waited += 1
        row = {"epoch": epoch, "train_loss": train_loss, **scores, "rate": rate, "seconds": seconds, "best": improved}
        self.rows.append(row)
        log.info(
            "epoch %d of %d:%s validation %s",
            *(epoch, self.config.epochs, f" training loss {train_loss:.4f}," if epoch else " the start,"),
            ", ".join(f"{name} {score:.4f}" for name, score in scores.items()),
        )
        return improved
