"""All pairs of samples, a tile of the distance matrix at a time, in one pass for whatever wants to see them.

In come embeddings (n, d) and consumers; each consumer is shown every tile of distances (or their squares) and keeps
sums. The n x n matrix never exists: memory is one tile, the embeddings in float32 and what the consumers keep. The
embeddings are read block by block from wherever they lie into that one table; it is not read from disk again for every
tile, as at 2 GB a million rows of 512 time ends before memory does (a million: half an hour of products on two cores).

A squared distance is one product of extended vectors, [x, |x|^2, 1] . [-2y, 1, |y|^2], so a tile is one matrix product.
That subtracts large numbers where points are near each other relative to their lengths. Therefore points are centred
first, and pairs nearer than a tenth of their lengths are computed again by differences in float64 (or, where a tile
has many of them, the whole tile by a float64 product). As distances are symmetric, only tiles on and above the diagonal
are computed, and each stands for two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from analysis.space.rows import gathered, precision_of, rows_of
from engine.errors import DataError

# 4 MB of float32: a product of this size runs at full speed, what is done with it stays in cache, and little of the
# half below the diagonal is computed in vain. An accelerator needs larger ones to be busy.
TILE = 1024
_TILE_ELSEWHERE = 2048
# What consumers may keep for all rows at once; above, tiles below the diagonal are computed again instead.
MEMORY = 2 << 30
# Squared distance by squared lengths under which float32 has lost too many digits (three of seven).
_NEAR = 1e-2
# Share of a tile's pairs up to which each is computed by itself.
_FEW = 1 / 64


class Consumer(Protocol):
    """What looks at tiles.

    ``squared`` tells whether it wants squared distances; ``bytes_a_row`` how much it keeps for a row until that row has
    met all others.
    """

    squared: bool
    bytes_a_row: int

    def take(self, rows: slice, columns: slice, tile: torch.Tensor, both: bool) -> None:
        """Look at the distances of some rows to some columns, (b, c) float32, and leave them as they are.

        ``both``: those of the columns to the rows, the same turned over, will not be shown again.
        """

    def finish(self, rows: slice) -> None:
        """Know that these rows have met all columns."""


class Points:
    """Embeddings made ready for tiles of squared distances.

    Parameters
    ----------
    source : array-like
        Anything that `analysis.space.rows.rows_of` reads, (n, d), also dask arrays: rows are read block by block into
        the one float32 table that tiles are made of.
    order : ndarray of int, (m,), optional
        Which rows, and in which order; an error names them by their place in the source.
    normalize : bool
        Bring rows to length 1 first.
    device : str
        "cpu", "cuda" or "cuda:N".
    """

    def __init__(
        self, source: Any, order: np.ndarray | None = None, *, normalize: bool = False, device: str = "cpu"
    ) -> None:
        rows = rows_of(source, normalize=normalize, device=device, dtype=precision_of(source))
        self.count, self.dimensions = rows.shape if order is None else (len(order), rows.shape[1])
        # One table holds [x, |x|^2, 1]; the other side of a tile is made from it when it is wanted.
        self._left = torch.empty((self.count, self.dimensions + 2), dtype=torch.float32, device=device)
        values = self._left[:, : self.dimensions]
        gathered(rows, order, device=device, dtype=torch.float32, out=values)
        values -= values.mean(dim=0)  # any point near the middle will do
        # Squared lengths of the rounded points, so that a point's distance to itself is what rounding leaves and no
        # more.
        self.squares = torch.empty(self.count, dtype=torch.float32, device=device)
        for start in range(0, self.count, TILE):
            part = slice(start, start + TILE)
            self.squares[part] = torch.linalg.vector_norm(values[part].double(), dim=1).square_()
        self._left[:, -2], self._left[:, -1] = self.squares, 1.0
        if not torch.isfinite(self.squares).all():
            raise DataError(
                "embeddings are too long for squared distances in float32 (above 1e19); divide them by a constant"
            )

    @property
    def device(self) -> torch.device:
        """Where the points lie."""
        return self._left.device

    def right(self, columns: slice) -> torch.Tensor:
        """Return the other side of tiles with these columns, (d + 2, c)."""
        part = self._left[columns]
        other = torch.empty_like(part)
        torch.mul(part[:, :-2], -2.0, out=other[:, :-2])
        other[:, -2] = 1.0
        other[:, -1] = part[:, -2]
        return other.T

    def squared_distances(
        self, rows: slice, columns: slice, right: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return a tile of squared distances, (b, c) float32, none below 0, and 0 from a sample to itself."""
        tile = torch.mm(self._left[rows], self.right(columns) if right is None else right, out=out)
        limit = _NEAR * (float(self.squares[rows].max()) + float(self.squares[columns].max()))
        # Reading the tile once tells that there is nothing to mend; no other pass is needed then.
        if rows.start < columns.stop and columns.start < rows.stop:
            first = max(rows.start, columns.start)
            last = min(rows.stop, columns.stop)
            same = torch.arange(first, last, device=tile.device)
            tile[same - rows.start, same - columns.start] = torch.inf
            if float(tile.amin()) < limit:
                self._mend(tile, rows, columns)
            tile[same - rows.start, same - columns.start] = 0.0
        elif float(tile.amin()) < limit:
            self._mend(tile, rows, columns)
        return tile

    def _mend(self, tile: torch.Tensor, rows: slice, columns: slice) -> None:
        """Compute again the pairs of a tile that lie near each other."""
        near = tile < _NEAR * (self.squares[rows][:, None] + self.squares[columns])
        number = int(near.sum())
        if number > tile.numel() * _FEW:
            x, y = (self._left[place, :-2].double() for place in (rows, columns))
            exact = torch.addmm(y.square().sum(dim=1)[None], x, y.T, alpha=-2.0) + x.square().sum(dim=1)[:, None]
            tile.copy_(torch.where(torch.isinf(tile), torch.inf, exact.clamp_(min=0.0)))
        elif number:
            row, column = near.nonzero(as_tuple=True)
            for start in range(0, number, TILE):
                i, j = row[start : start + TILE], column[start : start + TILE]
                x, y = self._left[rows][i, :-2].double(), self._left[columns][j, :-2].double()
                tile[i, j] = (x - y).square().sum(dim=1).float()
        tile.clamp_(min=0.0)


def sweep(points: Points, consumers: Sequence[Consumer], *, tile: int | None = None, memory: int = MEMORY) -> None:
    """Show every pair of points to every consumer.

    Parameters
    ----------
    points : Points
    consumers : sequence of Consumer
    tile : int, optional
        Rows and columns of a tile; what suits the device unless given.
    memory : int
        Bytes that the consumers may keep for all rows together. Where they need more, rows are finished a tile at a
        time, which computes every tile (not only those above the diagonal).
    """
    if tile is None:
        tile = TILE if points.device.type == "cpu" else _TILE_ELSEWHERE
    symmetric = points.count * sum(consumer.bytes_a_row for consumer in consumers) <= memory
    places = [slice(start, min(start + tile, points.count)) for start in range(0, points.count, tile)]
    buffer = torch.empty((min(tile, points.count),) * 2, dtype=torch.float32, device=points.device)
    for number, rows in enumerate(places):
        right_of_rows = points.right(rows) if symmetric else None
        for other in range(number if symmetric else 0, len(places)):
            columns = places[other]
            # The tile is made with `rows` as its columns where both are whole, which saves building that side anew.
            if right_of_rows is not None:
                space = buffer[: columns.stop - columns.start, : rows.stop - rows.start]
                turned = points.squared_distances(columns, rows, right_of_rows, out=_dense(space, buffer))
                _show(consumers, columns, rows, turned, both=other != number)
            else:
                space = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
                found = points.squared_distances(rows, columns, out=_dense(space, buffer))
                _show(consumers, rows, columns, found, both=False)
        for consumer in consumers:
            consumer.finish(rows)


def _dense(space: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return memory of the buffer in the shape of a part of it, without gaps between its rows."""
    return buffer.view(-1)[: space.numel()].view(space.shape)


def _show(consumers: Sequence[Consumer], rows: slice, columns: slice, tile: torch.Tensor, both: bool) -> None:
    for wanted in (True, False):
        asking = [consumer for consumer in consumers if consumer.squared is wanted]
        if not wanted and asking:
            tile.sqrt_()
        for consumer in asking:
            consumer.take(rows, columns, tile, both)


def row_panels(points: Points, rows: int) -> Any:
    """Yield the place of some rows and their distances to all points, (b, n) float32; for some 10,000 points."""
    for start in range(0, points.count, rows):
        place = slice(start, min(start + rows, points.count))
        panel = torch.empty((place.stop - start, points.count), dtype=torch.float32, device=points.device)
        for first in range(0, points.count, TILE):
            columns = slice(first, min(first + TILE, points.count))
            panel[:, columns] = points.squared_distances(place, columns)
        yield place, panel.sqrt_()
