"""What image towers saw of a sample, from the cheapest place that has it: cached tokens, cached pixels, or the image.

Comes in: a cache, a data set and the samples that are asked for. Goes out: `Tokens` that enter a block not behind the
one that a map needs (nothing is decoded, and no block before it runs), else the pixels as the model sees them, with the
place they came from. The image itself is decoded where it is drawn, once. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from analysis.cam import Tokens
from analysis.cam.passes import Seen
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from jobs.opening import read_image

IMAGE, PIXELS, TOKENS = "image", "cached pixels", "cached tokens"


class Input(NamedTuple):
    """What a tower saw of one image, as a batch of one, and where it was found."""

    seen: Seen
    source: str


class MapInputs:
    """Inputs of heatmaps for some samples of a data set.

    Parameters
    ----------
    cache : Cache
    dataset : Dataset
    positions : sequence of int
        The samples that will be asked for; only their keys are learned.
    """

    def __init__(self, cache: Cache, dataset: Dataset, positions: Sequence[int]) -> None:
        self.cache, self.dataset = cache, dataset
        rows = sorted(set(positions))
        self._keys = dict(zip(rows, cache.image_keys(dataset.take(np.array(rows, dtype=np.int64))), strict=True))
        self._arrays = set(cache.arrays())
        self._image: tuple[int, Image.Image] | None = None

    def image(self, position: int) -> Image.Image:
        """Return a sample's image, decoded; the last one is kept.

        Raises
        ------
        ImageError
            It cannot be read or decoded.
        """
        if self._image is None or self._image[0] != position:
            self._image = position, read_image(self.dataset, position)
        return self._image[1]

    def of(self, position: int, encoder: Encoder, block: int | None) -> Input:
        """Return what a tower saw of a sample.

        Parameters
        ----------
        position : int
            Row of the data set.
        encoder : Encoder
        block : int or None
            The last block whose entering tokens are enough (`Explainer.first_block`); None where only pixels are.

        Raises
        ------
        ImageError
            The cache has nothing of it, and the image cannot be read.
        """
        for number in range(block, -1, -1) if block is not None else ():
            tokens = self._stored(position, "tokens", f"{encoder.id}@{number}")
            if tokens is not None:
                return Input(Tokens(tokens, number), f"{TOKENS} of block {number}")
        pixels = self._stored(position, "pixels", encoder.preprocess.id)
        if pixels is not None:
            return Input(pixels, PIXELS)
        return Input(encoder.preprocess(self.image(position))[0][None], IMAGE)

    def _stored(self, position: int, kind: str, name: str) -> np.ndarray | None:
        """Return a sample's row of a keyed array, as a batch of one; None where there is none."""
        key = self._keys[position]
        if (kind, name) not in self._arrays or not key.any():
            return None
        array = self.cache.array(kind, name)
        row = array.find(key[None])
        return array.read(row) if row[0] >= 0 else None
