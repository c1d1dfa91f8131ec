"""The last block of a class-token ViT, computed for the class token alone: gradients of many labels for nearly nothing.

Behind the last block's attention only the class token is pooled, so of that block only its row matters: keys and values
of all tokens, one query, one token through projection and MLP. What remains between the block's normalised tokens and
the output is bilinear, and its gradient is written down instead of differentiated: with the class token's attention a,
the gradient g at what it gathered, and s_j = g . v_j a head,

    at the values   a_j g,      at the keys   scale q z_j,      z_j = a_j (s_j - sum_k a_k s_k),

and each goes back through its projection. Grad-CAM wants only the mean over the patches, which goes through it once
instead of once a patch. The numbers are autograd's, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from analysis.cam.passes import LayerPass, Seen, Tower
from analysis.cam.targets import Target
from engine.open_blocks import OpenBlock, can_be_opened, open_block
from engine.trunks import CamLayer, Trunk


def fits(trunk: Trunk, layer: CamLayer) -> bool:
    """Tell whether a layer is the first norm of a class-token ViT's last block, and that block can be opened."""
    if trunk.kind != "vit-token" or not trunk.has_tokens or not can_be_opened(trunk.blocks[-1]):
        return False
    block = open_block(trunk.blocks[-1])
    return block.linear and layer.module is block.norm


@dataclass(frozen=True)
class ClassTokenPass:
    """The class token's way through the last block, and how the targets depend on it; h heads of d channels.

    Parameters
    ----------
    block : OpenBlock
    trunk : Trunk
    normed : Tensor, (b, n, width)
        The block's normalised tokens.
    query : Tensor, (b, h, d)
        Of the class token, not scaled.
    keys, values : Tensor, (b, h, n, d)
    attention : Tensor, (b, h, n)
        Of the class token.
    gathered : Tensor, (b, t, h, d)
        Each target's gradient at what the class token gathered.
    scores : Tensor, (b, t)
    """

    block: OpenBlock
    trunk: Trunk
    normed: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attention: torch.Tensor
    gathered: torch.Tensor
    scores: torch.Tensor

    @property
    def evidence(self) -> torch.Tensor:
        """Each token's value along the gradient, s: (b, t, h, n)."""
        return torch.einsum("bthd,bhnd->bthn", self.gathered, self.values)

    def _at_products(self) -> torch.Tensor:
        """Gradient at the products of query and keys, z: (b, t, h, n)."""
        evidence, attention = self.evidence, self.attention[:, None]
        return attention * (evidence - (attention * evidence).sum(dim=-1, keepdim=True))

    def _back(self, at_keys: torch.Tensor, at_values: torch.Tensor) -> torch.Tensor:
        """Return gradients at keys and values, (..., h, d) each, carried back to normalised tokens, (..., width)."""
        weight, _ = self.block.projection()
        size = self.block.heads * self.block.head_dim
        return torch.cat([at_keys.flatten(-2), at_values.flatten(-2)], dim=-1) @ weight[size:]

    def activations(self) -> torch.Tensor:
        """Return the patches' normalised tokens as maps, (b, width, rows, columns)."""
        return self._grid(self.normed[:, self.trunk.prefix_tokens :].transpose(1, 2))

    def mean_gradients(self) -> torch.Tensor:
        """Return gradients averaged over the patches, (b, t, width)."""
        first = self.trunk.prefix_tokens
        at_products = self._at_products()[..., first:].mean(dim=-1) * self.block.scale
        at_values = self.attention[:, None, :, first:].mean(dim=-1)
        return self._back(at_products[..., None] * self.query[:, None], at_values[..., None] * self.gathered)

    def gradients(self) -> torch.Tensor:
        """Return gradients at the patches as maps, (b, t, width, rows, columns)."""
        first = self.trunk.prefix_tokens
        at_products = self._at_products()[..., first:].transpose(2, 3) * self.block.scale
        at_values = self.attention[..., first:].transpose(1, 2)[:, None]
        back = self._back(
            at_products[..., None] * self.query[:, None, None], at_values[..., None] * self.gathered[:, :, None]
        )
        return self._grid(back.transpose(2, 3))

    def gradcam(self) -> torch.Tensor:
        """Return Grad-CAM's maps, (b, t, rows, columns)."""
        return torch.einsum("btc,bchw->bthw", self.mean_gradients(), self.activations())

    def layer_pass(self) -> LayerPass:
        """Return activations and gradients in full."""
        return LayerPass(self.activations(), self.gradients(), self.scores)

    def _grid(self, places: torch.Tensor) -> torch.Tensor:
        assert self.trunk.grid is not None  # only transformers come here
        return places.unflatten(-1, self.trunk.grid)


def class_token_pass(tower: Tower, seen: Seen, targets: Sequence[Target]) -> ClassTokenPass:
    """Run the tower up to its last block, and that block for the class token; see `fits`."""
    trunk = tower.trunk
    block = open_block(trunk.blocks[-1])
    with tower.computing():
        with torch.no_grad():
            tokens = tower.entering(seen, len(trunk.blocks) - 1)
            normed = block.norm(tokens)
            query = block.queries(normed[:, :1])
            keys, values = block.keys_and_values(normed)
            attention = block.attention(query, keys)
            gathered = block.gather(attention, values)
        count = len(targets)
        # One row an image and target, so that one backward pass serves them all.
        rows = gathered.repeat_interleave(count, dim=0).requires_grad_()
        left = block.leave(tokens[:, :1].repeat_interleave(count, dim=0), rows)
        embeddings = trunk.finish(left).unflatten(0, (len(tokens), count))
        scores = torch.stack([target.score(embeddings[:, place]) for place, target in enumerate(targets)], dim=1)
        gradient = torch.zeros_like(rows)
        if scores.requires_grad:
            gradient = torch.autograd.grad(scores.sum(), rows)[0]
        at_gathered = block.by_head(gradient[:, 0].unflatten(0, (len(tokens), count)))
    return ClassTokenPass(
        block, trunk, normed, query[:, :, 0], keys, values, attention[:, :, 0], at_gathered, scores.detach()
    )
