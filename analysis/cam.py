"""Grad-CAM of an image tower for a target that is said explicitly, through the library pytorch-grad-cam.

In come an encoder, what it sees of one image (uint8 pixels) and one or more targets; out go heatmaps on the patch
grid, at the input's size and, through the image's geometry, on the pixels of the original image. The library hooks the
layer and combines activations and gradients; what it leaves to its user is settled here:

- An embedding is no class score. Without a target the library would take the largest embedding dimension for a class,
  so a target is always needed: similarity to a prompt (`TextTarget`), a probe's or a fine-tuned head's logit
  (`HeadTarget`).
- Where a transformer pools its class token, nothing behind the last block's attention reaches the patch tokens: the
  gradient there is exactly zero (pytorch-grad-cam issues 257, 363, 511, 513) and the library returns a map of zeros as
  if it were an answer. Here that is a `ZeroGradientError`; only under ``layer="paper"``, the study's own layer, is the
  empty map returned, and it says that it is empty.
- The library subtracts each map's minimum and adds 1e-7 before it divides by the maximum, which turns an even map into
  contrast and dims maps of small gradients. Here a map is max(raw, 0) / max, as in the paper (Selvaraju et al., ICCV
  2017), and a flat one stays flat and says so.
- Everything runs in float32: half-precision tensors break in the library's NumPy and OpenCV steps (issues 198, 493). An
  encoder of lower precision is explained through a float32 copy of its (rounded) weights.
- Targets of one image share its forward pass, and the graph starts at the layer: nothing below it is kept or
  differentiated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import cv2
import numpy as np
import torch
from pytorch_grad_cam import GradCAM, GradCAMElementWise, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from torch import nn

from analysis.heads import LinearHead
from engine.errors import DataError, ModelError, UsageError
from engine.trunks import describe_trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder
    from engine.pixels import Geometry

METHODS = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "gradcam-elementwise": GradCAMElementWise,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "xgradcam": XGradCAM,
}
"""Methods of the library that need one gradient at one layer and nothing else."""

Layer = int | Literal["default", "paper"]


class ZeroGradientError(ModelError):
    """No gradient reaches the spatial positions of the layer, so there is nothing to draw."""


class Target(Protocol):
    """A number computed from an image's embedding, whose evidence in the image is sought."""

    @property
    def name(self) -> str:
        """What is sought, for messages and figures."""

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the target of a raw embedding (d,), a tensor without dimensions that carries its gradient."""


@dataclass(frozen=True)
class TextTarget:
    """Similarity to a prompt.

    Parameters
    ----------
    embedding : ndarray of float, (d,)
        Of the prompt, or the mean of an ensemble of prompts.
    name : str
        What is sought, for messages and figures.
    normalize : bool
        True: the cosine (`protocol: sound`); False: the dot product of raw embeddings (`protocol: paper`).
    """

    embedding: np.ndarray
    name: str = ""
    normalize: bool = True

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the cosine or the dot product with a raw image embedding (d,)."""
        text = _weights(self.embedding, embedding)
        if self.normalize:
            text = nn.functional.normalize(text, dim=-1)
            embedding = nn.functional.normalize(embedding, dim=-1)
        return embedding @ text


@dataclass(frozen=True)
class HeadTarget:
    """Logit of one label of a linear head, a probe's or a fine-tuned one.

    Parameters
    ----------
    weight : ndarray of float, (d,)
    bias : float
        Moves the logit and not the map.
    name : str
        The label.
    normalized : bool
        Whether the head expects embeddings of length one.
    """

    weight: np.ndarray
    bias: float = 0.0
    name: str = ""
    normalized: bool = False

    @classmethod
    def of(cls, head: LinearHead, label: str) -> HeadTarget:
        """Return the target of one label of a head; UsageError for a label that it does not have."""
        weight, bias = head.of_label(label)
        return cls(weight, bias, label, head.normalised)

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the head's logit of a raw image embedding (d,)."""
        if self.normalized:
            embedding = nn.functional.normalize(embedding, dim=-1)
        return embedding @ _weights(self.weight, embedding) + self.bias


@dataclass(frozen=True)
class HeatMap:
    """Evidence for one target in one image.

    Parameters
    ----------
    map : ndarray of float32, (h, w)
        max(raw, 0) / max, enlarged bilinearly to the model's input; 0..1, all zero where `empty`.
    raw : ndarray of float32, (grid h, grid w)
        As the method gave it on the layer's grid, signed, in units of the target.
    layer : str
        Dotted name of the module within the image tower.
    method, target : str
        What made it and what it is for.
    score : float
        The target's value for this image.
    empty : bool
        Nothing positive anywhere: it points nowhere and must not be drawn as if it did.
    flat : bool
        Positive and the same everywhere: it says yes, and not where.
    note : str
        Why it is empty or flat, in words; "" else.
    """

    map: np.ndarray
    raw: np.ndarray
    layer: str
    method: str
    target: str
    score: float
    empty: bool = False
    flat: bool = False
    note: str = ""

    def on_original(self, geometry: Geometry) -> np.ndarray:
        """Return the map on the original image's pixels, float32 (H, W), NaN outside the model's crop."""
        # From the coarse grid at once: by way of the input size it would be smoothed twice.
        top = max(float(self.raw.max()), np.finfo(np.float32).tiny)
        return geometry.to_original(np.maximum(self.raw, 0) / top)


class Explainer:
    """Heatmaps of one image tower at one layer.

    Parameters
    ----------
    encoder : Encoder
        Its tower is hooked while a map is made and left as it was.
    layer : "default", "paper" or int
        The layer that suits the architecture; the study's own (`blocks[-1].attn.proj`); or a block by its number
        (negative ones count from the end).
    method : str
        One of `METHODS`.

    Raises
    ------
    UsageError
        Unknown method or layer.
    """

    def __init__(self, encoder: Encoder, layer: Layer = "default", method: str = "gradcam") -> None:
        if method not in METHODS:
            raise UsageError(f"unknown heatmap method {method!r}; known: {', '.join(METHODS)}")
        self.encoder = encoder
        self.method = method
        self.as_in_the_study = layer == "paper"
        self.tower: nn.Module = encoder.model.visual
        if any(weight.dtype != torch.float32 for weight in self.tower.parameters()):
            self.tower = copy.deepcopy(self.tower).float()
        self.trunk = describe_trunk(self.tower)
        self.layer, self._reshape, self.layer_name = self.trunk.cam_layer(layer)

    def heatmaps(self, pixels: np.ndarray, targets: Sequence[Target]) -> list[HeatMap]:
        """Return the heatmap of each target in one image; the forward pass is shared.

        Parameters
        ----------
        pixels : ndarray of uint8, (h, w, 3)
            What the model sees (`engine.pixels.Preprocess`), before mean and standard deviation.
        targets : sequence of Target

        Raises
        ------
        ZeroGradientError
            No gradient reaches the layer's positions (but see ``layer="paper"``).
        """
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise DataError(f"heatmaps need uint8 pixels (h, w, 3) of one image, not {pixels.dtype} {pixels.shape}")
        if not targets:
            raise UsageError("a heatmap needs a target: a prompt's embedding (TextTarget) or a head (HeadTarget)")
        cut = _GraphCut(self.layer)
        cam = METHODS[self.method](self.tower, [self.layer], reshape_transform=self._spatial)
        try:
            with torch.inference_mode(False), torch.enable_grad(), _float32(cam.device):
                inputs = self.encoder.preprocess.normalise(torch.from_numpy(pixels.copy())[None])
                inputs = inputs.to(cam.device, torch.float32)
                embedding = cam.activations_and_grads(inputs)
                embedding = (embedding[0] if isinstance(embedding, tuple) else embedding)[0]
                if cut.start is None:
                    raise ModelError(f"the image tower never calls {self.layer_name!r}, so it has no heatmap")
                return [self._heatmap(cam, cut.start, inputs, embedding, target) for target in targets]
        finally:
            # Not `with cam`: the library's exit prints and swallows every IndexError.
            cam.activations_and_grads.release()
            cut.release()

    def _heatmap(
        self, cam: GradCAM, start: torch.Tensor, inputs: torch.Tensor, embedding: torch.Tensor, target: Target
    ) -> HeatMap:
        cam.activations_and_grads.gradients = []
        score = target.score(embedding)
        if score.requires_grad:
            torch.autograd.grad(score, start, retain_graph=True, allow_unused=True)
        activations = cam.activations_and_grads.activations[0].numpy()
        gradients = cam.activations_and_grads.gradients
        gradient = gradients[0].numpy() if gradients else np.zeros_like(activations)
        empty = HeatMap(
            map=np.zeros(inputs.shape[-2:], dtype=np.float32),
            raw=np.zeros(activations.shape[-2:], dtype=np.float32),
            layer=self.layer_name,
            method=self.method,
            target=target.name,
            score=float(score.detach()),
            empty=True,
        )
        if not gradient.any():
            if not self.as_in_the_study:
                raise ZeroGradientError(
                    f"the gradient of {target.name or 'the target'!r} is exactly zero at every position of "
                    f"{self.layer_name!r}: what the tower pools does not depend on them, or the target's weights are "
                    f"zero. Take layer='default' ({self.trunk.cam_layer('default').name}) or an earlier block."
                )
            return replace(
                empty, note=f"empty: no gradient reaches the patch tokens at {self.layer_name}, the study's own layer"
            )
        raw = cam.get_cam_image(inputs, self.layer, [target], activations, gradient, False)[0].astype(np.float32)
        if not np.isfinite(raw).all():
            raise ModelError(f"the heatmap of {target.name!r} at {self.layer_name!r} is not finite; see the weights")
        top, bottom = float(raw.max()), float(raw.min())
        if top <= 0:
            return replace(empty, raw=raw, note=f"empty: no position speaks for {target.name or 'the target'}")
        flat = top - bottom <= 1e-6 * top
        enlarged = cv2.resize(
            np.maximum(raw, 0) / np.float32(top), (inputs.shape[-1], inputs.shape[-2]), interpolation=cv2.INTER_LINEAR
        )
        note = "flat: the same everywhere, it does not say where" if flat else ""
        return replace(empty, map=enlarged, raw=raw, empty=False, flat=flat, note=note)

    def _spatial(self, values: torch.Tensor) -> torch.Tensor:
        """Return a layer's values as maps (1, channels, rows, columns) in memory of their own.

        A later in-place activation would otherwise change what the library keeps.
        """
        maps = values if self._reshape is None else self._reshape(values)
        return maps.detach().clone(memory_format=torch.contiguous_format)


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
    layer : "default", "paper" or int
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


class _GraphCut:
    """Starts the autograd graph at a layer's output, so that nothing below it is kept or differentiated."""

    def __init__(self, module: nn.Module) -> None:
        self.start: torch.Tensor | None = None
        self._handle = module.register_forward_hook(self._cut)

    def _cut(self, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        self.start = output.detach().clone().requires_grad_()
        # A leaf may not be changed in place, as the activation behind a convolution does; its copy may.
        return self.start.clone()

    def release(self) -> None:
        self._handle.remove()


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Keep a caller's autocast and cuDNN's TF32 out."""
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        else:
            yield


def _weights(values: np.ndarray, embedding: torch.Tensor) -> torch.Tensor:
    vector = torch.as_tensor(np.asarray(values, dtype=np.float32), device=embedding.device)
    if vector.shape != embedding.shape:
        raise DataError(
            f"the target has shape {tuple(vector.shape)} but the encoder's embeddings have {tuple(embedding.shape)}; "
            "was it made for another model?"
        )
    return vector
