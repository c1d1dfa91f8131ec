"""Towers and a task that are small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator

import open_clip
import torch
from torch import nn
from torch.nn import functional

from analysis import contrastive

LABELS = 3


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_vit(**changes: object) -> nn.Module:
    vision = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 3, "head_width": 8, "pool_type": "tok"}
    text = {"context_length": 4, "vocab_size": 12, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return open_clip.CLIP(8, {**vision, **changes}, text)


class StripeTask:
    """Images with up to three bright spots; label k is a spot in the k-th row of patches."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.names = torch.tensor([[10, name, 0, 11] for name in range(1, LABELS + 1)])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = (torch.rand(count, LABELS, generator=self.generator) < 0.4).float()
        column = torch.randint(0, 4, (count, LABELS), generator=self.generator)
        coverage = labels[:, :, None, None] * functional.one_hot(column, 4)[:, :, None, :]
        grid = torch.zeros(count, LABELS, 4, 4)
        for label in range(LABELS):
            grid[:, label, label] = coverage[:, label, 0]
        pixels = grid.sum(dim=1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), labels, grid.flatten(2)

    def batches(self, count: int, with_coverage: bool = True) -> Iterator[contrastive.ContrastiveBatch]:
        while True:
            pixels, labels, coverage = self.draw(count)
            chosen = torch.multinomial(labels + 0.01, 1, generator=self.generator)[:, 0]
            texts, text_of = chosen.unique(return_inverse=True)
            said = functional.one_hot(texts, LABELS).bool()
            yield contrastive.ContrastiveBatch(
                pixels, self.names[texts], text_of, contrastive.subset_mask(labels.bool(), said), self.names, labels,
                coverage if with_coverage else None,
            )  # fmt: skip
