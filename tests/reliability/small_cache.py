"""A small cache with everything in it, made without a model: two encoders, all kinds of arrays, a table, indexes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine import index
from engine.cache import Cache
from engine.dataset import Dataset
from tests.engine.fakes import FakeEncoder, dataset_of, folder_dataset, settle, write_images

CHUNK_BYTES = 16 * 24  # 16 rows of an embedding a chunk, 2 of pixels: borders are crossed cheaply
SAMPLES = 20
EVERYTHING = ("image", "text", "pixels", "tokens@1")
FIRST, SECOND = "fake-fp32-0123456789ab", "other-fp32-ba9876543210"


def encoders() -> list[FakeEncoder]:
    """Return the two encoders of the cache: they share preprocessing and dimension."""
    made = [FakeEncoder(FIRST), FakeEncoder(SECOND)]
    for encoder in made:
        encoder.description["preprocess"] = encoder.preprocess.description  # as real encoders have it
    return made


def write_dataset(folder: Path, count: int = SAMPLES, first: int = 0, name: str = "fake") -> Dataset:
    """Write images and return them as a data set with texts; two samples a patient, three patients share a text."""
    write_images(folder, range(first, first + count))
    return reopened(folder, name)


def reopened(folder: Path, name: str = "fake") -> Dataset:
    """Return a folder of such images as a data set, as it is now."""
    uris = sorted(path.name for path in folder.iterdir())
    texts = [f"text of {int(uri[:4])}" if number % 7 else "no finding" for number, uri in enumerate(uris)]
    return dataset_of(uris, folder_dataset(folder).reader, texts, name=name)


def fill(
    cache: Path,
    dataset: Dataset,
    with_: Sequence[FakeEncoder] | None = None,
    what: Sequence[str] = EVERYTHING,
) -> Cache:
    """Embed a data set with some encoders (both) and index its images."""
    settle()
    opened = Cache(cache)
    for encoder in with_ or encoders():
        opened.embed(dataset, encoder, what, batch_size=8)
        index.build_index(opened, encoder.id)
    return opened


def rows_by_key(cache: Path) -> dict[tuple[str, str], dict[bytes, bytes]]:
    """Return what a cache holds, whatever the order of its rows: payload by key of each array."""
    opened, found = Cache(cache), {}
    for kind, name in opened.arrays():
        array = opened.array(kind, name)
        assert len(np.unique(array.keys, axis=0)) == len(array), "a key stands twice"
        found[kind, name] = {
            key.tobytes(): row.tobytes() for key, row in zip(array.keys, array.read_all(), strict=True)
        }
    return found


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """Give a file another content (None: none) and put the old one back afterwards."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, at: int, mask: int) -> bytes:
    """Return content with some bits of one byte turned."""
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]
