"""What can be embedded, by name: which keyed array it goes to and what describes that array.

Comes in: "image", "text", "pixels" or "tokens@LAYER", and an encoder. Goes out: a `Product`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.errors import UsageError
from engine.extract import EncoderLike

PRODUCTS = ("image", "text", "pixels", "tokens@LAYER")
# Pixels are committed before what is computed from them.
COMMIT_ORDER = ("pixels", "tokens", "image", "text")


class Product(NamedTuple):
    """One thing to compute: its keyed array, and the block whose input it is where it is tokens."""

    what: str
    kind: str
    name: str
    layer: int | None
    description: Mapping[str, Any]


def product_of(what: str, encoder: EncoderLike) -> Product:
    """Return what a product's name means for an encoder; UsageError for an unknown one."""
    name, at, layer = what.partition("@")
    if name == "tokens" and at:
        number = _layer(layer, what, encoder)
        return Product(
            f"tokens@{number}", "tokens", f"{encoder.id}@{number}", number, {**encoder.description, "layer": number}
        )
    if what in ("image", "text"):
        return Product(what, what, encoder.id, None, encoder.description)
    if what == "pixels":
        # Pixels are kept as they are before mean and std, so encoders that differ in those share them.
        described = {key: value for key, value in encoder.preprocess.description.items() if key not in ("mean", "std")}
        return Product(what, what, encoder.preprocess.id, None, described)
    raise UsageError(f"unknown product {what!r}; known: {', '.join(PRODUCTS)} (such as tokens@-1)")


def _layer(text: str, what: str, encoder: EncoderLike) -> int:
    if encoder.trunk.kind == "cnn":
        raise UsageError(f"{what!r}: the image tower of {encoder.id} is a CNN and has no tokens; cache pixels instead")
    blocks = len(encoder.trunk.blocks)
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"{what!r} does not name a layer; give its number, such as tokens@-1") from None
    if not -blocks <= number < blocks:
        raise UsageError(f"{what!r}: {encoder.id} has {blocks} blocks, numbered 0 to {blocks - 1} or from -1 backwards")
    return number % blocks
