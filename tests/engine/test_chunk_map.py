"""Mapped chunk files against NumPy: gathers, growth, what happens to files behind the maps, and what maps leave."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.arrays import address_range, chunk_map
from engine.arrays.address_range import PAGE
from engine.arrays.array_format import METADATA, ArrayFormat, document_bytes
from engine.arrays.chunk_map import LocalChunks, SideBySide
from engine.arrays.chunks import RecentChunks
from engine.errors import CacheError

PART = "embedding"
WAYS = ("side by side", "recent")
needs_ranges = pytest.mark.skipif(not address_range.supported(), reason="maps are placed on Linux only")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Both ways of reading, whatever this system would choose."""
    if request.param == "recent":
        monkeypatch.setattr(address_range, "supported", lambda: False)
    elif not address_range.supported():
        pytest.skip("maps are placed on Linux only")
    return request.param


def form_of(row_shape: tuple[int, ...] = (512,), chunk_rows: int = 8) -> ArrayFormat:
    """Chunks of two pages; other shapes end within one."""
    return ArrayFormat("image", "enc", row_shape, chunk_rows, {})


def rows_of(count: int, row_shape: tuple[int, ...] = (512,)) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(1)).standard_normal((count, *row_shape)).astype("<f2")


def written(folder: Path, form: ArrayFormat, rows: np.ndarray) -> Path:
    """Write rows as chunk files, each put in place by rename as the cache does it."""
    folder.mkdir(exist_ok=True)
    for number in range(-(-len(rows) // form.chunk_rows)):
        some = rows[number * form.chunk_rows : (number + 1) * form.chunk_rows]
        content = np.full((form.chunk_rows, *form.row_shape), np.nan, "<f2")
        content[: len(some)] = some
        temporary = folder.parent / "temporary"
        temporary.write_bytes(content.tobytes())
        temporary.replace(folder / form.chunk_file(PART, number))
    return folder


def opened(folder: Path, form: ArrayFormat, count: int) -> LocalChunks:
    chunks = LocalChunks(folder, form, PART)
    chunks.extend(count)
    return chunks


def gathered(chunks: LocalChunks, rows, form: ArrayFormat) -> np.ndarray:
    out = np.empty((len(rows), *form.row_shape), "<f2")
    chunks.gather(np.asarray(rows, np.int64), out)
    return out


def copied(chunks: LocalChunks, start: int, stop: int, form: ArrayFormat) -> np.ndarray:
    out = np.empty((stop - start, *form.row_shape), "<f2")
    chunks.copy(start, out)
    return out


def ways_to_read(chunks: LocalChunks, form: ArrayFormat) -> list[Callable[[], np.ndarray]]:
    """Return reads of 40 rows that touch chunk 2."""
    return [
        lambda: chunks.chunk(2, 8),
        lambda: gathered(chunks, [3, 17], form),
        lambda: copied(chunks, 0, 40, form),
    ]


def map_count() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("row_shape", [(512,), (5,), (3, 7, 11)], ids=["pages", "tiny", "odd"])
def test_read__any_rows_against_numpy(tmp_path, way, row_shape):
    form, rows = form_of(row_shape), rows_of(61, row_shape)
    chunks = opened(written(tmp_path / "a", form, rows), form, 61)
    rng = np.random.Generator(np.random.PCG64(2))
    for asked in (rng.integers(0, 61, 300), np.arange(61), np.array([60]), np.array([60, 0, 0, 59]), np.array([], int)):
        np.testing.assert_array_equal(gathered(chunks, asked, form), rows[asked])
    for start, stop in ((0, 61), (7, 9), (8, 16), (60, 61), (3, 58), (5, 5)):
        np.testing.assert_array_equal(copied(chunks, start, stop, form), rows[start:stop])
    np.testing.assert_array_equal(chunks.chunk(7, 5), rows[56:])
    np.testing.assert_array_equal(chunks.chunk(2, 8), rows[16:24])


def test_extend__the_short_chunk_is_read_from_the_file_that_replaced_it(tmp_path, way):
    form, rows = form_of(), rows_of(40)
    chunks = opened(written(tmp_path / "a", form, rows[:13]), form, 13)
    held = chunks.chunk(1, 5)
    written(tmp_path / "a", form, rows)
    np.testing.assert_array_equal(copied(chunks, 0, 13, form), rows[:13])
    chunks.extend(40)
    np.testing.assert_array_equal(gathered(chunks, np.arange(40)[::-1], form), rows[::-1])
    np.testing.assert_array_equal(held, rows[8:13])


def test_rebuilt__rows_that_are_in_use_stay_whatever_files_stand_at_their_names(tmp_path, way):
    form, rows = form_of(), rows_of(60)
    group, form_now = tmp_path / "group", replace(form, generation=1)
    for place, described, some in ((group, form, rows[:13]), (tmp_path / "new", form_now, rows[20:60])):
        place.mkdir()
        (place / METADATA).write_bytes(document_bytes(described.group_document()))
        written(place / PART, described, some)
    chunks = opened(group / PART, form, 13)
    held = copied(chunks, 0, 13, form)
    shutil.rmtree(group)
    (tmp_path / "new").rename(group)
    with suppress(CacheError):  # which chunks that are loaded one by one find out only when they are asked
        chunks.extend(40)
    np.testing.assert_array_equal(copied(chunks, 0, 13, form), held)
    np.testing.assert_array_equal(held, rows[:13])
    if way == "recent":
        with pytest.raises(CacheError, match="was rebuilt since it was opened"):
            copied(chunks, 16, 40, form)


@needs_ranges
def test_extend__beyond_the_reserved_addresses(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_map, "RESERVED_BYTES", 1)
    form, rows = form_of(), rows_of(200)
    chunks = opened(written(tmp_path / "a", form, rows[:5]), form, 5)
    held = chunks.chunk(0, 5)
    for count in (30, 90, 200):
        written(tmp_path / "a", form, rows[:count])
        chunks.extend(count)
        np.testing.assert_array_equal(copied(chunks, 0, count, form), rows[:count])
    np.testing.assert_array_equal(held, rows[:5])


@pytest.mark.parametrize("size", [0, 1, PAGE, 2 * PAGE - 1, 3 * PAGE])
def test_file_of_another_size__is_an_error_when_it_is_mapped(tmp_path, way, size):
    form, rows = form_of(), rows_of(40)
    folder = written(tmp_path / "a", form, rows)
    (folder / "c.2.0").write_bytes(bytes(size))
    chunks = opened(folder, form, 40)
    np.testing.assert_array_equal(copied(chunks, 0, 16, form), rows[:16])
    for read in ways_to_read(chunks, form):
        with pytest.raises(CacheError, match=rf"c\.2\.0 has {size:,} bytes instead of {2 * PAGE:,}"):
            read()


@pytest.mark.parametrize("size", [0, PAGE])
def test_file_shortened_while_it_is_mapped__is_an_error_and_no_crash(tmp_path, way, size):
    form, rows = form_of(), rows_of(40)
    folder = written(tmp_path / "a", form, rows)
    chunks = opened(folder, form, 40)
    copied(chunks, 0, 40, form)
    os.truncate(folder / "c.2.0", size)
    for read in ways_to_read(chunks, form):
        with pytest.raises(CacheError, match=rf"c\.2\.0 has {size:,} bytes instead of"):
            read()
    np.testing.assert_array_equal(gathered(chunks, [39, 3], form), rows[[39, 3]])


def test_file_missing__is_an_error_for_its_rows_only_and_none_when_it_is_back(tmp_path, way):
    form, rows = form_of(), rows_of(40)
    folder = written(tmp_path / "a", form, rows)
    (folder / "c.1.0").rename(tmp_path / "away")
    chunks = opened(folder, form, 40)
    np.testing.assert_array_equal(gathered(chunks, [0, 39], form), rows[[0, 39]])
    with pytest.raises(CacheError, match=r"chunk file .*c\.1\.0 cannot be read \(No such file"):
        gathered(chunks, [0, 9], form)
    (tmp_path / "away").rename(folder / "c.1.0")
    np.testing.assert_array_equal(gathered(chunks, [0, 9], form), rows[[0, 9]])


def test_folder_deleted_or_swapped__is_read_whole_by_who_has_it_mapped(tmp_path, way):
    form, rows = form_of(), rows_of(40)
    folder = written(tmp_path / "a", form, rows)
    chunks = opened(folder, form, 40)
    copied(chunks, 0, 40, form)
    folder.rename(tmp_path / "old")
    written(folder, form, rows_of(80)[40:])
    np.testing.assert_array_equal(copied(chunks, 0, 40, form), rows)
    shutil.rmtree(tmp_path / "old"), shutil.rmtree(folder)
    np.testing.assert_array_equal(gathered(chunks, np.arange(39, -1, -1), form), rows[::-1])


@needs_ranges
def test_more_files_than_may_be_mapped__are_read_all_the_same(tmp_path, monkeypatch, caplog):
    form, rows = form_of(), rows_of(100)
    folder = written(tmp_path / "a", form, rows)
    mapped = sum(map(len, address_range._mapped.values()))
    monkeypatch.setattr(address_range, "map_limit", lambda: mapped + 6)
    chunks = opened(folder, form, 40)
    with caplog.at_level(logging.WARNING):
        chunks.extend(100)
    assert "more chunk files than this system maps at once" in caplog.text
    np.testing.assert_array_equal(gathered(chunks, np.arange(100)[::-1], form), rows[::-1])


@needs_ranges
def test_no_addresses__are_replaced_by_recent_maps(tmp_path, monkeypatch):
    def refuse(self, size):
        raise address_range.NoAddresses("Cannot allocate memory")

    monkeypatch.setattr(address_range.AddressRange, "__init__", refuse)
    form, rows = form_of(), rows_of(40)
    chunks = opened(written(tmp_path / "a", form, rows), form, 40)
    np.testing.assert_array_equal(copied(chunks, 0, 40, form), rows)


@needs_ranges
def test_maps__hold_no_descriptor_cannot_be_written_and_end_with_the_last_view(tmp_path):
    form, rows = form_of(), rows_of(400)
    folder = written(tmp_path / "a", form, rows)
    gc.collect()
    maps, descriptors = map_count(), len(os.listdir("/proc/self/fd"))
    chunks = opened(folder, form, 400)
    assert map_count() >= maps + 50
    assert len(os.listdir("/proc/self/fd")) == descriptors
    held = chunks.chunk(49, 8)[2:5]
    with pytest.raises(ValueError, match="read-only"):
        held[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        held.flags.writeable = True
    del chunks
    gc.collect()
    np.testing.assert_array_equal(held, rows[394:397])
    del held
    gc.collect()
    assert map_count() <= maps + 2


def test_several_threads__read_while_one_extends(tmp_path, way):
    form, rows = form_of(), rows_of(400)
    folder = written(tmp_path / "a", form, rows[:5])
    chunks = opened(folder, form, 5)
    count, wrong, done = [5], [], threading.Event()

    def read() -> None:
        rng = np.random.Generator(np.random.PCG64(threading.get_ident()))
        while not done.is_set():
            asked = rng.integers(0, count[0], 50)
            if not np.array_equal(gathered(chunks, asked, form), rows[asked]):
                wrong.append(asked)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for more in range(10, 400, 5):
        written(folder, form, rows[:more]) if more < 100 else None
        if more == 100:
            written(folder, form, rows)
        chunks.extend(more)
        count[0] = more
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_recent_chunks__keeps_no_more_than_it_may(tmp_path):
    loaded = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return np.arange(4) + 4 * number

    chunks = RecentChunks(4, load, most=2)
    chunks.extend(40)
    for number in (0, 1, 0, 2, 0, 1):
        np.testing.assert_array_equal(chunks.chunk(number, 4), np.arange(4) + 4 * number)
    assert loaded == [0, 1, 2, 1]


@needs_ranges
def test_first_lost__of_many_pages(tmp_path):
    form = form_of()
    folder = written(tmp_path / "a", form, rows_of(8 * 1500))
    chunks = SideBySide(chunk_map.ChunkFiles(folder, form, PART))
    chunks.extend(8 * 1500)
    os.truncate(folder / "c.1300.0", PAGE)
    with pytest.raises(CacheError, match=r"c\.1300\.0 has"):
        chunks.copy(0, np.empty((8 * 1500, 512), "<f2"))
