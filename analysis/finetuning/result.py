"""What fine-tuning leaves, and the history of its epochs: which was best, and for how long nothing has improved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.finetuning.recipe import MONITORS, FinetuneConfig
from analysis.heads import LinearHead
from engine.errors import DataError

log = logging.getLogger(__name__)

State = tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class FinetuneResult:
    """What training left.

    Parameters
    ----------
    state : dict of str to Tensor
        The image tower's weights at its best epoch, in float32 on the CPU, by their names in the tower.
    head : LinearHead
        Of the same epoch.
    history : DataFrame
        One row an epoch: epoch, train_loss, bce, map, auroc_macro (validation), rate, seconds, best.
    best_epoch : int
        From 1; 0 where a head was handed in and nothing improved on it.
    seconds : float
        All in all, of which `frozen_seconds` went into the part that does not train.
    images_per_second : float
        Training images through an optimiser step, over the seconds of the training loops alone.
    trained_weights, all_weights : int
        How many numbers of the tower were free, and how many it has.
    """

    state: dict[str, torch.Tensor]
    head: LinearHead
    history: pd.DataFrame
    best_epoch: int
    seconds: float
    frozen_seconds: float
    images_per_second: float
    trained_weights: int
    all_weights: int
    config: FinetuneConfig

    def card(self) -> dict[str, Any]:
        """Return what training did as plain values, for the model folder's card."""
        best = self.history[self.history["epoch"] == self.best_epoch]
        return {
            "recipe": asdict(self.config),
            "best_epoch": self.best_epoch,
            "epochs_run": int(self.history["epoch"].max()),
            "validation": {name: float(best[name].iloc[0]) for name in MONITORS},
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.images_per_second, 2),
            "trained_weights": self.trained_weights,
            "all_weights": self.all_weights,
        }


class History:
    """What each epoch gave, which was best, and its weights."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self.best_state: State | None = None
        self.best_epoch = self.waited = 0
        self._best = -math.inf

    def add(
        self, epoch: int, train_loss: float, scores: dict[str, float], rate: float, seconds: float,
        state: Callable[[], State],
    ) -> None:  # fmt: skip
        """Note an epoch; its weights are taken where it is the best so far."""
        monitor = self.config.monitor
        if not math.isfinite(scores[monitor]):
            raise DataError(
                f"fine-tuning: the validation metric {monitor!r} is {scores[monitor]}; with no positives of any label "
                "in validation take monitor bce, or another split"
            )
        value = scores[monitor] if MONITORS[monitor] else -scores[monitor]
        improved = value > self._best + (self.config.min_improvement if self.rows else 0.0)
        if improved:
            self._best, self.best_epoch, self.best_state, self.waited = value, epoch, state(), 0
        else:
            self.waited += 1
        row = {"epoch": epoch, "train_loss": train_loss, **scores, "rate": rate, "seconds": seconds, "best": improved}
        self.rows.append(row)
        log.info(
            "epoch %d of %d:%s validation bce %.4f, map %.4f, auroc %.4f",
            *(epoch, self.config.epochs, f" training loss {train_loss:.4f}," if epoch else " the start,"),
            *(scores["bce"], scores["map"], scores["auroc_macro"]),
        )
