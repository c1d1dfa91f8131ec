"""An index in memory, which answers in cosines and rows whatever kind it is.

Comes in: queries of any length. Goes out: scores and rows (or keys), best first. Exact search and every filter that
leaves few rows go over the cache's own rows (`engine.index.exact`); approximate kinds are searched by FAISS, on the GPU
where that works. What an index of compressed rows finds is ranked again by the rows themselves, so scores are cosines
everywhere, and a filter never leaves fewer answers than there are rows that pass it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.arrays.array_snapshot import ArraySnapshot
from engine.cache import Cache
from engine.errors import UsageError
from engine.features import normalized
from engine.index.description import IndexInfo
from engine.index.devices import on_gpu
from engine.index.kinds import HNSW_SEARCH, cells_of, is_lossy
from engine.keys import KEY_BYTES

if TYPE_CHECKING:
    from engine.index.exact import ExactRows

# Below so many rows exact search is both faster and right.
FEW_ROWS = 50_000
# How many times k a compressed index is asked for, to be ranked again.
AGAIN = 4


class Index:
    """A search index in memory.

    Parameters
    ----------
    info : IndexInfo
    keys : ndarray of uint8, (rows, 16)
        Of the rows it covers.
    array : ArraySnapshot
        The rows themselves, by whose numbers the index answers; exact search goes over these.
    faiss, engine : module and faiss index, optional
        Of an approximate kind.
    """

    def __init__(
        self, info: IndexInfo, keys: np.ndarray, array: ArraySnapshot, faiss: Any = None, engine: Any = None
    ) -> None:
        self.info, self.keys, self.array, self._faiss = info, keys, array, faiss
        self._engine: Any = None if info.how == "exact" else engine
        self._lossy = is_lossy(info.how, str(info.parameters.get("factory", "")))
        self._gpu: Any = None
        if self._engine is not None:
            cells = cells_of(faiss, self._engine)
            if cells is not None and "nprobe" in info.parameters:
                cells.nprobe = info.parameters["nprobe"]
            self._gpu = on_gpu(faiss, self._engine, info.name)

    def __len__(self) -> int:
        return self.info.rows

    @cached_property
    def _rows(self) -> ExactRows:
        # Torch is imported here: whoever only builds, lists or verifies an index does not wait for it.
        from engine.index.devices import search_device
        from engine.index.exact import ExactRows

        return ExactRows(self.array, self.info.rows, search_device())

    @property
    def engine(self) -> Any:
        """The bare FAISS index; None for exact search."""
        return self._engine

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
        """Return scores as `search` and row numbers, (q, k) int64, -1 where there are fewer than k.

        Raises
        ------
        UsageError
            Queries of another dimension, a query with NaN or infinity, k below 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.info.dim:
            raise UsageError(f"queries must have shape (q, {self.info.dim}) for {self.info.name}, not {queries.shape}")
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        wrong = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(wrong):
            raise UsageError(f"query {wrong[0]} holds NaN or infinity, so nothing is near to it")
        if among is not None and not _ascending(among):
            among = np.unique(np.asarray(among, np.int64))
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        some = min(k, len(self) if among is None else len(among))
        if some and len(queries):
            scores[:, :some], rows[:, :some] = self._nearest(queries, some, among)
        scores[rows < 0] = -np.inf
        return scores, rows

    def exactly(self) -> Index:
        """Return exact search over the same rows, by the same numbers."""
        return Index(replace(self.info, how="exact"), self.keys, self.array)

    def behind(self, cache: Cache) -> int:
        """Return how many rows the cache has that this index does not cover."""
        return max(len(cache.array(self.info.kind, self.info.encoder)) - self.info.rows, 0)

    def _nearest(self, queries: np.ndarray, k: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self._engine is None or (among is not None and len(among) <= FEW_ROWS):
            return self._rows.search(queries, k, among)
        parameters = None
        if among is not None:
            parameters = self._filtered(among, k)
            if parameters is None:
                return self._rows.search(queries, k, among)
        scores, rows = self._approximately(queries, k, among, parameters)
        # Cells that were not looked into, or links that the filter cut, may have left too few.
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = self._rows.search(queries[short], k, among)
        return scores, rows

    def _approximately(
        self, queries: np.ndarray, k: int, among: np.ndarray | None, parameters: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        unit = np.ascontiguousarray(normalized(queries.astype(np.float32, copy=False)))
        engine = self._gpu if self._gpu is not None and parameters is None else self._engine
        hnsw = getattr(self._engine, "hnsw", None)
        if hnsw is not None and parameters is None:
            parameters = self._faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * k))
        if not self._lossy:
            return engine.search(unit, k, params=parameters)
        count = len(self) if among is None else len(among)
        _, rows = engine.search(unit, min(AGAIN * k, count), params=parameters)
        return self._ranked_again(queries, rows, k)

    def _ranked_again(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        from engine.index.exact import unit_rows

        query, place = np.nonzero(rows >= 0)
        scores = np.full(rows.shape, -np.inf, np.float32)
        scores[query, place] = self._rows.cosines(unit_rows(queries), query, rows[query, place])
        order = np.lexsort((np.where(rows < 0, len(self), rows), -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _filtered(self, among: np.ndarray, k: int) -> Any:
        """Return FAISS's parameters for a search among some rows, None where this kind of index takes none."""
        faiss, kind = self._faiss, type(self._engine).__name__
        allowed = np.zeros(len(self), bool)
        allowed[among] = True
        selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if kind.startswith("IndexIVF"):
            return faiss.SearchParametersIVF(sel=selector, nprobe=self._engine.nprobe)
        if kind.startswith("IndexHNSW"):
            return faiss.SearchParametersHNSW(sel=selector, efSearch=max(HNSW_SEARCH, 2 * k))
        if kind in ("IndexFlat", "IndexFlatIP", "IndexPQ", "IndexScalarQuantizer"):
            return faiss.SearchParameters(sel=selector)
        return None


def _ascending(rows: np.ndarray) -> bool:
    rows = np.asarray(rows)
    return rows.dtype == np.int64 and bool((rows[1:] > rows[:-1]).all())
