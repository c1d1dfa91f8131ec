"""Explanations that read a transformer's attention: Grad-ECLIP, LeGrad and attention rollout, from their papers.

Comes in: a tower of plain timm or open_clip blocks, pixels or tokens, targets. Goes out: raw maps (b, t, rows, columns)
on the patch grid, as of any other method.

- Grad-ECLIP (Zhao et al., "Gradient-based Visual Explanation for Transformer-based CLIP", ICML 2024). What the class
  token gathers in the last block is sum_j a_j v_j; a target's gradient g there weighs the channels, and a loosened
  attention weighs the places: the cosine of the class token's query and a patch's key, scaled to 0..1 over the patches.
  A patch's evidence is l_j (g . v_j). The target is the model's own: the paper's code computes the last block with one
  head instead, and takes queries and keys through the output projection, which the model never does.
- LeGrad (Bousselham et al., 2024). For each of the last blocks, the tokens that leave it are averaged and taken through
  the model's own norm and projection; the gradient of that score at the block's attention, without its negative part,
  is averaged over heads and queries. Maps of blocks are averaged. They are never negative.
- Attention rollout (Abnar and Zuidema, ACL 2020). Attention averaged over heads, half of it kept for the residual,
  multiplied from block to block; the class token's row (or the patches' mean row, where the average is pooled). It does
  not depend on the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from analysis.cam.class_token import class_token_pass
from analysis.cam.maps import RawMaps
from analysis.cam.passes import Seen, Tower, target_gradients
from analysis.cam.targets import Target, score_all
from engine.open_blocks import run_open
from engine.trunks import Trunk

LEGRAD_BLOCKS = 2
"""Last blocks that LeGrad reads by default, as its authors' code does."""


def grad_eclip(tower: Tower, seen: Seen, targets: Sequence[Target]) -> RawMaps:
    """Return Grad-ECLIP's signed maps, sum_c l_j g_c v_jc, at the last block of a class-token ViT."""
    found = class_token_pass(tower, seen, targets)
    first = tower.trunk.prefix_tokens
    query = torch.nn.functional.normalize(found.query.flatten(1), dim=-1)
    keys = torch.nn.functional.normalize(found.keys[:, :, first:].transpose(1, 2).flatten(2), dim=-1)
    likeness = torch.einsum("bc,bnc->bn", query, keys)
    least, most = likeness.amin(dim=-1, keepdim=True), likeness.amax(dim=-1, keepdim=True)
    # Where all keys are equal the places weigh the same; 0 / 0 would say so with NaN.
    spread = (most - least).clamp(min=torch.finfo(likeness.dtype).tiny)
    loosened = torch.where(most > least, (likeness - least) / spread, torch.ones_like(likeness))
    evidence = found.evidence.sum(dim=2)[..., first:] * loosened[:, None]
    reached = found.gathered.flatten(2).any(dim=-1)
    return RawMaps(on_grid(tower.trunk, evidence), found.scores, reached)


def legrad(tower: Tower, seen: Seen, targets: Sequence[Target], first_block: int) -> RawMaps:
    """Return LeGrad's maps, averaged over the blocks from the first one on; never negative."""
    blocks = tower.trunk.open_blocks()[first_block:]
    prefix = tower.trunk.prefix_tokens
    with tower.computing():
        with torch.no_grad():
            tokens = tower.entering(seen, first_block)
        total = tokens.new_zeros(len(tokens), len(targets), tokens.shape[1])
        for block in blocks:
            with torch.no_grad():
                normed = block.norm(tokens)
                keys, values = block.keys_and_values(normed)
                gathered = block.gather(block.attention(block.queries(normed), keys), values)
            gathered.requires_grad_()
            left = block.leave(tokens, gathered)
            scores = score_all(targets, tower.trunk.finish(_averaged(tower.trunk, left)))
            for place, gradient in enumerate(target_gradients(scores, gathered)):
                # What a token gathers is its attention times the values, so this is the gradient at the attention.
                at_attention = block.by_head(gradient).transpose(1, 2) @ values.transpose(-2, -1)
                total[:, place] += at_attention.clamp(min=0).mean(dim=(1, 2))
            tokens = left.detach()
        with torch.no_grad():
            final = score_all(targets, tower.trunk.finish(tokens))
    evidence = total[..., prefix:] / len(blocks)
    return RawMaps(on_grid(tower.trunk, evidence), final, evidence.flatten(2).any(dim=-1))


def rollout(tower: Tower, seen: Seen, targets: Sequence[Target]) -> RawMaps:
    """Return attention rollout through all blocks; the same map for every target."""
    with tower.computing(), torch.no_grad():
        tokens = tower.entering(seen, 0)
        attentions = []
        for block in tower.trunk.open_blocks():
            tokens, attention = run_open(block, tokens)
            attentions.append(attention)
        scores = score_all(targets, tower.trunk.finish(tokens))
        *_, joint = rolled_out(attentions)
    maps = pooled_row(tower.trunk, joint)[:, None].expand(-1, len(targets), -1, -1)
    return RawMaps(maps, scores, torch.ones_like(scores, dtype=torch.bool))


def rolled_out(attentions: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield what tokens attend to in the input after each block, (b, n, n), for attentions (b, h, n, n)."""
    joint: torch.Tensor | None = None
    for attention in attentions:
        mean = attention.mean(dim=1)
        kept = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        joint = kept if joint is None else kept @ joint
        yield joint


def pooled_row(trunk: Trunk, joint: torch.Tensor) -> torch.Tensor:
    """Return what the pooled token (or the average of the patches) attends to: (b, rows, columns)."""
    prefix = trunk.prefix_tokens
    row = joint[:, 0] if trunk.kind == "vit-token" else joint[:, prefix:].mean(dim=1)
    return on_grid(trunk, row[:, prefix:])


def on_grid(trunk: Trunk, patches: torch.Tensor) -> torch.Tensor:
    """Return values of patches (..., n) on the patch grid, (..., rows, columns)."""
    assert trunk.grid is not None  # only transformers come here
    return patches.unflatten(-1, trunk.grid)


def _averaged(trunk: Trunk, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens such that `Trunk.finish` pools their average."""
    return tokens.mean(dim=1, keepdim=True) if trunk.kind == "vit-token" else tokens
