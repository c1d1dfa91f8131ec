"""What fine-tuning learns from, out of the cache: pixels or tokens of a data set's images, and its texts.

In come a `Material` and a recipe; out go rows in the data set's order. What is missing in the cache is computed first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from analysis.finetuning import Captions, FinetuneConfig
from engine.errors import DataError
from engine.features import StoredRows
from engine.products import product_of

if TYPE_CHECKING:
    from jobs.study_settings import Material

log = logging.getLogger(__name__)

ProgressCall = Callable[[str, int, int | None], None]


def what_of(recipe: FinetuneConfig, encoder: Any) -> str:
    """Return which product of the cache a recipe starts from: "pixels" or "tokens@K"."""
    if recipe.from_block is None:
        return "pixels"
    return product_of(f"tokens@{recipe.from_block}", encoder).what


def source(material: Material, recipe: FinetuneConfig, progress: ProgressCall | None = None) -> StoredRows:
    """Return the rows that training starts from.

    Raises
    ------
    DataError
        Some cannot be computed.
    """
    what = what_of(recipe, material.encoder)
    if what == "pixels":
        return pixels(material, progress)
    height, width = material.encoder.trunk.grid or (0, 0)
    length = material.encoder.trunk.prefix_tokens + height * width
    log.info(
        "tokens that enter block %s, %d an image, from the cache; they are of the images as they are, so "
        "augmentation is excluded",
        *(what.partition("@")[2], length),
    )
    _computed(material, what, progress)
    rows = material.cache.tokens(material.dataset, material.encoder, int(what.partition("@")[2]))
    return _whole(material, rows, what)


def pixels(material: Material, progress: ProgressCall | None = None) -> StoredRows:
    """Return what the model sees of each image, uint8 (n, h, w, 3); DataError where some are missing."""
    _computed(material, "pixels", progress)
    return _whole(material, material.cache.pixels(material.dataset, material.encoder.preprocess), "pixels")


def captions(material: Material, recipe: FinetuneConfig) -> Captions | None:
    """Return the samples' texts, embedded where the text tower stays locked; None where they are not wanted.

    Raises
    ------
    DataError
        The data set has no texts.
    """
    if not recipe.contrasts:
        return None
    found = Captions.of(material.dataset.samples["text"].tolist())
    if not found.texts:
        raise DataError(
            f"{material.dataset.called} has no texts, so images cannot be held against them; take an objective of "
            "labels, such as bce, and contrastive_weight 0"
        )
    if recipe.text_trainable:
        return found
    embedded = material.cache.text_features(found.texts, material.encoder)
    return Captions(found.texts, found.of_row, embedded)


def _computed(material: Material, what: str, progress: ProgressCall | None) -> None:
    """Have the cache compute what it lacks."""
    options: dict[str, Any] = {} if progress is None else {"progress": progress}
    material.cache.embed(material.dataset, material.encoder, (what,), **options)


def _whole(material: Material, rows: StoredRows, what: str) -> StoredRows:
    if len(rows.missing):
        raise DataError(
            f"{len(rows.missing)} images that were embedded have no {what} in the cache, the first is "
            f"{rows.missing[0]!r}; `fluoro embed` with --what {what} says why"
        )
    return rows
