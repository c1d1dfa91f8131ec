"""Search in the samples of a data set: rows of an index on one side, samples with their patients on the other.

Comes in: an index and which of its rows belong to which samples. Goes out: the nearest samples of each query, the right
number of them: a filter is applied before the search, several samples may share a row (the same image twice), a sample
can be left out of its own neighbours, and only the best of each group be kept. Preparing takes time in proportion to
the samples, answering a query does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from engine.index import Index

# How many times more rows are asked for where the first did not give enough samples.
MORE = 4


@dataclass(frozen=True)
class Hits:
    """The nearest samples of one query, best first.

    Parameters
    ----------
    scores : ndarray of float32, (h,)
    samples : ndarray of int64, (h,)
        Positions in the data set.
    """

    scores: np.ndarray
    samples: np.ndarray


class SampleSearch:
    """An index over a data set's samples.

    Parameters
    ----------
    index : Index
    stored : ndarray of int64, (m,)
        Row of the index that each sample has, by `Index.array`; rows that it does not cover are left out.
    positions : ndarray of int64, (m,)
        The samples.
    groups : ndarray, (n,), optional
        Group of each sample of the data set, where only the best sample of each is wanted.
    """

    def __init__(
        self, index: Index, stored: np.ndarray, positions: np.ndarray, groups: np.ndarray | None = None
    ) -> None:
        covered = (stored >= 0) & (stored < len(index))
        order = np.argsort(stored[covered], kind="stable")
        self._index = index
        self._positions = positions[covered][order]
        rows, self._starts = np.unique(stored[covered][order], return_index=True)
        self._starts = np.append(self._starts, len(order))
        self._rows = rows.astype(np.int64)
        self._all = len(rows) == len(index)
        self._codes = None if groups is None else pd.factorize(groups)[0]

    def __len__(self) -> int:
        return len(self._positions)

    def search(self, queries: np.ndarray, k: int, own: np.ndarray | None = None) -> list[Hits]:
        """Return the k nearest samples of each query, fewer where there are fewer.

        Parameters
        ----------
        queries : ndarray of float, (q, dim)
        k : int
        own : ndarray of int64, (q,), optional
            A sample that each query must not find, -1 for none.
        """
        found: list[Hits | None] = [None] * len(queries)
        own = np.full(len(queries), -1) if own is None else own
        waiting, wanted = np.arange(len(queries)), k + int((own >= 0).any())
        while len(waiting):
            asked = min(wanted, max(len(self._rows), 1))
            scores, rows = self._index.search_rows(queries[waiting], asked, among=None if self._all else self._rows)
            for place, number in enumerate(waiting.tolist()):
                hits = self._hits(scores[place], rows[place], k, int(own[number]))
                if len(hits.samples) == k or asked >= len(self._rows):
                    found[number] = hits
            waiting = np.array([number for number in waiting.tolist() if found[number] is None], np.int64)
            wanted *= MORE
        return [hits for hits in found if hits is not None]

    def _hits(self, scores: np.ndarray, rows: np.ndarray, k: int, own: int) -> Hits:
        there = rows >= 0
        rows, scores = rows[there], scores[there]
        at = rows if self._all else np.searchsorted(self._rows, rows)
        counts = self._starts[at + 1] - self._starts[at]
        if (counts == 1).all():
            samples = self._positions[self._starts[at]]
        else:
            samples = np.concatenate([self._positions[self._starts[i] : self._starts[i + 1]] for i in at.tolist()])
            scores = np.repeat(scores, counts)
        kept = samples != own
        samples, scores = samples[kept], scores[kept]
        if self._codes is not None and len(samples):
            first = np.sort(np.unique(self._codes[samples], return_index=True)[1])
            samples, scores = samples[first], scores[first]
        return Hits(scores[:k], samples[:k])
