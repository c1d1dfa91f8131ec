"""What kind of image tower a model has, where it can be cut in two, and where Grad-CAM may look.

`describe_trunk` reads open_clip's image tower (its own ViT or ResNet, or a timm model) and returns a `Trunk`:

- tokens: what enters a transformer block, computed from images, and the embedding computed on from there. This is what
  the token cache keeps and what fine-tuning of the last blocks starts from.
- Grad-CAM layers: the module whose output is weighted by its gradient, and how that output becomes a map. Where a ViT
  is pooled by its class token, patch tokens leave the computation with the last block's attention: the gradient after
  it is exactly zero on them, so the layer has to lie before it (pytorch-grad-cam issues 363, 511, 513).
- blocks opened (`engine.open_blocks`), for what reads attention.

Everything here keeps gradients; callers decide whether they want them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from engine.errors import ModelError, UsageError
from engine.trunk import CamLayer, Trunk


def describe_trunk(visual: nn.Module) -> Trunk:
    """Return the structure of open_clip's image tower.

    Raises
    ------
    ModelError
        A kind of tower that is not known here.
    """
    if isinstance(visual, OpenClipVisionTransformer):
        return _OpenClipTransformer(visual)
    if isinstance(visual, ModifiedResNet):
        return _FeatureMaps(visual, ["layer1", "layer2", "layer3", "layer4"])
    if isinstance(visual, TimmModel):
        trunk = visual.trunk
        if all(hasattr(trunk, name) for name in ("blocks", "num_prefix_tokens", "patch_embed", "global_pool")):
            return _TimmTransformer(visual)
        stages = getattr(trunk, "feature_info", None) or []
        names = [f"trunk.{stage['module']}" for stage in stages if isinstance(stage, dict) and stage.get("module")]
        return _FeatureMaps(visual, names)
    raise ModelError(f"image towers of the class {type(visual).__name__} are not known; use open_clip's own or timm's")


class _Transformer(Trunk):
    """What timm's and open_clip's ViTs share: tokens in, blocks, tokens out."""

    block_path: str
    norm_name: str
    width: int

    @abstractmethod
    def _start(self, images: Tensor) -> Tensor:
        """Return the tokens that enter the first block."""

    def tokens(self, images: Tensor, layer: int) -> Tensor:
        tokens = self._start(images)
        for block in self.blocks[: self.block_index(layer)]:
            tokens = block(tokens)
        return tokens

    def from_tokens(self, tokens: Tensor, layer: int) -> Tensor:
        assert self.grid is not None
        expected = self.prefix_tokens + self.grid[0] * self.grid[1], self.width
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != expected:
            raise UsageError(
                f"tokens of this image tower have shape (b, {expected[0]}, {expected[1]}), not {tokens.shape}"
            )
        for block in self.blocks[self.block_index(layer) :]:
            tokens = block(tokens)
        return self.finish(tokens)

    def _any_map(self, output: Tensor) -> Tensor:
        assert self.grid is not None
        if isinstance(output, Tensor):
            places = self.grid[0] * self.grid[1]
            if output.ndim == 4 and tuple(output.shape[2:]) == self.grid:
                return output
            if output.ndim == 3 and output.shape[1] == self.prefix_tokens + places:
                return self._map(output)
            if output.ndim == 3 and output.shape[1] == places:
                return output.reshape(len(output), *self.grid, output.shape[-1]).permute(0, 3, 1, 2)
        raise UsageError(
            f"a layer of this image tower whose output is {_shape_of(output)} cannot give a heatmap: it is no map of "
            f"the {self.grid[0]} x {self.grid[1]} patches; what a block or its first norm gives is one"
        )

    def _map(self, tokens: Tensor) -> Tensor:
        assert self.grid is not None
        patches = tokens[:, self.prefix_tokens :]
        return patches.reshape(len(patches), *self.grid, patches.shape[-1]).permute(0, 3, 1, 2)

    def _named(self, name: str) -> CamLayer:
        return CamLayer(self.visual.get_submodule(name), self._map, name)

    def _entering(self, block: int) -> CamLayer:
        return self._named(f"{self.block_path}.{block}.{self.norm_name}")

    def _last(self, final_norm: str | None) -> CamLayer:
        """Return the deepest layer whose gradient reaches the patches."""
        if self.kind == "vit-token":
            return self._entering(len(self.blocks) - 1)
        if final_norm is not None:
            return self._named(final_norm)
        return self._named(f"{self.block_path}.{len(self.blocks) - 1}")


class _TimmTransformer(_Transformer):
    block_path, norm_name = "trunk.blocks", "norm1"

    def __init__(self, visual: TimmModel) -> None:
        trunk = visual.trunk
        self.visual = visual
        self.blocks = tuple(trunk.blocks)
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.prefix_tokens = trunk.num_prefix_tokens
        self.width = trunk.embed_dim
        pool = trunk.global_pool
        self.kind = "vit-token" if pool == "token" else "vit-attention" if pool == "map" else "vit-average"

    @property
    def has_tokens(self) -> bool:
        return isinstance(self.visual.trunk, TimmVisionTransformer)

    def _plain_trunk(self) -> TimmVisionTransformer:
        trunk = self.visual.trunk
        if not isinstance(trunk, TimmVisionTransformer):
            raise UsageError(
                f"tokens between blocks are not available for timm's {type(trunk).__name__}, whose blocks take more "
                "than tokens; use image embeddings"
            )
        return trunk

    def _start(self, images: Tensor) -> Tensor:
        trunk = self._plain_trunk()
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def finish(self, tokens: Tensor) -> Tensor:
        trunk = self._plain_trunk()
        return self.visual.head(trunk.forward_head(trunk.norm(tokens)))

    def cam_layer(self, which: str | int | None = "default") -> CamLayer:
        choice = self._choice(which)
        if isinstance(choice, int):
            return self._entering(choice)
        if choice not in ("default", "paper"):
            return self._module(choice)
        if choice == "paper":
            return self._named(f"trunk.blocks.{len(self.blocks) - 1}.attn.proj")
        norm = self.visual.trunk.norm
        return self._last(None if isinstance(norm, nn.Identity) else "trunk.norm")


class _OpenClipTransformer(_Transformer):
    block_path, norm_name = "transformer.resblocks", "ln_1"

    def __init__(self, visual: OpenClipVisionTransformer) -> None:
        self.visual = visual
        self.blocks = tuple(visual.transformer.resblocks)
        self.grid = tuple(visual.grid_size)
        self.prefix_tokens = 1
        self.width = visual.transformer.width
        if visual.attn_pool is not None:
            self.kind = "vit-attention"
        elif visual.pool_type in ("tok", "avg"):
            self.kind = "vit-token" if visual.pool_type == "tok" else "vit-average"
        else:
            raise ModelError(f"an image tower with pool_type {visual.pool_type!r} gives no embedding of the image")

    def _start(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def finish(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(tokens)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def cam_layer(self, which: str | int | None = "default") -> CamLayer:
        choice = self._choice(which)
        if isinstance(choice, int):
            return self._entering(choice)
        if choice not in ("default", "paper"):
            return self._module(choice)
        if choice == "paper":
            # torch's attention never calls its out_proj as a module; ls_1 is what its output goes through next
            return self._named(f"{self.block_path}.{len(self.blocks) - 1}.ls_1")
        visual = self.visual
        if visual.attn_pool is None:
            norm_sees_patches = not visual.final_ln_after_pool
        else:
            norm_sees_patches = visual.attn_pool_contrastive is not None
        return self._last("ln_post" if norm_sees_patches else None)


class _FeatureMaps(Trunk):
    """CNNs, and windowed transformers whose stages give maps."""

    kind = "cnn"

    def __init__(self, visual: nn.Module, stages: Sequence[str]) -> None:
        self.visual = visual
        self.stages = tuple(stages)
        self.blocks = tuple(visual.get_submodule(name) for name in stages)
        self.channels_last = getattr(getattr(visual, "trunk", None), "output_fmt", "NCHW") == "NHWC"

    @property
    def has_tokens(self) -> bool:
        return False

    def tokens(self, images: Tensor, layer: int) -> Tensor:
        raise UsageError("a CNN image tower has no tokens; cache its image embeddings or pixels")

    def from_tokens(self, tokens: Tensor, layer: int) -> Tensor:
        raise UsageError("a CNN image tower has no tokens; compute embeddings from pixels")

    def finish(self, tokens: Tensor) -> Tensor:
        raise UsageError("a CNN image tower has no tokens; compute embeddings from pixels")

    def cam_layer(self, which: str | int | None = "default") -> CamLayer:
        choice = self._choice(which)
        if isinstance(choice, str) and choice not in ("default", "paper"):
            return self._module(choice)
        name = self.stages[choice] if isinstance(choice, int) else self._last_map()
        return CamLayer(self.visual.get_submodule(name), _channels_first if self.channels_last else None, name)

    def _any_map(self, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UsageError(
                f"a layer of this image tower whose output is {_shape_of(output)} cannot give a heatmap: it has no "
                f"height and width; a stage has them ({', '.join(self.stages)})"
            )
        return _channels_first(output) if self.channels_last else output

    def _last_map(self) -> str:
        """Return the last module of a forward pass that gives a map of more than one place."""
        finished: list[str] = []
        maps: list[str] = []
        space = slice(1, 3) if self.channels_last else slice(2, 4)

        def watch(name: str) -> Callable[[nn.Module, tuple, object], None]:
            def hook(module: nn.Module, inputs: tuple, output: object) -> None:
                finished.append(name)
                if isinstance(output, Tensor) and output.ndim == 4 and max(output.shape[space]) > 1:
                    maps.append(name)

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.visual.named_modules() if name]
        try:
            weight = next(self.visual.parameters())
            size = self.visual.image_size if hasattr(self.visual, "image_size") else 224
            height, width = (size, size) if isinstance(size, int) else size
            with torch.no_grad():
                self.visual(torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device))
        finally:
            for handle in handles:
                handle.remove()
        # a module that is called twice would give Grad-CAM two maps
        once = [name for name in maps if finished.count(name) == 1]
        if not once:
            raise ModelError(f"no layer of this {type(self.visual).__name__} gives a map that Grad-CAM could use")
        return once[-1]


def _channels_first(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _shape_of(output: object) -> str:
    return f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
