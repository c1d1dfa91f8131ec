"""Probes that are trained by gradient descent: an MLP on embeddings, and attention pooling on cached tokens.

In come features (n, d), or tokens (n, t, width); out go logits. Both are trained in float32 on batches drawn by a seed,
with AdamW under a cosine schedule, features standardised by the training rows. The same seed gives the same probe.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from analysis.probes.base import Probe, plain
from analysis.probes.threads import threads_for


class _Trained(Probe):
    """Training and answering of a torch module; a subclass builds it."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    random_state: int | None
    device: str

    def _build(self, dimensions: int, labels: int) -> nn.Module:
        raise NotImplementedError

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        axes = tuple(range(x.ndim - 1))
        self._middle = x.mean(axis=axes, dtype=np.float64)
        spread = x.std(axis=axes, dtype=np.float64)
        self._spread = np.where(spread > 0, spread, 1)
        seed = torch.seed() if self.random_state is None else int(self.random_state)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        truth = torch.from_numpy(y.astype(np.float32))
        with threads_for(min(len(x), self.batch_size) * int(np.prod(x.shape[1:])) * 64):
            self._module = self._build(x.shape[-1], y.shape[1])
            self._initialise(generator)
            self._module.to(self.device).train()
            self._train(self._tensor(x), truth, generator)
        self._module.eval().cpu()

    def _initialise(self, generator: torch.Generator) -> None:
        for parameter in self._module.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def _train(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        optimizer = torch.optim.AdamW(self._module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs)
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator)
            for rows in order.split(self.batch_size):
                logits = self._module(x[rows].to(self.device))
                loss = nn.functional.binary_cross_entropy_with_logits(logits, y[rows].to(self.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(((x - self._middle) / self._spread).astype(np.float32))

    @torch.no_grad()
    def _answer(self, x: np.ndarray) -> np.ndarray:
        # Row by row through the same shapes: a batch's size changes the last bits.
        found = [self._module(some) for some in self._tensor(x).split(1024)]
        return torch.cat(found).double().numpy()


class MLPProbe(_Trained):
    """One hidden layer on embeddings.

    Parameters
    ----------
    hidden : int
        Units, with GELU.
    epochs, batch_size : int
    learning_rate, weight_decay : float
        Of AdamW.
    random_state : int or None
        Seed of weights and batches.
    device : str
        Where it is trained; it answers on the CPU.
    """

    def __init__(
        self,
        hidden: int = 128,
        *,
        epochs: int = 60,
        batch_size: int = 128,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        random_state: int | None = 0,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device

    def _build(self, dimensions: int, labels: int) -> nn.Module:
        return nn.Sequential(nn.Linear(dimensions, self.hidden), nn.GELU(), nn.Linear(self.hidden, labels))


class AttentionPoolingProbe(_Trained):
    """A query a label that attends to cached tokens, and a linear head on what it gathers.

    The logit of label l is sum_t softmax_t(x_t . q_l / sqrt(width)) x_t . w_l + b_l. Features (n, d) without tokens are
    taken as one token each; then it is a linear probe.

    Parameters
    ----------
    epochs, batch_size, learning_rate, weight_decay, random_state, device
        As in `MLPProbe`.
    """

    def __init__(
        self,
        *,
        epochs: int = 60,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        weight_decay: float = 1e-2,
        random_state: int | None = 0,
        device: str = "cpu",
    ) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        """Say that tokens (n, t, width) are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _features(self, x: Any, reset: bool) -> np.ndarray:
        values = plain(x)
        if getattr(values, "ndim", 2) < 3:
            found = super()._features(values, reset)[:, None]
        else:
            tokens = np.asarray(values)
            flat = tokens.reshape(-1, tokens.shape[-1])
            # Checked as a table of tokens, so that the number of features is their width.
            found = validate_data(self, flat, reset=reset, dtype=[np.float64, np.float32]).reshape(tokens.shape)
        return found

    def _build(self, dimensions: int, labels: int) -> nn.Module:
        return _AttentionPooling(dimensions, labels)

    @torch.no_grad()
    def attention(self, tokens: np.ndarray) -> np.ndarray:
        """Return the attention (m, L, t) that each label pays to each token; sums to 1 over the tokens."""
        values = self._tensor(self._features(tokens, reset=False))
        module = self._module
        assert isinstance(module, _AttentionPooling)
        return module.attention(values).double().numpy()


class _AttentionPooling(nn.Module):
    def __init__(self, dimensions: int, labels: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(labels, dimensions))
        self.weight = nn.Parameter(torch.empty(labels, dimensions))
        self.bias = nn.Parameter(torch.empty(labels))

    def attention(self, tokens: Tensor) -> Tensor:
        return torch.softmax(self.query @ tokens.mT / tokens.shape[-1] ** 0.5, dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.attention(tokens) * (self.weight @ tokens.mT)).sum(-1) + self.bias
