"""What `Cache.embed` does: find what is missing of a data set, run the pipeline, say what became of each sample.

Comes in: a data set, an encoder, the products asked for. Goes out: rows in the cache, the data set's sample table, and
an `EmbedReport`. A failure belongs to content, so every sample with that content is listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from engine import array_folder, extract
from engine.batches import make_runner
from engine.dataset import Dataset
from engine.decoding import Decoded, Decoder, ImageWork
from engine.durable import make_folder
from engine.errors import CacheError, UsageError
from engine.extract import EncoderLike
from engine.keyed_array import KeyedArray
from engine.keys import KEY_BYTES, key_of_text
from engine.plan import Plan
from engine.row_buffer import CommitPolicy, RowBuffer, Tally
from engine.row_lookup import first_occurrences
from engine.sample_keys import SampleKeys, stacked
from engine.sample_scan import in_blocks, names_of

FAILURE_COLUMNS = ["id", "uri", "what", "reason"]
PRODUCTS = ("image", "text", "pixels", "tokens@LAYER")
# Pixels are committed before what is computed from them.
COMMIT_ORDER = ("pixels", "tokens", "image", "text")
SECONDS_BETWEEN_TABLES = 120.0


@dataclass(frozen=True)
class EmbedReport:
    """What `Cache.embed` did.

    Parameters
    ----------
    computed : dict of str to int
        Rows computed and stored, by product.
    reused : dict of str to int
        Samples whose row was there already, or is that of another sample with the same content.
    failures : DataFrame
        Columns id, uri, what, reason; in the data set's order.
    opened : int
        Images that were read.
    seconds : float
    waits : dict of str to float
        Seconds the driving thread spent waiting for "decode", in "encode" and in "store"; the largest is the limit.
    bytes : int
        Payload bytes added to the cache.
    """

    computed: dict[str, int]
    reused: dict[str, int]
    failures: pd.DataFrame
    opened: int
    seconds: float
    waits: dict[str, float]
    bytes: int


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


def embed_dataset(
    cache: Path,
    sample_keys: SampleKeys,
    dataset: Dataset,
    encoder: EncoderLike,
    products: Sequence[Product],
    plan: Plan,
    *,
    rehash: bool,
    progress: extract.Progress | None,
    settled: Callable[[Plan], object] | None = None,
) -> EmbedReport:
    """Compute and store what is missing; see `engine.cache.Cache.embed`.

    `settled` is told the plan, with nothing left open, before anything is computed.
    """
    start = time.perf_counter()
    make_folder(cache)
    tally = Tally({product.what: 0 for product in products})
    ordered = sorted(products, key=lambda product: COMMIT_ORDER.index(product.kind))
    buffers = {p.what: RowBuffer(cache, p.what, p.kind, p.name, p.description) for p in ordered}
    failed: list[tuple[int, str, str]] = []
    images = [product for product in ordered if product.kind != "text"]
    if images:
        job = _ImageJob(cache, sample_keys, dataset, encoder, images, buffers, tally, plan, settled)
        failed += job.run(rehash, progress)
    elif settled is not None:
        settled(plan.settled(encoder, 0))
    if "text" in buffers:
        failed += _embed_texts(dataset, encoder, buffers["text"], tally, plan, progress)
    failures = _failure_table(dataset, failed)
    return EmbedReport(
        computed=tally.computed,
        reused=_reused(dataset, products, tally, failures),
        failures=failures,
        opened=tally.opened,
        seconds=time.perf_counter() - start,
        waits=tally.seconds,
        bytes=sum(tally.computed[what] * buffer.row_bytes for what, buffer in buffers.items()),
    )


def embed_texts(
    texts: Sequence[str],
    encoder: EncoderLike,
    buffer: RowBuffer,
    tally: Tally,
    plan: Plan,
    progress: extract.Progress | None = None,
) -> None:
    """Compute the texts that have no row yet, each once, in their order."""
    different = [text for text in dict.fromkeys(texts) if text]
    keys = [key_of_text(text) for text in different]
    lacking = np.flatnonzero(buffer.lacks(stacked(keys))) if keys else np.empty(0, np.int64)
    if not len(lacking):
        return
    extract.extract_texts(
        [different[row] for row in lacking],
        [keys[row] for row in lacking],
        encoder,
        buffer,
        tally,
        CommitPolicy(plan.commit_rows, plan.commit_seconds),
        progress=progress,
    )
    buffer.finish()


def _embed_texts(
    dataset: Dataset,
    encoder: EncoderLike,
    buffer: RowBuffer,
    tally: Tally,
    plan: Plan,
    progress: extract.Progress | None,
) -> list[tuple[int, str, str]]:
    """Compute a data set's texts; return failures as (position, what, reason)."""
    texts = dataset.samples["text"].tolist()
    tally.failed_keys.clear()
    embed_texts(texts, encoder, buffer, tally, plan, progress)
    if not tally.failed_keys:
        return []
    reasons = [tally.failed_keys.get(key_of_text(text)) if text else None for text in texts]
    return [(position, *failure) for position, failure in enumerate(reasons) if failure]


class _ImageJob:
    """One embedding of a data set's images: the scan, what is missing, the pipeline, the failures by sample."""

    def __init__(
        self,
        cache: Path,
        sample_keys: SampleKeys,
        dataset: Dataset,
        encoder: EncoderLike,
        products: Sequence[Product],
        buffers: Mapping[str, RowBuffer],
        tally: Tally,
        plan: Plan,
        settled: Callable[[Plan], object] | None,
    ) -> None:
        self._cache, self._sample_keys, self._dataset, self._encoder = cache, sample_keys, dataset, encoder
        self._tally, self._plan, self._settled = tally, plan, settled
        self._buffers = {product.what: buffers[product.what] for product in products}
        self._layers = {product.what: product.layer for product in products if product.layer is not None}

    def run(self, rehash: bool, progress: extract.Progress | None) -> list[tuple[int, str, str]]:
        """Compute what is missing; return failures as (position, what, reason)."""
        self._scan = self._sample_keys.scan(self._dataset, rehash=rehash)
        lost = ",".join(self._buffers)
        self._tally.failed_positions = {position: (lost, why) for position, why in self._scan.failures.items()}
        wanted = self._wanted()
        self._plan = self._plan.settled(self._encoder, len(wanted))
        if self._settled is not None:
            self._settled(self._plan)
        try:
            if len(wanted):
                extract.extract_images(
                    self._works(wanted),
                    len(wanted),
                    make_runner(self._encoder, self._plan.batch_size, compiled=bool(self._plan.compiled)),
                    self._buffers,
                    self._layers,
                    self._decoder(),
                    self._tally,
                    CommitPolicy(self._plan.commit_rows, self._plan.commit_seconds, on_commit=self._table_saver()),
                    threads=self._plan.threads,
                    learned=self._learn,
                    progress=progress,
                )
        except BaseException:
            # Also after an error or Ctrl-C: what was read once need not be read again.
            with suppress(CacheError):
                self._sample_keys.save(self._dataset, self._scan)
            raise
        self._sample_keys.save(self._dataset, self._scan)
        self._sample_keys.remember(self._dataset, self._scan)
        for buffer in self._buffers.values():
            buffer.finish()
        return self._failures()

    def _wanted(self) -> np.ndarray:
        """Return where to look: at images without a known key, and the first of each content that lacks a row."""
        scan = self._scan
        lacking = np.zeros(len(self._dataset), bool)
        known = np.flatnonzero(scan.known)
        first = known[first_occurrences(scan.keys[known])]
        for buffer in self._buffers.values():
            lacking[first] |= buffer.lacks(scan.keys[first])
        has_image = np.asarray(pc.not_equal(names_of(self._dataset, "uri"), "").combine_chunks())
        has_image[list(scan.failures)] = False
        return np.flatnonzero(has_image & (lacking | ~scan.known))

    def _works(self, wanted: np.ndarray) -> Iterator[ImageWork]:
        """Yield the images at some positions, as names and keys are needed."""
        scan = self._scan
        for start, uris in in_blocks(names_of(self._dataset, "uri").take(pa.array(wanted))):
            for position, uri in zip(wanted[start : start + len(uris)].tolist(), uris, strict=True):
                yield ImageWork(position, uri, bytes(scan.keys[position]) if scan.known[position] else None)

    def _decoder(self) -> Decoder:
        # Imported here: reading a cache needs neither torch nor a decoder.
        from engine import pixels

        most = self._plan.max_pixels or pixels.DEFAULT_MAX_PIXELS
        name = self._encoder.preprocess.id
        at_least = getattr(self._encoder.preprocess, "at_least", None)
        there = ("pixels", name) in array_folder.list_arrays(self._cache)
        return Decoder(
            self._dataset.reader,
            self._encoder.preprocess,
            lambda content: pixels.decode(content, max_pixels=most, at_least=at_least),
            list(self._buffers.values()),
            KeyedArray.open(self._cache, "pixels", name) if there else None,
        )

    def _learn(self, decoded: Decoded) -> None:
        if decoded.key is not None and decoded.read_at:
            self._scan.learn(decoded.work.position, decoded.key, decoded.fingerprint, decoded.read_at)

    def _table_saver(self) -> Callable[[], None]:
        """Return what saves the sample table now and then, so that a killed first run need not read all again."""
        last = time.monotonic()

        def save() -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_TABLES:
                self._sample_keys.save(self._dataset, self._scan)
                last = time.monotonic()

        return save

    def _failures(self) -> list[tuple[int, str, str]]:
        failed = [(position, *failure) for position, failure in self._tally.failed_positions.items()]
        if self._tally.failed_keys:
            among = np.frombuffer(b"".join(self._tally.failed_keys), f"S{KEY_BYTES}")
            candidates = np.isin(self._scan.keys.view(f"S{KEY_BYTES}").ravel(), among) & self._scan.known
            for position in np.flatnonzero(candidates).tolist():
                failure = self._tally.failed_keys.get(bytes(self._scan.keys[position]))
                if failure:
                    failed.append((position, *failure))
        return failed


def _failure_table(dataset: Dataset, failed: Sequence[tuple[int, str, str]]) -> pd.DataFrame:
    """Return failures in the data set's order as a table."""
    ordered = sorted(failed, key=lambda failure: failure[0])
    samples = dataset.samples.iloc[[position for position, _, _ in ordered]]
    rows = zip(samples["id"], samples["uri"], ordered, strict=True)
    return pd.DataFrame([(sample, uri, what, why) for sample, uri, (_, what, why) in rows], columns=FAILURE_COLUMNS)


def _reused(dataset: Dataset, products: Sequence[Product], tally: Tally, failures: pd.DataFrame) -> dict[str, int]:
    lost = [name for names in failures["what"] for name in names.split(",")]
    reused = {}
    for product in products:
        having = int((dataset.samples["text" if product.kind == "text" else "uri"] != "").sum())
        reused[product.what] = max(having - tally.computed[product.what] - lost.count(product.what), 0)
    return reused
