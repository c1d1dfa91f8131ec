"""One pass through an image tower for many labels: activations and gradients at a layer, computed from there on only.

Comes in: what the tower saw of b images, as pixels or as tokens that are about to enter a block, a layer and targets.
Goes out: the layer's activations as maps (b, c, h, w) and each target's gradient there (b, t, c, h, w), on the tower's
device, in float32. The graph starts at the layer: nothing below it is kept or differentiated, and nothing below a
token's block is computed at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from analysis.cam.targets import Target, score_all
from engine.errors import DataError, ModelError, UsageError
from engine.trunks import CamLayer, Trunk, describe_trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder
    from engine.pixels import Preprocess


@dataclass(frozen=True)
class Tokens:
    """Tokens that are about to enter a block, as the token cache keeps them.

    Parameters
    ----------
    values : ndarray or Tensor of float, (b, n, width)
    block : int
        Counted from 0.
    """

    values: np.ndarray | torch.Tensor
    block: int

    def __len__(self) -> int:
        return len(self.values)


Seen = np.ndarray | Tokens
"""What a tower saw: uint8 pixels (b, h, w, 3) before mean and standard deviation, or tokens."""


@dataclass(frozen=True)
class LayerPass:
    """Activations and gradients at one layer.

    Parameters
    ----------
    activations : Tensor of float32, (b, c, h, w)
    gradients : Tensor of float32, (b, t, c, h, w)
    scores : Tensor of float32, (b, t)
    """

    activations: torch.Tensor
    gradients: torch.Tensor
    scores: torch.Tensor


class Tower:
    """An image tower in float32, ready to be run from pixels or from tokens.

    Parameters
    ----------
    visual : Module
        open_clip's image tower.
    trunk : Trunk
        Its structure.
    preprocess : Preprocess
        Whose mean and standard deviation pixels go through.
    """

    def __init__(self, visual: nn.Module, trunk: Trunk, preprocess: Preprocess) -> None:
        self.visual, self.trunk, self.preprocess = visual, trunk, preprocess
        self.device = next(visual.parameters()).device

    def inputs(self, seen: Seen) -> torch.Tensor:
        """Return what enters the tower, (b, 3, h, w), or the block, (b, n, width): float32, on the device.

        Raises
        ------
        DataError
            Neither pixels nor tokens.
        """
        if isinstance(seen, Tokens):
            values = torch.as_tensor(np.array(seen.values) if isinstance(seen.values, np.ndarray) else seen.values)
            return values.to(self.device, torch.float32)
        pixels = np.asarray(seen)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise DataError(f"heatmaps need uint8 pixels (h, w, 3) of each image, not {pixels.dtype} {pixels.shape}")
        return self.preprocess.normalise(pixels).to(self.device, torch.float32)

    def embed(self, seen: Seen, inputs: torch.Tensor) -> torch.Tensor:
        """Return raw embeddings (b, dim) of what `inputs` gave."""
        if isinstance(seen, Tokens):
            return self.trunk.from_tokens(inputs, seen.block)
        found = self.visual(inputs)
        return found[0] if isinstance(found, tuple) else found

    def entering(self, seen: Seen, block: int) -> torch.Tensor:
        """Return the tokens that enter a block, (b, n, width)."""
        inputs = self.inputs(seen)
        if not isinstance(seen, Tokens):
            return self.trunk.tokens(inputs, block)
        for between in self.trunk.blocks[seen.block : block]:
            inputs = between(inputs)
        return inputs

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Record gradients, of no weight, in plain float32: a caller's autocast and cuDNN's TF32 are kept out."""
        weights = [weight for weight in self.visual.parameters() if weight.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                if self.device.type == "cuda":
                    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                        yield
                else:
                    yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def float_tower(encoder: Encoder) -> Tower:
    """Return an encoder's image tower in float32: itself, or a copy of its (rounded) weights."""
    visual, trunk = encoder.model.visual, encoder.trunk
    if any(weight.dtype != torch.float32 for weight in visual.parameters()):
        visual = copy.deepcopy(visual).float()
        trunk = describe_trunk(visual)
    return Tower(visual, trunk, encoder.preprocess)


def layer_pass(tower: Tower, layer: CamLayer, seen: Seen, targets: Sequence[Target]) -> LayerPass:
    """Return activations and gradients at a layer, for all targets, from one forward pass.

    A target whose gradient does not reach the layer has zeros.

    Raises
    ------
    ModelError
        The tower never calls the layer on its way.
    """
    with tower.computing(), cut_at(layer.module) as cut:
        embeddings = tower.embed(seen, tower.inputs(seen))
        if not cut.starts:
            raise ModelError(f"the image tower never calls {layer.name!r}, so it has no heatmap")
        start = cut.starts[-1]
        scores = score_all(targets, embeddings)
        gradients = target_gradients(scores, start)
        activations = as_maps(layer, start.detach())
        shaped = as_maps(layer, gradients.flatten(0, 1))
        by_target = shaped.unflatten(0, (len(targets), len(embeddings))).transpose(0, 1)
    return LayerPass(activations, by_target, scores.detach())


def target_gradients(scores: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return the gradient of each column of scores (b, t) at a tensor (b, ...): (t, b, ...)."""
    count = scores.shape[1]
    if not scores.requires_grad:
        return start.new_zeros(count, *start.shape)
    found = []
    for place in range(count):
        last = place == count - 1
        gradient = torch.autograd.grad(scores[:, place].sum(), start, retain_graph=not last, allow_unused=True)[0]
        found.append(torch.zeros_like(start) if gradient is None else gradient)
    return torch.stack(found)


def as_maps(layer: CamLayer, values: torch.Tensor) -> torch.Tensor:
    """Return a layer's values (b, ...) as maps (b, channels, rows, columns)."""
    return values if layer.reshape is None else layer.reshape(values)


class _Cut:
    """Outputs of a module at which the graph was started."""

    def __init__(self) -> None:
        self.starts: list[torch.Tensor] = []

    def hook(self, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor):
            given = type(output).__name__
            raise UsageError(f"a {type(module).__name__} gives a {given} and no tensor, so it has no heatmap")
        start = output.detach().clone().requires_grad_()
        self.starts.append(start)
        # A leaf may not be changed in place, as the activation behind a convolution does; its copy may.
        return start.clone()


@contextmanager
def cut_at(module: nn.Module) -> Iterator[_Cut]:
    """Start the autograd graph at a module's output, so that nothing below it is kept or differentiated."""
    cut = _Cut()
    handle = module.register_forward_hook(cut.hook)
    try:
        yield cut
    finally:
        handle.remove()
