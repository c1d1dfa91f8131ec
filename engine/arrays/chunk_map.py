"""Reading chunk files by mapping them: memory speed for scans and for random rows.

`LocalChunks` gives the rows of one array of a keyed array in a local folder. Where the system can place maps
(`address_range`), `SideBySide` maps all chunk files one after the other, so that a gather is one NumPy operation
on one array; elsewhere, and past the system's limit of maps, `RecentChunks` keeps the last used maps.

A chunk that is full never changes; the short last one is replaced by rename when rows are added, and is then mapped
over the old one. Maps are read-only, and no file of the cache is ever truncated. One that was shortened from outside is
an error and not a crash: sizes are compared when a file is mapped, and maps are asked for their last page before each
read (less than a page missing is left to the rows' checks). One that was unlinked, as when an array is rebuilt while it
is read, stays whole for those who have it mapped; and a file of the rebuilt array, whose rows have other numbers, never
takes the place of one that was mapped.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.arrays import address_range
from engine.arrays.address_range import PAGE, AddressRange, NoAddresses
from engine.arrays.array_format import DAMAGED, METADATA, ArrayFormat, parse_group
from engine.arrays.chunks import Chunks, RecentChunks, spans
from engine.errors import CacheError

log = logging.getLogger(__name__)

RESERVED_BYTES = 1 << 34


class Rebuilt(CacheError):
    """The array was rebuilt since, and what is asked for was not mapped by then."""


class ChunkFiles:
    """Where the chunk files of an array are, and what is wrong with one.

    Parameters
    ----------
    folder : Path
        The Zarr array's folder.
    form : ArrayFormat
    part : str
        Name of the array in its group.
    """

    def __init__(self, folder: Path, form: ArrayFormat, part: str) -> None:
        self.folder, self._form, self._part = folder, form, part
        self.bytes, self.rows = form.chunk_file_bytes(part), form.chunk_rows
        self.row_shape, self.dtype = form.part_shape(part), form.part_dtype(part)

    def path(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.folder / self._form.chunk_file(self._part, number)

    def open(self, number: int) -> int:
        """Return a descriptor of a chunk's file; CacheError where it is missing or has another size than it must."""
        path = self.path(number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError(f"chunk file {path} cannot be read ({error.strerror}); {DAMAGED}") from error
        found = os.fstat(descriptor).st_size
        if found != self.bytes:
            os.close(descriptor)
            raise self.wrong_size(number, found)
        return descriptor

    def open_same(self, number: int) -> int:
        """Return a descriptor as `open` does, of a file of the generation that is read here for certain; else Rebuilt.

        Generations only count up, so a file that is open before the number is read is of no later one.
        """
        try:
            descriptor = self.open(number)
        except CacheError:
            self.check_generation()
            raise
        try:
            self.check_generation()
        except CacheError:
            os.close(descriptor)
            raise
        return descriptor

    def check_generation(self) -> None:
        """Raise Rebuilt where the array has other rows now than are read here."""
        path = self.folder.parent / METADATA
        try:
            found = parse_group(path.read_bytes(), path).generation
        except FileNotFoundError:
            return  # the array was removed as a whole, so a file that could be opened before is of this one
        except OSError as error:
            raise CacheError(f"{path} cannot be read ({error.strerror}); {DAMAGED}") from error
        if found != self._form.generation:
            raise Rebuilt(
                f"{self.folder.parent} was rebuilt since it was opened (compaction, repair, forgetting), and not all "
                "of its old rows can be read any more; run the same command again"
            )

    def wrong_size(self, number: int, found: int | None = None) -> CacheError:
        """Return the error of a file of another size than it must have, for the caller to raise."""
        path = self.path(number)
        if found is None:
            found = path.stat().st_size if path.exists() else 0
        return CacheError(f"{path} has {found:,} bytes instead of {self.bytes:,}; {DAMAGED}")


class LocalChunks:
    """Chunk files of a local folder: side by side for as long as the system has room for that, then the recent ones.

    Parameters
    ----------
    folder, form, part
        See `ChunkFiles`.
    """

    def __init__(self, folder: Path, form: ArrayFormat, part: str) -> None:
        self._files = ChunkFiles(folder, form, part)
        self._way: Chunks = SideBySide(self._files) if address_range.supported() else _recent_maps(self._files)

    def extend(self, count: int) -> None:
        """See `Chunks.extend`."""
        try:
            self._way.extend(count)
        except NoAddresses as error:
            log.warning(
                "%s has more chunk files than this system maps at once (%s), so reading it is slower; raising "
                "vm.max_map_count or the limit of virtual memory helps",
                self._files.folder,
                error,
            )
            self._way = _recent_maps(self._files)
            self._way.extend(count)

    def chunk(self, number: int, rows: int) -> np.ndarray:
        """See `Chunks.chunk`."""
        return self._way.chunk(number, rows)

    def copy(self, start: int, out: np.ndarray) -> None:
        """See `Chunks.copy`."""
        self._way.copy(start, out)

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Chunks.gather`."""
        self._way.gather(rows, out)


class _Mapped(NamedTuple):
    """A state that readers take as a whole.

    Parameters
    ----------
    room : AddressRange
    there : ndarray of bool, (chunks,)
        Which chunks are mapped.
    grid : ndarray, (chunks, chunk_rows, ...)
        All chunks that have room.
    flat : ndarray, (chunks * chunk_rows, ...), or None
        The same as rows, where chunks leave no gap between them.
    """

    room: AddressRange
    there: np.ndarray
    grid: np.ndarray
    flat: np.ndarray | None


class SideBySide:
    """All chunk files mapped one after the other into one reserved range of addresses."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files
        # Files are mapped by whole pages; where a chunk ends within one, the next begins at the next page.
        self._stride = -(-files.bytes // PAGE) * PAGE
        self._count = 0
        self._lock = threading.Lock()
        self._mapped: _Mapped | None = None

    def extend(self, count: int) -> None:
        """See `Chunks.extend`; NoAddresses where there is no room, Rebuilt where the files are of other rows."""
        with self._lock:
            chunks = -(-count // self._files.rows)
            mapped = self._mapped
            if mapped is None or chunks > len(mapped.there):
                mapped, first = self._reserved(chunks), 0
            else:
                # The chunk that was short has been replaced since.
                first = self._count // self._files.rows
            for number in range(first, chunks):
                try:
                    self._map(mapped, number)
                except Rebuilt:
                    raise
                except CacheError as error:
                    log.debug("left for the moment at which it is read: %s", error)
            if self._count:
                self._files.check_generation()
            self._mapped, self._count = mapped, count

    def chunk(self, number: int, rows: int) -> np.ndarray:
        """See `Chunks.chunk`."""
        return self._ready(np.array([number])).grid[number, :rows]

    def copy(self, start: int, out: np.ndarray) -> None:
        """See `Chunks.copy`."""
        if not len(out):
            return
        first, last = start // self._files.rows, (start + len(out) - 1) // self._files.rows
        mapped = self._ready(np.arange(first, last + 1))
        if mapped.flat is not None:
            out[...] = mapped.flat[start : start + len(out)]
            return
        for number, inside, into in spans(start, len(out), self._files.rows):
            out[into] = mapped.grid[number, inside]

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Chunks.gather`."""
        if not len(rows):
            return
        numbers = rows // self._files.rows
        touched = np.zeros(int(numbers.max()) + 1, bool)
        touched[numbers] = True
        mapped = self._ready(np.flatnonzero(touched))
        if mapped.flat is not None:
            # The callers' rows are within the array; "clip" only spares NumPy a copy of the result.
            np.take(mapped.flat, rows, axis=0, out=out, mode="clip")
        else:
            out[...] = mapped.grid[numbers, rows - numbers * self._files.rows]

    def _ready(self, numbers: np.ndarray) -> _Mapped:
        """Return the maps once it is sure that some chunks can be read from them."""
        mapped = self._mapped
        if mapped is None:
            raise IndexError(f"chunk {numbers[0]} asked of none in {self._files.folder}")
        for number in numbers[~mapped.there[numbers]].tolist():
            with self._lock:
                try:
                    self._map(mapped, number)
                except NoAddresses as error:
                    raise CacheError(f"chunk file {self._files.path(number)} cannot be mapped: {error}") from error
        lost = mapped.room.first_lost(numbers * self._stride + (self._files.bytes - 1))
        if lost is not None:
            raise self._files.wrong_size(int(numbers[lost]))
        return mapped

    def _reserved(self, chunks: int) -> _Mapped:
        size = max(4 * chunks * self._stride, RESERVED_BYTES // self._stride * self._stride)
        while True:
            try:
                room = AddressRange(size)
                break
            except NoAddresses:
                size = size // 2 // self._stride * self._stride
                if size < chunks * self._stride:
                    raise
        files, steps = self._files, [self._files.dtype.itemsize]
        for length in reversed(files.row_shape):
            steps.insert(0, steps[0] * length)
        within, capacity = tuple(steps[1:]), size // self._stride
        grid_strides = (self._stride, steps[0], *within)
        grid = room.array(files.dtype, (capacity, files.rows, *files.row_shape), grid_strides)
        flat = None
        if self._stride == files.bytes:
            flat = room.array(files.dtype, (capacity * files.rows, *files.row_shape), (steps[0], *within))
        return _Mapped(room, np.zeros(capacity, bool), grid, flat)

    def _map(self, mapped: _Mapped, number: int) -> None:
        # Rows that somebody may be reading stay what they are, whatever became of the array.
        in_use = mapped is self._mapped and number * self._files.rows < self._count
        try:
            descriptor = self._files.open_same(number) if in_use else self._files.open(number)
        except Rebuilt:
            raise
        except CacheError:
            mapped.there[number] = False
            raise
        mapped.there[number] = False
        try:
            mapped.room.map_file(number * self._stride, descriptor, self._files.bytes)
        except OSError as error:
            path = self._files.path(number)
            raise CacheError(f"chunk file {path} cannot be mapped ({error.strerror}); {DAMAGED}") from error
        finally:
            os.close(descriptor)
        mapped.there[number] = True


def _recent_maps(files: ChunkFiles) -> RecentChunks:
    """Return the recent chunks of local files, each mapped by itself."""
    opened: dict[int, tuple[int, int]] = {}

    def load(number: int) -> np.ndarray:
        with os.fdopen(files.open_same(number), "rb") as file:
            status = os.fstat(file.fileno())
            opened[number] = (status.st_dev, status.st_ino)
            return np.memmap(file, files.dtype, "r", shape=(files.rows, *files.row_shape)).view(np.ndarray)

    def confirm(number: int) -> None:
        try:
            status = os.stat(files.path(number))
        except FileNotFoundError:
            return  # unlinked, and so whole for who has it mapped; as is one that another was renamed over
        if (status.st_dev, status.st_ino) == opened[number] and status.st_size != files.bytes:
            raise files.wrong_size(number, status.st_size)

    return RecentChunks(files.rows, load, confirm)
