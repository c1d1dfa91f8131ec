"""Activations and gradients of one layer in, maps out: the CAM family on the device, for all labels of a batch at once.

Each function takes activations A (b, c, h, w) and gradients G (b, t, c, h, w) of t targets and returns signed maps
(b, t, h, w), in float32. They are the formulas of pytorch-grad-cam, constants included, before its scaling; a method
that it does not compute from one layer's activations and gradients alone is not here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]

# pytorch-grad-cam's own, in Grad-CAM++ and XGrad-CAM: kept, so that maps are equal.
_PLUS_PLUS_EPSILON, _X_EPSILON = 1e-6, 1e-7


def gradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return sum_c mean(G_c) A_c (Selvaraju et al., ICCV 2017)."""
    return _by_channel(gradients.mean(dim=(-2, -1)), activations)


def gradcam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Grad-CAM++ (Chattopadhay et al., WACV 2018), weights by its equation 19."""
    squared = gradients**2
    total = activations.sum(dim=(-2, -1), keepdim=True)[:, None]
    share = squared / (2 * squared + total * squared * gradients + _PLUS_PLUS_EPSILON)
    share = torch.where(gradients != 0, share, torch.zeros_like(share))
    return _by_channel((gradients.clamp(min=0) * share).sum(dim=(-2, -1)), activations)


def gradcam_elementwise(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return sum_c max(G_c A_c, 0)."""
    return (gradients * activations[:, None]).clamp(min=0).sum(dim=2)


def hirescam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return sum_c G_c A_c (Draelos and Carin, 2020)."""
    return torch.einsum("btchw,bchw->bthw", gradients, activations)


def layercam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return sum_c max(G_c, 0) A_c (Jiang et al., TIP 2021)."""
    return torch.einsum("btchw,bchw->bthw", gradients.clamp(min=0), activations)


def xgradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return XGrad-CAM (Fu et al., BMVC 2020): channels weighted by their gradient, averaged by their activation."""
    total = activations.sum(dim=(-2, -1))[:, None]
    weights = torch.einsum("btchw,bchw->btc", gradients, activations) / (total + _X_EPSILON)
    return _by_channel(weights, activations)


def _by_channel(weights: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("btc,bchw->bthw", weights, activations)


BATCHED: dict[str, Weighting] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "gradcam-elementwise": gradcam_elementwise,
    "hirescam": hirescam,
    "layercam": layercam,
    "xgradcam": xgradcam,
}
