"""Search indexes over the rows of a keyed array, which know what they cover.

Comes in: a cache, an encoder's id, "image" or "text", and a kind of index: ``exact``, ``ivf`` or ``hnsw``. Goes out:
``<cache>/indexes/<encoder>-<kind>-<how>.faiss`` with a JSON beside it that names encoder, kind, metric, number of rows
and the digest of their keys; and an `Index` that answers in scores and keys. The metric is the cosine: inner products
of rows scaled to length one. Under some 50,000 rows exact search is both faster and right.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.arrays.file_digest import file_digest
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.faiss_loader import load_faiss
from engine.features import normalized
from engine.keys import KEY_BYTES, short_hash

log = logging.getLogger(__name__)

How = Literal["exact", "ivf", "hnsw"]
KINDS = ("exact", "ivf", "hnsw")
INDEX_VERSION = 1
FEW_ROWS = 50_000
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128
QUERY_BLOCK = 1024


@dataclass(frozen=True)
class IndexInfo:
    """What stands in the JSON beside an index.

    Parameters
    ----------
    encoder, kind, how : str
    rows : int
        The index covers rows 0 to rows - 1 of the keyed array.
    keys_digest : str
        BLAKE2b over their keys.
    generation : int
        Of the keyed array.
    dim : int
    bytes : int
        Size of the index file.
    file_digest : str
        Of the index file, see `engine.arrays.file_digest`; "" where an earlier version wrote it.
    parameters : dict
        What the index was built with.
    """

    encoder: str
    kind: str
    how: str
    rows: int
    keys_digest: str
    generation: int
    dim: int
    bytes: int = 0
    file_digest: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    metric: str = "cosine"
    version: int = INDEX_VERSION

    @property
    def name(self) -> str:
        """File name without its suffix."""
        return f"{self.encoder}-{self.kind}-{self.how}"

    def document(self) -> builtins.bytes:
        """Return the JSON that stands beside the index, with a digest over all of it."""
        values = asdict(self)
        return (json.dumps({**values, "digest": _document_digest(values)}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> IndexInfo:
        """Read the JSON beside an index; CacheError where there is none, it is damaged or of a newer version."""
        try:
            content = path.read_bytes()
            values = json.loads(content)
            digest = values.pop("digest", None)
            ours = _document_digest({**values, "version": INDEX_VERSION})
            if values["version"] > INDEX_VERSION and digest != ours:  # else it is a damaged digit
                raise CacheError(f"the index {path} is of the newer version {values['version']}; upgrade fluoroscope")
            info = cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"no index {path} ({error})") from error
        if values["version"] > INDEX_VERSION or (digest is not None and content != info.document()):
            raise CacheError(f"the JSON {path} of an index does not match its digest {digest!r}")
        return info

    def damage_of(self, path: Path) -> str:
        """Return what is wrong with the index file that this describes, "" where nothing is."""
        try:
            if path.stat().st_size != self.bytes or file_digest(path) != (self.file_digest or file_digest(path)):
                return f"the index {path} is not the one that its JSON describes"
        except OSError as error:
            return f"the index {path} cannot be read ({error.strerror})"
        return ""


def _document_digest(values: dict[str, Any]) -> str:
    return short_hash(json.dumps(values, sort_keys=True), digits=32)


class Index:
    """A search index in memory.

    Parameters
    ----------
    info : IndexInfo
    keys : ndarray of uint8, (rows, 16)
        Of the rows it covers.
    engine : faiss index or ndarray of float32, (rows, dim)
        Normalised rows where there is no FAISS.
    """

    def __init__(self, info: IndexInfo, keys: np.ndarray, engine: Any) -> None:
        self.info, self.keys, self._engine = info, keys, engine

    def __len__(self) -> int:
        return self.info.rows

    def search(self, queries: np.ndarray, k: int, *, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest rows of each query.

        Parameters
        ----------
        queries : ndarray of float, (q, dim)
            Of any length; they are normalised.
        k : int
        among : ndarray of int, optional
            Search these rows only.

        Returns
        -------
        scores : ndarray of float32, (q, k)
            Cosines, descending; -inf where there are fewer than k.
        keys : ndarray of uint8, (q, k, 16)
            Keys of the rows; zeros where there are fewer than k.
        """
        scores, rows = self.search_rows(queries, k, among=among)
        keys = self.keys[np.maximum(rows, 0)] if len(self.keys) else np.zeros((*rows.shape, KEY_BYTES), np.uint8)
        keys[rows < 0] = 0
        return scores, keys

    def search_rows(
        self, queries: np.ndarray, k: int, *, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores as `search` and row numbers, (q, k) int64, -1 where there are fewer than k."""
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.info.dim:
            raise UsageError(f"queries must have shape (q, {self.info.dim}) for {self.info.name}, not {queries.shape}")
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        queries = np.ascontiguousarray(normalized(queries))
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        some = min(k, len(self) if among is None else len(among))
        if some and len(queries):
            scores[:, :some], rows[:, :some] = self._nearest(queries, some, among)
        scores[rows < 0] = -np.inf
        return scores, rows

    def behind(self, cache: Cache) -> int:
        """Return how many rows the cache has that this index does not cover."""
        return max(len(cache.array(self.info.kind, self.info.encoder)) - self.info.rows, 0)

    def _nearest(self, queries: np.ndarray, k: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self._engine, np.ndarray):
            return _nearest_by_products(self._engine, queries, k, among)
        faiss = load_faiss()
        if faiss is None:
            raise CacheError(f"the index {self.info.name} needs FAISS, which does not work here; see `fluoro doctor`")
        parameters = self._parameters(faiss, k, among)
        parts = [
            self._engine.search(queries[start : start + QUERY_BLOCK], k, params=parameters)
            for start in range(0, len(queries), QUERY_BLOCK)
        ]
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])

    def _parameters(self, faiss: Any, k: int, among: np.ndarray | None) -> Any:
        given: dict[str, Any] = {}
        if among is not None:
            given["sel"] = faiss.IDSelectorBatch(np.ascontiguousarray(among, np.int64))
        if self.info.how == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.info.parameters["nprobe"], **given)
        if self.info.how == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * k), **given)
        return faiss.SearchParameters(**given) if given else None


def build_index(
    cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact", *, seed: int = 0, save: bool = True
) -> Index:
    """Build an index over all rows of an encoder, and write it.

    Parameters
    ----------
    cache : Cache
    encoder_id : str
    kind : "image" or "text"
    how : "exact", "ivf" or "hnsw"
    seed : int
        Of the random rows that an IVF's cells are trained on.
    save : bool
        Otherwise it lives in memory only.

    Raises
    ------
    UsageError
        An unknown kind of index.
    CacheError
        No such rows, or FAISS is needed and does not work.
    """
    if how not in KINDS:
        raise UsageError(f"unknown kind of index {how!r}; known: {', '.join(KINDS)}")
    if kind not in ("image", "text"):
        raise UsageError(f"{kind!r} rows cannot be searched; choose image or text")
    array = cache.array(kind, encoder_id)
    faiss = load_faiss()
    if faiss is None and (how != "exact" or save):
        raise CacheError("FAISS does not work here, so an index cannot be kept; see `fluoro doctor`")
    if how != "exact" and len(array) < FEW_ROWS:
        log.info("%s index of %d rows: below some %d exact search is faster and right", how, len(array), FEW_ROWS)
    keys = array.keys
    rows, dim = len(keys), array.form.row_shape[0]
    info = IndexInfo(
        encoder_id, kind, how, rows, _digest(keys), array.form.generation, dim, parameters=_choose(how, rows)
    )
    if faiss is None:
        return Index(info, keys, np.concatenate([values for _, values in _vectors(array)] or [np.empty((0, dim))]))
    engine = _empty_engine(faiss, info)
    if not engine.is_trained:
        sample = np.random.Generator(np.random.PCG64(seed)).permutation(rows)[: 256 * info.parameters["nlist"]]
        engine.train(normalized(array.read(np.sort(sample)).astype(np.float32)))
    for _, values in _vectors(array):
        engine.add(values)
    index = Index(info, keys, engine)
    return _save(cache, index, faiss) if save else index


def load_index(cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact") -> Index:
    """Load an index that `build_index` wrote.

    Raises
    ------
    CacheError
        There is none (`has_index`), it is newer than this fluoroscope, or it does not belong to these rows (any more).
    """
    storage, name = cache.storage, _name(encoder_id, kind, how)
    rebuild = f"build it (again): fluoro index --cache {cache.address} --encoder {encoder_id} --kind {kind} --how {how}"
    place = storage.place(f"{name}.faiss")
    if not storage.exists(f"{name}.json"):
        raise CacheError(f"no index {place}; {rebuild}")
    try:
        with storage.reading(f"{name}.json") as path:
            info = IndexInfo.read(path)
    except CacheError as error:
        raise CacheError(f"{error}; {rebuild}") from error
    faiss = load_faiss()
    if faiss is None:
        raise CacheError(f"the index {place} needs FAISS, which does not work here; see `fluoro doctor`")
    array = cache.array(kind, encoder_id)
    keys = array.keys[: info.rows]
    if array.form.generation != info.generation or _digest(keys) != info.keys_digest:
        raise CacheError(f"the index {place} was built over other rows than the cache has; {rebuild}")
    with storage.reading(f"{name}.faiss") as path:
        if damage := info.damage_of(path):
            raise CacheError(f"{damage}; {rebuild}")
        try:
            engine = faiss.read_index(str(path))
        except (OSError, RuntimeError) as error:
            raise CacheError(f"the index {place} cannot be read ({error}); {rebuild}") from error
    return Index(info, keys, engine)


def has_index(cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact") -> bool:
    """Tell whether an index of this name is there."""
    return cache.storage.exists(f"{_name(encoder_id, kind, how)}.json")


def _name(encoder_id: str, kind: str, how: str) -> str:
    """Return where an index and its JSON lie in a cache, without their suffixes."""
    return f"indexes/{encoder_id}-{kind}-{how}"


def _digest(keys: np.ndarray) -> str:
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


def _choose(how: str, rows: int) -> dict[str, Any]:
    if how == "hnsw":
        return {"links": HNSW_LINKS, "ef_construction": HNSW_BUILD}
    if how == "ivf":
        # At least 39 rows train a cell (FAISS's own rule); half of the cells' square root would miss text queries.
        cells = max(1, min(round(4 * math.sqrt(rows)), rows // 39))
        return {"nlist": cells, "nprobe": min(cells, max(8, cells // 16))}
    return {}


def _vectors(array: KeyedArray) -> Any:
    for start, values in array.chunks():
        yield start, np.ascontiguousarray(normalized(values.astype(np.float32)))


def _empty_engine(faiss: Any, info: IndexInfo) -> Any:
    if info.how == "hnsw":
        engine = faiss.IndexHNSWFlat(info.dim, info.parameters["links"], faiss.METRIC_INNER_PRODUCT)
        engine.hnsw.efConstruction = info.parameters["ef_construction"]
        return engine
    flat = faiss.IndexFlatIP(info.dim)
    if info.how == "ivf":
        return faiss.IndexIVFFlat(flat, info.dim, info.parameters["nlist"], faiss.METRIC_INNER_PRODUCT)
    return flat


def _save(cache: Cache, index: Index, faiss: Any) -> Index:
    """Write the index, then the JSON that makes it one; each whole or not at all."""
    info, storage = index.info, cache.storage
    name, scratch = _name(info.encoder, info.kind, info.how), "tmp/indexes"
    with storage.lock(f"locks/{name}.lock"):
        with storage.writing(f"{name}.faiss", scratch) as temporary:
            # Not by its name: FAISS overlooks that the last few kilobytes did not fit onto the disk.
            with open(temporary, "wb") as file:
                faiss.write_index(index._engine, faiss.PyCallbackIOWriter(file.write))
            info = replace(info, bytes=temporary.stat().st_size, file_digest=file_digest(temporary))
        storage.put([[(f"{name}.json", [info.document()])]], scratch)
    return Index(info, index.keys, index._engine)


def _nearest_by_products(
    vectors: np.ndarray, queries: np.ndarray, k: int, among: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest inner products and their rows, by blocks of queries, equal scores in row order."""
    rows = np.arange(len(vectors)) if among is None else np.sort(np.asarray(among, np.int64))
    candidates = vectors if among is None else vectors[rows]
    scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        products = queries[start : start + QUERY_BLOCK] @ candidates.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores[start : start + QUERY_BLOCK] = np.take_along_axis(products, order, axis=1)
        found[start : start + QUERY_BLOCK] = rows[order]
    return scores, found
