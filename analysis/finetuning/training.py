"""Fine-tuning of an image tower with a linear head on multi-label targets, from the pixels that the model sees.

In come an encoder, uint8 pixels, labels and which rows train and choose; out go the tower's new weights (the caller
makes them a model folder, a new encoder of its own) and the head. The given encoder is not touched.

What does not train need not run more than once: with ``trainable`` set to the last blocks, the frozen part turns the
images into tokens a single time, these stay in memory, and every epoch starts from them (unless images are augmented).
BatchNorm keeps its statistics: with small batches they would be the batch's, not the data's.

`study_recipe` is the published study's own training (arXiv 2506.14136): the whole tower and a Xavier head at one rate
of 1e-5, AdamW made anew each epoch, no schedule, plain BCE, fp16 autocast where there is CUDA, stop by validation BCE.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from analysis import metrics
from analysis.finetuning import inputs
from analysis.finetuning.optimizing import make_optimizer, rate_share
from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.result import FinetuneResult, History, State
from analysis.finetuning.tower import TowerWithHead
from analysis.heads import LinearHead
from engine.errors import DataError, UsageError

if TYPE_CHECKING:
    from engine.encoder import Encoder

log = logging.getLogger(__name__)


def finetune(
    encoder: Encoder,
    pixels: inputs.PixelSource,
    y: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    config: FinetuneConfig | None = None,
    *,
    label_names: tuple[str, ...] = (),
    head: LinearHead | None = None,
    progress: inputs.Progress | None = None,
    kept: inputs.KeptResults | None = None,
) -> FinetuneResult:
    """Train a copy of the image tower and a linear head.

    Parameters
    ----------
    encoder : Encoder
        Left as it is; training runs on its device, in float32 (a lower precision's weights are taken as they are).
    pixels : PixelSource, n rows
        uint8 (b, h, w, 3), what the model sees before mean and standard deviation.
    y : ndarray of 0/1, (n, L)
    train, val : ndarray of int
        Rows; without a row in common.
    config : FinetuneConfig, optional
    label_names : tuple of str, length L
    head : LinearHead, optional
        Where the head starts: a fitted probe (probe first, then fine-tune: Kumar et al., ICLR 2022) or
        `head_from_text`. By default Xavier-uniform with the bias as ``nn.Linear`` has it.
    progress : callable, optional
        ``progress(name, done, total)``.
    kept : KeptResults, optional
        What the frozen part gave in earlier trainings on the same pixels, encoder, `trainable` and precision (folds);
        it is used and added to.

    Raises
    ------
    UsageError, DataError
        Rows in both parts, an empty part, shapes that do not fit, a loss that is not finite.
    """
    config = config or FinetuneConfig()
    truth = metrics.check_truth(y)
    train, val = _checked_rows(train, "train", len(truth)), _checked_rows(val, "val", len(truth))
    both = np.intersect1d(train, val)
    if len(both):
        raise DataError(f"{len(both)} rows are in both train and val, first {both[0]}: validation must be unseen")
    if len(pixels) != len(truth):
        raise DataError(f"{len(pixels)} images but {len(truth)} rows of labels")
    names = label_names or (head.label_names if head else tuple(str(label) for label in range(truth.shape[1])))
    if len(names) != truth.shape[1]:
        raise DataError(f"{len(names)} label names for {truth.shape[1]} labels")
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(config.seed)
        training = _Training(encoder, pixels, truth, train, val, config, tuple(names), head, progress, kept)
        return training.run()


class _Training:
    """One run of `finetune`: its model, its data in the form that the free part needs, its loop."""

    def __init__(
        self,
        encoder: Encoder,
        pixels: inputs.PixelSource,
        truth: np.ndarray,
        train: np.ndarray,
        val: np.ndarray,
        config: FinetuneConfig,
        label_names: tuple[str, ...],
        head: LinearHead | None,
        progress: inputs.Progress | None,
        kept: inputs.KeptResults | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.encoder, self.pixels, self.truth, self.train, self.val = encoder, pixels, truth, train, val
        self.config, self.label_names, self.progress, self.kept = config, label_names, progress, kept
        self.device = encoder.device
        self.normalize = head.normalised if head is not None else config.normalize
        self.start = head
        self.model = TowerWithHead(encoder, config.trainable, len(label_names), head, self.normalize)
        self.rng = np.random.Generator(np.random.PCG64(config.seed))
        self.autocast = _autocast_type(config.autocast, self.device)
        self.images_to_do = config.epochs * len(train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.loss = nn.BCEWithLogitsLoss(pos_weight=self._positive_weights())
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)

    def run(self) -> FinetuneResult:
        """Train until the epochs end or nothing improves, and return the best epoch."""
        config = self.config
        before = time.perf_counter()
        augmented = self._augmented if config.augments else None
        with self._mixed():
            train_inputs = self._inputs(self.train, augmented)
            val_inputs = self._inputs(self.val, None)
        frozen_seconds = time.perf_counter() - before
        optimizer, history = make_optimizer(self.model, config), History(config)
        if self.start is not None:
            # A head that was fitted already may be better than anything that follows.
            history.add(0, math.nan, self._validate(val_inputs), 0.0, 0.0, self._state)
        training_seconds = 0.0
        for epoch in range(1, config.epochs + 1):
            begun = time.perf_counter()
            if config.remake_optimizer and epoch > 1:
                optimizer = make_optimizer(self.model, config)
            train_loss = self._epoch(epoch, optimizer, train_inputs)
            training_seconds += time.perf_counter() - begun
            rate = optimizer.param_groups[0]["lr"]
            scores = self._validate(val_inputs)
            history.add(epoch, train_loss, scores, rate, time.perf_counter() - begun, self._state)
            if history.waited >= config.patience:
                break
        assert history.best_state is not None
        tower, weight, bias = history.best_state
        return FinetuneResult(
            state=tower,
            head=LinearHead(weight=weight, bias=bias, label_names=self.label_names, normalised=self.normalize),
            history=pd.DataFrame(history.rows),
            best_epoch=history.best_epoch,
            seconds=time.perf_counter() - self.started,
            frozen_seconds=frozen_seconds,
            images_per_second=epoch * len(self.train) / training_seconds,
            trained_weights=self.model.free_count,
            all_weights=sum(weights.numel() for weights in self.model.tower.parameters()),
            config=config,
        )

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, source: inputs.Inputs) -> float:
        """Go through the training rows once and return the mean loss."""
        self.model.train_free_part()
        order = self.rng.permutation(len(self.train))
        total = 0.0
        for step in range(self.steps_per_epoch):
            done = (epoch - 1) * self.steps_per_epoch + step
            share = rate_share(done, self.config.epochs * self.steps_per_epoch, self.config)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            chosen = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            labels = torch.from_numpy(self.truth[self.train[chosen]]).to(self.device, torch.float32)
            with self._mixed():
                loss = self.loss(self.model(source.batch(chosen)).float(), labels)
            if not torch.isfinite(loss):
                raise UsageError(
                    f"fine-tuning: the loss is {loss.item()} in epoch {epoch}, step {step}; lower learning_rate "
                    f"{self.config.learning_rate} or take autocast none"
                )
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            if self.config.gradient_clip is not None:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.model.free_weights, self.config.gradient_clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            total += float(loss.detach()) * len(chosen)
            if self.progress is not None:
                through = min((step + 1) * self.config.batch_size, len(self.train))
                self.progress("fine-tune", (epoch - 1) * len(self.train) + through, self.images_to_do)
        return total / len(self.train)

    def _validate(self, source: inputs.Inputs) -> dict[str, float]:
        """Return the monitored metrics on validation."""
        self.model.eval()
        logits = []
        with torch.no_grad(), self._mixed():
            for rows in inputs.slices(len(self.val), self.config.batch_size):
                logits.append(self.model(source.batch(rows)).float().cpu())
        scores = torch.cat(logits)
        truth = self.truth[self.val]
        # The plain loss also where training weighs its labels: the figure is then comparable between objectives.
        bce = nn.functional.binary_cross_entropy_with_logits(scores, torch.from_numpy(truth).float())
        values = scores.double().numpy()
        return {
            "bce": float(bce),
            "map": float(metrics.mean_of_defined(metrics.average_precision(truth, values))),
            "auroc_macro": float(metrics.mean_of_defined(metrics.auroc(truth, values))),
        }

    def _inputs(self, rows: np.ndarray, augmented: inputs.Augment | None) -> inputs.Inputs:
        size, limit = self.config.batch_size, self.config.token_memory
        return inputs.of_rows(
            self.pixels, rows, self.model, self.device, size, limit, augmented, self.progress, self.kept
        )

    def _augmented(self, pixels: torch.Tensor) -> torch.Tensor:
        return inputs.augment(pixels, self.rng, shift=self.config.shift, contrast=self.config.contrast)

    def _mixed(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()

    def _positive_weights(self) -> torch.Tensor | None:
        if self.config.objective == "bce":
            return None
        positive = self.truth[self.train].sum(axis=0)
        weights = (len(self.train) - positive) / np.maximum(positive, 1)
        return torch.from_numpy(np.clip(weights, 1.0, self.config.largest_weight)).to(self.device, torch.float32)

    def _state(self) -> State:
        tower = {name: value.detach().cpu().clone() for name, value in self.model.tower.state_dict().items()}
        head = self.model.head
        return tower, head.weight.detach().cpu().numpy().copy(), head.bias.detach().cpu().numpy().copy()


def _checked_rows(rows: np.ndarray, part: str, count: int) -> np.ndarray:
    """Return row numbers of one part, from positions or a mask."""
    places = np.asarray(rows)
    places = np.flatnonzero(places) if places.dtype == bool else places.astype(np.int64)
    if not len(places):
        raise DataError(f"fine-tuning needs samples in {part}, there are none; look at the split")
    if len(np.unique(places)) != len(places) or places.min() < 0 or places.max() >= count:
        raise DataError(f"the rows of {part} must differ and lie in 0..{count - 1}")
    return places


def _autocast_type(choice: str, device: torch.device) -> torch.dtype | None:
    if choice == "fp16" and device.type != "cuda":
        raise UsageError(f"autocast fp16 needs a CUDA device, not {device}; take bf16, none or fp16-on-cuda")
    if choice == "none" or (choice == "fp16-on-cuda" and device.type != "cuda"):
        return None
    return torch.bfloat16 if choice == "bf16" else torch.float16
