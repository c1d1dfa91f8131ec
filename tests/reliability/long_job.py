"""A job of more than forty chunks that takes its time, without a model: what the tests kill, starve and interrupt."""

from __future__ import annotations

import multiprocessing
import os
import select
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays import array_format
from engine.arrays.array_folder import list_arrays
from engine.arrays.array_verify import verify_array
from engine.cache import Cache
from engine.dataset import Dataset
from engine.embed import EmbedReport
from tests.engine.fakes import FakeEncoder, FolderReader, dataset_of, write_images

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend the test's time on imports
CHUNK_BYTES = 16 * 24  # 16 rows of an embedding a chunk, 2 of pixels
SAMPLES, BATCH = 96, 8
WHAT = ("image", "pixels", "text", "tokens@1")
NAME = "fake-fp32-0123456789ab"


class SlowEncoder(FakeEncoder):
    """Takes its time for a batch, and notes the rows that it computes in a file, where no kill can undo it."""

    def __init__(self, seconds: float = 0.0, notes: Path | None = None, name: str = NAME) -> None:
        super().__init__(name)
        self.seconds, self.notes = seconds, notes

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        if self.notes is not None:
            with self.notes.open("ab") as file:
                file.write(bytes([len(pixels)]))
        return super().encode_pixels(pixels)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        time.sleep(self.seconds)
        return super().encode_text(texts)


class Signal:
    """Tells another process that something has happened; unlike an event's lock, a pipe outlives a killed holder."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def give(self) -> None:
        os.write(self._writing, b".")

    def wait(self, process: Any, seconds: float = 60.0) -> None:
        """Wait until it is given or the process has ended, and take it."""
        ready = select.select([self._reading, process.sentinel], [], [], seconds)[0]
        assert ready, "the other process said nothing"
        if self._reading in ready:
            os.read(self._reading, 1 << 16)

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


class SignallingReader(FolderReader):
    """Says when the first image is read."""

    def __init__(self, root: Path, signal: Signal) -> None:
        super().__init__(root)
        self._signal = signal

    def read(self, uri: str) -> bytes:
        if not self.opened:
            self._signal.give()
        return super().read(uri)


def dataset_in(folder: Path, signal: Signal | None = None) -> Dataset:
    """Return the images of a folder, with texts of which some are alike; `signal` is given at the first read."""
    if not folder.exists():
        write_images(folder, range(SAMPLES))
    uris = sorted(path.name for path in folder.iterdir())
    texts = [f"{'a ' * (number % 3)}text of {uri}" if number % 7 else "no finding" for number, uri in enumerate(uris)]
    return dataset_of(uris, FolderReader(folder) if signal is None else SignallingReader(folder, signal), texts)


def embed(cache: Path, dataset: Dataset, encoder: FakeEncoder | None = None, **plan: Any) -> EmbedReport:
    """Do the job: a commit every second batch."""
    plan = {"batch_size": BATCH, "threads": 2, "commit_rows": 2 * BATCH, **plan}
    return Cache(cache).embed(dataset, encoder or SlowEncoder(), WHAT, **plan)


def chunks_of(cache: Path) -> int:
    """Return how many chunks of payload a cache holds."""
    return sum(len(list(Cache(cache).array(*name).folder.glob("[!kc]*/c.*"))) for name in list_arrays(cache))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_valid(cache: Path) -> None:
    """Hold every array against its checks, also while others add to it; no key may stand twice."""
    for kind, name in list_arrays(cache):
        rows, damage = verify_array(cache, kind, name)
        keys = Cache(cache).array(kind, name).keys
        assert damage == [] and rows <= len(keys) == len(np.unique(keys, axis=0))


def small_chunks(patch: Any) -> None:
    """Make chunks small, and leave out syncing, which only a power cut needs."""
    patch.setattr(array_format, "CHUNK_BYTES", CHUNK_BYTES)
    patch.setattr(os, "fsync", lambda descriptor: None)
