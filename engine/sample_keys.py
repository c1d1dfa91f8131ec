"""The keys of a data set's images and texts: learned once, from the sample table where files are unchanged.

Comes in: data sets. Goes out: (n, 16) keys, zeros where there is no content or it cannot be read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine import sample_table
from engine.arrays.storage import Storage, storage_of
from engine.dataset import Dataset, Reader
from engine.decoding import default_threads, ordered_map
from engine.errors import ImageError
from engine.keys import KEY_BYTES, key_of_content
from engine.sample_scan import Scan, find_names, in_blocks, names_of, scan_dataset

log = logging.getLogger(__name__)

MANY = 1000


class _Known(NamedTuple):
    """What is known of one reader's images: uris and their keys, (n, 16), zeros where it could not be read."""

    reader: Reader
    uris: pa.ChunkedArray
    keys: np.ndarray


class SampleKeys:
    """What one cache object knows of the contents behind uris.

    Parameters
    ----------
    cache : path, URL or Storage
    """

    def __init__(self, cache: str | os.PathLike[str] | Storage) -> None:
        self._storage = storage_of(cache)
        self._known: dict[int, _Known] = {}

    def of_images(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's images, (n, 16) uint8; unchanged files are recognised, others read."""
        uris = names_of(dataset, "uri")
        places = self._places(dataset, uris)
        unknown = np.flatnonzero((places < 0) & np.asarray(pc.not_equal(uris, "").combine_chunks()))
        if len(unknown):
            part = dataset.take(unknown)
            scan = self.scan(part)
            self._read(part, scan)
            self.remember(part, scan)
            places = self._places(dataset, uris)
        keys = np.zeros((len(dataset), KEY_BYTES), np.uint8)
        found = places >= 0
        if found.any():
            keys[found] = self._known[id(dataset.reader)].keys[places[found]]
        return keys

    def of_texts(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's texts, (n, 16) uint8; zeros where there is none."""
        return sample_table.text_keys(dataset)[0]

    def scan(self, dataset: Dataset, *, rehash: bool = False) -> Scan:
        """Look at all images without reading them, see `engine.sample_scan`."""
        return scan_dataset(dataset, sample_table.load_from(self._storage, dataset.name), rehash=rehash)

    def remember(self, dataset: Dataset, scan: Scan) -> None:
        """Keep what a scan has found for as long as this object lives."""
        uris, keys = names_of(dataset, "uri"), scan.keys
        known = self._known.get(id(dataset.reader))
        if known is not None and not known.uris.equals(uris):
            kept = find_names(known.uris, uris) < 0
            uris = pa.chunked_array([*known.uris.filter(pa.array(kept)).chunks, *uris.chunks])
            keys = np.concatenate([known.keys[kept], keys])
        # Held with the reader itself, so that its id is not given to another one.
        self._known[id(dataset.reader)] = _Known(dataset.reader, uris, keys)

    def save(self, dataset: Dataset, scan: Scan) -> None:
        """Write what a scan has found to the sample table, where it can be written."""
        if not self._storage.writable:
            log.debug("%s is read-only, so its table of %s stays as it is", self._storage.address, dataset.name)
            return
        sample_table.save_table(self._storage, dataset.name, dataset, scan)

    def _places(self, dataset: Dataset, uris: pa.ChunkedArray) -> np.ndarray:
        known = self._known.get(id(dataset.reader))
        return np.full(len(uris), -1) if known is None else find_names(uris, known.uris)

    def _read(self, dataset: Dataset, scan: Scan) -> None:
        """Read the content that the table does not know, to learn its keys."""
        failed = np.zeros(len(dataset), bool)
        failed[list(scan.failures)] = True
        todo = np.flatnonzero(~scan.known & ~failed)
        if len(todo) > MANY:
            log.info("reading %d images of %s to learn their keys", len(todo), dataset.schema)
        uris = names_of(dataset, "uri").take(pa.array(todo))

        def key_of(uri: str) -> bytes | None:
            try:
                return key_of_content(dataset.reader.read(uri))
            except ImageError as error:
                log.debug("no key for %s: %s", uri, error)
                return None

        threads = default_threads()
        names = (uri for _, some in in_blocks(uris) for uri in some)
        with closing(ordered_map(key_of, names, threads, ahead=8 * threads)) as keys:
            for position, key in zip(todo.tolist(), keys, strict=True):
                if key is not None:
                    scan.learn(position, key, None, 0)


def stacked(keys: Sequence[bytes]) -> np.ndarray:
    """Return keys as (n, 16) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
