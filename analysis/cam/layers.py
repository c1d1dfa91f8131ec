"""One map a block, side by side: where evidence for a label lies on its way through an image tower.

Comes in: an encoder, what it saw of one image, a target. Goes out: for each block Grad-CAM of the tokens that enter it
(a CNN: of the maps that its stage gives) and, where attention can be read, attention rollout from the image up to and
with that block; behind the last block Grad-CAM of what leaves it. All from one forward and one backward pass. A block
whose gradient never reaches the output has no Grad-CAM and says so: where a class token is pooled, that is what leaves
the last block, and a study that looks there sees nothing.

The numbers are those of ``Explainer(encoder, layer=NUMBER)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from analysis.cam.attention import pooled_row, rolled_out
from analysis.cam.maps import HeatMap, heat_map
from analysis.cam.passes import Seen, Tokens, as_maps, float_tower
from analysis.cam.targets import Target
from analysis.cam.weighting import gradcam
from engine.errors import ModelError, UsageError
from engine.open_blocks import OpenBlock
from engine.trunks import CamLayer, Trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder

UNREACHED = "no gradient reaches the output from here"


@dataclass(frozen=True)
class LayerMaps:
    """What one block shows for a target in an image.

    Parameters
    ----------
    block : int
        From 0; the number of blocks for what leaves the last one.
    layer : str
        Module within the image tower whose output Grad-CAM weighs.
    gradcam : HeatMap
        Empty, with the note, where no gradient reaches it.
    reached : bool
        Whether the output depends on this layer's positions at all.
    leaving : bool
        Whether this is what leaves the last block, and not what enters one.
    rollout : HeatMap or None
        Of the attention of all blocks up to this one; None where attention cannot be read.
    """

    block: int
    layer: str
    gradcam: HeatMap
    reached: bool
    rollout: HeatMap | None
    leaving: bool = False


def layer_strip(encoder: Encoder, seen: Seen, target: Target) -> list[LayerMaps]:
    """Return the maps of all blocks for one target in one image, in order of depth.

    Parameters
    ----------
    encoder : Encoder
    seen : ndarray of uint8 (1, h, w, 3), or Tokens of one image that enter block 0
    target : Target

    Raises
    ------
    UsageError
        Tokens from behind the first block, or several images.
    """
    tower = float_tower(encoder)
    trunk = tower.trunk
    if len(seen) != 1 or (isinstance(seen, Tokens) and seen.block):
        raise UsageError("layers side by side need one image: its pixels, or the tokens that enter block 0")
    layers = [trunk.cam_layer(block) for block in range(len(trunk.blocks))]
    if trunk.has_tokens:
        layers.append(trunk.leaving())
    opened = trunk.open_blocks() if trunk.has_open_blocks and trunk.kind != "vit-attention" else ()
    with tower.computing(), _watching(layers) as given:
        score = target.score(tower.embed(seen, tower.inputs(seen)))[0]
        outputs = [given[layer.name] for layer in layers]
        gradients: Sequence[torch.Tensor | None] = [None] * len(outputs)
        if score.requires_grad:
            gradients = torch.autograd.grad(score, outputs, allow_unused=True)
        value = float(score.detach())
        with torch.no_grad():
            rolled = _rolled_out(trunk, opened, outputs)
    size = encoder.preprocess.size
    found = []
    for block, (layer, output, gradient) in enumerate(zip(layers, outputs, gradients, strict=True)):
        activations, at = (as_maps(layer, x).detach() for x in (output, _or_zeros(gradient, output)))
        reached = bool(at.any())
        found.append(
            LayerMaps(
                block=block,
                layer=layer.name,
                gradcam=heat_map(
                    gradcam(activations, at[:, None])[0, 0].cpu().numpy(),
                    score=value,
                    size=size,
                    layer=layer.name,
                    method="gradcam",
                    target=target.name,
                    note="" if reached else f"empty: {UNREACHED}",
                ),
                reached=reached,
                leaving=block == len(trunk.blocks),
                rollout=_rolled_map(rolled[block], value, size, block, target.name) if block < len(rolled) else None,
            )
        )
    return found


def _rolled_map(row: torch.Tensor, score: float, size: tuple[int, int], block: int, target: str) -> HeatMap:
    """Return attention rollout up to a block, (rows, columns), as a heatmap."""
    layer = f"attention of blocks 0 to {block}" if block else "attention of block 0"
    return heat_map(row.cpu().numpy(), score=score, size=size, layer=layer, method="rollout", target=target)


def _or_zeros(gradient: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output) if gradient is None else gradient


def _rolled_out(trunk: Trunk, opened: tuple[OpenBlock, ...], normed: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return rollout up to each block, (rows, columns), from the normalised tokens that entered them."""
    attentions = []
    for block, tokens in zip(opened, normed, strict=False):
        keys, _ = block.keys_and_values(tokens)
        attentions.append(block.attention(block.queries(tokens), keys))
    return [pooled_row(trunk, joint)[0] for joint in rolled_out(attentions)]


@contextmanager
def _watching(layers: list[CamLayer]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep what some layers give, in their order of depth, with the graph that starts at the first of them."""
    given: dict[str, torch.Tensor] = {}

    def keep(layer: CamLayer) -> None:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            if not isinstance(output, torch.Tensor):
                raise ModelError(f"{layer.name!r} gives a {type(output).__name__} and no tensor, so it has no heatmap")
            given[layer.name] = output if given else output.detach().clone().requires_grad_()
            # A copy goes on: what is kept may not be changed in place behind it.
            return given[layer.name].clone()

        handles.callback(layer.module.register_forward_hook(hook).remove)

    with ExitStack() as handles:
        for layer in layers:
            keep(layer)
        yield given
