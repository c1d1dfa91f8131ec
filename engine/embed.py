"""What `Cache.embed` does: find what is missing of a data set, have it computed, say what became of each sample.

Comes in: a data set, an encoder, the products asked for. Goes out: rows in the cache, the data set's sample table, and
an `EmbedReport`. What is missing is computed in this process or, by blocks, in the workers of a cluster. A failure
belongs to content, so every sample with that content is listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from engine import blocks, extract
from engine.arrays.row_lookup import first_occurrences
from engine.arrays.storage import storage_of
from engine.blocks import Block, Computed, Work
from engine.cluster import Cluster
from engine.dataset import Dataset
from engine.decoding import Decoded, ImageWork
from engine.errors import CacheError
from engine.extract import EncoderLike
from engine.keys import KEY_BYTES, key_of_text
from engine.plan import Plan
from engine.products import Product
from engine.row_buffer import RowBuffer, Tally
from engine.sample_keys import SampleKeys
from engine.sample_scan import Scan, in_blocks, names_of
from engine.unfinished import UnfinishedJob

FAILURE_COLUMNS = ["id", "uri", "what", "reason"]
SECONDS_BETWEEN_TABLES = 120.0
# Texts are sorted by length within so many samples: enough to fill batches also where few are missing, few enough to be
# tokenised in seconds, which a kill may cost.
TEXTS_A_WINDOW = 1 << 15
# What a worker's block of texts is counted in: enough to fill batches of several lengths.
TEXTS_A_BATCH = 512
Failure = tuple[int, str, str]


class Doubles(NamedTuple):
    """How many samples have the content of an earlier one, and the ids of the first two of one content ("" without)."""

    samples: int
    first: str = ""
    second: str = ""


@dataclass(frozen=True)
class EmbedReport:
    """What `Cache.embed` did.

    Parameters
    ----------
    computed : dict of str to int
        Rows computed and stored, by product; with workers, all rows of its samples that were stored meanwhile.
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
    doubles : dict of str to Doubles
        Samples that have the content of an earlier one, for "image" and "text", as far as they were asked for.
    """

    computed: dict[str, int]
    reused: dict[str, int]
    failures: pd.DataFrame
    opened: int
    seconds: float
    waits: dict[str, float]
    bytes: int
    doubles: dict[str, Doubles] = field(default_factory=dict)


def embed_dataset(
    cache: Any,
    sample_keys: SampleKeys,
    dataset: Dataset,
    encoder: EncoderLike,
    products: Sequence[Product],
    plan: Plan,
    unfinished: UnfinishedJob,
    *,
    rehash: bool,
    progress: extract.Progress | None,
    settled: Callable[[Plan], object] | None = None,
    cluster: Cluster | None = None,
) -> EmbedReport:
    """Compute and store what is missing; see `engine.cache.Cache.embed`.

    `settled` is told the plan, with nothing left open, before images are computed; `unfinished` keeps it until nothing
    is left to compute.
    """
    start = time.perf_counter()
    tally = Tally({product.what: 0 for product in products})
    job = _Job(sample_keys, dataset, encoder, tally, progress, cluster)

    def begin(settled_plan: Plan) -> None:
        unfinished.begin(settled_plan)
        if settled is not None:
            settled(settled_plan)

    work = Work(cache, dataset.reader, blocks.ordered(products), plan, encoder.id)
    images = replace(work, products=tuple(product for product in work.products if product.kind != "text"))
    texts = replace(work, products=tuple(product for product in work.products if product.kind == "text"))
    failed: list[Failure] = []
    if images.products:
        failed += job.embed_images(images, rehash, begin)
    if texts.products:
        failed += job.embed_texts(texts)
    unfinished.finish()
    failures = _failure_table(dataset, failed)
    return EmbedReport(
        computed=tally.computed,
        reused=_reused(dataset, products, tally, failures),
        failures=failures,
        opened=tally.opened,
        seconds=time.perf_counter() - start,
        waits=tally.seconds,
        bytes=sum(tally.computed[what] * buffer.row_bytes for what, buffer in work.buffers().items()),
        doubles=job.doubles,
    )


class _Job:
    """One embedding of a data set: the scan, what is missing, where it is computed, the failures by sample."""

    def __init__(
        self,
        sample_keys: SampleKeys,
        dataset: Dataset,
        encoder: EncoderLike,
        tally: Tally,
        progress: extract.Progress | None,
        cluster: Cluster | None,
    ) -> None:
        self._sample_keys, self._dataset, self._encoder = sample_keys, dataset, encoder
        self._tally, self._progress, self._cluster = tally, progress, cluster
        self._told = False
        self.doubles: dict[str, Doubles] = {}

    def _tell(self, plan: Plan) -> None:
        """Say how the job computes, once, where it begins."""
        if not self._told:
            plan.say(self._encoder)
        self._told = True

    def _settled(self, plan: Plan, images: int) -> Plan:
        """Return the plan with nothing left open, by the machine that computes."""
        if self._cluster is None:
            return plan.settled(self._encoder, images)
        return self._cluster.settled(plan, self._encoder, images)

    # -- Images ------------------------------------------------------------------------------------------------------

    def embed_images(self, work: Work, rehash: bool, begin: Callable[[Plan], object]) -> list[Failure]:
        """Compute what is missing of the images, where anything is after a word to `begin`; return failures."""
        scan = self._sample_keys.scan(self._dataset, rehash=rehash)
        lost = ",".join(product.what for product in work.products)
        self._tally.failed_positions = {position: (lost, why) for position, why in scan.failures.items()}
        wanted = self._wanted(work, scan)
        self._check_storage(work, len(wanted), rows_lack=bool(scan.known[wanted].any()))
        if len(wanted):
            work = replace(work, plan=self._settled(work.plan, len(wanted)))
            self._tell(work.plan)
            begin(work.plan)
        try:
            if len(wanted):
                self._compute(work, self._images(work, scan, wanted), len(wanted), scan)
        except BaseException:
            # Also after an error or Ctrl-C: what was read once need not be read again.
            with suppress(CacheError):
                self._sample_keys.save(self._dataset, scan)
            raise
        self._sample_keys.save(self._dataset, scan)
        self._sample_keys.remember(self._dataset, scan)
        for buffer in work.buffers().values():
            buffer.finish()
        failed = [(position, *failure) for position, failure in self._tally.failed_positions.items()]
        failed += self._failed_contents(scan.keys, scan.known)
        self.doubles["image"] = _doubles(self._dataset, scan.keys, failed)
        return failed

    def _wanted(self, work: Work, scan: Scan) -> np.ndarray:
        """Return where to look: at images without a known key, and the first of each content that lacks a row."""
        lacking = np.zeros(len(self._dataset), bool)
        known = np.flatnonzero(scan.known)
        first = known[first_occurrences(scan.keys[known])]
        for buffer in work.buffers().values():
            lacking[first] |= buffer.lacks(scan.keys[first])
        has_image = np.asarray(pc.not_equal(names_of(self._dataset, "uri"), "").combine_chunks())
        has_image[list(scan.failures)] = False
        return np.flatnonzero(has_image & (lacking | ~scan.known))

    def _images(self, work: Work, scan: Scan, wanted: np.ndarray) -> Iterator[ImageWork]:
        """Yield the images at some positions, with what is known of them, a block of names at a time."""
        buffers, pixels = work.buffers(), blocks.pixel_cache(work.cache, self._encoder)
        for start, uris in in_blocks(names_of(self._dataset, "uri").take(pa.array(wanted))):
            positions = wanted[start : start + len(uris)]
            keys, known = scan.keys[positions], scan.known[positions]
            rows = pixels.find(keys) if pixels is not None else np.full(len(keys), -1)
            lacks = {what: buffer.lacks(keys) for what, buffer in buffers.items()}
            for place, (position, uri) in enumerate(zip(positions.tolist(), uris, strict=True)):
                if known[place]:
                    lacking = tuple(what for what, mask in lacks.items() if mask[place])
                    yield ImageWork(position, uri, bytes(keys[place]), lacking, int(rows[place]))
                else:
                    yield ImageWork(position, uri, None)

    def _compute(self, work: Work, images: Iterator[ImageWork], total: int, scan: Scan) -> None:
        save = self._table_saver(scan)
        if self._cluster is None:

            def learn(decoded: Decoded) -> None:
                if decoded.key is not None and decoded.read_at:
                    scan.learn(decoded.work.position, decoded.key, decoded.fingerprint, decoded.read_at)

            blocks.compute_images(
                work, self._encoder, images, total, self._tally, learn, on_commit=save, progress=self._progress
            )
            return
        rows, before = self._cluster.block_rows(total, work.plan.batch_size), work.buffers()
        parts = (Block(images=part) for part in _parts(images, rows))

        def take(computed: Computed) -> None:
            self._tally.include(computed.tally)
            for learned in computed.learned:
                scan.learn(*learned)
            save()

        self._cluster.compute(work, self._encoder, parts, "embed images", total, take, self._progress)
        self._count_added(work, before, scan.keys[scan.known])

    def _table_saver(self, scan: Scan) -> Callable[[], None]:
        """Return what saves the sample table now and then, so that a killed first run need not read all again."""
        last = time.monotonic()

        def save() -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_TABLES:
                self._sample_keys.save(self._dataset, scan)
                last = time.monotonic()

        return save

    # -- Texts -------------------------------------------------------------------------------------------------------

    def embed_texts(self, work: Work) -> list[Failure]:
        """Compute the texts that have no row yet, each once, in their order; return failures by position."""
        self._tally.failed_keys.clear()
        keys = self._sample_keys.of_texts(self._dataset)
        there: np.ndarray = np.asarray(keys.any(axis=1))
        positions = np.flatnonzero(there)
        first = positions[first_occurrences(keys[positions])]
        (buffer,) = work.buffers().values()
        wanted = first[buffer.lacks(keys[first])] if len(first) else first
        self._check_storage(work, len(wanted), rows_lack=len(wanted) > 0)
        work = replace(work, plan=replace(work.plan, compiled=False, compiled_reason="text towers never are"))
        if len(wanted):
            self._tell(work.plan)
            self._compute_texts(work, self._windows(wanted), keys[wanted])
        for buffer in work.buffers().values():
            buffer.finish()
        failed = self._failed_contents(keys, there)
        self.doubles["text"] = _doubles(self._dataset, keys, failed)
        return failed

    def _windows(self, wanted: np.ndarray) -> Iterator[list[str]]:
        """Yield the texts at some positions, ascending, window by window.

        Windows are places in the data set, not numbers of texts that are missing: a job that goes on has the same ones.
        """
        names = names_of(self._dataset, "text")
        for positions in np.split(wanted, np.flatnonzero(np.diff(wanted // TEXTS_A_WINDOW)) + 1):
            yield names.take(pa.array(positions)).to_pylist()

    def _compute_texts(self, work: Work, windows: Iterator[list[str]], keys: np.ndarray) -> None:
        total = len(keys)
        if self._cluster is None:
            blocks.compute_texts(work, self._encoder, windows, total, self._tally, progress=self._progress)
            return
        rows, before = self._cluster.block_rows(total, TEXTS_A_BATCH), work.buffers()
        parts = (Block(texts=part) for part in _parts(chain.from_iterable(windows), rows))

        def take(computed: Computed) -> None:
            self._tally.include(computed.tally)

        self._cluster.compute(work, self._encoder, parts, "embed texts", total, take, self._progress)
        self._count_added(work, before, keys)

    def _count_added(self, work: Work, before: Mapping[str, RowBuffer], keys: np.ndarray) -> None:
        """Count the rows that have come: a worker that was killed could not tell of those that it had committed."""
        keys = keys[first_occurrences(keys)]
        for what, buffer in work.buffers().items():
            self._tally.computed[what] = int((before[what].lacks(keys) & ~buffer.lacks(keys)).sum())

    def _check_storage(self, work: Work, wanted: int, *, rows_lack: bool) -> None:
        """Raise CacheError before anything is computed that could not be stored."""
        storage = storage_of(work.cache)
        if rows_lack:
            storage.check_writable()
        if wanted and self._cluster is not None and not storage.shared:
            raise CacheError(
                f"the cache {storage.address} can be written by one process only, not by a cluster's workers; embed "
                "without --workers and --scheduler, or name a folder that all workers see"
            )

    def _failed_contents(self, keys: np.ndarray, there: np.ndarray) -> list[Failure]:
        """Return the failures of all samples whose content failed."""
        failures = self._tally.failed_keys
        if not failures:
            return []
        among = np.frombuffer(b"".join(failures), f"S{KEY_BYTES}")
        candidates = np.flatnonzero(np.isin(keys.view(f"S{KEY_BYTES}").ravel(), among) & there)
        found = [(position, failures.get(bytes(keys[position]))) for position in candidates.tolist()]
        return [(position, *failure) for position, failure in found if failure]


def embed_texts(work: Work, encoder: EncoderLike, texts: Sequence[str], tally: Tally) -> None:
    """Compute those of some texts that have no row yet, each once, in their order."""
    (buffer,) = work.buffers().values()
    different = [text for text in dict.fromkeys(texts) if text]
    lacking = [text for text in different if buffer.lacks_one(key_of_text(text))]
    if lacking:
        blocks.compute_texts(work, encoder, [lacking], len(lacking), tally)


def _parts(items: Iterator[Any], rows: int) -> Iterator[list[Any]]:
    """Yield lists of so many items, the last one shorter."""
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == rows:
            yield part
            part = []
    if part:
        yield part


def _failure_table(dataset: Dataset, failed: Sequence[tuple[int, str, str]]) -> pd.DataFrame:
    """Return failures in the data set's order as a table."""
    ordered = sorted(failed, key=lambda failure: failure[0])
    samples = dataset.samples.iloc[[position for position, _, _ in ordered]]
    rows = zip(samples["id"], samples["uri"], ordered, strict=True)
    return pd.DataFrame([(sample, uri, what, why) for sample, uri, (_, what, why) in rows], columns=FAILURE_COLUMNS)


def _doubles(dataset: Dataset, keys: np.ndarray, failed: Sequence[Failure]) -> Doubles:
    having = np.asarray(keys.any(axis=1))
    having[[position for position, _, _ in failed]] = False
    there = np.flatnonzero(having)
    twice = np.ones(len(there), bool)
    twice[first_occurrences(keys[there])] = False
    again = there[twice]
    if not len(again):
        return Doubles(0)
    first = there[(keys[there] == keys[again[0]]).all(axis=1)][0]
    return Doubles(len(again), str(dataset.ids[first]), str(dataset.ids[again[0]]))


def _reused(dataset: Dataset, products: Sequence[Product], tally: Tally, failures: pd.DataFrame) -> dict[str, int]:
    lost = [name for names in failures["what"] for name in names.split(",")]
    reused = {}
    for product in products:
        having = int((dataset.samples["text" if product.kind == "text" else "uri"] != "").sum())
        reused[product.what] = max(having - tally.computed[product.what] - lost.count(product.what), 0)
    return reused
