"""A block of samples, computed and stored where the encoder is: in this process, or in a worker's.

Comes in: what the whole job needs (`Work`, fit to be sent to another process) and the samples of one block. Goes out:
rows in the cache, and what a driver has to know of them. A block that is computed twice, because a worker was lost or
another job had it too, is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine import extract
from engine.arrays import array_folder
from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.keyed_array import KeyedArray
from engine.batches import Runner, make_runner
from engine.dataset import Fingerprint, Reader
from engine.decoding import Decoded, Decoder, ImageWork, default_threads
from engine.extract import EncoderLike
from engine.keys import KEY_BYTES, key_of_text
from engine.plan import Plan
from engine.products import COMMIT_ORDER, Product
from engine.row_buffer import CommitPolicy, RowBuffer, Tally


@dataclass(frozen=True)
class Work:
    """What all blocks of a job have in common.

    Parameters
    ----------
    cache : Path or Storage
    reader : Reader or None
        None where no image is to be read.
    products : tuple of Product
        In the order in which they are committed.
    plan : Plan
        With nothing left open.
    encoder_id : str
        What the encoder that computes must be.
    """

    cache: Any
    reader: Reader | None
    products: tuple[Product, ...]
    plan: Plan
    encoder_id: str

    def buffers(self) -> dict[str, RowBuffer]:
        """Return an empty buffer a product."""
        return {p.what: RowBuffer(self.cache, p.what, p.kind, p.name, p.description) for p in self.products}


@dataclass(frozen=True)
class Block:
    """Some samples of a job: images by position, uri and key (where it is known), or different texts."""

    images: Sequence[ImageWork] = ()
    texts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images) + len(self.texts)


@dataclass
class Computed:
    """What became of a block.

    Parameters
    ----------
    tally : Tally
    learned : list of (position, key, fingerprint, read_at)
        The images that were read.
    """

    tally: Tally = field(default_factory=Tally)
    learned: list[tuple[int, bytes, Fingerprint | None, int]] = field(default_factory=list)


def ordered(products: Sequence[Product]) -> tuple[Product, ...]:
    """Return products in the order in which they are committed."""
    return tuple(sorted(products, key=lambda product: COMMIT_ORDER.index(product.kind)))


class _Stopped(Exception):
    """Somebody has asked to stop."""


def compute_block(
    work: Work,
    encoder: EncoderLike,
    block: Block,
    *,
    runner: Runner | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Computed:
    """Compute and store one block in this process, or as many of its batches as it takes to be `stopped`.

    `runner` is that of an earlier block of the same encoder and plan, which is warm.
    """
    done = Computed(Tally({product.what: 0 for product in work.products}))

    def learn(decoded: Decoded) -> None:
        if decoded.key is not None and decoded.read_at:
            done.learned.append((decoded.work.position, decoded.key, decoded.fingerprint, decoded.read_at))

    def heed(name: str, so_far: int, total: int) -> None:
        if stopped():
            raise _Stopped

    buffers = work.buffers()
    left = _still_missing(block, buffers)
    with suppress(_Stopped):
        if left.images:
            compute_images(
                work,
                encoder,
                left.images,
                len(left.images),
                done.tally,
                learn,
                buffers=buffers,
                runner=runner,
                progress=heed,
            )
        if left.texts:
            compute_texts(work, encoder, [left.texts], len(left.texts), done.tally, buffers=buffers, progress=heed)
    return done


def _still_missing(block: Block, buffers: Mapping[str, RowBuffer]) -> Block:
    """Return a block without what was stored since it was made, by a worker that has died or by another job."""
    known = [image.key for image in block.images if image.key is not None]
    lacking = _lacking(known, buffers)
    images = []
    for image in block.images:
        if image.key is None:
            images.append(image)
        elif what := tuple(name for name in image.lacking or () if image.key in lacking[name]):
            images.append(image._replace(lacking=what))
    keys = [key_of_text(text) for text in block.texts]
    missing = set().union(*_lacking(keys, buffers).values())
    return Block(images, [text for text, key in zip(block.texts, keys, strict=True) if key in missing])


def _lacking(keys: Sequence[bytes], buffers: Mapping[str, RowBuffer]) -> dict[str, set[bytes]]:
    """Return by product the keys that have no row."""
    matrix = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
    rows = {what: np.flatnonzero(buffer.lacks(matrix)).tolist() for what, buffer in buffers.items()}
    return {what: {keys[row] for row in lacking} for what, lacking in rows.items()}


def compute_images(
    work: Work,
    encoder: EncoderLike,
    images: Sequence[ImageWork] | Iterator[ImageWork],
    total: int,
    tally: Tally,
    learned: Callable[[Decoded], None],
    *,
    buffers: Mapping[str, RowBuffer] | None = None,
    runner: Runner | None = None,
    on_commit: Callable[[], None] | None = None,
    progress: extract.Progress | None = None,
) -> None:
    """Compute and store what is missing of images; see `engine.extract.extract_images`."""
    buffers, plan = buffers or work.buffers(), work.plan
    extract.extract_images(
        images,
        total,
        runner or make_runner(encoder, plan.batch_size, compiled=bool(plan.compiled)),
        buffers,
        {product.what: product.layer for product in work.products if product.layer is not None},
        _decoder(work, encoder, buffers),
        tally,
        CommitPolicy(plan.commit_rows, plan.commit_seconds, on_commit=on_commit),
        threads=plan.threads or default_threads(),
        learned=learned,
        progress=progress,
    )
    _finish(buffers)


def compute_texts(
    work: Work,
    encoder: EncoderLike,
    windows: Iterable[Sequence[str]],
    total: int,
    tally: Tally,
    *,
    buffers: Mapping[str, RowBuffer] | None = None,
    progress: extract.Progress | None = None,
) -> None:
    """Compute and store texts that are all different; see `engine.extract.extract_texts`."""
    buffers, plan = buffers or work.buffers(), work.plan
    policy = CommitPolicy(plan.commit_rows, plan.commit_seconds)
    for buffer in buffers.values():
        extract.extract_texts(windows, total, key_of_text, encoder, buffer, tally, policy, progress=progress)
    _finish(buffers)


def _finish(buffers: Mapping[str, RowBuffer]) -> None:
    for buffer in buffers.values():
        buffer.finish()


def _decoder(work: Work, encoder: EncoderLike, buffers: Mapping[str, RowBuffer]) -> Decoder:
    # Imported here: reading a cache needs neither torch nor a decoder.
    from engine import pixels

    most = work.plan.max_pixels or pixels.DEFAULT_MAX_PIXELS
    at_least = getattr(encoder.preprocess, "at_least", None)
    assert work.reader is not None  # a job without images reads none
    return Decoder(
        work.reader,
        encoder.preprocess,
        lambda content: pixels.decode(content, max_pixels=most, at_least=at_least),
        list(buffers.values()),
        pixel_cache(work.cache, encoder),
    )


def pixel_cache(cache: Any, encoder: EncoderLike) -> ArraySnapshot | None:
    """Return the cached model inputs of an encoder's preprocessing, None where there are none."""
    name = encoder.preprocess.id
    if not array_folder.has_array(cache, "pixels", name):
        return None
    return KeyedArray.open(cache, "pixels", name).snapshot()
