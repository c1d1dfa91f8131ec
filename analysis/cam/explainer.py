"""Heatmaps of one image tower by one method: pixels or cached tokens and targets in, maps out.

`Explainer.batch` gives raw maps of all targets in a batch of images, `Explainer.heatmaps` those of one image as
`HeatMap`s that say what they are. Methods of the CAM family run batched: all labels from one forward pass, and from the
layer on only. What else matters:

- Where a transformer pools its class token, nothing behind the last block's attention reaches the patch tokens: the
  gradient there is exactly zero (pytorch-grad-cam issues 257, 363, 511, 513) and the library returns a map of zeros as
  if it were an answer. Here that is a `ZeroGradientError`; only under ``layer="paper"``, the study's own layer, is the
  empty map returned, and it says that it is empty.
- Everything runs in float32: half-precision tensors break in the library's NumPy and OpenCV steps (issues 198, 493). An
  encoder of lower precision is explained through a float32 copy of its (rounded) weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from analysis.cam import attention, class_token, library, weighting
from analysis.cam.maps import HeatMap, RawMaps, heat_maps
from analysis.cam.methods import Method, method_named
from analysis.cam.passes import Seen, Tokens, float_tower, layer_pass
from analysis.cam.targets import Target, check_targets
from engine.errors import DataError, UsageError
from engine.trunks import CamLayer, Trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder

Layer = int | str
"""A block by its number, "default", "paper", or a module's path within the image tower."""

MOST_VALUES = 1 << 26
"""Gradients held at once, in numbers of 4 bytes; larger batches are taken in parts."""


class Explainer:
    """Heatmaps of one image tower at one layer.

    Parameters
    ----------
    encoder : Encoder
        Its tower is hooked while a map is made and left as it was.
    layer : "default", "paper", int or str
        The layer that suits the architecture; the study's own (`blocks[-1].attn.proj`); a block by its number (negative
        ones count from the end); or a module's path within the image tower. For LeGrad the first block that it reads.
    method : str
        One of `METHODS`.
    by_library : bool
        Let pytorch-grad-cam itself combine activations and gradients, also where the project has a batched way; to
        compare with.

    Attributes
    ----------
    layer_name : str
        What was chosen, for captions.
    first_block : int or None
        The last block whose entering tokens are enough for the map; None where it takes the images.

    Raises
    ------
    UsageError
        Unknown method or layer, or a method that the tower does not support: what works is named.
    """

    def __init__(
        self, encoder: Encoder, layer: Layer = "default", method: str = "gradcam", *, by_library: bool = False
    ) -> None:
        self.encoder = encoder
        self.tower = float_tower(encoder)
        self.trunk: Trunk = self.tower.trunk
        self.method: Method = method_named(method, self.trunk)
        self.as_in_the_study = layer == "paper"
        self.layer: CamLayer | None = None
        self.first_block: int | None
        self._run: Callable[[Seen, Sequence[Target]], RawMaps]
        if self.method.family == "attention":
            self._prepare_attention(layer)
        else:
            self._prepare_layer(layer, by_library or not self.method.batched)

    def batch(self, seen: Seen, targets: Sequence[Target]) -> RawMaps:
        """Return the raw maps of all targets in some images.

        Parameters
        ----------
        seen : ndarray of uint8 (b, h, w, 3), or Tokens
            What the model sees (`engine.pixels.Preprocess`), before mean and standard deviation; or the tokens that
            enter a block, up to `first_block`.
        targets : sequence of Target

        Returns
        -------
        RawMaps
            raw (b, targets, rows, columns) float32, scores and reached (b, targets), on the tower's device. A gradient
            that is exactly zero at every position has ``reached`` false.

        Raises
        ------
        DataError
            Pixels of another form; a target of another length.
        UsageError
            No target; tokens from behind the layer.
        """
        check_targets(targets)
        self._check(seen)
        with self.tower.computing():
            parts = [self._run(part, targets) for part in self._parts(seen, len(targets))]
        return RawMaps(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def heatmaps(self, seen: Seen, targets: Sequence[Target]) -> list[HeatMap]:
        """Return the heatmap of each target in one image; the forward pass is shared.

        Parameters
        ----------
        seen : ndarray of uint8 (h, w, 3), or Tokens of one image
        targets : sequence of Target

        Raises
        ------
        ZeroGradientError
            No gradient reaches the layer's positions (but see ``layer="paper"``).
        """
        if not isinstance(seen, Tokens):
            seen = np.asarray(seen)
            if seen.ndim != 3:
                raise DataError(f"heatmaps need uint8 pixels (h, w, 3) of one image, not {seen.dtype} {seen.shape}")
            seen = seen[None]
        return self.batch_heatmaps(seen, targets)[0]

    def batch_heatmaps(
        self, seen: Seen, targets: Sequence[Target], *, state_unreached: bool = False
    ) -> list[list[HeatMap]]:
        """Return the heatmaps of all targets in some images, a list an image; see `batch` and `heatmaps`.

        Parameters
        ----------
        state_unreached : bool
            Return a target that no gradient reaches as an empty map that says so, instead of raising for all of them.
        """
        found = self.batch(seen, targets)
        unreached = ""
        if self.as_in_the_study:
            unreached = f"empty: no gradient reaches the patch tokens at {self.layer_name}, the study's own layer"
        elif state_unreached:
            unreached = f"empty: no gradient reaches {self.layer_name}; a head without weights for a label has none"
        return heat_maps(
            found,
            targets,
            size=self.encoder.preprocess.size,
            layer=self.layer_name,
            method=self.method.name,
            unreached=unreached,
            advice=self._advice,
        )

    # -- Preparing ---------------------------------------------------------------------------------------------------

    def _prepare_layer(self, layer: Layer, by_library: bool) -> None:
        if self.method.name == "fullgrad":
            if layer not in ("default", "paper"):
                raise UsageError(f"'fullgrad' sums over all layers of the tower, so it takes no layer {layer!r}")
            layer = "default"
        chosen = self.layer = self.trunk.cam_layer(layer)
        name = self.method.name
        self.layer_name = "all biases" if name == "fullgrad" else chosen.name
        block = self.trunk.block_of(chosen) if self.trunk.has_tokens else -1
        from_images = block < 0 or self.method.family == "tower"
        self.first_block = None if from_images else min(block, len(self.trunk.blocks) - 1)
        if self.method.family == "tower":
            self._run = lambda seen, targets: library.from_tower(name, self.tower, chosen, seen, targets)
        elif by_library:
            self._run = lambda seen, targets: library.from_layer(name, self.tower, chosen, seen, targets)
        elif class_token.fits(self.trunk, chosen):
            self._run = self._from_class_token
        else:
            self._run = self._from_layer

    def _prepare_attention(self, layer: Layer) -> None:
        last = len(self.trunk.blocks) - 1
        name = self.method.name
        if name == "legrad":
            first = max(0, last + 1 - attention.LEGRAD_BLOCKS)
            if isinstance(layer, int):
                first = self.trunk.block_index(layer)
            elif layer not in ("default", "paper"):
                raise UsageError(f"'legrad' takes the number of the first block that it reads, not the layer {layer!r}")
            self.first_block, self.layer_name = first, f"attention of blocks {first} to {last}"
            self._run = lambda seen, targets: attention.legrad(self.tower, seen, targets, first)
            return
        if layer not in ("default", "paper"):
            where = "the last block" if name == "grad-eclip" else "all blocks"
            raise UsageError(f"{name!r} reads the attention of {where}, so it takes no layer {layer!r}")
        if name == "grad-eclip":
            self.first_block, self.layer_name = last, f"attention of block {last}"
            self._run = lambda seen, targets: attention.grad_eclip(self.tower, seen, targets)
        else:
            self.first_block, self.layer_name = 0, f"attention of blocks 0 to {last}"
            self._run = lambda seen, targets: attention.rollout(self.tower, seen, targets)

    # -- Running -----------------------------------------------------------------------------------------------------

    def _from_layer(self, seen: Seen, targets: Sequence[Target]) -> RawMaps:
        assert self.layer is not None
        found = layer_pass(self.tower, self.layer, seen, targets)
        raw = weighting.BATCHED[self.method.name](found.activations, found.gradients)
        return RawMaps(raw, found.scores, found.gradients.flatten(2).any(dim=-1))

    def _from_class_token(self, seen: Seen, targets: Sequence[Target]) -> RawMaps:
        found = class_token.class_token_pass(self.tower, seen, targets)
        if self.method.name == "gradcam":
            return RawMaps(found.gradcam(), found.scores, found.gathered.flatten(2).any(dim=-1))
        whole = found.layer_pass()
        raw = weighting.BATCHED[self.method.name](whole.activations, whole.gradients)
        return RawMaps(raw, found.scores, whole.gradients.flatten(2).any(dim=-1))

    def _check(self, seen: Seen) -> None:
        if not isinstance(seen, Tokens):
            return
        if self.first_block is None:
            raise UsageError(f"{self.method.name!r} at {self.layer_name!r} needs the images, not tokens between blocks")
        if not 0 <= seen.block <= self.first_block:
            raise UsageError(
                f"{self.method.name!r} at {self.layer_name!r} needs tokens that enter block {self.first_block} or an "
                f"earlier one, not block {seen.block}"
            )

    def _parts(self, seen: Seen, targets: int) -> list[Seen]:
        """Return the batch in parts whose gradients fit into `MOST_VALUES`."""
        height, width = self.encoder.preprocess.size
        one = targets * height * width * 3
        size = max(1, MOST_VALUES // one)
        if len(seen) <= size:
            return [seen]
        starts = range(0, len(seen), size)
        if isinstance(seen, Tokens):
            return [Tokens(seen.values[start : start + size], seen.block) for start in starts]
        return [seen[start : start + size] for start in starts]

    def _advice(self) -> str:
        if self.method.family != "gradients":
            return ""
        return f"Take layer='default' ({self.trunk.cam_layer('default').name}) or an earlier block."


def heatmap(
    encoder: Encoder, pixels: np.ndarray, target: Target, layer: Layer = "default", method: str = "gradcam"
) -> HeatMap:
    """Return the heatmap of one target in one image; see `Explainer` for many.

    Parameters
    ----------
    encoder : Encoder
    pixels : ndarray of uint8, (h, w, 3)
        What the model sees, before mean and standard deviation.
    target : Target
        `TextTarget` or `HeadTarget`.
    layer : "default", "paper", int or str
    method : str
        One of `METHODS`.

    Raises
    ------
    ZeroGradientError
        No gradient reaches the layer's positions (but see ``layer="paper"``).
    UsageError
        Unknown method or layer.
    """
    return Explainer(encoder, layer, method).heatmaps(pixels, [target])[0]
