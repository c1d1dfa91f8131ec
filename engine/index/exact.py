"""Exact nearest rows by blocked matrix products, straight from the mapped rows of the cache.

Comes in: a keyed array (float16, any lengths) and queries. Goes out: the k rows of largest cosine, the same as a
brute-force comparison in float64 gives whatever computed the products; scores are rounded to float32, equal ones stand
in the order of rows. How:

1. A block of rows is converted to float32 and scaled to length one, once, and multiplied with all queries.
2. Every query has a bar: the k-th best product so far, less the bounds on its and the next one's rounding error
   (`Way.error`). What lies below it cannot be among the k best, so only the largest product of each short run of rows
   is compared; almost none is left after the first blocks.
3. What is left at the end, barely more than k rows a query, is compared again in float64.

So bfloat16 may find the candidates where the processor is faster in it: its bar is lower, the answer is the same. A
search of which too much is left (many rows that hardly differ) goes on in float32, its crowded blocks in float64. Each
core takes blocks of its own; memory: a block of rows and one of products a core, and the candidates.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from engine.arrays.array_snapshot import ArraySnapshot
from engine.index.products import Way, fastest_way, on_every_core

# Each core works on a block of its own: 8 MiB of products in float32 stay in the cache they share.
BLOCK_ROWS = 2048
BLOCK_QUERIES = 1024
BLOCK_PRODUCTS = BLOCK_ROWS * BLOCK_QUERIES
# Rows of which the largest product is looked at first.
RUN_ROWS = 64
# Share of a block's runs that may be left before a more exact product takes over, and how many always may.
MOST_LEFT, FEW_LEFT = 1 / 8, 1 << 12
# Pairs of query and row compared in float64 at once.
PAIRS = 1 << 14
FEW_PRODUCTS = 1 << 27


class ExactRows:
    """Exact search over the rows of a keyed array.

    Parameters
    ----------
    array : ArraySnapshot
        Of vectors.
    rows : int
        Rows 0 to rows - 1 are searched.
    way : Way, optional
        How products are computed; by default the fastest on this machine, found at the first large search.
    """

    def __init__(self, array: ArraySnapshot, rows: int, way: Way | None = None) -> None:
        self._array, self._rows, self._way = array, rows, way
        # Of rows that were read once, which also were compared with their checks then.
        self._lengths = np.full(rows, np.nan, np.float32)

    def search(self, queries: np.ndarray, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the k rows of largest cosine to each query.

        Parameters
        ----------
        queries : ndarray of float, (q, d)
            Of any lengths; a query or row of zeros has cosine 0 with all.
        k : int
            At most the number of rows that are searched.
        among : ndarray of int64, (m,), optional
            Search these rows only; ascending, each once.

        Returns
        -------
        scores : ndarray of float32, (q, k)
            Descending.
        rows : ndarray of int64, (q, k)

        Raises
        ------
        CacheError
            A row is damaged.
        """
        count = self._rows if among is None else len(among)
        size = min(max(BLOCK_ROWS, 1 << (4 * k - 1).bit_length()), max(count, 1))
        batch = max(1, min(BLOCK_QUERIES, BLOCK_PRODUCTS // size))
        way = self._way or (fastest_way() if count * len(queries) >= FEW_PRODUCTS else Way("torch"))
        unit = unit_rows(queries)
        parts = [unit[start : start + batch] for start in range(0, len(unit), batch)]
        floors = [np.full(len(part), -np.inf, np.float32) for part in parts]
        blocks, taking = self._blocks(count, size, among), threading.Lock()

        def work() -> list[_Batch]:
            room = torch.empty(-(-size // RUN_ROWS) * RUN_ROWS * batch, device=way.device)
            batches = [
                _Batch(self._array, part, k, way, size, room, floor) for part, floor in zip(parts, floors, strict=True)
            ]
            while True:
                with taking:
                    block = next(blocks, None)
                if block is None:
                    return batches
                scaled = self._scaled(*block, way.device)
                for some in batches:
                    some.take(block[0], scaled, block[1])

        found = on_every_core(work, 1 if way.device != "cpu" else -(-count // size))
        best = [_joined(list(of_part)).result() for of_part in zip(*found, strict=True)]
        return np.concatenate([scores for scores, _ in best]), np.concatenate([rows for _, rows in best])

    def _blocks(self, count: int, size: int, among: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row numbers and values as stored, a block at a time; mapped and not copied where that can be."""
        if among is None and self._array.form.chunk_rows >= size:
            unread = bool(np.isnan(self._lengths).any())
            for start, values in self._array.chunks(verify=unread):
                for first in range(start, min(start + len(values), self._rows), size):
                    last = min(first + size, start + len(values), self._rows)
                    yield np.arange(first, last), values[first - start : last - start]
                if start + len(values) >= self._rows:
                    return
            return
        for first in range(0, count, size):
            numbers = np.arange(first, min(first + size, count)) if among is None else among[first : first + size]
            unread = bool(np.isnan(self._lengths[numbers]).any())
            yield numbers, self._array.read(numbers, verify=unread)

    def cosines(self, unit: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the cosines of pairs in float64 arithmetic, (p,) float32; unit (q, d) float64, query, rows (p,)."""
        return cosines_of_pairs(self._array, unit, query, rows)

    def _scaled(self, numbers: np.ndarray, values: np.ndarray, device: str) -> torch.Tensor:
        """Return rows scaled to length one, (r, d) float32."""
        rows = _tensor(values).to(device).to(torch.float32)
        lengths = self._lengths[numbers]
        if np.isnan(lengths).any():
            lengths = torch.linalg.vector_norm(rows, dim=1).cpu().numpy()
            self._lengths[numbers] = lengths
        factors = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return rows.mul_(torch.from_numpy(factors).to(device)[:, None])


class _Batch:
    """Some queries on their way through the rows.

    Parameters
    ----------
    array : ArraySnapshot
    unit : ndarray of float64, (q, d)
        Queries of length one.
    k : int
    way : Way
    size : int
        Rows of the largest block.
    room : tensor of float32, (at least whole runs of `size` rows times q,)
        Where products are put; batches that take their turns share it.
    floor : ndarray of float32, (q,)
        What the k-th best score of each query is at least, shared by all who work on these queries.
    """

    def __init__(
        self, array: ArraySnapshot, unit: np.ndarray, k: int, way: Way, size: int, room: torch.Tensor, floor: np.ndarray
    ) -> None:
        self._array, self._unit, self._k, self._way = array, unit, k, way
        self._columns = torch.from_numpy(np.ascontiguousarray(unit.T.astype(np.float32))).to(way.device)
        self._run = _run_length(size, k)
        self._out = room[: -(-size // self._run) * self._run * len(unit)].view(-1, len(unit))
        self._floor = floor
        # What is held, the k-th best of it of each query, and how far its scores may be from the truth.
        self._held, self._held_error = _Pairs.none(), 0.0
        self._best = np.full(len(unit), -np.inf, np.float32)

    def take(self, numbers: np.ndarray, scaled: torch.Tensor, values: np.ndarray) -> None:
        """Keep the rows of a block that may be among the best.

        Parameters
        ----------
        numbers : ndarray of int64, (r,)
            Row numbers, ascending from block to block.
        scaled : tensor of float32, (r, d)
            Rows of length one.
        values : ndarray, (r, d)
            Rows as stored.
        """
        found = self._above_bar(scaled)
        if found is None and self._way.library == "bf16":
            self._settle()
            self._way = Way("torch", self._way.device, self._way.rate)
            found = self._above_bar(scaled)
        if found is None:
            self._settle()
            found = self._above_exactly(values)
        if len(found.query):
            found.row = numbers[found.row]
            self._held = self._held.with_more(found)
            if not found.exact.all():
                self._held_error = max(self._held_error, self._way.error(self._unit.shape[1]))
        room = self._k * len(self._unit)
        if len(self._held.query) > 1.5 * room or not np.isfinite(self._floor).all():
            self._drop()
            if len(self._held.query) > 4 * room + FEW_LEFT:
                self._settle()

    def join(self, other: _Batch) -> None:
        """Take over what another worker holds of the same queries."""
        self._held = self._held.with_more(other._held)
        self._held_error = max(self._held_error, other._held_error)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows, (q, k), compared in float64; there must be k rows."""
        self._drop()
        self._settle()
        return self._held.score.reshape(-1, self._k), self._held.row.reshape(-1, self._k)

    def _above_bar(self, scaled: torch.Tensor) -> _Pairs | None:
        """Return what of a block is not below the bar, by places in the block; None where that is too much."""
        rows, queries = len(scaled), len(self._unit)
        products = self._way.multiply(scaled, self._columns, self._out[:rows])
        whole = -(-rows // self._run)
        self._out[rows : whole * self._run] = -torch.inf
        runs = self._out[: whole * self._run].view(whole, self._run, queries)
        largest = runs.amax(1) if self._run > 1 else products
        error = self._way.error(self._unit.shape[1])
        bar = self._floor - np.float32(error)
        if whole >= self._k and not np.isfinite(bar).all():
            # The k-th largest of the runs' largest is not above the k-th largest of all.
            here = torch.topk(largest, self._k, dim=0).values[-1].cpu().numpy()
            bar = np.maximum(bar, here - np.float32(2 * error))
        level = torch.from_numpy(bar).to(products.device)
        above = largest >= level
        crowded = max(MOST_LEFT * above.numel(), 2 * self._k * queries, FEW_LEFT)
        if self._run > 1 and int(above.sum()) > crowded:
            return None
        run, query = torch.nonzero(above, as_tuple=True)
        found = runs[run, :, query]
        pair, place = torch.nonzero(found >= level[query][:, None], as_tuple=True)
        inside = run[pair] * self._run + place
        kept = inside < rows
        pairs, places, scores = (values[kept].cpu().numpy() for values in (query[pair], inside, found[pair, place]))
        return _Pairs(pairs, places, scores, np.zeros(len(pairs), bool))

    def _above_exactly(self, values: np.ndarray) -> _Pairs:
        """Return what of a block may be among the best, compared in float64; rows before it win where all is equal."""
        scores = (unit_rows(values) @ self._unit.T).astype(np.float32)
        wanted = scores > self._best
        if not np.isfinite(self._best).all():
            some = min(self._k, len(scores))
            wanted &= scores >= np.partition(scores, len(scores) - some, axis=0)[len(scores) - some]
        place, query = np.nonzero(wanted)
        return _Pairs(query, place, scores[place, query], np.ones(len(query), bool))

    def _drop(self) -> None:
        """Learn the k-th best of each query anew, and drop what is below the bar."""
        held = self._held.ordered()
        rank = held.ranks(len(self._unit))
        at = rank == self._k - 1
        self._best[held.query[at]] = held.score[at]
        np.maximum(self._floor, self._best - np.float32(self._held_error), out=self._floor)
        self._held = held.only(held.score >= (self._floor - np.float32(self._held_error))[held.query])

    def _settle(self) -> None:
        """Compare what is held in float64, and hold the k best of each query."""
        held = self._held
        rough = np.flatnonzero(~held.exact)
        held.score[rough] = cosines_of_pairs(self._array, self._unit, held.query[rough], held.row[rough])
        held.exact[:] = True
        held = held.ordered()
        rank = held.ranks(len(self._unit))
        self._best[held.query[rank == self._k - 1]] = held.score[rank == self._k - 1]
        self._held_error = 0.0
        np.maximum(self._floor, self._best, out=self._floor)
        self._held = held.only(rank < self._k)


@dataclass
class _Pairs:
    """Pairs of query and row, (p,) each: their products, and which of these are exact."""

    query: np.ndarray
    row: np.ndarray
    score: np.ndarray
    exact: np.ndarray

    @classmethod
    def none(cls) -> _Pairs:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))

    def with_more(self, more: _Pairs) -> _Pairs:
        return _Pairs(
            np.concatenate([self.query, more.query]),
            np.concatenate([self.row, more.row]),
            np.concatenate([self.score, more.score]),
            np.concatenate([self.exact, more.exact]),
        )

    def only(self, which: np.ndarray) -> _Pairs:
        return _Pairs(self.query[which], self.row[which], self.score[which], self.exact[which])

    def ordered(self) -> _Pairs:
        """Return the pairs by query, score (descending) and row."""
        return self.only(np.lexsort((self.row, -self.score, self.query)))

    def ranks(self, queries: int) -> np.ndarray:
        """Return the place of each pair among those of its query, where they are ordered."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(self.query, minlength=queries))])
        return np.arange(len(self.query)) - starts[self.query]


def _joined(batches: list[_Batch]) -> _Batch:
    """Return the first of some workers' batches of the same queries, with what all of them hold."""
    for other in batches[1:]:
        batches[0].join(other)
    return batches[0]


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Return rows (m, d) scaled to length one in float64; rows of zeros stay."""
    rows = np.asarray(values, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def cosines_of_pairs(array: ArraySnapshot, unit: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return cosines computed in float64, (p,) float32.

    Parameters
    ----------
    array : ArraySnapshot
    unit : ndarray of float64, (q, d)
        Queries of length one.
    query, rows : ndarray of int64, (p,)
        Positions of the pairs in `unit` and in the array.
    """
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PAIRS):
        some = slice(start, start + PAIRS)
        values = torch.from_numpy(array.read(rows[some])).to(torch.float64).numpy()
        lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
        products = np.einsum("ij,ij->i", values, unit[query[some]])
        scores[some] = products / np.where(lengths > 0, lengths, 1.0)
    return scores


def _run_length(size: int, k: int) -> int:
    """Return how many rows one largest product stands for, so that a block has at least 2 k runs."""
    run = RUN_ROWS
    while run > 1 and size // run < 2 * k:
        run //= 2
    return run


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Return a tensor over rows that are mapped read-only; nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
