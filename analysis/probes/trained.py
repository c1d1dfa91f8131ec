"""Probes that are trained by gradient descent: an MLP on embeddings, and attention pooling on cached tokens.

In come features (n, d), or tokens (n, t, width); out go logits. Both are trained in float32 on batches drawn by a seed,
with AdamW under a cosine schedule, features standardised by the training rows. The same seed gives the same probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from analysis.probes.base import Probe, plain
from analysis.probes.threads import threads_for

# Numbers of a block of tokens that is turned into float64 at once: 32 MB.
_CELLS = 1 << 22
_MODULE = "module."


class _Trained(Probe):
    """Training and answering of a torch module; a subclass builds it."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    random_state: int | None
    device: str | None

    def _build(self, dimensions: int, labels: int) -> nn.Module:
        raise NotImplementedError

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        self._middle, spread = _moments(x)
        self._spread = np.where(spread > 0, spread, 1)
        seed = torch.seed() if self.random_state is None else int(self.random_state)
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        truth = torch.from_numpy(y.astype(np.float32))
        place = torch.device(self._lies if self.device is None else self.device)
        with threads_for(min(len(x), self.batch_size) * int(np.prod(x.shape[1:])) * 64):
            self._module = self._build(x.shape[-1], y.shape[1])
            self._initialise(generator)
            self._module.to(place).train()
            self._train(x, truth, generator, place)
        self._module.eval().cpu()

    def _initialise(self, generator: torch.Generator) -> None:
        for parameter in self._module.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def _train(self, x: np.ndarray, y: Tensor, generator: torch.Generator, place: torch.device) -> None:
        optimizer = torch.optim.AdamW(self._module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.epochs)
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator)
            for rows in order.split(self.batch_size):
                # Standardised batch by batch: tokens of a whole data set are held once, as they came.
                logits = self._module(self._tensor(x[rows.numpy()]).to(place))
                loss = nn.functional.binary_cross_entropy_with_logits(logits, y[rows].to(place))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(((x - self._middle) / self._spread).astype(np.float32))

    @torch.no_grad()
    def _answer(self, x: np.ndarray) -> np.ndarray:
        # Row by row through the same shapes: a batch's size changes the last bits.
        found = [self._module(self._tensor(x[start : start + 1024])) for start in range(0, len(x), 1024)]
        return torch.cat(found).double().numpy()

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the standardisation and the network's parameters."""
        weights = {_MODULE + name: value.numpy() for name, value in self._module.state_dict().items()}
        return {"middle": self._middle, "spread": self._spread, **weights}

    def take_arrays(self, arrays: Mapping[str, np.ndarray], labels: int, features: int) -> _Trained:
        """Become the probe of these parameters."""
        super().take_arrays(arrays, labels, features)
        self._middle, self._spread = arrays["middle"], arrays["spread"]
        self._module = self._build(features, labels)
        state = {
            name.removeprefix(_MODULE): torch.from_numpy(value.copy())
            for name, value in arrays.items()
            if name.startswith(_MODULE)
        }
        self._module.load_state_dict(state)
        self._module.eval()
        return self


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (d,) float64 of the last axis; tokens (n, t, width) in blocks of rows."""
    if x.ndim == 2:
        return x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    step = max(1, _CELLS // int(np.prod(x.shape[1:])))
    blocks = [x[start : start + step] for start in range(0, len(x), step)]
    count = len(x) * x.shape[1]
    middle = np.sum([block.sum(axis=(0, 1), dtype=np.float64) for block in blocks], axis=0) / count
    squares = np.sum([((block - middle) ** 2).sum(axis=(0, 1)) for block in blocks], axis=0)
    return middle, np.sqrt(squares / count)


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
    device : str or None
        Where it is trained; None: where the features lie, the CPU for arrays. It answers on the CPU.
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
        device: str | None = None,
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
        device: str | None = None,
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
            # Checked as a table of tokens, so that the number of features is their width; float16 as cached.
            kinds = [np.float64, np.float32, np.float16]
            found = validate_data(self, flat, reset=reset, dtype=kinds).reshape(tokens.shape)
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
