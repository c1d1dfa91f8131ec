"""A class-token ViT whose weights are written by hand, so that what a heatmap has to show is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from engine.pixels import Preprocess
from engine.trunks import describe_trunk

PATCH, GRID, WIDTH = 16, 4, 8


def readable_encoder(layers: int = 2) -> Any:
    """Return an encoder that carries each patch's brightness in channel 0 and averages it; nothing else happens.

    Attention is even, values pass channel 0 alone, norms and MLPs do nothing, and the embedding is the class token.
    """
    visual = VisionTransformer(PATCH * GRID, PATCH, WIDTH, layers, 1, 1.0, output_dim=WIDTH)
    with torch.no_grad():
        for weight in visual.parameters():
            weight.zero_()
        visual.conv1.weight[0] = 1 / (3 * PATCH * PATCH)
        visual.proj.copy_(torch.eye(WIDTH))
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[2 * WIDTH, 0] = 1
            block.attn.out_proj.weight.copy_(torch.eye(WIDTH))
            block.ln_1 = block.ln_2 = nn.Identity()
    visual.ln_pre = visual.ln_post = nn.Identity()
    visual.eval().requires_grad_(False)
    return SimpleNamespace(
        id="readable",
        model=SimpleNamespace(visual=visual),
        trunk=describe_trunk(visual),
        preprocess=Preprocess(size=(PATCH * GRID,) * 2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        dim=WIDTH,
    )


def one_bright_patch(row: int, column: int) -> np.ndarray:
    """Return black pixels with one white patch, (h, w, 3)."""
    pixels = np.zeros((PATCH * GRID, PATCH * GRID, 3), dtype=np.uint8)
    pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 255
    return pixels
