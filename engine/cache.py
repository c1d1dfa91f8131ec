"""The embedding cache: a data set and an encoder in, aligned features out; what is there is never computed again.

`Cache.embed` computes what is missing and says what it reused and what failed. `Cache.features`, `tokens` and `pixels`
give the rows of a data set's samples in its order; a sample without a row is listed as missing, never filled in.
Everything is addressed by content, so it makes no difference which data set, path or run a row came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine import embed, extract
from engine.arrays import array_folder, array_format
from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.storage import Storage, storage_of
from engine.blocks import Work
from engine.cluster import Cluster
from engine.dataset import Dataset
from engine.embed import EmbedReport
from engine.errors import CacheError, UsageError
from engine.extract import EncoderLike
from engine.features import Features, StoredRows, align, normalized
from engine.keys import key_of_text
from engine.last_use import mark_use
from engine.plan import Plan, make_plan
from engine.products import product_of
from engine.row_buffer import COMMIT_SECONDS, Tally
from engine.sample_keys import SampleKeys, stacked
from engine.unfinished import UnfinishedJob


class Cache:
    """Keyed arrays, sample tables and indexes, in a folder or anywhere else; a folder also holds the jobs' runs.

    A cache object learns the keys of a data set's images once; files that change later are seen by the next `embed`, or
    by another cache object.

    Parameters
    ----------
    place : path, URL or Storage
        A folder, made when something is first written to it; a ``.zip`` or ``.tar``; or what fsspec opens, such as
        ``memory://name``, ``s3://bucket/cache`` or ``https://host/cache``, see `engine.arrays.storage`. Archives
        and web servers are read-only, and elsewhere than in folders one process writes at a time.

    Raises
    ------
    CacheError
        It was written by a newer format version, or there is none where none can be made.
    UsageError
        The URL cannot be opened.
    """

    def __init__(self, place: str | os.PathLike[str] | Storage) -> None:
        self.storage = storage_of(place)
        self._arrays: dict[tuple[str, str], KeyedArray] = {}
        self._sample_keys = SampleKeys(self.storage)
        root = f"{array_format.STORE}/{array_format.METADATA}"
        try:
            version = json.loads(self.storage.read(root))["attributes"]["format_version"]
        except FileNotFoundError:
            if not self.storage.writable:
                raise CacheError(f"there is no cache at {self.address}: it has no {root}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{self.storage.place(root)} cannot be read as a cache's metadata ({error!r})") from error
        else:
            array_format.check_version(version, Path(self.storage.place(root)))

    @property
    def address(self) -> str:
        """Where the cache is, as a user names it: a path or a URL."""
        return self.storage.address

    @property
    def path(self) -> Path:
        """Folder of the cache; CacheError where it is no folder of this machine."""
        return self.storage.local_folder()

    @property
    def runs_path(self) -> Path:
        """Folder of the jobs' records."""
        return self.path / "runs"

    @property
    def indexes_path(self) -> Path:
        """Folder of the search indexes."""
        return self.path / "indexes"

    @property
    def datasets_path(self) -> Path:
        """Folder of the sample tables."""
        return self.path / "datasets"

    # -- What is there -----------------------------------------------------------------------------------------------

    def arrays(self) -> list[tuple[str, str]]:
        """Return (kind, name) of all keyed arrays."""
        return array_folder.list_arrays(self.storage)

    def array(self, kind: str, name: str) -> ArraySnapshot:
        """Return a keyed array with all rows committed so far; CacheError naming what there is where it is missing.

        Its row numbers hold for as long as it is held. Those of an array that was asked for at another time may be
        others: rows are renumbered when a cache is compacted.
        """
        known = self._arrays.get((kind, name))
        if known is not None:
            known.refresh()
            return known.snapshot()
        there: list[str] = []
        if not array_folder.has_array(self.storage, kind, name):
            with suppress(CacheError):  # some web servers do not tell what they have
                there = [other for other_kind, other in self.arrays() if other_kind == kind]
            raise CacheError(
                f"the cache {self.address} has no {kind} rows of {name!r}"
                + (f"; it has those of {', '.join(there)}" if there else "")
                + "; `fluoro embed` computes them"
            )
        self._arrays[kind, name] = KeyedArray.open(self.storage, kind, name)
        mark_use(self.storage, kind, name)
        return self._arrays[kind, name].snapshot()

    def encoders(self) -> list[dict[str, Any]]:
        """Return the encoders that have rows here: id, rows by kind, and their whole description."""
        found: dict[str, dict[str, Any]] = {}
        for kind, name in self.arrays():
            if kind in ("image", "text"):
                array = self.array(kind, name)
                entry = found.setdefault(name, {"id": name, "rows": {}, "description": dict(array.form.description)})
                entry["rows"][kind] = len(array)
        return list(found.values())

    # -- Computing ---------------------------------------------------------------------------------------------------

    def embed(
        self,
        dataset: Dataset,
        encoder: EncoderLike,
        what: Sequence[str] = ("image",),
        *,
        batch_size: int | None = None,
        threads: int | None = None,
        commit_rows: int | None = None,
        commit_seconds: float = COMMIT_SECONDS,
        rehash: bool = False,
        limits: Mapping[str, int] | None = None,
        compiled: bool | None = None,
        settled: Callable[[Plan], object] | None = None,
        cluster: Cluster | None = None,
        progress: extract.Progress | None = None,
    ) -> EmbedReport:
        """Compute and store what is missing of a data set.

        Parameters
        ----------
        dataset : Dataset
        encoder : EncoderLike
        what : sequence of str
            "image" and "text" embeddings, "pixels" (the model's input before mean and standard deviation) and
            "tokens@LAYER" (what enters that block; -1 is the last).
        batch_size : int, optional
            Of every batch, the last one filled up; 32 on a CPU, 256 elsewhere. A stopped job that is gone on with
            keeps its own, unless another one is given.
        threads : int, optional
            Threads that read and decode; as many as there are cores, at most 16, for a worker its share of them.
        commit_rows : int, optional
            Rows a commit; 64 MiB unless given.
        commit_seconds : float
            Commit at least this often.
        rehash : bool
            Read all files, also those that look unchanged.
        limits : mapping, optional
            ``max_pixels``: larger images are refused (decompression bombs).
        compiled : bool, optional
            Compile the image tower; by default as in the stopped job that is gone on with, else where the size of the
            job repays it.
        settled : callable(plan), optional
            Told the plan, with nothing left open, before images are computed; not where none is left to compute.
        cluster : Cluster, optional
            Workers that compute, see `engine.cluster.start_cluster`; this process unless given.
        progress : callable(name, done, total), optional

        Returns
        -------
        EmbedReport

        Raises
        ------
        UsageError
            An unknown product or limit.
        CacheError
            The cache cannot be written. What is committed stays valid, and the same call goes on from there.
        KeyboardInterrupt
            After Ctrl-C, with what was computed committed.
        """
        if isinstance(what, str):
            raise UsageError(f"what is a list of products, such as [{what!r}]")
        products = {product.what: product for product in (product_of(name, encoder) for name in what)}
        unfinished = UnfinishedJob(self.storage, encoder.id, dataset.name, list(products))
        plan = make_plan(
            encoder,
            batch_size=batch_size,
            threads=threads,
            commit_rows=commit_rows,
            commit_seconds=commit_seconds,
            limits=limits,
            compiled=compiled,
            kept=unfinished.kept(),
            cluster=cluster,
        )
        return embed.embed_dataset(
            self.storage,
            self._sample_keys,
            dataset,
            encoder,
            list(products.values()),
            plan,
            unfinished,
            rehash=rehash,
            progress=progress,
            settled=settled,
            cluster=cluster,
        )

    # -- Reading -----------------------------------------------------------------------------------------------------

    def features(
        self,
        dataset: Dataset,
        encoder: EncoderLike | str,
        kind: Literal["image", "text"] = "image",
        *,
        normalize: bool = False,
        dtype: type[np.floating] | np.dtype = np.float32,
    ) -> Features:
        """Return the embeddings of a data set's samples, in its order.

        Parameters
        ----------
        dataset : Dataset
        encoder : EncoderLike or str
            An encoder or its id.
        kind : "image" or "text"
        normalize : bool
            Scale rows to length one (a row of zeros stays).
        dtype : numpy dtype

        Raises
        ------
        CacheError
            Nothing of this encoder is in the cache, or a row is damaged.
        """
        found = self.stored_features(dataset, encoder, kind)
        values = found[:].astype(dtype)
        return Features(normalized(values) if normalize else values, found.rows, found.keys, found.missing)

    def stored_features(
        self, dataset: Dataset, encoder: EncoderLike | str, kind: Literal["image", "text"] = "image"
    ) -> StoredRows:
        """Return the rows that `features` would read, (m, dim) float16, read when asked for.

        Raises
        ------
        CacheError
            Nothing of this encoder is in the cache.
        """
        return self._stored(dataset, kind, encoder if isinstance(encoder, str) else encoder.id)

    def pixels(self, dataset: Dataset, preprocess: Any) -> StoredRows:
        """Return the cached model inputs of a data set's samples, read when asked for; (m, h, w, 3) uint8.

        Parameters
        ----------
        dataset : Dataset
        preprocess : Preprocess or str
            A preprocessing or its id.
        """
        return self._stored(dataset, "pixels", preprocess if isinstance(preprocess, str) else preprocess.id)

    def tokens(self, dataset: Dataset, encoder: EncoderLike, layer: int) -> StoredRows:
        """Return the cached tokens that enter block `layer`, read when asked for; (m, n, width) float16."""
        return self._stored(dataset, "tokens", product_of(f"tokens@{layer}", encoder).name)

    def _stored(self, dataset: Dataset, kind: str, name: str) -> StoredRows:
        array = self.array(kind, name)
        keys = self.text_keys(dataset) if kind == "text" else self.image_keys(dataset)
        stored, rows, missing = align(dataset, keys, array)
        return StoredRows(array, stored, rows, missing)

    def text_features(self, texts: Sequence[str], encoder: EncoderLike, *, normalize: bool = False) -> np.ndarray:
        """Return embeddings of texts such as prompts, (n, dim) float32; computed once, then taken from the cache.

        Raises
        ------
        UsageError
            An empty text, or none.
        CacheError
            A text's embedding cannot be stored (not finite).
        """
        texts = list(texts)
        if not texts or not all(texts):
            raise UsageError(f"{'an empty text' if texts else 'no text'} cannot be embedded; give at least one word")
        work = Work(self.storage, None, (product_of("text", encoder),), make_plan(encoder), encoder.id)
        tally = Tally({"text": 0})
        embed.embed_texts(work, encoder, texts, tally)
        for text in texts:
            if failure := tally.failed_keys.get(key_of_text(text)):
                raise CacheError(f"the text {text!r} cannot be embedded: {failure[1]}")
        array = self.array("text", encoder.id)
        values = array.read(array.find(stacked([key_of_text(text) for text in texts]))).astype(np.float32)
        return normalized(values) if normalize else values

    def image_keys(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's images, (n, 16) uint8; zeros where there is no image or it cannot be read.

        Unchanged files are recognised by their fingerprints, others are read.
        """
        return self._sample_keys.of_images(dataset)

    def text_keys(self, dataset: Dataset) -> np.ndarray:
        """Return the keys of a data set's texts, (n, 16) uint8; zeros where there is none."""
        return self._sample_keys.of_texts(dataset)
