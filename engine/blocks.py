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

from engine import extract
from engine.arrays import array_folder
from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.keyed_array import KeyedArray
from engine.batches import make_runner
from engine.dataset import Fingerprint, Reader
from engine.decoding import Decoded, Decoder, ImageWork
from engine.extract import EncoderLike
from engine.keys import key_of_text
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
    work: Work, encoder: EncoderLike, block: Block, *, stopped: Callable[[], bool] = lambda: False
) -> Computed:
    """Compute and store one block in this process, or as many of its batches as it takes to be `stopped`."""
    done = Computed(Tally({product.what: 0 for product in work.products}))

    def learn(decoded: Decoded) -> None:
        if decoded.key is not None and decoded.read_at:
            done.learned.append((decoded.work.position, decoded.key, decoded.fingerprint, decoded.read_at))

    def heed(name: str, so_far: int, total: int) -> None:
        if stopped():
            raise _Stopped

    with suppress(_Stopped):
        if block.images:
            compute_images(work, encoder, block.images, len(block.images), done.tally, learn, progress=heed)
        if block.texts:
            compute_texts(work, encoder, [block.texts], len(block.texts), done.tally, progress=heed)
    return done


def compute_images(
    work: Work,
    encoder: EncoderLike,
    images: Sequence[ImageWork] | Iterator[ImageWork],
    total: int,
    tally: Tally,
    learned: Callable[[Decoded], None],
    *,
    on_commit: Callable[[], None] | None = None,
    progress: extract.Progress | None = None,
) -> None:
    """Compute and store what is missing of images; see `engine.extract.extract_images`."""
    buffers, plan = work.buffers(), work.plan
    extract.extract_images(
        images,
        total,
        make_runner(encoder, plan.batch_size, compiled=bool(plan.compiled)),
        buffers,
        {product.what: product.layer for product in work.products if product.layer is not None},
        _decoder(work, encoder, buffers),
        tally,
        CommitPolicy(plan.commit_rows, plan.commit_seconds, on_commit=on_commit),
        threads=plan.threads,
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
    progress: extract.Progress | None = None,
) -> None:
    """Compute and store texts that are all different; see `engine.extract.extract_texts`."""
    buffers, plan = work.buffers(), work.plan
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
