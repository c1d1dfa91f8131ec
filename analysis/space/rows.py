"""Embeddings as blocks of rows, wherever they lie: in memory, in a dask or zarr array, or made block by block.

In comes anything that holds a table (samples, dimensions); out come its rows in order, block by block, as tensors on
the device that computes, checked for values that are not finite. What only adds up over rows (centroids, scatter, cross
products) is thereby exact for collections that do not fit in memory: it reads the blocks once or twice and keeps sums.

Blocks are float64 unless a reader asks for the precision that the source has (`precision_of`): sums of float32 values
over one block are as good in float32 as the values are, and products take half the time, if differences were taken
before (`Shifted`) and sums over blocks are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from engine.errors import DataError, UsageError

# 4 MB of 512 dimensions as float32: large enough for products at nearly full speed, small enough that a block stays in
# cache and its memory is used again for the next one; fetching new memory costs more than what is done with it.
BLOCK_ROWS = 2048
# Row lengths whose squares float32 can hold without losing digits.
_SQUARABLE = (1e-15, 1e15)
_LONGEST = 1e18


class Rows(Protocol):
    """Embeddings that can be read block by block, as often as wanted."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows in order: their place and their values, (b, d), to be left as they are."""
        ...


class _Blocks:
    """The one implementation: a function that starts reading from the first row each time."""

    def __init__(
        self, read: Callable[[], Iterator[Any]], shape: tuple[int, int], normalize: bool, device: str, origin: str,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.shape, self.dtype = shape, dtype
        self._read, self._normalize, self._device, self._origin = read, normalize, device, origin
        self._sound = False  # known once all were read

    def again(self, normalize: bool, dtype: torch.dtype) -> _Blocks:
        """Return the same rows in blocks of a dtype, brought to length 1 where asked or where they are already."""
        if dtype == self.dtype and (self._normalize or not normalize):
            return self
        return _Blocks(self._read, self.shape, normalize or self._normalize, self._device, self._origin, dtype)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        start = 0
        for raw in self._read():
            values = tensor_of(raw, self._device, self.dtype)
            if values.ndim != 2 or values.shape[1] != self.shape[1]:
                raise DataError(f"{self._origin}: a block of shape {tuple(values.shape)} where rows of {self.shape[1]}")
            if self._normalize or not self._sound:
                values = checked(values, start, self._normalize)
            yield slice(start, start + len(values)), values
            start += len(values)
        if start != self.shape[0]:
            raise DataError(f"{self._origin}: {start} rows were read where {self.shape[0]} are expected")
        self._sound = True


def rows_of(
    source: Any,
    *,
    normalize: bool = False,
    device: str = "cpu",
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Return embeddings as rows that can be read block by block.

    Parameters
    ----------
    source : array-like, or Rows
        A NumPy array or tensor; a dask array (computed a chunk of rows at a time); anything with a ``shape`` that gives
        rows by slices, such as a zarr array or `engine.features.StoredRows`; a sequence of row blocks; or a callable
        that returns a new iterator of row blocks each time. An iterator itself can be read only once and is refused.
    normalize : bool
        Bring every row to length 1, also where the source are rows that were read as they are before.
    device : str
        Where the blocks are put.
    shape : (n, d), optional
        Of a callable's rows, counted by reading them once unless given.
    dtype : torch.dtype
        Of the blocks: float64, or what `precision_of` says of the source.

    Raises
    ------
    DataError
        No table, a value that is not finite, or a row of length 0 where lengths shall be 1; the row is named.
    UsageError
        Something that cannot be read twice.
    """
    if isinstance(source, _Blocks):
        return source.again(normalize, dtype)
    if isinstance(source, Iterator):
        raise UsageError(
            "an iterator of row blocks can be read only once, and distances need two passes; "
            "give a callable that returns a new iterator, or a list of blocks"
        )
    if callable(source) and not hasattr(source, "shape"):
        found = shape or _counted(source())
        return _Blocks(lambda: iter(source()), found, normalize, device, "row blocks", dtype)
    if hasattr(source, "dask") and hasattr(source, "compute"):
        return _Blocks(lambda: _dask_blocks(source), _shape_of(source), normalize, device, "dask array", dtype)
    if isinstance(source, Sequence) and len(source) and getattr(source[0], "ndim", 1) == 2:
        found = (sum(len(block) for block in source), int(source[0].shape[1]))
        return _Blocks(lambda: iter(source), found, normalize, device, "row blocks", dtype)
    if not hasattr(source, "shape"):
        source = np.asarray(source)
    return _Blocks(lambda: _sliced(source), _shape_of(source), normalize, device, "embeddings", dtype)


def precision_of(source: Any) -> torch.dtype:
    """Return float32 for a source of float32 or shorter numbers, float64 for any other and where it is not known."""
    dtype = getattr(source, "dtype", None)
    if dtype is None and isinstance(source, Sequence) and len(source):
        dtype = getattr(source[0], "dtype", None)
    short = str(dtype).removeprefix("torch.") in ("float32", "float16", "bfloat16")
    return torch.float32 if short else torch.float64


def tensor_of(raw: Any, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return an array or tensor as a float64 or float32 tensor on a device, without a copy where it is one."""
    if not isinstance(raw, torch.Tensor):
        values = np.asarray(raw)
        if values.dtype.kind not in "fiub":
            raise DataError(f"embeddings must be numbers, got {values.dtype}")
        values = np.ascontiguousarray(values, dtype=np.float32 if dtype == torch.float32 else np.float64)
        raw = torch.from_numpy(values if values.flags.writeable else values.copy())
    return raw.to(device=device, dtype=dtype)


def checked(values: torch.Tensor, first_row: int = 0, normalize: bool = False) -> torch.Tensor:
    """Return rows (n, d), normalised where asked; DataError naming the first row that cannot be used."""
    lengths = torch.linalg.vector_norm(values, dim=1)
    if values.dtype != torch.float64 and not bool(((lengths > _SQUARABLE[0]) & (lengths < _SQUARABLE[1])).all()):
        lengths = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    wrong = ~torch.isfinite(lengths)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"{int(wrong.sum())} embeddings hold NaN or infinite values, first row {first_row + row}; "
            "leave them out or compute them again in fp32"
        )
    if not normalize:
        if values.dtype != torch.float64 and float(lengths.max()) > _LONGEST:
            raise DataError(
                f"embeddings are too long for squared distances in float32 (above {_LONGEST:g}), the longest in row "
                f"{first_row + int(lengths.argmax())}; divide them by a constant, or give them as float64"
            )
        return values
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise DataError(
            f"{int((lengths == 0).sum())} embeddings cannot be normalised, first row {first_row + row} of length 0.0; "
            "leave them out, or measure with normalize=False"
        )
    return (values / lengths[:, None]).to(values.dtype)


def gathered(
    source: Any,
    order: np.ndarray | None = None,
    *,
    normalize: bool = False,
    device: str = "cpu",
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows as one tensor (m, d), read and checked block by block, so that nothing else of their size is made.

    Parameters
    ----------
    source : array-like
        Anything that `rows_of` reads; every row is read and checked, also those that are not wanted.
    order : ndarray of int, (m,), optional
        Which rows, each once, in the order in which they are wanted; all as they come unless given.
    out : Tensor, (m, d), optional
        Where to put them.
    """
    rows = rows_of(source, normalize=normalize, device=device, dtype=precision_of(source))
    if out is None:
        count = rows.shape[0] if order is None else len(order)
        out = torch.empty((count, rows.shape[1]), dtype=dtype, device=device)
    if order is None:
        for place, block in rows.blocks():
            out[place] = block
        return out
    wanted = np.full(rows.shape[0], -1)
    wanted[order] = np.arange(len(order))
    for place, block in rows.blocks():
        targets = wanted[place]
        inside = np.flatnonzero(targets >= 0)
        part = block if len(inside) == len(block) else block[torch.from_numpy(inside).to(block.device)]
        if out.device.type == "cpu":  # NumPy copies whole rows, PyTorch number by number
            out.numpy()[targets[inside]] = part.numpy()
        else:
            out[torch.from_numpy(targets[inside]).to(out.device)] = part.to(out.dtype)
    return out


def check_rows(source: Any, *, normalize: bool = False) -> None:
    """Raise DataError for rows that cannot be used, by their place in the source."""
    for _ in rows_of(source, normalize=normalize, dtype=precision_of(source)).blocks():
        pass


def _shape_of(source: Any) -> tuple[int, int]:
    shape = tuple(int(side) if side == side else -1 for side in source.shape)
    if len(shape) != 2 or min(shape) < 1:
        raise DataError(
            f"embeddings must be a table (samples, dimensions) with at least one of each, got shape {shape}"
        )
    return shape[0], shape[1]


def _sliced(source: Any) -> Iterator[Any]:
    for start in range(0, source.shape[0], BLOCK_ROWS):
        yield source[start : start + BLOCK_ROWS]


def _dask_blocks(source: Any) -> Iterator[np.ndarray]:
    """Compute a dask array chunk by chunk; a chunk larger than a block is fetched once and cut."""
    start = 0
    for rows in source.chunks[0]:
        chunk = source[start : start + rows].compute()
        start += rows
        yield from _sliced(chunk)


def _counted(blocks: Iterable[Any]) -> tuple[int, int]:
    count, width = 0, 0
    for block in blocks:
        count, width = count + len(block), int(block.shape[1])
    if not count:
        raise DataError("no rows: the callable's iterator was empty")
    return count, width


class Shifted:
    """Rows less the mean of their first block: what depends on differences alone stays, and keeps more digits.

    Rows whose mean is no longer than twice their spread are left as they are: less than a digit is lost there.
    """

    def __init__(self, rows: Rows) -> None:
        self.shape, self.dtype = rows.shape, rows.dtype
        self._rows = rows
        self._offset: torch.Tensor | None = None
        self._far = False

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows in order, see `Rows`."""
        for place, block in self._rows.blocks():
            if self._offset is None:
                self._offset = block.mean(dim=0)
                spread = torch.linalg.vector_norm(block - self._offset) / len(block) ** 0.5
                self._far = bool(torch.linalg.vector_norm(self._offset) > 2 * spread)
            yield place, block - self._offset if self._far else block


class Chosen:
    """Some of the rows, ascending: what has no class, say, is read and left out."""

    def __init__(self, rows: Rows, kept: np.ndarray) -> None:
        self.shape, self.dtype = (len(kept), rows.shape[1]), rows.dtype
        self._rows, self._kept = rows, kept

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows in order, see `Rows`."""
        for place, block in self._rows.blocks():
            first, last = (int(at) for at in np.searchsorted(self._kept, [place.start, place.stop]))
            if last - first == len(block):
                yield slice(first, last), block
            elif first < last:
                yield slice(first, last), block[torch.from_numpy(self._kept[first:last] - place.start).to(block.device)]
