"""A tiny encoder, preprocessing and reader without torch, for tests of the cache."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

from engine.dataset import Dataset, Fingerprint
from engine.errors import ImageError

SIZE = 8
TEXT_ROWS = 8


class FakePreprocess:
    """Scales to 8 x 8 RGB."""

    def __init__(self, size: int = SIZE) -> None:
        self.id = f"{size}-fake"
        self.size = (size, size)
        self.description = {"id": self.id, "size": [size, size], "mean": [0.5] * 3, "std": [0.5] * 3}

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, None]:
        return np.array(image.convert("RGB").resize(self.size)), None


class FakeEncoder:
    """Projects pixels and hashes texts; counts what it is asked for. Numbers depend on the row alone, and a bit on it.

    ``poison`` maps a red value of the first pixel to a value that its embedding gets.
    """

    def __init__(
        self, name: str = "fake-fp32-0123456789ab", dim: int = 12, poison: dict[int, float] | None = None
    ) -> None:
        self.id, self.dim, self.poison = name, dim, poison or {}
        self.preprocess = FakePreprocess()
        self.description = {"id": name, "dim": dim, "architecture": {"layers": 3}}
        self.trunk = SimpleNamespace(blocks=[None] * 3, kind="vit-token")
        self.projection = np.random.Generator(np.random.PCG64(len(name))).standard_normal((SIZE * SIZE * 3, dim))
        self.image_batches: list[int] = []
        self.text_batches: list[list[str]] = []
        self.sleep = 0.0
        self.fail_at: int | None = None

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        self.image_batches.append(len(pixels))
        time.sleep(self.sleep)
        if self.fail_at is not None and len(self.image_batches) > self.fail_at:
            raise RuntimeError("the device fell off the bus")
        values = self._project(pixels)
        for red, value in self.poison.items():
            values[pixels[:, 0, 0, 0] == red, 0] = value
        return values

    def encode_batch(self, pixels: np.ndarray, *, image: bool = True, layers=()) -> dict:
        answer = {"image": self.encode_pixels(pixels)} if image else {}
        return answer | {layer: self.tokens(pixels, layer) for layer in layers}

    def _project(self, pixels: np.ndarray) -> np.ndarray:
        flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
        return np.stack([row @ self.projection for row in flat]).astype(np.float32)

    def encode_text(self, texts: list[str]) -> np.ndarray:
        self.text_batches.append(list(texts))
        rows = [np.frombuffer(hashlib.sha256(text.encode()).digest()[: self.dim], np.uint8) for text in texts]
        return np.stack(rows).astype(np.float32) / 16

    def encode_text_batches(self, texts) -> Iterator[tuple[list[int], np.ndarray]]:
        rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(rows), TEXT_ROWS):
            chosen = rows[start : start + TEXT_ROWS]
            yield chosen, self.encode_text([texts[row] for row in chosen])

    def tokens(self, pixels: np.ndarray, layer: int) -> np.ndarray:
        return pixels[:, ::4, ::4, :].reshape(len(pixels), 4, 3).astype(np.float32) + layer


class FolderReader:
    """Reads files below a root and counts how often."""

    def __init__(self, root: Path) -> None:
        self.root, self.opened = root, []
        self._lock = threading.Lock()

    def read(self, uri: str) -> bytes:
        with self._lock:
            self.opened.append(uri)
        try:
            return (self.root / uri).read_bytes()
        except OSError as error:
            raise ImageError(f"{uri}: {error.strerror}") from error

    def fingerprint(self, uri: str) -> Fingerprint:
        try:
            status = os.stat(self.root / uri)
        except OSError as error:
            raise ImageError(f"{uri}: {error.strerror}") from error
        return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class ArrayReader:
    """Draws pixels from the uri's number, as phantoms are drawn; there is no file and no fingerprint."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def read(self, uri: str) -> np.ndarray:
        self.opened.append(uri)
        return np.random.Generator(np.random.PCG64(int(uri))).integers(0, 256, (10, 10), np.uint8)

    def fingerprint(self, uri: str) -> None:
        return None


def write_images(folder: Path, numbers) -> None:
    """Write one small PNG a number, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        rng = np.random.Generator(np.random.PCG64(number))
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / f"{number:04d}.png")


def dataset_of(uris, reader, texts=None, name: str = "fake") -> Dataset:
    """Return a data set of uris (and texts) with one label."""
    count = len(uris)
    samples = pd.DataFrame(
        {
            "id": [f"s{number}" for number in range(count)],
            "uri": list(uris),
            "text": list(texts) if texts is not None else [""] * count,
            "group": [f"p{number // 2}" for number in range(count)],
            "view": [""] * count,
            "split": [""] * count,
        }
    )
    labels = (np.arange(count)[:, None] % 2).astype(np.int8)
    return Dataset("fake:" + name, name, samples, ("Odd",), labels, reader)


def folder_dataset(folder: Path, texts=None) -> Dataset:
    """Return a data set of all files of a folder with a fresh reader."""
    return dataset_of(sorted(path.name for path in folder.iterdir()), FolderReader(folder), texts)


def settle() -> None:
    """Wait until files just written are older than a scan's moment."""
    time.sleep(0.08)
