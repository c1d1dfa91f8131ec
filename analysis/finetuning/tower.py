"""A trainable copy of an image tower with a linear head, cut where its frozen part ends.

In come an encoder and a recipe; out goes a module of two halves: `frozen`, which turns pixels into what enters the free
part and needs to run only once an image, and `embed` with `classify`, from there to embeddings and logits. Which
weights are free is found by asking autograd which of them lie behind the cut, so that it holds for every architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from analysis.finetuning import adapters
from analysis.finetuning.recipe import FinetuneConfig
from analysis.heads import LinearHead
from engine.class_token import class_token_tail
from engine.errors import ModelError, UsageError
from engine.trunks import Trunk, describe_trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder


class TowerWithHead(nn.Module):
    """A float32 copy of an encoder's image tower, and a head.

    Parameters
    ----------
    encoder : Encoder
        Left as it is.
    config : FinetuneConfig
        Its `trainable`, `from_block` and what belongs to them.
    labels : int
        L, outputs of the head.
    head : LinearHead, optional
        Where the head starts; by default Xavier-uniform with the bias as ``nn.Linear`` has it.
    normalize : bool
        Whether embeddings are scaled to length one before the head.

    Raises
    ------
    UsageError
        More blocks than the tower has, a block that it does not have, adapters that it cannot have, or a head of
        another size.
    """

    def __init__(
        self, encoder: Encoder, config: FinetuneConfig, labels: int, head: LinearHead | None, normalize: bool
    ) -> None:
        super().__init__()
        self.tower: nn.Module = copy.deepcopy(encoder.model.visual).float()
        self.preprocess, self.normalize, self.config = encoder.preprocess, normalize, config
        self.trunk: Trunk = describe_trunk(self.tower)
        self.depth = len(self.trunk.blocks)
        self.from_tokens = config.from_block is not None
        self.first_free = self._first_free()
        self.all_count = sum(weights.numel() for weights in self.tower.parameters())
        self.adapters: adapters.Adapters | None = None
        self.levels = self._levels()
        self._free_up()
        self.head = _linear(encoder.dim, labels, head).to(encoder.device)
        # With the contrast alone nothing pulls at the head.
        self.head.requires_grad_(config.objective != "contrastive")
        # A CNN can be resumed only behind its pooling; a ViT before any block.
        plain_blocks = self.trunk.kind != "cnn" and hasattr(self.trunk, "finish") and _takes_tokens(self.trunk)
        self.resumes_tokens = plain_blocks and (self.from_tokens or config.trainable not in ("all", "lora", "none"))
        self._tail = class_token_tail(self.trunk) if plain_blocks else None
        if config.gradient_checkpointing:
            self._recompute_blocks()

    def _first_free(self) -> int:
        """Return the first block that trains; the number of blocks where none does."""
        config, depth = self.config, self.depth
        if config.from_block is not None:
            if self.trunk.kind == "cnn":
                raise UsageError("from_block: a CNN image tower has no tokens between blocks; train it from pixels")
            return self.trunk.block_index(config.from_block)
        if isinstance(config.trainable, int):
            if config.trainable > depth:
                raise UsageError(
                    f"trainable={config.trainable}: this image tower has {depth} blocks; say all for all of it"
                )
            return depth - config.trainable
        return 0 if config.trainable in ("all", "lora") else depth

    def _free_up(self) -> None:
        """Say which weights train."""
        config = self.config
        self.resumes_pooled = False
        self.tower.requires_grad_(False)
        if config.trainable == "none":
            return
        if config.trainable == "lora":
            first = self.first_free if self.from_tokens else 0
            self.adapters = adapters.Adapters(self.tower, self.trunk, first, config.lora_rank, config.lora_alpha)
            for name, weights in self.tower.named_parameters():
                if weights.requires_grad:
                    self.levels[name] = self._level_of_adapter(name)
            return
        whole = config.trainable == "all" and not self.from_tokens
        names = set(self.levels) if whole else self._find_behind(self.first_free)
        if config.trainable == "projection" and self.trunk.kind == "cnn" and isinstance(self.tower, TimmModel):
            # Behind the pooling, so that what is pooled can be kept.
            names &= {name for name in self.levels if name.startswith("head.")}
            self.resumes_pooled = True
        for name, weights in self.tower.named_parameters():
            weights.requires_grad_(name in names)

    @property
    def can_keep(self) -> bool:
        """Whether `frozen` does work whose result is worth keeping."""
        return self.resumes_tokens or self.resumes_pooled or self.config.trainable == "none"

    @property
    def free_weights(self) -> dict[str, nn.Parameter]:
        """All weights that train by name, the head's among them."""
        return {name: weights for name, weights in self.named_parameters() if weights.requires_grad}

    @property
    def free_count(self) -> int:
        """How many numbers of the tower train."""
        return sum(weights.numel() for weights in self.tower.parameters() if weights.requires_grad)

    def layered_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the tower's free weights with how many blocks lie between each and the last block (0 behind it)."""
        for name, weights in self.tower.named_parameters():
            if weights.requires_grad:
                yield self.levels[name], weights

    def train_free_part(self) -> None:
        """Set training mode where weights are free; BatchNorm keeps its statistics, which a small batch would spoil."""
        self.eval()
        parts: list[nn.Module] = [self.head]
        whole = self.config.trainable in ("all", "lora") and not self.from_tokens
        parts += [self.tower] if whole else list(self.trunk.blocks[self.first_free :])
        for part in parts:
            for module in part.modules():
                module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)

    def frozen(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what enters the free part for uint8 pixels (b, h, w, 3): tokens, pooled features or images."""
        images = self.preprocess.normalise(pixels)
        if not self.can_keep:
            return images
        with torch.no_grad():
            if self.config.trainable == "none":
                return self._whole(images)
            if self.resumes_tokens:
                return self.trunk.tokens(images, self.resumed_block)
            return self.tower.get_submodule("trunk")(images)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return raw embeddings (b, d) of what `frozen` gave."""
        if self.config.trainable == "none":
            return inputs
        if self.resumes_tokens:
            return self._from_tokens(inputs, self.resumed_block)
        if self.resumes_pooled:
            return self.tower.get_submodule("head")(inputs)
        return self._whole(inputs)

    def classify(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return logits (b, L) of raw embeddings (b, d)."""
        return self.head(nn.functional.normalize(embedding, dim=-1) if self.normalize else embedding)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits (b, L) of what `frozen` gave."""
        return self.classify(self.embed(inputs))

    def tower_state(self) -> dict[str, torch.Tensor]:
        """Return the tower's plain weights, adapters merged in (after which nothing trains any more), on the CPU."""
        if self.adapters is not None:
            self.adapters.merge()
            self.adapters = None
        return {name: value.detach().cpu().clone() for name, value in self.tower.state_dict().items()}

    @property
    def resumed_block(self) -> int:
        """The block that the kept tokens enter."""
        # Behind the last block there is no way in, so with "projection" the last block runs, but does not train.
        return min(self.first_free, self.depth - 1)

    def _whole(self, images: torch.Tensor) -> torch.Tensor:
        if self._tail is not None:
            return self._tail(self.trunk.tokens(images, self.depth - 1))
        found = self.tower(images)
        return found[0] if isinstance(found, tuple) else found

    def _from_tokens(self, tokens: torch.Tensor, block: int) -> torch.Tensor:
        if self._tail is None:
            return self.trunk.from_tokens(tokens, block)
        for module in self.trunk.blocks[block:-1]:
            tokens = module(tokens)
        return self._tail(tokens)

    def _recompute_blocks(self) -> None:
        """Have the free blocks keep only their inputs, and compute the rest again on the way back."""
        for block in self.trunk.blocks[self.first_free if self.resumes_tokens else 0 :]:
            block.forward = _Recomputed(block.forward)  # type: ignore[method-assign]

    def _levels(self) -> dict[str, int]:
        """Return how many blocks lie between each of the tower's weights and the last block, by name."""
        levels = {name: self.depth for name, _ in self.tower.named_parameters()}
        for name in self._find_behind(self.depth):
            levels[name] = 0
        for number, path in enumerate(self._block_paths()):
            for name in levels:
                if name.startswith(path + "."):
                    levels[name] = self.depth - 1 - number
        return levels

    def _level_of_adapter(self, name: str) -> int:
        paths = self._block_paths()
        return next(self.depth - 1 - number for number, path in enumerate(paths) if name.startswith(path + "."))

    def _block_paths(self) -> list[str]:
        names = {id(module): name for name, module in self.tower.named_modules()}
        return [names[id(block)] for block in self.trunk.blocks]

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


class _Recomputed:
    """A block's forward that keeps its input alone (Chen et al., arXiv 1604.06174)."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*inputs, **options)
        return checkpoint(self._forward, *inputs, use_reentrant=False, **options)


def _takes_tokens(trunk: Trunk) -> bool:
    """Tell whether this tower can be entered between blocks."""
    size = getattr(trunk.visual, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    device = next(trunk.visual.parameters()).device
    try:
        with torch.no_grad():
            trunk.tokens(torch.zeros(1, 3, height, width, device=device), 0)
    except UsageError:
        return False
    return True


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
