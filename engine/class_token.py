"""The last block of a ViT that is pooled by its class token, computed for that token alone.

In comes a trunk; out goes a function from the tokens that enter the last block to the embedding, or None where the
tower is another. After the last block's attention nothing of the patches reaches the output, so queries, the projection
and the MLP are wanted for one token of n: about a sixth of the block's products, forwards and backwards. The numbers
are those of the whole block, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional

from engine.open_blocks import OpenBlock, can_be_opened, open_block
from engine.trunks import Trunk

Tail = Callable[[Tensor], Tensor]


def class_token_tail(trunk: Trunk) -> Tail | None:
    """Return tokens (b, n, width) that enter the last block -> embeddings (b, dim); None where that is not known.

    Known are timm's and open_clip's plain blocks, also with peft's adapters in their linear layers.
    """
    finish = getattr(trunk, "finish", None)
    if trunk.kind != "vit-token" or finish is None:
        return None
    last = trunk.blocks[-1]
    if type(last) is Block and can_be_opened(last):
        opened = open_block(last)
        return lambda tokens: finish(_timm_block(opened, tokens))
    if type(last) is ResidualAttentionBlock and getattr(last.attn, "batch_first", True):
        return lambda tokens: finish(_open_clip_block(last, tokens))
    return None


def _timm_block(opened: OpenBlock, tokens: Tensor) -> Tensor:
    """Return the class token (b, 1, width) as it leaves a block."""
    entered = opened.norm(tokens)
    keys, values = opened.keys_and_values(entered)
    attention = opened.block.attn
    dropout = attention.attn_drop.p if attention.training else 0.0
    # Fused, unlike `OpenBlock.attention`: nobody reads the attention here.
    gathered = functional.scaled_dot_product_attention(opened.queries(entered[:, :1]), keys, values, dropout_p=dropout)
    return opened.leave(tokens[:, :1], gathered.transpose(1, 2).flatten(2))


def _open_clip_block(block: Any, tokens: Tensor) -> Tensor:
    """Return the class token (b, 1, width) as it leaves a block."""
    entered = block.ln_1(tokens)
    gathered = block.attn(entered[:, :1], entered, entered, need_weights=False)[0]
    first = tokens[:, :1] + block.ls_1(gathered)
    return first + block.ls_2(block.mlp(block.ln_2(first)))
