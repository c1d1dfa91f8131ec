"""A transformer block opened: its queries, keys, values and attention, which its own forward pass does not give out.

Comes in: a pre-norm block of timm's or of open_clip's vision transformer. Goes out: an `OpenBlock` that computes the
same numbers step by step. Fused attention never builds the attention matrix, and torch's attention module hides its
projections; explanations that read attention, and shortcuts that need the class token's row alone, need both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import UsageError


class OpenBlock(ABC):
    """tokens + attention(norm(tokens)), then + mlp(norm(tokens)), one step at a time; h heads of d channels each.

    Attributes
    ----------
    block : Module
    norm : Module
        What tokens go through before attention.
    heads, head_dim : int
    scale : float
        What products of queries and keys are multiplied by.
    linear : bool
        Whether keys and values are linear in the normalised tokens, without a norm of their own.
    """

    block: Any
    norm: nn.Module
    heads: int
    head_dim: int
    scale: float
    linear: bool

    @abstractmethod
    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (3 h d, width) and bias (3 h d,) that make queries, keys and values of normalised tokens."""

    @abstractmethod
    def leave(self, tokens: Tensor, gathered: Tensor) -> Tensor:
        """Return the tokens that leave the block, from those that entered it and what they gathered, (b, n, h d)."""

    def queries(self, normed: Tensor) -> Tensor:
        """Return queries, not yet scaled, of normalised tokens (b, n, width): (b, h, n, d)."""
        return self._projected(normed, 0, 1)[0]

    def keys_and_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of normalised tokens (b, n, width), (b, h, n, d) each."""
        keys, values = self._projected(normed, 1, 3)
        return keys, values

    def attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return how queries (b, h, m, d) spread over keys (b, h, n, d): (b, h, m, n), rows of sum 1."""
        return (queries * self.scale @ keys.transpose(-2, -1)).softmax(dim=-1)

    def gather(self, attention: Tensor, values: Tensor) -> Tensor:
        """Return what each token gathers, heads side by side, before the output projection: (b, m, h d)."""
        return (attention @ values).transpose(1, 2).flatten(2)

    def by_head(self, channels: Tensor) -> Tensor:
        """Return channels (..., h d) as (..., h, d)."""
        return channels.unflatten(-1, (self.heads, self.head_dim))

    def _projected(self, normed: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        size = self.heads * self.head_dim
        made = self._made(normed, slice(first * size, last * size))
        parts = self.by_head(made.unflatten(-1, (last - first, size))).permute(2, 0, 3, 1, 4)
        return tuple(self._normed_parts(first, parts))

    def _made(self, normed: Tensor, rows: slice) -> Tensor:
        """Return some channels of queries, keys and values, side by side, of normalised tokens."""
        weight, bias = self.projection()
        return functional.linear(normed, weight[rows], None if bias is None else bias[rows])

    def _normed_parts(self, first: int, parts: Tensor) -> list[Tensor]:
        """Return the parts, of which `first` is the first (0 queries, 1 keys, 2 values), after norms of their own."""
        return list(parts.unbind(0))


class _TimmBlock(OpenBlock):
    def __init__(self, block: Any) -> None:
        attention = block.attn
        self.block = block
        self.norm = block.norm1
        self.heads, self.scale = attention.num_heads, attention.scale
        self.head_dim = attention.head_dim
        self.linear = isinstance(attention.k_norm, nn.Identity)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        qkv = self.block.attn.qkv
        return qkv.weight, qkv.bias

    def _made(self, normed: Tensor, rows: slice) -> Tensor:
        qkv = self.block.attn.qkv
        # With an adapter the product has no parts of its own.
        return super()._made(normed, rows) if type(qkv) is nn.Linear else qkv(normed)[..., rows]

    def leave(self, tokens: Tensor, gathered: Tensor) -> Tensor:
        block, attention = self.block, self.block.attn
        attended = attention.proj_drop(attention.proj(attention.norm(gathered)))
        tokens = tokens + block.drop_path1(block.ls1(attended))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def _normed_parts(self, first: int, parts: Tensor) -> list[Tensor]:
        attention = self.block.attn
        norms = (attention.q_norm, attention.k_norm, nn.Identity())
        return [norms[first + place](part) for place, part in enumerate(parts.unbind(0))]


class _OpenClipBlock(OpenBlock):
    def __init__(self, block: Any) -> None:
        self.block = block
        self.norm = block.ln_1
        self.heads, self.head_dim = block.attn.num_heads, block.attn.head_dim
        self.scale = self.head_dim**-0.5
        self.linear = True

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.block.attn.in_proj_weight, self.block.attn.in_proj_bias

    def leave(self, tokens: Tensor, gathered: Tensor) -> Tensor:
        block = self.block
        tokens = tokens + block.ls_1(block.attn.out_proj(gathered))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def can_be_opened(block: nn.Module) -> bool:
    """Tell whether `open_block` knows this block; subclasses may compute something else, so they do not count."""
    attention: Any = getattr(block, "attn", None)
    if type(block) is Block:
        return type(attention) is Attention and getattr(attention, "gate", None) is None and hasattr(attention, "norm")
    if type(block) is ResidualAttentionBlock:
        plain = attention.bias_k is None and not attention.add_zero_attn and attention._qkv_same_embed_dim
        return type(attention) is nn.MultiheadAttention and plain and attention.batch_first
    return False


def open_block(block: nn.Module) -> OpenBlock:
    """Return a block opened.

    Raises
    ------
    UsageError
        A kind of block whose attention is not known here.
    """
    if not can_be_opened(block):
        kind = type(block).__name__
        raise UsageError(f"the attention of a {kind} cannot be read; that of plain timm and open_clip blocks can")
    return _TimmBlock(block) if isinstance(block, Block) else _OpenClipBlock(block)


def run_open(block: OpenBlock, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that leave a block, (b, n, width), and its attention, (b, h, n, n), both with their graph."""
    normed = block.norm(tokens)
    queries, (keys, values) = block.queries(normed), block.keys_and_values(normed)
    attention = block.attention(queries, keys)
    return block.leave(tokens, block.gather(attention, values)), attention
