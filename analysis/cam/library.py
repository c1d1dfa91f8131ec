"""Methods as pytorch-grad-cam computes them: one image and one label at a time, through NumPy.

The library's classes are used as they are. What it leaves to its user is settled around them: a target is always said
(`analysis.cam.targets`), weights get no gradients and keep those they have, what it prints is not printed, and its raw
map is taken before it is scaled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_grad_cam
import torch
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from torch import nn

from analysis.cam.maps import RawMaps
from analysis.cam.passes import Seen, Tower, as_maps, layer_pass
from analysis.cam.targets import Target, score_all
from engine.trunks import CamLayer

FROM_GRADIENTS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "gradcam-elementwise": "GradCAMElementWise",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
    "eigengradcam": "EigenGradCAM",
    "segeigencam": "SegEigenCAM",
}
"""Methods that need activations and gradients at one layer, by the library's class."""

FROM_ACTIVATIONS = {"eigencam": "EigenCAM", "kpcacam": "KPCA_CAM", "fem": "FEM"}
"""Methods that need activations alone: the same map for every target."""

FROM_TOWER = {"scorecam": "ScoreCAM", "ablationcam": "AblationCAM", "fullgrad": "FullGrad"}
"""Methods that run the tower themselves, from its images."""

_QUIET = ("score_cam", "ablation_cam")


def installed(name: str) -> bool:
    """Tell whether the library at hand has a method; some came in later versions."""
    return hasattr(pytorch_grad_cam, {**FROM_GRADIENTS, **FROM_ACTIVATIONS, **FROM_TOWER}[name])


def from_layer(method: str, tower: Tower, layer: CamLayer, seen: Seen, targets: Sequence[Target]) -> RawMaps:
    """Return maps that the library makes of activations, and of gradients where the method wants them."""
    found = layer_pass(tower, layer, seen, targets)
    activations = found.activations.cpu().numpy()
    combine = _combining(_class_of(method), tower, layer)
    if method in FROM_ACTIVATIONS:
        raw = torch.from_numpy(np.stack([combine(image[None], None) for image in activations]))
        raw = raw[:, None].expand(-1, len(targets), -1, -1)
        reached = torch.ones_like(found.scores, dtype=torch.bool)
        return RawMaps(raw, found.scores, reached)
    gradients = found.gradients.cpu().numpy()
    by_image = [
        np.stack([combine(image[None], gradient[None]) for gradient in of_image])
        for image, of_image in zip(activations, gradients, strict=True)
    ]
    return RawMaps(torch.from_numpy(np.stack(by_image)), found.scores, found.gradients.flatten(2).any(dim=-1))


def from_tower(method: str, tower: Tower, layer: CamLayer, seen: Seen, targets: Sequence[Target]) -> RawMaps:
    """Return maps of a method that runs the tower itself, called as its authors call it."""
    kept: dict[str, Any] = {}
    cam = _keeping(_class_of(method), kept)(tower.visual, [] if method == "fullgrad" else [layer.module], **_options(
        method, tower, layer
    ))  # fmt: skip
    try:
        with tower.computing(), _quiet():
            inputs = tower.inputs(seen)
            raw = np.stack([[_one(cam, kept, image[None], target) for target in targets] for image in inputs])
            with torch.no_grad():
                scores = score_all(targets, tower.embed(seen, inputs))
    finally:
        # Not `with cam`: the library's exit prints and swallows every IndexError.
        cam.activations_and_grads.release()
    reached = torch.from_numpy(raw).flatten(2).any(dim=-1)
    return RawMaps(torch.from_numpy(raw), scores, reached)


def has_full_gradients(visual: nn.Module) -> bool:
    """Tell whether FullGrad finds a tower's biases: it knows plain convolutions and batch norms, and no kinds of them.

    Of a tower whose batch norms are of a kind of their own (with their activation, as in timm's EfficientNets) it would
    leave most biases out without a word.
    """
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    return bool(norms) and all(type(module) is nn.BatchNorm2d for module in norms)


def _class_of(method: str) -> Any:
    return getattr(pytorch_grad_cam, {**FROM_GRADIENTS, **FROM_ACTIVATIONS, **FROM_TOWER}[method])


def _combining(kind: Any, tower: Tower, layer: CamLayer) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    cam = kind(tower.visual, [layer.module])
    cam.activations_and_grads.release()

    def combine(activations: np.ndarray, gradients: np.ndarray | None) -> np.ndarray:
        return np.asarray(cam.get_cam_image(None, layer.module, None, activations, gradients, False)[0], np.float32)

    return combine


def _options(method: str, tower: Tower, layer: CamLayer) -> dict[str, Any]:
    def spatial(values: torch.Tensor) -> torch.Tensor:
        # In memory of its own: a later in-place activation would change what is kept.
        return as_maps(layer, values).detach().clone(memory_format=torch.contiguous_format)

    options: dict[str, Any] = {"reshape_transform": None if method == "fullgrad" else spatial}
    if method == "ablationcam":
        options["ablation_layer"] = AblationLayer() if tower.trunk.kind == "cnn" else AblationLayerVit()
    return options


def _keeping(kind: Any, kept: dict[str, Any]) -> Any:
    """Return a library class that leaves its raw map in a dictionary on its way."""

    class Keeping(kind):  # type: ignore[misc]
        def get_cam_image(self, *given: Any, **more: Any) -> np.ndarray:
            kept["raw"] = super().get_cam_image(*given, **more)
            return kept["raw"]

        def aggregate_multi_layers(self, maps: Any) -> np.ndarray:
            if kind is pytorch_grad_cam.FullGrad:
                kept["raw"] = np.sum(maps, axis=1)
            return super().aggregate_multi_layers(maps)

    return Keeping


def _one(cam: Any, kept: dict[str, Any], image: torch.Tensor, target: Target) -> np.ndarray:
    kept.clear()
    cam(image.clone(), [target.score])
    return np.asarray(kept["raw"][0], dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars off the terminal."""
    modules = [sys.modules[f"pytorch_grad_cam.{name}"] for name in _QUIET]
    bars = [module.tqdm for module in modules]  # type: ignore[attr-defined]
    for module in modules:
        module.tqdm = _Plain  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]


class _Plain:
    """Stands where the library expects the module tqdm."""

    @staticmethod
    def tqdm(steps: Any) -> Any:
        return steps
