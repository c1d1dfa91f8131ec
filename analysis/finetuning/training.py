"""The loop that fine-tunes an image tower with a linear head, and with texts where it is asked for.

In come an encoder, rows of pixels (or tokens), labels and which rows train and choose; out go the tower's new weights
(the caller makes them a model folder, a new encoder of its own) and the head. The given encoder is not touched.

What does not train need not run more than once: with ``trainable`` set to the last blocks, the frozen part turns the
images into tokens a single time, these stay in memory, and every epoch starts from them (unless images are augmented);
with ``from_block`` they come from the cache. BatchNorm keeps its statistics: with small batches they would be the
batch's, not the data's.

With `Checkpoints`, a training that is killed at any step goes on from the last one and ends with the same weights, to
the bit, on the same machine: weights, moments, scaler, running average, random numbers, the epoch's order and the
history are all part of the state.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from analysis.finetuning import inputs, memory, objectives
from analysis.finetuning.checkpoints import Checkpoints
from analysis.finetuning.gradients import Batch, Gradients
from analysis.finetuning.material import Material, fingerprint
from analysis.finetuning.optimizing import make_optimizer, rate_share
from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.result import FinetuneResult
from analysis.finetuning.state import Numbers, Position
from analysis.finetuning.texts import LARGEST_SCALE, Captions, TextSide
from analysis.finetuning.tower import TowerWithHead
from analysis.finetuning.validation import validate
from analysis.heads import LinearHead
from engine.errors import TrainingError, UsageError

if TYPE_CHECKING:
    from engine.encoder import Encoder

log = logging.getLogger(__name__)


def finetune(
    encoder: Encoder,
    source: inputs.RowSource,
    y: np.ndarray,
    train: np.ndarray,
    val: np.ndarray,
    config: FinetuneConfig | None = None,
    *,
    label_names: tuple[str, ...] = (),
    head: LinearHead | None = None,
    captions: Captions | None = None,
    progress: inputs.Progress | None = None,
    kept: inputs.KeptResults | None = None,
    checkpoints: Checkpoints | None = None,
) -> FinetuneResult:
    """Train a copy of the image tower and a linear head.

    Parameters
    ----------
    encoder : Encoder
        Left as it is; training runs on its device, in float32 (a lower precision's weights are taken as they are).
    source : RowSource, n rows
        uint8 (b, h, w, 3), what the model sees before mean and standard deviation; with ``config.from_block`` the
        tokens that enter that block, float (b, t, width).
    y : ndarray of 0/1, (n, L)
    train, val : ndarray of int
        Rows; without a row in common.
    config : FinetuneConfig, optional
    label_names : tuple of str, length L
    head : LinearHead, optional
        Where the head starts: a fitted probe (probe first, then fine-tune: Kumar et al., ICLR 2022) or
        `head_from_text`. By default Xavier-uniform with the bias as ``nn.Linear`` has it.
    captions : Captions, optional
        The samples' texts, for the contrast.
    progress : callable, optional
        ``progress(name, done, total)``.
    kept : KeptResults, optional
        What the frozen part gave in earlier trainings on the same pixels, encoder, `trainable` and precision (folds);
        it is used and added to.
    checkpoints : Checkpoints, optional
        Where the state is kept; if there is one of the same training, it goes on from there.

    Raises
    ------
    UsageError
        Choices that exclude each other; a checkpoint of another training.
    DataError
        Rows in both parts, an empty part, shapes that do not fit, no label with a positive in training.
    TrainingError
        A loss or gradient that is not finite; the message names the step and the last good checkpoint.
    """
    config = config or FinetuneConfig()
    material = Material(source, y, train, val, label_names or (head.label_names if head else ()))
    if config.contrasts and captions is None:
        raise UsageError("fine-tuning: the contrast needs the samples' texts; give captions")
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        _deterministic(config.deterministic),
    ):
        torch.manual_seed(config.seed)
        training = _Training(encoder, material, config, head, captions, progress, kept, checkpoints)
        return training.run()


class _Training:
    """One run of `finetune`: its model, its data in the form that the free part needs, its loop."""

    def __init__(
        self,
        encoder: Encoder,
        material: Material,
        config: FinetuneConfig,
        head: LinearHead | None,
        captions: Captions | None,
        progress: inputs.Progress | None,
        kept: inputs.KeptResults | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.started, self.earlier_seconds, self.earlier_images = time.perf_counter(), 0.0, 0
        self.material, self.config, self.start = material, config, head
        self.progress, self.kept, self.checkpoints = progress, kept, checkpoints
        self.device = encoder.device
        self.fingerprint = fingerprint(encoder, material, config, head, captions)
        self.normalize = head.normalised if head is not None else config.normalize
        self.model = TowerWithHead(encoder, config, len(material.names), head, self.normalize)
        self.texts: TextSide | None = None
        if config.contrasts and captions is not None:
            self.texts = TextSide(encoder, captions, config.text_trainable, material.train)
        if config.objective != "contrastive":
            material.check_positives()
        self.autocast = _autocast_type(config.autocast, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.loss = objectives.label_loss(config, material.truth[material.train], self.device)
        self.gradients = Gradients(self.model, self.texts, config, self.loss, self.scaler, self._mixed)
        self.steps_per_epoch = math.ceil(len(material.train) / config.batch_size)
        micro_batch = min(config.micro_batch or config.batch_size, config.batch_size, len(material.train))
        self.numbers = Numbers.at_start(self.model, self.texts, self.scaler, config, self.device, micro_batch)
        self.good: str = "none was written"

    # -- The run -------------------------------------------------------------------------------------------------------

    def run(self) -> FinetuneResult:
        """Train until the epochs end or nothing improves, and return the best epoch."""
        config = self.config
        state = self._found_state()
        before = time.perf_counter()
        with self._mixed():
            self.train_inputs = self._inputs(self.material.train, augment=True)
            self.val_inputs = self._inputs(self.material.val, augment=False)
        frozen_seconds = time.perf_counter() - before
        if state is None:
            self._fit_into_memory()
        position = self._begin() if state is None else self._restore(state)
        while position.epoch <= config.epochs and self.numbers.history.waited < config.patience:
            begun = time.perf_counter()
            if config.remake_optimizer and position.epoch > 1 and position.step == 0:
                self.numbers.optimizer = make_optimizer(self.model, self.texts, config)
            train_loss = self._epoch(position)
            self._end_epoch(position.epoch, train_loss, begun)
            position = Position(position.epoch + 1)
            self._save(position)
        return self._result(frozen_seconds)

    def _begin(self) -> Position:
        """Look at the start where it is one: a head that was fitted may be better than anything that follows."""
        if self.start is not None or self.config.objective == "contrastive":
            self._note(0, math.nan, 0.0, 0.0)
        self._save(Position(1))
        return Position(1)

    def _epoch(self, position: Position) -> float:
        """Go through the training rows once, or through the rest from a step on; return the mean loss."""
        config, train = self.config, self.material.train
        epoch, first, total, order = position
        self.model.train_free_part()
        if self.texts is not None:
            self.texts.train(config.text_trainable)
        if order is None:
            order = self.numbers.order_rng.permutation(len(train))
        parts = [order[step * config.batch_size :][: config.batch_size] for step in range(self.steps_per_epoch)]
        begun = time.perf_counter()
        for step, stored in enumerate(inputs.read_ahead(self.train_inputs, parts[first:]), start=first):
            loss = self._step(epoch, step, parts[step], stored)
            total += loss * len(parts[step])
            self.numbers.images_through += len(parts[step])
            now = time.perf_counter()
            self.numbers.training_seconds, begun = self.numbers.training_seconds + now - begun, now
            if self.progress is not None:
                done = (epoch - 1) * len(train) + min((step + 1) * config.batch_size, len(train))
                self.progress("fine-tune", done, config.epochs * len(train))
            due = self.checkpoints is not None and self.checkpoints.due((epoch - 1) * self.steps_per_epoch + step + 1)
            if due and step + 1 < self.steps_per_epoch:
                self._save(Position(epoch, step + 1, total, order))
        return total / len(train)

    def _step(self, epoch: int, step: int, places: np.ndarray, stored: torch.Tensor) -> float:
        """Take one optimiser step and return its loss."""
        config = self.config
        done = (epoch - 1) * self.steps_per_epoch + step
        share = rate_share(done, config.epochs * self.steps_per_epoch, config)
        for group in self.numbers.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        rows = self.material.train[places]
        labels = torch.from_numpy(self.material.truth[rows]).to(self.device, torch.float32)
        augmentation = self.train_inputs.augmentation
        drawn = None if augmentation is None else augmentation.draw(len(rows), self.numbers.draw_rng)
        loss = self._set_gradients(Batch(rows, stored, labels, drawn))
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}", epoch, step)
        self.scaler.unscale_(self.numbers.optimizer)
        limit = math.inf if config.gradient_clip is None else config.gradient_clip
        norm = nn.utils.clip_grad_norm_(self.numbers.weights.values(), limit)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise self._diverged(f"the gradient's norm is {float(norm)}", epoch, step)
        self.scaler.step(self.numbers.optimizer)
        self.scaler.update()
        if self.texts is not None:
            with torch.no_grad():
                self.texts.log_scale.clamp_(0.0, math.log(LARGEST_SCALE))
        if self.numbers.average is not None:
            self.numbers.average.update()
        return loss

    def _set_gradients(self, batch: Batch) -> float:
        """Set the batch's gradients; where the device's memory is not enough, with fewer samples at once."""
        while True:
            self.numbers.optimizer.zero_grad(set_to_none=True)
            random = torch.get_rng_state()
            try:
                return self.gradients.set(self.train_inputs, batch, self.numbers.micro_batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if self.numbers.micro_batch == 1 or not _is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback holds the pass's tensors.
            self.numbers.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.numbers.micro_batch = -(-self.numbers.micro_batch // 2)
            torch.set_rng_state(random)
            log.warning(
                "out of memory: batches of %d go through %d samples at a time from here on, with the same gradient",
                *(self.config.batch_size, self.numbers.micro_batch),
            )

    def _diverged(self, what: str, epoch: int, step: int) -> TrainingError:
        done = (epoch - 1) * self.steps_per_epoch + step
        return TrainingError(
            f"fine-tuning: {what} at step {done} (epoch {epoch}, step {step} in it); the last good checkpoint: "
            f"{self.good}. Lower learning_rate {self.config.learning_rate:g} or take a longer warmup"
            + ("" if self.autocast is None else f", or autocast none instead of {self.config.autocast}")
        )

    # -- Validation ----------------------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int, train_loss: float, begun: float) -> None:
        rate = self.numbers.optimizer.param_groups[0]["lr"]
        with self.numbers.average.in_place() if self.numbers.average is not None else nullcontext():
            self._note(epoch, train_loss, rate, time.perf_counter() - begun)

    def _note(self, epoch: int, train_loss: float, rate: float, seconds: float) -> None:
        """Validate the weights as they are, and keep them where they are the best so far."""
        size = self.config.batch_size
        try:
            scores = validate(self.gradients, self.val_inputs, self.material, size, self.numbers.micro_batch)
        except FloatingPointError as error:
            raise self._diverged(str(error), epoch, self.steps_per_epoch) from None
        self.numbers.history.add(epoch, train_loss, scores, rate, seconds, self.numbers.copied_weights)

    # -- State ---------------------------------------------------------------------------------------------------------

    def _found_state(self) -> dict[str, Any] | None:
        if self.checkpoints is None:
            return None
        state = self.checkpoints.load_last(self.fingerprint)
        self.checkpoints.begin()
        return state

    def _save(self, position: Position) -> None:
        """Write the state before a step of an epoch."""
        if self.checkpoints is None:
            return
        history = self.numbers.history
        if history.best_weights is not None and not self._best_is_written():
            self.checkpoints.save_best(history.best_epoch, history.best_weights)
        best = self.checkpoints.best(history.best_epoch).name if self._best_is_written() else None
        self.numbers.seconds = self._seconds()
        self.checkpoints.save_last({"fingerprint": self.fingerprint, **self.numbers.state(position)}, best)
        self.good = f"{self.checkpoints.last} ({position.described})"

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def _best_is_written(self) -> bool:
        assert self.checkpoints is not None
        history = self.numbers.history
        return (
            history.best_weights is not None and self.checkpoints.best(history.best_epoch) in self.checkpoints.written
        )

    def _restore(self, state: dict[str, Any]) -> Position:
        """Set everything as it was."""
        assert self.checkpoints is not None
        position = self.numbers.restore(state)
        self.earlier_seconds, self.earlier_images = self.numbers.seconds, self.numbers.images_through
        self.good = f"{self.checkpoints.last} ({position.described})"
        log.info("going on from %s", self.good)
        return position

    def _result(self, frozen_seconds: float) -> FinetuneResult:
        history = self.numbers.history
        assert history.best_weights is not None
        self.numbers.set_weights(history.best_weights)
        free = self.model.free_count
        head = self.model.head
        return FinetuneResult(
            state=self.model.tower_state(),
            head=LinearHead(
                weight=head.weight.detach().cpu().numpy().copy(),
                bias=head.bias.detach().cpu().numpy().copy(),
                label_names=self.material.names,
                normalised=self.normalize,
            ),
            history=pd.DataFrame(history.rows),
            best_epoch=history.best_epoch,
            seconds=self._seconds(),
            earlier_seconds=self.earlier_seconds,
            frozen_seconds=frozen_seconds,
            images=self.numbers.images_through - self.earlier_images,
            images_per_second=self.numbers.images_through / max(self.numbers.training_seconds, 1e-9),
            trained_weights=free,
            all_weights=self.model.all_count,
            config=self.config,
            micro_batch=self.numbers.micro_batch,
            text_state={} if self.texts is None else self.texts.state(),
            untrained_labels=self.material.untrained,
        )

    # -- Parts ---------------------------------------------------------------------------------------------------------

    def _inputs(self, rows: np.ndarray, *, augment: bool) -> inputs.Inputs:
        config = self.config
        return inputs.of_rows(
            self.material.source,
            rows,
            self.model,
            self.device,
            config.batch_size,
            config.token_memory,
            config.augmentation if augment else None,
            self.progress,
            self.kept,
        )

    def _fit_into_memory(self) -> None:
        """Say what the training will take, and let fewer samples through at once where it is too much."""
        self.model.train_free_part()
        random = torch.get_rng_state()

        def forward(count: int) -> torch.Tensor:
            places = np.zeros(count, dtype=np.int64)
            rows = self.material.train[places]
            labels = torch.from_numpy(self.material.truth[rows]).to(self.device, torch.float32)
            with self._mixed():
                return self.gradients.whole(
                    self.train_inputs, Batch(rows, self.train_inputs.read(places), labels, None)
                )

        modules = [self.model] if self.texts is None else [self.model, self.texts]
        # The running average, and the best epoch's weights, which are kept in the machine's own memory.
        copies = int(self.numbers.average is not None) + int(self.device.type == "cpu")
        need = memory.estimate(modules, forward, copies=copies)
        torch.set_rng_state(random)
        available = memory.available_bytes(self.device)
        fitting = need.fitting(self.numbers.micro_batch, available)
        log.info("%s", need.sentence(fitting, available))
        if fitting < self.numbers.micro_batch:
            log.warning(
                "batches of %d go through %d samples at a time, with the same gradient: more would not fit into memory",
                *(self.config.batch_size, fitting),
            )
            self.numbers.micro_batch = fitting

    def _mixed(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext()


@contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    """Allow only deterministic operations within the context."""
    before = torch.are_deterministic_algorithms_enabled()
    if asked:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device's memory was not enough; on the processor torch has no class of error for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _autocast_type(choice: str, device: torch.device) -> torch.dtype | None:
    if choice == "fp16" and device.type != "cuda":
        raise UsageError(f"autocast fp16 needs a CUDA device, not {device}; take bf16, none or fp16-on-cuda")
    if choice == "none" or (choice == "fp16-on-cuda" and device.type != "cuda"):
        return None
    return torch.bfloat16 if choice == "bf16" else torch.float16
