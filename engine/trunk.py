"""What an image tower is to the rest of the project: tokens between its blocks, and layers where Grad-CAM may look.

The classes here say what can be asked; `engine.trunks` reads it off open_clip's towers.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from engine.errors import UsageError
from engine.open_blocks import OpenBlock, can_be_opened, open_block

Kind = Literal["vit-token", "vit-average", "vit-attention", "cnn"]


class CamLayer(NamedTuple):
    """Where Grad-CAM looks.

    `reshape` turns the module's output into maps (b, channels, h, w) without class and register tokens; it is None
    where the output has that form already. `name` is the module's path below the image tower.
    """

    module: nn.Module
    reshape: Callable[[Tensor], Tensor] | None
    name: str


class Trunk(ABC):
    """An image tower's structure.

    Attributes
    ----------
    kind : "vit-token", "vit-average", "vit-attention" or "cnn"
        A transformer by the way it is pooled, or a network of feature maps (also windowed transformers such as Swin).
    visual : Module
        open_clip's image tower.
    blocks : tuple of Module
        Transformer blocks, or a CNN's stages, in order of depth.
    grid : (height, width) or None
        Patches of the input; None for a CNN, whose map's size comes out of the forward pass.
    prefix_tokens : int
        Tokens that stand before the patches: class and registers.
    """

    kind: Kind
    visual: Any
    blocks: tuple[nn.Module, ...]
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0

    @abstractmethod
    def tokens(self, images: Tensor, layer: int) -> Tensor:
        """Return what enters a block: images (b, 3, h, w), normalised, to tokens (b, n, width)."""

    @abstractmethod
    def from_tokens(self, tokens: Tensor, layer: int) -> Tensor:
        """Return the embeddings (b, dim) of tokens (b, n, width) that are about to enter a block."""

    @contextmanager
    def watched(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Keep what enters some blocks, (b, n, width), during a forward pass within the with block."""
        entered: dict[int, Tensor] = {}

        def keep(layer: int, batch_first: bool) -> Callable[[nn.Module, tuple], None]:
            def hook(module: nn.Module, inputs: tuple) -> None:
                entered[layer] = inputs[0] if batch_first else inputs[0].transpose(0, 1)

            return hook

        transformer = getattr(self.visual, "transformer", None)
        batch_first = getattr(transformer, "batch_first", True)
        handles = [self.blocks[layer].register_forward_pre_hook(keep(layer, batch_first)) for layer in layers]
        try:
            yield entered
        finally:
            for handle in handles:
                handle.remove()

    @abstractmethod
    def finish(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (b, dim) of tokens that leave the last block: (b, n, width).

        Where a class token is pooled, the tokens may be that one alone, (b, 1, width).
        """

    def open_blocks(self) -> tuple[OpenBlock, ...]:
        """Return the blocks with their attention readable; UsageError where it is not known how."""
        if self.kind == "cnn":
            raise UsageError("a CNN image tower has no attention between its blocks")
        return tuple(open_block(block) for block in self.blocks)

    @property
    def has_tokens(self) -> bool:
        """Whether `tokens` and `from_tokens` work."""
        return True

    @property
    def has_open_blocks(self) -> bool:
        """Whether `open_blocks` works."""
        return self.has_tokens and all(can_be_opened(block) for block in self.blocks)

    @abstractmethod
    def cam_layer(self, which: str | int | None = "default") -> CamLayer:
        """Return a layer for Grad-CAM.

        Parameters
        ----------
        which : "default", "paper", int or str
            "default" (or None) is the deepest layer whose gradient reaches the patches. "paper" is the layer that arXiv
            2506.14136 used, the last attention's projection: with a class token its gradient is exactly zero on the
            patches; a CNN has none, so its default is taken. A number is a block, counted from the end if negative: the
            normalised tokens that enter it (ViT) or the stage's maps (CNN). Any other name is a module's path within
            the image tower.

        Raises
        ------
        UsageError
            A block that the tower does not have, or a name that is no module of it: the nearest ones are named.
        """

    def leaving(self) -> CamLayer:
        """Return what leaves the last block, as a layer for Grad-CAM."""
        return self._module(next(name for name, module in self.visual.named_modules() if module is self.blocks[-1]))

    def block_of(self, layer: CamLayer) -> int:
        """Return the block whose entering tokens are all that a layer needs.

        -1 for what lies before the blocks, the number of blocks for what lies behind them.
        """
        names = {module: name for name, module in self.visual.named_modules()}
        paths = [names[block] for block in self.blocks]
        for number, path in enumerate(paths):
            if layer.name == path or layer.name.startswith(f"{path}."):
                return number
        order = list(names.values())
        return -1 if order.index(layer.name) < order.index(paths[0]) else len(paths)

    def block_index(self, layer: int) -> int:
        """Return a block's number from 0; UsageError if there is no such block."""
        if not -len(self.blocks) <= layer < len(self.blocks):
            raise UsageError(f"this image tower has {len(self.blocks)} blocks, so there is no block {layer}")
        return layer % len(self.blocks)

    def _choice(self, which: str | int | None) -> str | int:
        if which is None:
            return "default"
        if isinstance(which, int) and not isinstance(which, bool):
            return self.block_index(which)
        if which not in ("default", "paper"):
            names = [name for name, _ in self.visual.named_modules() if name]
            if which not in names:
                near = difflib.get_close_matches(str(which), ["default", "paper", *names], n=3, cutoff=0.4)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise UsageError(
                    f"the image tower has no layer {which!r} for a heatmap: 'default', 'paper', a block's number from "
                    f"{-len(self.blocks)} to {len(self.blocks) - 1} or a module's name{hint}"
                )
        return which

    def _module(self, name: str) -> CamLayer:
        """Return a module of the image tower as a layer; its output is turned into maps by its shape."""
        return CamLayer(self.visual.get_submodule(name), self._any_map, name)

    @abstractmethod
    def _any_map(self, output: Tensor) -> Tensor:
        """Return any module's output as maps (b, channels, h, w); UsageError where it is none."""
