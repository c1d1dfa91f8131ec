"""Extraction: source -> decode -> encode -> store, as one pipeline that loses no sample and no computed row.

Comes in: the samples whose rows are missing, an encoder, and a buffer a product ("image", "pixels", "tokens@3",
"text"). Goes out: rows committed to keyed arrays, in the order in which they were asked for, and the list of failures.

- Decoding threads run a bounded number of images ahead (`engine.decoding`); their results are taken in order. What
  cannot be read or decoded is listed; any other error in a part ends the job with that error.
- Batches have one static shape, the last one is filled up (`engine.batches`): a row's numbers must not depend on its
  neighbours. On a GPU the next batches are under way before the last one's rows are taken.
- Texts come in windows, and within one in the encoder's order, short ones first.
- Commits come after whole batches only, by size and by time, in a thread of their own (`engine.storing`). So a killed
  job goes on at a batch's edge, and the same plan (batch size, compilation) ends with the same bytes.
- Ctrl-C or an error commits what is computed before it goes on its way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

import numpy as np

from engine.batches import Batch, Product, Runner, as_array
from engine.decoding import Decoded, Decoder, ImageWork, ordered_map
from engine.row_buffer import CommitPolicy, RowBuffer, Tally, to_half
from engine.storing import Storing

Item = TypeVar("Item")
Progress = Callable[[str, int, int], object]


class EncoderLike(Protocol):
    """What extraction needs of an encoder; `engine.encoder.Encoder` is one."""

    id: str
    description: dict[str, Any]
    preprocess: Any
    trunk: Any

    def encode_pixels(self, pixels: np.ndarray) -> Any:
        """Return embeddings (b, dim) of uint8 pixels (b, h, w, 3)."""

    def encode_batch(self, pixels: np.ndarray, *, image: bool, layers: Sequence[int]) -> Mapping[Product, Any]:
        """Return embeddings ("image") and what enters some blocks, of one forward pass."""

    def encode_text_batches(self, texts: Sequence[str]) -> Iterator[tuple[Sequence[int] | np.ndarray, Any]]:
        """Yield rows and their embeddings (r, dim), each independent of the others, as soon as they are computed.

        The order of two texts depends on nothing but these two.
        """


def extract_images(
    works: Iterable[ImageWork],
    total: int,
    runner: Runner,
    buffers: Mapping[str, RowBuffer],
    layers: Mapping[str, int],
    decoder: Decoder,
    tally: Tally,
    policy: CommitPolicy,
    *,
    threads: int,
    learned: Callable[[Decoded], None],
    progress: Progress | None = None,
) -> None:
    """Compute and store what is missing of images.

    Parameters
    ----------
    works : iterable of ImageWork
        In the order in which their rows are to stand; taken as they are needed.
    total : int
        How many they are.
    runner : Runner
        Of the encoder, with the plan's batch size.
    buffers : mapping of product to RowBuffer
    layers : mapping of token product to block number
    decoder : Decoder
    tally : Tally
        Filled in as the work goes on, so that it is right also when an error ends it.
    policy : CommitPolicy
    threads : int
        Threads that read and decode.
    learned : callable
        Told each image's key as it becomes known.
    progress : callable(name, done, total), optional
    """
    told = progress or _silent
    encoding = _Encoding(runner, buffers, layers, tally)
    decoding = ordered_map(decoder, works, threads, ahead=2 * (runner.batch_size + threads))
    told("embed images", 0, total)
    with Storing(list(buffers.values()), tally, policy) as store, closing(decoding) as results:
        for done, decoded in enumerate(_timed(results, tally.seconds, "decode"), start=1):
            whole = encoding.take(decoded, learned)
            if whole:
                store.when_due()
            if done < total and (whole or done % runner.batch_size == 0):
                told("embed images", done, total)
        encoding.finish()
        told("embed images", total, total)


class _Encoding:
    """From decoded images to computed rows: fills batches, starts them, and keeps their rows in order."""

    def __init__(
        self, runner: Runner, buffers: Mapping[str, RowBuffer], layers: Mapping[str, int], tally: Tally
    ) -> None:
        self._runner, self._buffers, self._layers, self._tally = runner, buffers, layers, tally
        self._filling: Batch | None = None
        self._under_way: deque[Batch] = deque()

    def take(self, decoded: Decoded, learned: Callable[[Decoded], None]) -> bool:
        """Take one image in; tell whether all rows that are kept so far belong to whole batches."""
        key = _noted(decoded, self._buffers, self._tally, learned)
        if key is None or decoded.pixels is None:
            return self._filling is None
        lacking = decoded.work.lacking if decoded.work.key == key else None
        names = self._buffers if lacking is None else lacking
        wanted = tuple(what for what in names if self._buffers[what].take(key, known=lacking is not None))
        if "pixels" in wanted:
            self._buffers["pixels"].add(key, decoded.pixels)
            wanted = tuple(what for what in wanted if what != "pixels")
        if wanted:
            if self._filling is None:
                self._filling = self._runner.new_batch()
            self._filling.add(key, decoded.pixels, wanted)
            if len(self._filling) == self._runner.batch_size:
                self._start()
                self._keep_all_but(self._runner.ahead)
        return self._filling is None

    def finish(self) -> None:
        """Compute the batch that is not full, and keep all rows."""
        if self._filling is not None:
            self._start()
        self._keep_all_but(0)

    def _start(self) -> None:
        began, batch = time.perf_counter(), self._filling
        assert batch is not None
        layers = sorted({self._layers[what] for wanted in batch.wanted for what in wanted if what in self._layers})
        self._runner.start(batch, any("image" in wanted for wanted in batch.wanted), layers)
        self._under_way.append(batch)
        self._filling = None
        self._tally.seconds["encode"] += time.perf_counter() - began

    def _keep_all_but(self, ahead: int) -> None:
        began = time.perf_counter()
        while len(self._under_way) > ahead:
            batch = self._under_way.popleft()
            answer = self._runner.result(batch)
            for what, buffer in self._buffers.items():
                rows = [row for row, wanted in enumerate(batch.wanted) if what in wanted]
                if rows:
                    values = answer[self._layers.get(what, what)]
                    _keep(buffer, [batch.keys[row] for row in rows], values[rows], self._tally)
        self._tally.seconds["encode"] += time.perf_counter() - began


def extract_texts(
    windows: Iterable[Sequence[str]],
    total: int,
    key_of: Callable[[str], bytes],
    encoder: EncoderLike,
    buffer: RowBuffer,
    tally: Tally,
    policy: CommitPolicy,
    *,
    progress: Progress | None = None,
) -> None:
    """Compute and store the embeddings of so many texts that are all different and all missing.

    Of each window the encoder makes batches as it likes (texts are of many lengths), and their rows stand in the order
    in which it gives them.
    """
    told, done = progress or _silent, 0
    with Storing([buffer], tally, policy) as store:
        for texts in windows:
            computed = ((rows, as_array(values)) for rows, values in encoder.encode_text_batches(texts))
            for rows, values in _timed(computed, tally.seconds, "encode"):
                _keep(buffer, [key_of(texts[row]) for row in rows], values, tally)
                store.when_due()
                done += len(rows)
                told("embed texts", done, total)


def _silent(name: str, done: int, total: int) -> None:
    pass


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


def _noted(
    decoded: Decoded, buffers: Mapping[str, RowBuffer], tally: Tally, learned: Callable[[Decoded], None]
) -> bytes | None:
    """Count a decoded image and list a failure; return its key unless it failed."""
    tally.opened += decoded.read_at > 0
    if decoded.key is not None:
        learned(decoded)
    if not decoded.failure:
        return decoded.key
    failure = (",".join(buffers), decoded.failure)
    if decoded.key is None:
        tally.failed_positions[decoded.work.position] = failure
    else:
        tally.failed_keys[decoded.key] = failure
    return None


def _keep(buffer: RowBuffer, keys: Sequence[bytes], values: np.ndarray, tally: Tally) -> None:
    half, reasons = to_half(values)
    for row, key in enumerate(keys):
        if row in reasons:
            tally.fail(key, buffer.what, reasons[row])
        else:
            buffer.add(key, half[row])
