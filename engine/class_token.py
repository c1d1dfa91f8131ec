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
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional

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
    if type(last) is Block and type(last.attn) is Attention and getattr(last.attn, "gate", None) is None:
        return lambda tokens: finish(_timm_block(last, tokens))
    if type(last) is ResidualAttentionBlock and getattr(last.attn, "batch_first", True):
        return lambda tokens: finish(_open_clip_block(last, tokens))
    return None


def _timm_block(block: Any, tokens: Tensor) -> Tensor:
    """Return the class token (b, 1, width) as it leaves a block."""
    attention = block.attn
    entered = block.norm1(tokens)
    queries, keys, values = _projected(attention, entered)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    dropout = attention.attn_drop.p if attention.training else 0.0
    gathered = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
    gathered = gathered.transpose(1, 2).flatten(2)
    answer = attention.proj_drop(attention.proj(getattr(attention, "norm", nn.Identity())(gathered)))
    first = tokens[:, :1] + block.drop_path1(block.ls1(answer))
    return first + block.drop_path2(block.ls2(block.mlp(block.norm2(first))))


def _projected(attention: Any, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class token's query and all keys and values, (b, heads, 1 or n, width of a head)."""
    heads = attention.num_heads
    if type(attention.qkv) is nn.Linear:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        width = len(weight) // 3
        query = functional.linear(entered[:, :1], weight[:width], None if bias is None else bias[:width])
        both = functional.linear(entered, weight[width:], None if bias is None else bias[width:])
    else:  # with an adapter, whose product has no halves
        query, both = attention.qkv(entered).tensor_split([attention.qkv.out_features // 3], dim=2)
        query = query[:, :1]
    keys, values = both.chunk(2, dim=2)
    split = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, keys, values))
    found_query, found_keys, found_values = split
    return found_query, found_keys, found_values


def _open_clip_block(block: Any, tokens: Tensor) -> Tensor:
    """Return the class token (b, 1, width) as it leaves a block."""
    entered = block.ln_1(tokens)
    gathered = block.attn(entered[:, :1], entered, entered, need_weights=False)[0]
    first = tokens[:, :1] + block.ls_1(gathered)
    return first + block.ls_2(block.mlp(block.ln_2(first)))
