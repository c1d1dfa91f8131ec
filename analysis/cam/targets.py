"""What a heatmap is for: a number computed from an image's embedding, whose evidence in the image is sought.

An embedding is no class score. Without a target pytorch-grad-cam would take the largest embedding dimension for a
class, so here a target is always said: similarity to a prompt or a free text (`TextTarget`), or the logit of a probe's,
a fine-tuned or any saved head (`HeadTarget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from analysis.heads import LinearHead
from engine.errors import DataError, UsageError


class Target(Protocol):
    """A number computed from an image's embedding."""

    @property
    def name(self) -> str:
        """What is sought, for messages and figures."""

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the target of raw embeddings (..., d), shape (...), with their gradient."""


@dataclass(frozen=True)
class TextTarget:
    """Similarity to a prompt.

    Parameters
    ----------
    embedding : ndarray of float, (d,)
        Of the prompt, or the mean of an ensemble of prompts.
    name : str
        What is sought, for messages and figures.
    normalize : bool
        True: the cosine (`protocol: sound`); False: the dot product of raw embeddings (`protocol: paper`).
    """

    embedding: np.ndarray
    name: str = ""
    normalize: bool = True

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the cosine or the dot product with raw image embeddings (..., d)."""
        text = _weights(self.embedding, embedding)
        if self.normalize:
            text = nn.functional.normalize(text, dim=-1)
            embedding = nn.functional.normalize(embedding, dim=-1)
        return embedding @ text


@dataclass(frozen=True)
class HeadTarget:
    """Logit of one label of a linear head, a probe's or a fine-tuned one.

    Parameters
    ----------
    weight : ndarray of float, (d,)
    bias : float
        Moves the logit and not the map.
    name : str
        The label.
    normalized : bool
        Whether the head expects embeddings of length one.
    """

    weight: np.ndarray
    bias: float = 0.0
    name: str = ""
    normalized: bool = False

    @classmethod
    def of(cls, head: LinearHead, label: str) -> HeadTarget:
        """Return the target of one label of a head; UsageError for a label that it does not have."""
        weight, bias = head.of_label(label)
        return cls(weight, bias, label, head.normalised)

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the head's logit of raw image embeddings (..., d)."""
        if self.normalized:
            embedding = nn.functional.normalize(embedding, dim=-1)
        return embedding @ _weights(self.weight, embedding) + self.bias


def check_targets(targets: Sequence[Target]) -> None:
    """Raise UsageError where no target is given."""
    if not targets:
        raise UsageError("a heatmap needs a target: a prompt's embedding (TextTarget) or a head (HeadTarget)")


def score_all(targets: Sequence[Target], embeddings: torch.Tensor) -> torch.Tensor:
    """Return every target of raw embeddings (b, d): (b, targets), with their gradient."""
    return torch.stack([target.score(embeddings) for target in targets], dim=1)


def _weights(values: np.ndarray, embedding: torch.Tensor) -> torch.Tensor:
    vector = torch.as_tensor(np.asarray(values, dtype=np.float32), device=embedding.device)
    if vector.shape != embedding.shape[-1:]:
        raise DataError(
            f"the target has shape {tuple(vector.shape)} but the encoder's embeddings have "
            f"{tuple(embedding.shape[-1:])}; was it made for another model?"
        )
    return vector
