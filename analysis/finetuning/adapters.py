"""Low-rank adapters in a tower's blocks (LoRA: Hu et al., ICLR 2022), by the library peft, merged into plain weights.

In come a tower and the first block that gets them; the tower is changed in place, its own weights stay as they are and
the adapters alone train. `Adapters.merge` adds them to the weights and takes them out again, so that what is saved is a
model like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.errors import ModelError, UsageError
from engine.trunks import Trunk


class Adapters:
    """The adapters of one tower.

    Parameters
    ----------
    tower : Module
        open_clip's image tower; changed in place.
    trunk : Trunk
        Its structure.
    first : int
        Blocks from this one on get adapters, in their attention's and MLP's matrices.
    rank : int
    alpha : float, optional
        The adapters' product is scaled by alpha / rank; twice the rank unless given.

    Raises
    ------
    UsageError
        The tower is a CNN.
    ModelError
        peft is not installed.
    """

    def __init__(self, tower: nn.Module, trunk: Trunk, first: int, rank: int, alpha: float | None) -> None:
        if trunk.kind == "cnn":
            raise UsageError(
                "trainable lora: adapters are for transformers, and this image tower is a CNN; train its projection, "
                "some of its last blocks or all of it"
            )
        peft = _peft()
        self._names = matrices_of(tower, trunk, first)
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=self._names, lora_dropout=0.0
        )
        self._tuner: Any = peft.tuners.lora.LoraModel(tower, config, "default")
        self._handles = [_keep_exact(module) for module in tower.modules() if _is_attention(module)]

    def merge(self) -> None:
        """Add the adapters to the tower's weights and take them out; the tower is then as it was, but trained."""
        for handle in self._handles:
            handle.remove()
        self._tuner.merge_and_unload()


def matrices_of(tower: nn.Module, trunk: Trunk, first: int) -> list[str]:
    """Return the names of the linear layers and torch attentions within the blocks from one on."""
    names = {id(module): name for name, module in tower.named_modules()}
    found = []
    for block in trunk.blocks[first:]:
        attentions = [module for module in block.modules() if isinstance(module, nn.MultiheadAttention)]
        inside = {id(part) for attention in attentions for part in attention.modules() if part is not attention}
        for module in block.modules():
            if isinstance(module, nn.Linear | nn.MultiheadAttention) and id(module) not in inside:
                found.append(names[id(module)])
    return found


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.MultiheadAttention)


def _keep_exact(module: nn.Module) -> Any:
    """Put an attention's own weights back, to the bit, after each forward pass.

    peft adds the adapters to them for the pass and takes them away again, each time with a rounding: over thousands of
    steps the weights that are said to be frozen would wander.
    """
    attention: Any = module.base_layer
    projection = attention.out_proj.get_base_layer()
    own = attention.in_proj_weight.detach().clone(), projection.weight.detach().clone()

    def restore(*_: Any) -> None:
        with torch.no_grad():
            attention.in_proj_weight.copy_(own[0])
            projection.weight.copy_(own[1])

    return module.register_forward_hook(restore)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError(
            "trainable lora needs the library peft, which is not installed: pip install 'fluoroscope[lora]'"
        ) from None
    return peft
