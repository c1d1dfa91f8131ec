"""From a uri to the pixels that a model sees, in threads, some images ahead and in order.

Threads, because Pillow lets go of Python's lock while it decodes and scales. What cannot be read or decoded comes back
as a reason; any other error comes out where the image's result would have been.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine.arrays.array_snapshot import ArraySnapshot
from engine.dataset import Fingerprint, Reader
from engine.errors import ImageError
from engine.keys import key_of_content
from engine.row_buffer import RowBuffer

# More threads than these only get into one another's way.
MOST_THREADS = 16

Input = TypeVar("Input")
Output = TypeVar("Output")


class ImageWork(NamedTuple):
    """One image to look at: its position in the data set, its uri, and its key where that is known.

    Of known keys, what lacks a row and where the pixel cache has the image (-1: nowhere) is looked up for many at once.
    That place is a hint: who computes may have opened the pixel cache after a compaction that numbered its rows anew.
    """

    position: int
    uri: str
    key: bytes | None
    lacking: tuple[str, ...] | None = None
    pixel_row: int = -1


class Decoded(NamedTuple):
    """What became of one image: pixels uint8 (h, w, 3), None where nothing of it is missing, or a failure's reason."""

    work: ImageWork
    key: bytes | None = None
    pixels: np.ndarray | None = None
    fingerprint: Fingerprint | None = None
    read_at: int = 0
    failure: str = ""


class Decoder:
    """Reads one image and makes the model's input of it; runs in threads.

    Parameters
    ----------
    reader : Reader
    preprocess : callable
        ``image -> (pixels, geometry)``, see `engine.pixels.Preprocess`.
    decode : callable
        ``content -> image``, see `engine.pixels.decode`; raises ImageError.
    buffers : sequence of RowBuffer
        What is to be computed: content of which everything is stored is not decoded.
    pixels : ArraySnapshot, optional
        The pixel cache of this preprocessing, used instead of decoding.
    """

    def __init__(
        self,
        reader: Reader,
        preprocess: Any,
        decode: Callable[[Any], Any],
        buffers: Sequence[RowBuffer],
        pixels: ArraySnapshot | None,
    ) -> None:
        self._reader, self._preprocess, self._decode = reader, preprocess, decode
        self._buffers, self._pixels = buffers, pixels

    def __call__(self, work: ImageWork) -> Decoded:
        """Return pixels or the reason why there are none."""
        if work.key is not None and work.pixel_row >= 0:
            cached = self._cached(work.key, work.pixel_row)
            if cached is not None:
                return Decoded(work, work.key, cached)
        key, read_at, fingerprint = work.key, time.time_ns(), None
        try:
            fingerprint = self._reader.fingerprint(work.uri)
            content = self._reader.read(work.uri)
            key = key_of_content(content)
            pixels = None
            if work.lacking or any(buffer.lacks_one(key) for buffer in self._buffers):
                pixels = self._cached(key)
                if pixels is None:
                    pixels, _ = self._preprocess(self._decode(content))
            return Decoded(work, key, pixels, fingerprint, read_at)
        except ImageError as error:
            return Decoded(work, key, None, fingerprint, read_at, str(error))

    def _cached(self, key: bytes, likely: int = -1) -> np.ndarray | None:
        """Return the cached pixels of a key, which may be in the likely row; None where there are none."""
        if self._pixels is None:
            return None
        keys, row = self._pixels.keys, np.array([likely])
        if not (0 <= likely < len(keys) and keys[likely].tobytes() == key):
            row = self._pixels.find(np.frombuffer(key, np.uint8)[None])
        return self._pixels.read(row)[0] if row[0] >= 0 else None


def default_threads() -> int:
    """Return how many threads read and decode: the cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def ordered_map(
    function: Callable[[Input], Output], items: Iterable[Input], threads: int, ahead: int
) -> Generator[Output, None, None]:
    """Yield function(item) in order, computed by threads at most `ahead` items before they are asked for.

    An error in a thread is raised at the next result that is asked for, however far ahead it happened; then, or when
    the caller stops, no further item is begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: deque[Future[Output]] = deque()
    errors: list[BaseException] = []

    def watched(item: Input) -> Output:
        try:
            return function(item)
        except BaseException as error:
            errors.append(error)
            raise

    def next_result() -> Output:
        if errors:
            raise errors[0]
        return waiting.popleft().result()

    try:
        for item in items:
            waiting.append(pool.submit(watched, item))
            if len(waiting) >= ahead:
                yield next_result()
        while waiting:
            yield next_result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
