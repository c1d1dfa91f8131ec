"""A trainable copy of an image tower with a linear head, cut where its frozen part ends.

In come an encoder and which part shall train; out goes a module of two halves: `frozen`, which turns pixels into what
enters the free part and needs to run only once an image, and `forward`, from there to logits. Which weights are free is
found by asking autograd which of them lie behind the cut, so that it holds for every architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from analysis.heads import LinearHead
from engine.errors import ModelError, UsageError
from engine.trunks import Trunk, describe_trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder

Trainable = Literal["all", "projection"] | int


class TowerWithHead(nn.Module):
    """A float32 copy of an encoder's image tower, and a head.

    Parameters
    ----------
    encoder : Encoder
        Left as it is.
    trainable : "all", "projection" or int
        The whole tower; what follows its last block; or the last so many blocks and what follows them.
    labels : int
        L, outputs of the head.
    head : LinearHead, optional
        Where the head starts; by default Xavier-uniform with the bias as ``nn.Linear`` has it.
    normalize : bool
        Whether embeddings are scaled to length one before the head.

    Raises
    ------
    UsageError
        More blocks than the tower has, or a head of another size.
    """

    def __init__(
        self, encoder: Encoder, trainable: Trainable, labels: int, head: LinearHead | None, normalize: bool
    ) -> None:
        super().__init__()
        self.tower: nn.Module = copy.deepcopy(encoder.model.visual).float()
        self.preprocess, self.normalize, self.trainable = encoder.preprocess, normalize, trainable
        self.trunk: Trunk = describe_trunk(self.tower)
        self.head = _linear(encoder.dim, labels, head).to(encoder.device)
        depth = len(self.trunk.blocks)
        if isinstance(trainable, int):
            if trainable > depth:
                raise UsageError(f"trainable={trainable}: this image tower has {depth} blocks; say all for all of it")
            self.first_free = depth - trainable
        else:
            self.first_free = 0 if trainable == "all" else depth
        self._free_names = self._find_free()
        for name, weights in self.tower.named_parameters():
            weights.requires_grad_(name in self._free_names)
        # A CNN can be resumed only behind its pooling; a ViT before any block.
        self.resumes_tokens = trainable != "all" and self.trunk.kind != "cnn"
        self.resumes_pooled = (
            trainable == "projection" and self.trunk.kind == "cnn" and isinstance(self.tower, TimmModel)
        )
        if self.resumes_pooled:
            inside = {name for name, _ in self.tower.named_parameters() if name.startswith("head.")}
            for name in self._free_names - inside:
                self.tower.get_parameter(name).requires_grad_(False)
            self._free_names &= inside

    @property
    def can_keep(self) -> bool:
        """Whether `frozen` does work whose result is worth keeping."""
        return self.resumes_tokens or self.resumes_pooled

    @property
    def free_weights(self) -> list[nn.Parameter]:
        """All weights that train, the head's among them."""
        return [weights for weights in self.parameters() if weights.requires_grad]

    @property
    def free_count(self) -> int:
        """How many numbers of the tower train."""
        return sum(weights.numel() for weights in self.tower.parameters() if weights.requires_grad)

    def layered_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the tower's free weights with how many blocks lie between each and the last block (0 behind it)."""
        depth = len(self.trunk.blocks)
        level_of = {id(weights): depth for weights in self.tower.parameters()}
        for name in self._find_behind(depth):
            level_of[id(self.tower.get_parameter(name))] = 0
        for number, block in enumerate(self.trunk.blocks):
            for weights in block.parameters():
                level_of[id(weights)] = depth - 1 - number
        for weights in self.tower.parameters():
            if weights.requires_grad:
                yield level_of[id(weights)], weights

    def train_free_part(self) -> None:
        """Set training mode where weights are free; BatchNorm keeps its statistics, which a small batch would spoil."""
        self.eval()
        parts: list[nn.Module] = [self.head]
        parts += [self.tower] if self.trainable == "all" else list(self.trunk.blocks[self.first_free :])
        for part in parts:
            for module in part.modules():
                module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)

    def frozen(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what enters the free part for uint8 pixels (b, h, w, 3): tokens, pooled features or images."""
        images = self.preprocess.normalise(pixels)
        if self.resumes_tokens:
            with torch.no_grad():
                return self.trunk.tokens(images, self._resumed_block)
        if self.resumes_pooled:
            with torch.no_grad():
                return self.tower.get_submodule("trunk")(images)
        return images

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return raw embeddings (b, d) of what `frozen` gave."""
        if self.resumes_tokens:
            return self.trunk.from_tokens(inputs, self._resumed_block)
        if self.resumes_pooled:
            return self.tower.get_submodule("head")(inputs)
        found = self.tower(inputs)
        return found[0] if isinstance(found, tuple) else found

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits (b, L) of what `frozen` gave."""
        embedding = self.embed(inputs)
        return self.head(nn.functional.normalize(embedding, dim=-1) if self.normalize else embedding)

    @property
    def _resumed_block(self) -> int:
        # Behind the last block there is no way in, so with "projection" the last block runs, but does not train.
        return min(self.first_free, len(self.trunk.blocks) - 1)

    def _find_free(self) -> set[str]:
        if self.trainable == "all":
            return {name for name, _ in self.tower.named_parameters()}
        return self._find_behind(self.first_free)

    def _find_behind(self, block: int) -> set[str]:
        """Return the names of the weights that act from a block on (the number of blocks: behind the last)."""
        blocks = self.trunk.blocks
        if block < len(blocks):
            handle = blocks[block].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        else:
            handle = blocks[-1].register_forward_hook(lambda module, inputs, output: output.detach())
        asked = {name: weights.requires_grad for name, weights in self.tower.named_parameters()}
        height, width = self.preprocess.size
        device = next(self.tower.parameters()).device
        training = self.tower.training
        try:
            self.tower.eval().requires_grad_(True)
            found = self.tower(torch.zeros(1, 3, height, width, device=device))
            embedding = found[0] if isinstance(found, tuple) else found
            names, weights = zip(*self.tower.named_parameters(), strict=True)
            gradients = torch.autograd.grad(embedding.sum(), weights, allow_unused=True)
        finally:
            handle.remove()
            self.tower.train(training)
            for name, value in self.tower.named_parameters():
                value.requires_grad_(asked[name])
        reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        if not reached:
            raise ModelError(f"no weight of this image tower lies behind block {block}; it cannot be trained there")
        return reached


def _linear(dimensions: int, labels: int, head: LinearHead | None) -> nn.Linear:
    linear = nn.Linear(dimensions, labels)
    with torch.no_grad():
        if head is None:
            nn.init.xavier_uniform_(linear.weight)
            return linear
        if head.weight.shape != (labels, dimensions):
            raise UsageError(
                f"the head to start from has {head.weight.shape[0]} labels and takes embeddings of "
                f"{head.weight.shape[1]}; here are {labels} labels and embeddings of {dimensions}"
            )
        linear.weight.copy_(torch.from_numpy(np.asarray(head.weight, dtype=np.float32)))
        linear.bias.copy_(torch.from_numpy(np.asarray(head.bias, dtype=np.float32)))
    return linear
