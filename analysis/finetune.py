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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from analysis import metrics, training_inputs
from analysis.heads import LinearHead
from analysis.tower import TowerWithHead, Trainable
from engine.errors import DataError, UsageError

if TYPE_CHECKING:
    from engine.encoder import Encoder

log = logging.getLogger(__name__)

State = tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]

MONITORS = {"bce": False, "map": True, "auroc_macro": True}
"""Validation metrics that training can be stopped and chosen by, and whether more is better."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a tower is fine-tuned.

    Parameters
    ----------
    trainable : "all", "projection" or int
        The whole tower; only what follows its last block; or its last so many blocks and what follows them.
    objective : "bce" or "weighted_bce"
        Mean binary cross-entropy over labels; weighted: positives of a label count (negatives / positives) times, at
        most `largest_weight`.
    epochs, batch_size : int
    learning_rate : float
        Of the last block and what follows it, at its peak.
    head_rate : float, optional
        Of the head; by default the same.
    layer_decay : float
        Each block further down learns at this times the rate of the block above; 1: one rate for all.
    weight_decay : float
        AdamW's. Norms and biases are spared unless `decay_all`.
    decay_all : bool
    warmup : float
        Share of all steps over which the rate rises linearly; a cosine then carries it to zero.
    schedule : "cosine" or "constant"
    remake_optimizer : bool
        Make AdamW anew each epoch, which forgets its moments (the study did).
    normalize : bool
        Scale embeddings to length one before the head. A head that is handed in says this itself.
    monitor : "bce", "map" or "auroc_macro"
        On validation: which epoch's weights are kept, and when training stops.
    patience : int
        Epochs without improvement before it stops.
    min_improvement : float
        What counts as one.
    autocast : "none", "bf16", "fp16" or "fp16-on-cuda"
        Mixed precision; the last is fp16 on a CUDA device and float32 elsewhere. fp16 scales its loss.
    gradient_clip : float, optional
        Largest norm of the gradient.
    shift : int
        Augmentation: each training image moves by up to so many pixels, its edge repeated.
    contrast : float
        Augmentation: contrast and brightness vary by up to this share. There are no flips: the heart is on the left.
    token_memory : int
        Bytes that the frozen part's results may take in memory; beyond, they are computed again in every epoch.
    seed : int
    """

    trainable: Trainable = "all"
    objective: Literal["bce", "weighted_bce"] = "bce"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    decay_all: bool = False
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    remake_optimizer: bool = False
    normalize: bool = False
    monitor: Literal["bce", "map", "auroc_macro"] = "bce"
    patience: int = 5
    min_improvement: float = 0.0
    autocast: Literal["none", "bf16", "fp16", "fp16-on-cuda"] = "none"
    gradient_clip: float | None = 1.0
    shift: int = 0
    contrast: float = 0.0
    largest_weight: float = 20.0
    token_memory: int = 4 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"fine-tuning: {name} must be at least {least}, not {getattr(self, name)}")
        if isinstance(self.trainable, int) and (isinstance(self.trainable, bool) or self.trainable < 1):
            raise UsageError(f"fine-tuning: trainable is all, projection or a number of blocks, not {self.trainable}")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.warmup < 1 or not 0 <= self.contrast < 1:
            raise UsageError("fine-tuning: layer_decay must lie in (0, 1], warmup and contrast in [0, 1)")
        if self.learning_rate <= 0 or self.monitor not in MONITORS:
            raise UsageError(f"fine-tuning: learning_rate > 0 and monitor one of {', '.join(MONITORS)} are needed")

    @property
    def augments(self) -> bool:
        """Whether images differ from epoch to epoch."""
        return self.shift > 0 or self.contrast > 0


def study_recipe(seed: int = 0) -> FinetuneConfig:
    """Return the study's own fine-tuning (see the module's text)."""
    return FinetuneConfig(
        trainable="all",
        objective="bce",
        epochs=10,
        batch_size=24,
        learning_rate=1e-5,
        weight_decay=1e-2,
        decay_all=True,
        warmup=0.0,
        schedule="constant",
        remake_optimizer=True,
        normalize=False,
        monitor="bce",
        patience=5,
        min_improvement=1e-4,
        autocast="fp16-on-cuda",
        gradient_clip=None,
        seed=seed,
    )


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


def finetune(
    encoder: Encoder,
    pixels: training_inputs.PixelSource,
    y: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    config: FinetuneConfig | None = None,
    *,
    label_names: tuple[str, ...] = (),
    head: LinearHead | None = None,
    progress: training_inputs.Progress | None = None,
    kept: training_inputs.KeptResults | None = None,
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


def head_from_text(
    text: np.ndarray, label_names: tuple[str, ...], *, scale: float, prevalence: np.ndarray | None = None
) -> LinearHead:
    """Return the head that classifies as zero-shot does, for a start from the prompts.

    Parameters
    ----------
    text : ndarray of float, (L, d)
        Embeddings of the labels' prompts.
    scale : float
        Factor of the cosine in the logit; the encoder's own `logit_scale` is the sharpest sensible one.
    prevalence : ndarray of float, (L,), optional
        Share of positives in training, whose log-odds become the bias, so that training does not begin by unlearning
        an even guess; the embeddings of all labels are then centred, since what they share says nothing.
    """
    weight = np.asarray(text, dtype=np.float64)
    weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    bias = np.zeros(len(weight))
    if prevalence is not None:
        weight = weight - weight.mean(axis=0)
        share = np.clip(np.asarray(prevalence, dtype=np.float64), 1e-4, 1 - 1e-4)
        bias = np.log(share / (1 - share))
    return LinearHead(
        weight=(scale * weight).astype(np.float32),
        bias=bias.astype(np.float32),
        label_names=tuple(label_names),
        normalised=True,
    )


class _Training:
    """One run of `finetune`: its model, its data in the form that the free part needs, its loop."""

    def __init__(
        self,
        encoder: Encoder,
        pixels: training_inputs.PixelSource,
        truth: np.ndarray,
        train: np.ndarray,
        val: np.ndarray,
        config: FinetuneConfig,
        label_names: tuple[str, ...],
        head: LinearHead | None,
        progress: training_inputs.Progress | None,
        kept: training_inputs.KeptResults | None = None,
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
        optimizer, history = self._optimizer(), _History(config)
        if self.start is not None:
            # A head that was fitted already may be better than anything that follows.
            history.add(0, math.nan, self._validate(val_inputs), 0.0, 0.0, self._state)
        training_seconds = 0.0
        for epoch in range(1, config.epochs + 1):
            begun = time.perf_counter()
            if config.remake_optimizer and epoch > 1:
                optimizer = self._optimizer()
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

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer, inputs: training_inputs.Inputs) -> float:
        """Go through the training rows once and return the mean loss."""
        self.model.train_free_part()
        order = self.rng.permutation(len(self.train))
        total = 0.0
        for step in range(self.steps_per_epoch):
            done = (epoch - 1) * self.steps_per_epoch + step
            share = _rate_share(done, self.config.epochs * self.steps_per_epoch, self.config)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            chosen = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            labels = torch.from_numpy(self.truth[self.train[chosen]]).to(self.device, torch.float32)
            with self._mixed():
                loss = self.loss(self.model(inputs.batch(chosen)).float(), labels)
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

    def _validate(self, inputs: training_inputs.Inputs) -> dict[str, float]:
        """Return the monitored metrics on validation."""
        self.model.eval()
        logits = []
        with torch.no_grad(), self._mixed():
            for rows in training_inputs.slices(len(self.val), self.config.batch_size):
                logits.append(self.model(inputs.batch(rows)).float().cpu())
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

    def _inputs(self, rows: np.ndarray, augmented: training_inputs.Augment | None) -> training_inputs.Inputs:
        size, limit = self.config.batch_size, self.config.token_memory
        return training_inputs.of_rows(
            self.pixels, rows, self.model, self.device, size, limit, augmented, self.progress, self.kept
        )

    def _augmented(self, pixels: torch.Tensor) -> torch.Tensor:
        return training_inputs.augment(pixels, self.rng, shift=self.config.shift, contrast=self.config.contrast)

    def _mixed(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()

    def _positive_weights(self) -> torch.Tensor | None:
        if self.config.objective == "bce":
            return None
        positive = self.truth[self.train].sum(axis=0)
        weights = (len(self.train) - positive) / np.maximum(positive, 1)
        return torch.from_numpy(np.clip(weights, 1.0, self.config.largest_weight)).to(self.device, torch.float32)

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for share, weights in self.model.layered_weights():
            peak = config.learning_rate * config.layer_decay**share
            _add_to_group(groups, weights, peak, config)
        head_rate = config.head_rate if config.head_rate is not None else config.learning_rate
        for weights in self.model.head.parameters():
            _add_to_group(groups, weights, head_rate, config)
        return torch.optim.AdamW(list(groups.values()), lr=config.learning_rate)

    def _state(self) -> State:
        tower = {name: value.detach().cpu().clone() for name, value in self.model.tower.state_dict().items()}
        head = self.model.head
        return tower, head.weight.detach().cpu().numpy().copy(), head.bias.detach().cpu().numpy().copy()


class _History:
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


def _checked_rows(rows: np.ndarray, part: str, count: int) -> np.ndarray:
    """Return row numbers of one part, from positions or a mask."""
    places = np.asarray(rows)
    places = np.flatnonzero(places) if places.dtype == bool else places.astype(np.int64)
    if not len(places):
        raise DataError(f"fine-tuning needs samples in {part}, there are none; look at the split")
    if len(np.unique(places)) != len(places) or places.min() < 0 or places.max() >= count:
        raise DataError(f"the rows of {part} must differ and lie in 0..{count - 1}")
    return places


def _rate_share(done: int, steps: int, config: FinetuneConfig) -> float:
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


def _autocast_type(choice: str, device: torch.device) -> torch.dtype | None:
    if choice == "fp16" and device.type != "cuda":
        raise UsageError(f"autocast fp16 needs a CUDA device, not {device}; take bf16, none or fp16-on-cuda")
    if choice == "none" or (choice == "fp16-on-cuda" and device.type != "cuda"):
        return None
    return torch.bfloat16 if choice == "bf16" else torch.float16
