"""The keys of a data set's images and texts: learned once, from the sample table where files are unchanged.

Comes in: data sets. Goes out: (n, 16) keys, zeros where there is no content or it cannot be read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from engine import sample_table
from engine.dataset import Dataset, Reader
from engine.decoding import ordered_map
from engine.errors import ImageError
from engine.keys import KEY_BYTES, key_of_content, key_of_text
from engine.sample_table import Scan

log = logging.getLogger(__name__)

NO_KEY = bytes(KEY_BYTES)
MANY = 1000


class SampleKeys:
    """What one cache object knows of the contents behind uris.

    Parameters
    ----------
    cache : Path
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[int, tuple[Reader, dict[str, bytes]]] = {}

    def of_images(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's images, (n, 16) uint8; unchanged files are recognised, others read."""
        known = self._keys_by_uri(dataset.reader)
        uris = dataset.samples["uri"].tolist()
        unknown = [position for position, uri in enumerate(uris) if uri and uri not in known]
        if unknown:
            part = dataset.take(np.array(unknown))
            scan = self.scan(part)
            self._read(part, scan)
            self.remember(part, scan)
        return stacked([known.get(uri, NO_KEY) if uri else NO_KEY for uri in uris])

    def of_texts(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's texts, (n, 16) uint8; zeros where there is none."""
        return stacked([key_of_text(text) if text else NO_KEY for text in dataset.samples["text"]])

    def scan(self, dataset: Dataset, *, rehash: bool = False) -> Scan:
        """Look at all images without reading them, see `engine.sample_table`."""
        return sample_table.scan_dataset(dataset, sample_table.load_table(self._path(dataset)), rehash=rehash)

    def remember(self, dataset: Dataset, scan: Scan) -> None:
        """Keep what a scan has found for as long as this object lives."""
        known = self._keys_by_uri(dataset.reader)
        known.update(zip(dataset.samples["uri"], map(bytes, scan.keys), strict=True))

    def save(self, dataset: Dataset, scan: Scan) -> None:
        """Write what a scan has found to the sample table."""
        lock = self._cache / "locks" / "datasets" / f"{dataset.name}.lock"
        sample_table.save_table(self._path(dataset), dataset, scan, lock, self._cache / "tmp" / "datasets")

    def _path(self, dataset: Dataset) -> Path:
        return self._cache / "datasets" / f"{dataset.name}.parquet"

    def _keys_by_uri(self, reader: Reader) -> dict[str, bytes]:
        # Held with the reader itself, so that its id is not given to another one.
        return self._known.setdefault(id(reader), (reader, {}))[1]

    def _read(self, dataset: Dataset, scan: Scan) -> None:
        """Read the content that the table does not know, to learn its keys."""
        uris = dataset.samples["uri"].tolist()
        todo = [p for p in range(len(dataset)) if not scan.known[p] and p not in scan.failures]
        if len(todo) > MANY:
            log.info("reading %d images of %s to learn their keys", len(todo), dataset.schema)

        def key_of(position: int) -> bytes:
            try:
                return key_of_content(dataset.reader.read(uris[position]))
            except ImageError as error:
                log.debug("no key for %s: %s", uris[position], error)
                return NO_KEY

        workers = default_workers()
        with closing(ordered_map(key_of, todo, workers, ahead=8 * workers)) as keys:
            for position, key in zip(todo, keys, strict=True):
                if key != NO_KEY:
                    scan.learn(position, key, None, 0)


def default_workers() -> int:
    """Return how many threads read and decode: the cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def stacked(keys: Sequence[bytes]) -> np.ndarray:
    """Return keys as (n, 16) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
