"""The gradient of one batch, however it is split: the same whether its samples go through at once or in parts.

In come a model, the batch as it was read and a number of samples that may go through at once; out go gradients in the
weights, and the loss. A loss of labels is a mean over samples, so its parts add up. A contrast holds every image
against every text of the batch: its gradient at the embeddings is taken first, from a pass without memory, and then
carried through the tower part by part (Gao et al., "Scaling deep contrastive learning", RepL4NLP 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.finetuning import inputs, objectives
from analysis.finetuning.recipe import FinetuneConfig
from analysis.finetuning.texts import TextSide
from analysis.finetuning.tower import TowerWithHead


@dataclass(frozen=True)
class Batch:
    """One step's samples.

    Parameters
    ----------
    rows : ndarray of int64, (b,)
        In the data.
    stored : Tensor
        What was read of them.
    labels : float32 tensor (b, L)
    drawn : ndarray or None
        Random numbers of the augmentation, one row a sample.
    """

    rows: np.ndarray
    stored: Tensor
    labels: Tensor
    drawn: np.ndarray | None

    def part(self, places: np.ndarray) -> Batch:
        """Return some of its samples."""
        index = torch.from_numpy(places)
        drawn = None if self.drawn is None else self.drawn[places]
        return Batch(self.rows[places], self.stored[index], self.labels[index.to(self.labels.device)], drawn)


class Gradients:
    """What sets the gradients of a batch.

    Parameters
    ----------
    model : TowerWithHead
    texts : TextSide or None
    config : FinetuneConfig
    loss : callable
        Of logits against labels.
    scaler : GradScaler
        Scales the loss in fp16.
    mixed : callable
        Returns the context of mixed precision.
    """

    def __init__(
        self,
        model: TowerWithHead,
        texts: TextSide | None,
        config: FinetuneConfig,
        loss: objectives.LabelLoss,
        scaler: torch.amp.GradScaler,
        mixed: Callable[[], AbstractContextManager],
    ) -> None:
        self.model, self.texts, self.config, self.loss = model, texts, config, loss
        self.scaler, self.mixed = scaler, mixed
        self.labels_count = config.objective != "contrastive"
        self.contrast_weight = config.contrastive_weight if self.labels_count else 1.0

    def set(self, source: inputs.Inputs, batch: Batch, micro_batch: int) -> float:
        """Add the batch's gradients to those that the weights hold (none, at first); return its loss."""
        parts = [batch.part(places) for places in inputs.slices(len(batch.rows), micro_batch)]
        if len(parts) == 1 and (self.texts is None or not self.config.text_trainable):
            with self.mixed():
                total = self.whole(source, batch)
            if total.requires_grad:
                self.scaler.scale(total).backward()
            return float(total.detach())
        if self.texts is None:
            return sum(self._label_part(source, part, len(batch.rows)) for part in parts)
        return self._by_embeddings(source, batch, parts, micro_batch)

    def whole(self, source: inputs.Inputs, batch: Batch) -> Tensor:
        """Return the loss of samples that go through at once."""
        embedding = self.model.embed(source.enter(batch.stored, batch.drawn))
        total = torch.zeros((), device=batch.labels.device)
        if self.labels_count:
            total = self.loss(self.model.classify(embedding).float(), batch.labels)
        if self.texts is not None:
            having, distinct, place = self.texts.places(batch.rows)
            if len(having):
                total = total + self._contrast(embedding[_index(having, embedding)], self.texts.embed(distinct), place)
        return total

    def contrast_of(self, embedding: Tensor, rows: np.ndarray) -> float | None:
        """Return the bare contrast of some rows' embeddings (b, d); None where no row has a text."""
        assert self.texts is not None
        having, distinct, place = self.texts.places(rows)
        if not len(having):
            return None
        text = self.texts.embed(distinct)
        chosen = embedding[_index(having, embedding)].float()
        index = _index(place, embedding)
        return float(objectives.contrastive_loss(chosen, text.float(), index, self.texts.scale))

    def _contrast(self, image: Tensor, text: Tensor, place: np.ndarray) -> Tensor:
        assert self.texts is not None
        loss = objectives.contrastive_loss(image.float(), text.float(), _index(place, image), self.texts.scale)
        return self.contrast_weight * loss

    def _label_part(self, source: inputs.Inputs, part: Batch, count: int) -> float:
        with self.mixed():
            loss = self.loss(self.model(source.enter(part.stored, part.drawn)).float(), part.labels)
            loss = loss * (len(part.rows) / count)
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def _by_embeddings(self, source: inputs.Inputs, batch: Batch, parts: list[Batch], micro_batch: int) -> float:
        """Set the gradients of a loss with a contrast, part by part."""
        assert self.texts is not None
        having, distinct, place = self.texts.places(batch.rows)
        states, images = [], []
        for part in parts:
            states.append(_random_state(batch.labels.device))
            with torch.no_grad(), self.mixed():
                images.append(self.model.embed(source.enter(part.stored, part.drawn)).float())
        image = torch.cat(images).requires_grad_()
        text_parts = [distinct[places] for places in inputs.slices(len(distinct), micro_batch)]
        text_states, texts = [], []
        for numbers in text_parts:
            text_states.append(_random_state(batch.labels.device))
            with torch.no_grad(), self.mixed():
                texts.append(self.texts.embed(numbers).float())
        total = 0.0
        if len(having):
            text = torch.cat(texts).requires_grad_()
            contrast = self._contrast(image[_index(having, image)], text, place)
            self.scaler.scale(contrast).backward()
            total += float(contrast.detach())
        start = 0
        for part, state in zip(parts, states, strict=True):
            total += self._carry(source, part, image.grad, start, state, len(batch.rows))
            start += len(part.rows)
        if self.config.text_trainable and len(having):
            assert text.grad is not None
            for numbers, state, gradient in zip(text_parts, text_states, text.grad.split(micro_batch), strict=True):
                with _from_state(state), self.mixed():
                    pull = (self.texts.embed(numbers).float() * gradient).sum()
                pull.backward()
        return total

    def _carry(
        self, source: inputs.Inputs, part: Batch, gradient: Tensor | None, start: int, state: list[Tensor], count: int
    ) -> float:
        """Carry a part's gradient at its embeddings through the tower, with that of its labels; return their loss."""
        with _from_state(state), self.mixed():
            embedding = self.model.embed(source.enter(part.stored, part.drawn))
            pull = torch.zeros((), device=part.labels.device)
            if gradient is not None:
                pull = (embedding.float() * gradient[start : start + len(part.rows)]).sum()
            loss = None
            if self.labels_count:
                loss = self.loss(self.model.classify(embedding).float(), part.labels) * (len(part.rows) / count)
                pull = pull + self.scaler.scale(loss)
        if pull.requires_grad:
            pull.backward()
        return 0.0 if loss is None else float(loss.detach())


def _index(places: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(places).to(like.device)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the state of what dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class _from_state:
    """Within the context, dropout draws again what it drew from a state on; afterwards it goes on from where it was."""

    def __init__(self, state: list[Tensor]) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if len(self._state) > 1 else [])]
        self._set(self._state)

    def __exit__(self, *_: object) -> None:
        self._set(self._own)

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1])
