"""Extraction: source -> decode -> encode -> store, as one pipeline that loses no sample and no computed row.

Comes in: the samples whose rows are missing, an encoder, and a buffer a product ("image", "pixels", "tokens@3",
"text"). Goes out: rows committed to keyed arrays, in the order in which they were asked for, and the list of failures.

- Decode workers run a bounded number of images ahead (`engine.decoding`); their results are taken in order. What cannot
  be read or decoded is listed; any other error in a part ends the job with that error.
- Batches have one static shape, the last one is filled up: a row's numbers must not depend on its neighbours.
- Commits come after whole batches only, by size and by time (`engine.row_buffer`). So a killed job goes on at a batch's
  edge, and the same plan (batch size) ends with the same bytes.
- Ctrl-C or an error commits what is computed before it goes on its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.decoding import Decoded, Decoder, ImageWork, ordered_map
from engine.row_buffer import CommitPolicy, Committing, RowBuffer, Tally, to_half

Item = TypeVar("Item")
TEXTS_AT_ONCE = 256
Progress = Callable[[str, int, int], object]


class EncoderLike(Protocol):
    """What extraction needs of an encoder; `engine.encoder.Encoder` is one."""

    id: str
    description: dict[str, Any]
    preprocess: Any
    trunk: Any

    def encode_pixels(self, pixels: np.ndarray) -> Any:
        """Return embeddings (b, dim) of uint8 pixels (b, h, w, 3)."""

    def encode_text(self, texts: list[str]) -> Any:
        """Return embeddings (b, dim) of texts, each independent of the others."""

    def tokens(self, pixels: np.ndarray, layer: int) -> Any:
        """Return what enters block `layer`, (b, n, width)."""


def extract_images(
    works: Sequence[ImageWork],
    encoder: EncoderLike,
    buffers: Mapping[str, RowBuffer],
    layers: Mapping[str, int],
    decoder: Decoder,
    tally: Tally,
    policy: CommitPolicy,
    *,
    batch_size: int,
    workers: int,
    learned: Callable[[Decoded], None],
    progress: Progress | None = None,
) -> None:
    """Compute and store what is missing of images.

    Parameters
    ----------
    works : sequence of ImageWork
        In the order in which their rows are to stand.
    encoder : EncoderLike
    buffers : mapping of product to RowBuffer
    layers : mapping of token product to block number
    decoder : Decoder
    tally : Tally
        Filled in as the work goes on, so that it is right also when an error ends it.
    policy : CommitPolicy
    batch_size, workers : int
    learned : callable
        Told each image's key as it becomes known.
    progress : callable(name, done, total), optional
    """
    ordered = list(buffers.values())
    batch: list[_Pending] = []

    def encode() -> None:
        start = time.perf_counter()
        _encode_images(batch, encoder, buffers, layers, tally, batch_size)
        batch.clear()
        tally.seconds["encode"] += time.perf_counter() - start

    decoding = ordered_map(decoder, works, workers, ahead=2 * (batch_size + workers))
    if progress is not None:
        progress("embed images", 0, len(works))
    with Committing(ordered, tally, policy), closing(decoding) as results:
        for done, decoded in enumerate(_timed(results, tally.seconds, "decode"), start=1):
            pending = _sort_in(decoded, buffers, tally, learned)
            if pending is not None:
                batch.append(pending)
            if len(batch) == batch_size:
                encode()
            if not batch and policy.due(ordered):
                policy.commit(ordered, tally)
            if progress is not None and not batch:
                progress("embed images", done, len(works))
        if batch:
            encode()
            if progress is not None:
                progress("embed images", len(works), len(works))


def extract_texts(
    texts: Sequence[str],
    keys: Sequence[bytes],
    encoder: EncoderLike,
    buffer: RowBuffer,
    tally: Tally,
    policy: CommitPolicy,
    *,
    progress: Progress | None = None,
) -> None:
    """Compute and store the embeddings of texts that are all different and all missing."""
    with Committing([buffer], tally, policy):
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[start : start + TEXTS_AT_ONCE])
            began = time.perf_counter()
            # Texts are of many lengths, so it is the encoder that gives its batches static shapes.
            values = as_array(encoder.encode_text(some))
            tally.seconds["encode"] += time.perf_counter() - began
            _keep(buffer, list(keys[start : start + TEXTS_AT_ONCE]), values, tally)
            if policy.due([buffer]):
                policy.commit([buffer], tally)
            if progress is not None:
                progress("embed texts", start + len(some), len(texts))


def as_array(values: Any) -> np.ndarray:
    """Return a tensor on any device, or an array, as a NumPy array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


class _Pending(NamedTuple):
    """One image of the batch that is filling up: its key, pixels and the products that lack it."""

    key: bytes
    pixels: np.ndarray
    wanted: tuple[str, ...]


def _timed(items: Iterator[Item], seconds: dict[str, float], name: str) -> Iterator[Item]:
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            seconds[name] += time.perf_counter() - start
        yield item


def _sort_in(
    decoded: Decoded, buffers: Mapping[str, RowBuffer], tally: Tally, learned: Callable[[Decoded], None]
) -> _Pending | None:
    """Count a decoded image, keep its pixels where they are wanted, and return it if it has to be encoded."""
    tally.opened += decoded.read_at > 0
    if decoded.key is not None:
        learned(decoded)
    if decoded.failure:
        failure = (",".join(buffers), decoded.failure)
        if decoded.key is None:
            tally.failed_positions[decoded.work.position] = failure
        else:
            tally.failed_keys[decoded.key] = failure
        return None
    key, pixels = decoded.key, decoded.pixels
    if key is None or pixels is None:
        return None
    wanted = tuple(what for what, buffer in buffers.items() if buffer.take(key))
    if "pixels" in wanted:
        buffers["pixels"].add(key, pixels)
        wanted = tuple(what for what in wanted if what != "pixels")
    return _Pending(key, pixels, wanted) if wanted else None


def _encode_images(
    batch: Sequence[_Pending],
    encoder: EncoderLike,
    buffers: Mapping[str, RowBuffer],
    layers: Mapping[str, int],
    tally: Tally,
    batch_size: int,
) -> None:
    pixels = np.zeros((batch_size, *batch[0].pixels.shape), np.uint8)
    for row, pending in enumerate(batch):
        pixels[row] = pending.pixels
    for what, buffer in buffers.items():
        rows = [row for row, pending in enumerate(batch) if what in pending.wanted]
        if rows:
            computed = encoder.tokens(pixels, layers[what]) if what in layers else encoder.encode_pixels(pixels)
            _keep(buffer, [batch[row].key for row in rows], as_array(computed)[rows], tally)


def _keep(buffer: RowBuffer, keys: Sequence[bytes], values: np.ndarray, tally: Tally) -> None:
    half, reasons = to_half(values)
    for row, key in enumerate(keys):
        if row in reasons:
            tally.fail(key, buffer.what, reasons[row])
        else:
            buffer.add(key, half[row])
