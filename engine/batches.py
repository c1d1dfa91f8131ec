"""Batches of one static shape through an encoder; on a GPU, copies overlap with computing.

Comes in: uint8 pixels, written row by row into a batch's buffer. Goes out: the products as float32 arrays, in order.

- One shape for all batches, the last one filled up with zeros: a row's numbers must not depend on its neighbours, and
  compiled or captured code wants static shapes.
- On CUDA the buffers are page-locked; a copy stream carries the next batch over while this one is computed; mean and
  standard deviation are applied on the device; embeddings come back by an asynchronous copy. The forward pass is
  captured as a CUDA graph where the tower allows it.
- A batch that does not fit into the device's memory is halved, again and again down to one row, and the job goes on
  with the smaller size; it is said once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

Product = str | int


@dataclass
class Batch:
    """One batch that is filled up, computed and taken apart.

    Parameters
    ----------
    pixels : ndarray of uint8, (batch size, h, w, 3)
        Rows are written here; those after the last one are zeros.
    keys : list of bytes
        Of the rows written so far.
    wanted : list of tuple of str
        Of each row, the products that it lacks.
    """

    pixels: np.ndarray
    keys: list[bytes] = field(default_factory=list)
    wanted: list[tuple[str, ...]] = field(default_factory=list)
    answer: Any = None
    buffers: Any = None

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: bytes, pixels: np.ndarray, wanted: tuple[str, ...]) -> None:
        """Write one row."""
        self.pixels[len(self.keys)] = pixels
        self.keys.append(key)
        self.wanted.append(wanted)


def make_runner(encoder: Any, batch_size: int, *, compiled: bool = False) -> Runner:
    """Return what runs batches on an encoder's device."""
    if getattr(getattr(encoder, "device", None), "type", "cpu") == "cuda":
        from engine.cuda_batches import CudaRunner

        return CudaRunner(encoder, batch_size, compiled=compiled)
    return Runner(encoder, batch_size, compiled=compiled)


class Runner:
    """Runs batches as they come: for processors, where decoding threads and the model share the cores.

    Parameters
    ----------
    encoder : EncoderLike
    batch_size : int
        Rows of every batch.
    compiled : bool
        Compile the forward pass; what it costs at the first batch is repaid by long jobs only.
    """

    # Batches that may be under way while the next one is filled.
    ahead = 0

    def __init__(self, encoder: Any, batch_size: int, *, compiled: bool = False) -> None:
        self.encoder, self.batch_size, self.compiled = encoder, batch_size, compiled
        self.rows = batch_size
        self._encode: Callable[[Any], Any] = encoder.encode_pixels
        if compiled:
            self._encode = encoder.compiled()

    def new_batch(self) -> Batch:
        """Return an empty batch."""
        return Batch(np.zeros((self.batch_size, *self.encoder.preprocess.size, 3), np.uint8))

    def start(self, batch: Batch, image: bool, layers: Sequence[int]) -> None:
        """Begin to compute embeddings and what enters some blocks."""
        batch.answer = self._halving(batch.pixels, image, layers)

    def result(self, batch: Batch) -> dict[Product, np.ndarray]:
        """Return what a batch that was begun comes to: "image" and the layers' tokens, (batch size, ...) float32."""
        return batch.answer

    def _halving(self, pixels: np.ndarray, image: bool, layers: Sequence[int]) -> dict[Product, np.ndarray]:
        """Compute in slices that fit into the device's memory."""
        while True:
            try:
                starts = range(0, len(pixels), self.rows)
                parts = [self._compute(pixels[start : start + self.rows], image, layers) for start in starts]
                return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            except Exception as error:
                if not is_out_of_memory(error) or self.rows == 1:
                    raise
            # Outside of the handler: the error's frames hold on to what did not fit.
            self._halve()

    def _halve(self) -> None:
        self.rows = (self.rows + 1) // 2
        log.warning("a batch did not fit into the device's memory; going on with %d rows at a time", self.rows)

    def _compute(self, pixels: np.ndarray, image: bool, layers: Sequence[int]) -> dict[Product, np.ndarray]:
        if not layers:
            return {"image": as_array(self._encode(pixels))}
        computed = self.encoder.encode_batch(pixels, image=image, layers=layers)
        return {name: as_array(values) for name, values in computed.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device's memory is full."""
    # By name: readers of a cache, and the tests' encoders, do without torch.
    return type(error).__name__ == "OutOfMemoryError"


def as_array(values: Any) -> np.ndarray:
    """Return a tensor on any device, or an array, as a NumPy array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
