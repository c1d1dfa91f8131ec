"""The text side of the contrast: each image's text, as embeddings that stay or through a tower that trains.

In come the distinct texts of the samples and which one each sample has; out go, for a batch of rows, the embeddings of
its distinct texts and each image's place among them. A locked tower's texts are embedded once, by whoever has a cache;
a free one is a float32 copy of the encoder's own, without its image tower.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from engine.errors import DataError
from engine.text_towers import describe_text_tower

if TYPE_CHECKING:
    from engine.encoder import Encoder

LARGEST_SCALE = 100.0
"""CLIP's bound of the temperature's inverse."""


@dataclass(frozen=True)
class Captions:
    """The texts of a data set's samples.

    Parameters
    ----------
    texts : sequence of str, length t
        Distinct.
    of_row : ndarray of int64, (n,)
        Each sample's text; -1 where it has none, which leaves the sample out of the contrast.
    embeddings : ndarray of float, (t, d), optional
        By the encoder's own text tower; wanted where that stays locked.
    """

    texts: Sequence[str]
    of_row: np.ndarray
    embeddings: np.ndarray | None = None

    @classmethod
    def of(cls, texts: Sequence[str]) -> Captions:
        """Return the captions of samples' texts, (n,), identical ones as one; "" is none."""
        number: dict[str, int] = {}
        rows = [number.setdefault(text, len(number)) if text else -1 for text in texts]
        return cls(list(number), np.array(rows, dtype=np.int64))


class TextSide(nn.Module):
    """Temperature and texts of the contrast.

    Parameters
    ----------
    encoder : Encoder
        Left as it is.
    captions : Captions
    trainable : bool
        Whether the text tower trains.
    train : ndarray of int
        Training rows.

    Raises
    ------
    DataError
        No training row has a text, or all have the same; embeddings are wanted and not given.
    """

    def __init__(self, encoder: Encoder, captions: Captions, trainable: bool, train: np.ndarray) -> None:
        super().__init__()
        distinct = np.unique(captions.of_row[train])
        distinct = distinct[distinct >= 0]
        if len(distinct) < 2:
            raise DataError(
                f"the contrast needs images with different texts, and the training samples have {len(distinct)} "
                "distinct texts; take an objective of labels (bce), or data with reports"
            )
        self.of_row, self.trainable, self.device = captions.of_row, trainable, encoder.device
        self.log_scale = nn.Parameter(torch.tensor(math.log(max(encoder.logit_scale, 1.0)), device=encoder.device))
        if trainable:
            visual = encoder.model.visual
            self.model: Any = copy.deepcopy(encoder.model, {id(visual): nn.Identity()}).float().requires_grad_(True)
            for name, weights in self.model.named_parameters():
                weights.requires_grad_(name not in ("logit_scale", "logit_bias"))
            self._tower = describe_text_tower(self.model, encoder.tokenizer)
            self._words = encoder.tokenizer(list(captions.texts))
            self._lengths = self._tower.lengths(self._words)
        elif captions.embeddings is None:
            raise DataError("a locked text tower's embeddings must be given with the captions")
        else:
            self.embeddings = torch.from_numpy(np.asarray(captions.embeddings, dtype=np.float32)).to(encoder.device)

    @property
    def scale(self) -> torch.Tensor:
        """Factor of the cosines."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, for rows (b,): which of them have a text (m,), the distinct texts (t,), and the text of each (m,)."""
        own = self.of_row[rows]
        having = np.flatnonzero(own >= 0)
        distinct, place = np.unique(own[having], return_inverse=True)
        return having, distinct, place

    def embed(self, texts: np.ndarray) -> torch.Tensor:
        """Return embeddings (t, d) of texts by number (t,)."""
        chosen = torch.from_numpy(texts)
        if not self.trainable:
            return self.embeddings[chosen.to(self.device)]
        length = int(self._lengths[chosen].max()) if self._tower.can_be_cut else self._words.shape[1]
        return self._tower.encode(self._words[chosen, :length].to(self.device)).float()

    def state(self) -> dict[str, torch.Tensor]:
        """Return what trained, by the names of the whole model, on the CPU."""
        found = {"logit_scale": self.scale.detach().log().cpu().clone()}
        if self.trainable:
            own = self.model.state_dict()
            found.update(
                {
                    name: value.detach().cpu().clone()
                    for name, value in own.items()
                    if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
                }
            )
        return found
