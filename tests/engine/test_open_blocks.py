"""Blocks opened against their own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn

from engine.errors import UsageError
from engine.open_blocks import can_be_opened, open_block, run_open

BLOCKS = {
    "timm": lambda: Block(24, 3, qkv_bias=True),
    "timm, no bias, layer scale": lambda: Block(24, 2, init_values=0.3),
    "timm, keys normed": lambda: Block(24, 3, qkv_bias=True, qk_norm=True, scale_attn_norm=True),
    "open_clip": lambda: ResidualAttentionBlock(24, 3),
    "open_clip, layer scale": lambda: ResidualAttentionBlock(24, 4, ls_init_value=0.2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_open_block__gives_what_the_block_gives(name: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().eval()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    tokens = torch.randn(2, 7, 24)
    opened = open_block(block)
    with torch.no_grad():
        left, attention = run_open(opened, tokens)
        torch.testing.assert_close(left, block(tokens), rtol=1e-4, atol=1e-5)
        assert attention.shape == (2, opened.heads, 7, 7)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, opened.heads, 7))
        normed = opened.norm(tokens)
        keys, _ = opened.keys_and_values(normed)
        products = opened.queries(normed).numpy() @ keys.transpose(-1, -2).numpy() / np.sqrt(24 / opened.heads)
        exponentials = np.exp(products - products.max(-1, keepdims=True))
        np.testing.assert_allclose(attention.numpy(), exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-4)
    assert opened.linear == ("keys normed" not in name)


@pytest.mark.parametrize("block", [ParallelScalingBlock(24, 3), CustomResidualAttentionBlock(24, 3), nn.Linear(2, 2)])
def test_open_block__refuses_kinds_that_it_does_not_know(block: nn.Module) -> None:
    assert not can_be_opened(block)
    with pytest.raises(UsageError, match=type(block).__name__):
        open_block(block)
