"""Text towers whose texts may be cut to their own length: what is padding, and the forward pass without it.

Most texts are far shorter than a model's context, and a tower spends its time on padding. Padding changes nothing but
rounding in two kinds of towers, which is what `describe_text_tower` looks for:

- a Hugging Face BERT whose attention is masked and whose padding stands on the right;
- CLIP's own causal tower, whose tokens see only those before them and which is pooled at the end-of-text token.

All others get texts of full length.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


class TextTower(NamedTuple):
    """How a model's texts are padded.

    `kind` is "masked" or "causal" where texts may be cut and "fixed" where not; `module` is what a causal tower's
    parts hang from, `padding` a masked tower's padding token.
    """

    kind: Literal["masked", "causal", "fixed"]
    model: Any
    module: Any = None
    padding: int = 0

    @property
    def can_be_cut(self) -> bool:
        """Whether texts may be cut to their own length."""
        return self.kind != "fixed"

    def lengths(self, words: Tensor) -> Tensor:
        """Return how many of the token numbers (b, context) each text needs, (b,) int64."""
        if self.kind == "fixed":
            return torch.full((len(words),), words.shape[1])
        if self.kind == "masked":
            written = (words != self.padding).long()
            return words.shape[1] - written.flip(1).argmax(dim=1)
        return self._end(words) + 1

    def encode(self, words: Tensor) -> Tensor:
        """Embed token numbers (b, n), cut to a length that holds them all: (b, dim), un-normalised."""
        if self.kind != "causal" or words.shape[1] == len(self.module.positional_embedding):
            return self.model.encode_text(words, normalize=False)
        module, length = self.module, words.shape[1]
        cast = module.transformer.get_cast_dtype()
        tokens = module.token_embedding(words).to(cast) + module.positional_embedding[:length].to(cast)
        tokens = module.ln_final(module.transformer(tokens, attn_mask=module.attn_mask[:length, :length]))
        pooled = text_global_pool(tokens, words, *_pooling(module))
        projection = module.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def _end(self, words: Tensor) -> Tensor:
        pool, number = _pooling(self.module)
        return (words if pool == "argmax" else words.eq(number or 0).int()).argmax(dim=1)


def describe_text_tower(model: Any, tokenizer: Any) -> TextTower:
    """Return how an open_clip model's texts are padded.

    Parameters
    ----------
    model : Module
        open_clip's.
    tokenizer : callable
        open_clip's, of that model.
    """
    tower = getattr(model, "text", None)
    if (
        isinstance(tower, HFTextEncoder)
        and isinstance(tower.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler)
        and tower.config.model_type in ("bert", "roberta", "xlm-roberta")
        and not tokenizer.tokenizer_mode
        and tokenizer.tokenizer.padding_side == "right"
        and tokenizer.tokenizer.pad_token_id == tower.config.pad_token_id
    ):
        return TextTower("masked", model, padding=tower.config.pad_token_id)
    module = model if isinstance(model, CLIP) else tower if isinstance(tower, TextTransformer) else None
    if module is not None and _is_causal(module):
        return TextTower("causal", model, module)
    return TextTower("fixed", model)


def _pooling(module: Any) -> tuple[str, int | None]:
    """Return how a tower of open_clip's own is pooled, and its end-of-text token where that says so."""
    if isinstance(module, CLIP):
        return module.text_pool_type, getattr(module, "text_eos_id", None)
    return module.pool_type, getattr(module, "eos_id", None)


def _is_causal(module: Any) -> bool:
    if getattr(module, "cls_emb", None) is not None or getattr(module, "use_pad_mask", False):
        return False
    if getattr(module, "output_tokens", False) or module.attn_mask is None or _pooling(module)[0] not in _END_POOLS:
        return False
    future = torch.ones_like(module.attn_mask, dtype=torch.bool).triu(1)
    return bool(torch.isneginf(module.attn_mask).eq(future).all())


_END_POOLS = ("argmax", "eos")
