"""Heatmap methods by name: what each computes, which towers it fits, and what it needs to see.

Names are pytorch-grad-cam's own, in its `METHODS`' spelling, and those of three explanations of transformers. A method
that a tower cannot serve is refused with the ones that it can.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from analysis.cam import library, weighting
from engine.errors import UsageError
from engine.trunks import Trunk

Family = Literal["gradients", "activations", "tower", "attention"]


class Method(NamedTuple):
    """One way of making a heatmap.

    Parameters
    ----------
    name : str
    family : "gradients", "activations", "tower" or "attention"
        What it is made of: activations and gradients at one layer, activations alone, repeated runs of the whole tower,
        or the attention of transformer blocks.
    batched : bool
        Whether the project computes it for all labels of a batch at once.
    of_target : bool
        Whether the map depends on what is sought.
    """

    name: str
    family: Family
    batched: bool = False
    of_target: bool = True


def _known() -> dict[str, Method]:
    found = [Method(name, "gradients", batched=name in weighting.BATCHED) for name in library.FROM_GRADIENTS]
    found += [Method(name, "activations", of_target=False) for name in library.FROM_ACTIVATIONS]
    found += [Method(name, "tower") for name in library.FROM_TOWER]
    found = [method for method in found if library.installed(method.name)]
    found += [
        Method("grad-eclip", "attention", batched=True),
        Method("legrad", "attention", batched=True),
        Method("rollout", "attention", batched=True, of_target=False),
    ]
    return {method.name: method for method in found}


METHODS: dict[str, Method] = _known()
"""All methods that the installed libraries have."""


def obstacle(method: Method, trunk: Trunk) -> str:
    """Return why a tower cannot serve a method; "" where it can."""
    if method.family == "attention":
        if not trunk.has_open_blocks:
            return "it reads the attention of plain timm or open_clip transformer blocks"
        if method.name == "grad-eclip" and trunk.kind != "vit-token":
            return "it follows the class token, which this tower does not pool"
        if trunk.kind == "vit-attention":
            return "it knows towers that pool a class token or the average, not an attention pool"
    if method.name == "fullgrad":
        if trunk.kind != "cnn":
            return "it sums the biases of convolutions and batch norms, which a transformer has not"
        if not library.has_full_gradients(trunk.visual):
            return "it knows the biases of plain batch norms only, and this tower's are of a kind of their own"
    return ""


def methods_for(trunk: Trunk) -> list[str]:
    """Return the names of the methods that a tower can serve."""
    return [name for name, method in METHODS.items() if not obstacle(method, trunk)]


def method_named(name: str, trunk: Trunk) -> Method:
    """Return a method that a tower can serve.

    Raises
    ------
    UsageError
        An unknown name, or a method that does not fit the tower; what works is named.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UsageError(f"unknown heatmap method {name!r}{hint}; this image tower has {', '.join(methods_for(trunk))}")
    reason = obstacle(METHODS[name], trunk)
    if reason:
        raise UsageError(f"{name!r} does not fit this image tower: {reason}. It has {', '.join(methods_for(trunk))}")
    return METHODS[name]
