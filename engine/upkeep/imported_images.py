"""Where the images lie that rows of imported embeddings are of: below a folder or URL, or in tars.

A root and what a row says of its image come in; the image's bytes go out. clip-retrieval writes into ``image_path``
what its reader calls an image. Of files (``--input_format files``) that is the path. Of img2dataset's and other
webdataset tars (``--input_format webdataset``) it is the sample's key, which is the member's name up to its file name's
first dot, such as ``000010042``; the tar itself is not told, so a key that several tars or rows have is no answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from engine.errors import ImageError
from engine.keys import key_of_text
from engine.sample_scan import in_blocks, names_of
from engine.sources import open_dataset
from engine.sources.files import FileReader
from engine.sources.remote import RemoteReader, open_reader
from engine.sources.tar import key_and_extension
from engine.sources.tar_reader import member_name

TARS = "tar:"
SUFFIXES = (".jpg", ".png", ".webp", ".jpeg")
# Digits of a key of img2dataset that are its shard's number, and so the folder of the files that it writes.
SHARD_DIGITS = 5
MOST_NAMED = 3
ONE_TAR = "import the embeddings of one tar at a time, each with --root tar:FILE"


class Images(Protocol):
    """What gives the image that a row names."""

    def read(self, value: str) -> bytes:
        """Return an image's encoded bytes; ImageError with the reason where it cannot be had. From any thread."""


def open_images(root: str | Path | None) -> Images:
    """Return the images of a root.

    Parameters
    ----------
    root : str or Path, optional
        Folder or URL that the paths are relative to, or ``tar:PATTERN`` (with the options of `open_tar`, such as
        ``?image=webp``); the folder of this process unless given.

    Raises
    ------
    UsageError, DataError
        No such folder or tar, or no image in the tars.
    """
    if root is not None and str(root).startswith(TARS):
        return ImagesInTars(str(root))
    return ImagesBelow(root)


class ImagesBelow:
    """Image files by their paths, or by img2dataset's keys (``<shard>/<key>.jpg``)."""

    def __init__(self, root: str | Path | None) -> None:
        self._root = None if root is None else open_reader(str(root), str(root))
        self._here, self._anywhere = FileReader(str(Path.cwd())), FileReader("/")

    def read(self, value: str) -> bytes:
        """See `Images.read`."""
        problem: ImageError | None = None
        for reader, uri in self._places(value):
            try:
                return reader.read(uri)
            except ImageError as error:
                problem = problem or error
        raise problem or ImageError(f"{value}: not found")

    def _places(self, value: str) -> Iterator[tuple[FileReader | RemoteReader, str]]:
        reader = self._root or (self._anywhere if value.startswith("/") else self._here)
        yield reader, value
        if self._root is not None and value.startswith("/"):
            yield self._anywhere, value
        if value.isdigit() and len(value) > SHARD_DIGITS:
            for suffix in SUFFIXES:
                yield reader, f"{value[:SHARD_DIGITS]}/{value}{suffix}"


class ImagesInTars:
    """Images in webdataset tars by their samples' keys; holds a number for each key, and no object.

    Parameters
    ----------
    schema : str
        ``tar:PATTERN``.
    """

    def __init__(self, schema: str) -> None:
        samples = open_dataset(schema, fields="")
        self._reader = samples.reader
        self._uris = names_of(samples, "uri")
        numbers = np.zeros(len(samples), np.uint64)
        for start, uris in in_blocks(self._uris):
            numbers[start : start + len(uris)] = [_number(_key(uri)) for uri in uris]
        self._rows = np.argsort(numbers, kind="stable")
        self._numbers = numbers[self._rows]
        self._repeated = np.zeros(0, np.uint64)

    def check_rows(self, values: Iterable[Sequence[str]]) -> None:
        """Look through what all rows say: rows that say the same may be of different tars, and get no image."""
        blocks = [np.array([_number(value.removeprefix("./")) for value in some], np.uint64) for some in values]
        numbers, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *blocks]), return_counts=True)
        self._repeated = numbers[counts > 1]

    def read(self, value: str) -> bytes:
        """See `Images.read`."""
        key = value.removeprefix("./")
        number = np.uint64(_number(key))
        if np.searchsorted(self._repeated, number) < np.searchsorted(self._repeated, number, "right"):
            raise ImageError(f"{value}: several rows have this key, which may be one of several tars; {ONE_TAR}")
        # The second is for tables in which somebody wrote the whole name.
        found = self._find(key) or self._find(key_and_extension(value)[0])
        if not found:
            raise ImageError(f"{value}: no sample of the tars has this key, or none with an image")
        if len(found) > 1:
            tars = ", ".join(uri.partition(":")[0] for uri in found[:MOST_NAMED])
            raise ImageError(f"{value}: {len(found)} samples have this key ({tars}); {ONE_TAR}")
        content = self._reader.read(found[0])
        assert isinstance(content, bytes)
        return content

    def _find(self, key: str) -> list[str]:
        """Return the uris of all samples with a key."""
        number = np.uint64(_number(key))
        rows = self._rows[np.searchsorted(self._numbers, number) : np.searchsorted(self._numbers, number, "right")]
        return [uri for uri in self._uris.take(pa.array(rows)).to_pylist() if key and _key(uri) == key]


def _key(uri: str) -> str:
    return key_and_extension(member_name(uri))[0] if uri else ""


def _number(key: str) -> int:
    return int.from_bytes(key_of_text(key)[:8], "big")
