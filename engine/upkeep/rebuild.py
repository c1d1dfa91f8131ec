"""Building a keyed array anew from some of its rows, and swapping it in: what repair and compaction end in.

Comes in: an array whose lock is held, which of its rows stay, and their keys. Goes out: the same array with those rows
in their order, whole and synced, under the next generation where rows got other numbers. Chunk files that stay as they
are become hard links (a chunk file is never written in place), the others are put together from the old ones, each row
held against its check on the way. Memory: a few chunks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.arrays import array_folder, array_format, folder_swap
from engine.arrays.array_format import CHECK, KEY, METADATA, STORE, ArrayFormat
from engine.arrays.durable import make_folder, sync_folder, write_whole
from engine.arrays.lock import record_lock
from engine.arrays.row_check import row_checks
from engine.errors import CacheError

REPAIR = "`fluoro cache verify --repair` drops and recomputes damaged rows"


@contextmanager
def holding(cache: Path, kind: str, name: str) -> Iterator[Path]:
    """Hold an array's lock, what a killed predecessor has left finished; gives the scratch folder for its successor."""
    with record_lock(array_folder.lock_path(cache, kind, name)):
        scratch = folder_swap.finish_swap(folder_swap.swap_scratch(cache, kind, name), cache / STORE / kind / name)
        try:
            yield scratch
        finally:
            # Also after a full disk; but not a half-done swap, which `finish_swap` puts in order.
            if not (scratch / folder_swap.OLD).exists():
                shutil.rmtree(scratch, ignore_errors=True)


def finish_leftovers(cache: Path) -> None:
    """Finish what killed processes have left: a swap that was half done, folders that nobody needs."""
    for scratch in sorted((cache / "tmp" / "upkeep").glob("*/*")):
        with holding(cache, scratch.parent.name, scratch.name):
            pass


def rebuild(
    folder: Path, form: ArrayFormat, rows: np.ndarray, keys: np.ndarray, scratch: Path, *, renumbered: bool
) -> None:
    """Replace an array by one of some of its rows.

    Parameters
    ----------
    folder : Path
        The array's.
    form : ArrayFormat
    rows : ndarray of int64, (m,)
        Rows that stay, ascending, each with payload and check in order.
    keys : ndarray of uint8, (m, 16)
        Their keys, which may be others than those stored (lost ones that were found again).
    scratch : Path
        From `holding`.
    renumbered : bool
        Readers and indexes must not take the old row numbers for the new ones.

    Raises
    ------
    CacheError
        A row does not match its check (the array stays as it was), or the disk is full.
    """
    new = scratch / folder_swap.NEW
    for part in (form.payload, CHECK, KEY):
        make_folder(new / part)
    for start in range(0, len(rows), form.chunk_rows):
        some = slice(start, start + form.chunk_rows)
        _write_chunk(folder, new, form, start // form.chunk_rows, rows[some], keys[some], scratch)
    changed = replace(form, generation=form.generation + renumbered)
    for part in (form.payload, CHECK, KEY):
        document = array_format.document_bytes(changed.array_document(part, len(rows)))
        write_whole(new / part / METADATA, [document], scratch)
        sync_folder(new / part)
    write_whole(new / METADATA, [array_format.document_bytes(changed.group_document())], scratch)
    sync_folder(new)
    folder_swap.swap_in(scratch, folder)


def _write_chunk(
    folder: Path, new: Path, form: ArrayFormat, number: int, rows: np.ndarray, keys: np.ndarray, scratch: Path
) -> None:
    """Write one chunk of the new array."""
    as_it_was = (
        len(rows) == form.chunk_rows and rows[0] == number * form.chunk_rows and rows[-1] == rows[0] + len(rows) - 1
    )
    values = {part: _gather(folder, form, part, rows) for part in (form.payload, CHECK)}
    wrong = rows[row_checks(keys, values[form.payload]) != values[CHECK]]
    if len(wrong):
        raise CacheError(f"row {wrong[0]} of {folder} does not match its check; {REPAIR}")
    for part in (form.payload, CHECK):
        name = form.chunk_file(part, number)
        # A longer file has whole rows as well, and is not what readers map.
        whole = as_it_was and (folder / part / name).stat().st_size == form.chunk_file_bytes(part)
        if not (whole and _linked(folder / part / name, new / part / name)):
            write_whole(new / part / name, [values[part], _filling(form, part, len(rows))], scratch)
    write_whole(new / KEY / form.chunk_file(KEY, number), [keys, _filling(form, KEY, len(rows))], scratch)


def _gather(folder: Path, form: ArrayFormat, part: str, rows: np.ndarray) -> np.ndarray:
    """Return rows of one of the old arrays, read chunk by chunk."""
    values = np.empty((len(rows), *form.part_shape(part)), form.part_dtype(part))
    numbers = rows // form.chunk_rows
    for number in np.unique(numbers):
        path = folder / part / form.chunk_file(part, int(number))
        here = numbers == number
        try:
            content = np.fromfile(path, form.part_dtype(part)).reshape(form.chunk_rows, *form.part_shape(part))
        except (OSError, ValueError) as error:
            raise CacheError(f"chunk file {path} cannot be read ({error}); {REPAIR}") from error
        values[here] = content[rows[here] - number * form.chunk_rows]
    return values


def _filling(form: ArrayFormat, part: str, count: int) -> np.ndarray:
    dtype = form.part_dtype(part)
    shape = (form.chunk_rows - count, *form.part_shape(part))
    return np.full(shape, array_folder.fill_value(dtype), dtype)


def _linked(old: Path, new: Path) -> bool:
    """Give a file a second name; False where the file system cannot."""
    try:
        os.link(old, new)
    except OSError:
        return False
    return True
