"""Keyed arrays against plain zarr and NumPy: format, commits, readers, damage and full disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from engine.arrays import array_format, durable
from engine.arrays.array_folder import list_arrays
from engine.arrays.array_format import METADATA
from engine.arrays.array_verify import verify_array
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.row_check import all_finite, row_checks
from engine.arrays.row_lookup import RowLookup, first_occurrences
from engine.errors import CacheError

DESCRIPTION = {"model": "tiny", "preprocess": {"size": [8, 8]}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 to 32 rows, so that tests cross their borders cheaply; no syncing, which only a power cut needs."""
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 16 * 24)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def keys_of(numbers) -> np.ndarray:
    """Return different keys, the same for the same number."""
    keys = np.zeros((len(numbers), 16), np.uint8)
    words = keys.view("<u8")
    words[:, 0] = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    words[:, 1] = np.asarray(numbers, np.uint64)
    return keys


def rows_of(numbers, dim: int = 12) -> np.ndarray:
    return (np.asarray(numbers)[:, None] % 100 + np.arange(dim) / 16).astype("<f2")


def filled(cache: Path, count: int, dim: int = 12) -> KeyedArray:
    array = KeyedArray.create(cache, "image", "enc", (dim,), DESCRIPTION)
    array.append(keys_of(range(count)), rows_of(range(count), dim))
    return array


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- Format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "names"),
    [
        ("image", (12,), ("row", "dim")),
        ("text", (5,), ("row", "dim")),
        ("pixels", (4, 6, 3), ("row", "y", "x", "channel")),
        ("tokens", (3, 4), ("row", "token", "width")),
    ],
)
def test_format__plain_zarr_reads_what_was_appended(tmp_path, kind, shape, names):
    array = KeyedArray.create(tmp_path, kind, "enc@1", shape, DESCRIPTION)
    rng = np.random.Generator(np.random.PCG64(0))
    values = rng.integers(0, 200, (75, *shape)).astype(array.form.dtype)
    for start in range(0, 75, 7):
        array.append(keys_of(range(start, min(start + 7, 75))), values[start : start + 7])
    group = zarr.open_group(tmp_path / "arrays.zarr", mode="r")[f"{kind}/enc@1"]
    payload = group[array.form.payload]
    np.testing.assert_array_equal(payload[:], values)
    np.testing.assert_array_equal(group["key"][:], keys_of(range(75)))
    np.testing.assert_array_equal(group["check"][:], row_checks(keys_of(range(75)), values))
    assert payload.metadata.dimension_names == names
    assert payload.chunks[0] == group["key"].chunks[0] == group["check"].chunks[0]
    assert np.isnan(payload.fill_value) if payload.dtype.kind == "f" else payload.fill_value == 0
    assert payload.compressors == () and payload.shards is None
    assert group.attrs["description"] == DESCRIPTION and group.attrs["format_version"] == 1


@pytest.mark.parametrize(
    ("row_bytes", "rows"), [(1024, 4096), (768, 8192), (2, 16384), (150528, 32), (302592, 16), (1 << 23, 1)]
)
def test_format__chunks_of_four_to_eight_megabytes(monkeypatch, row_bytes, rows):
    monkeypatch.undo()
    assert array_format.choose_chunk_rows(row_bytes) == rows


def test_check__is_the_documented_sum():
    """The definition is part of the format, so it is computed a second time in plain integers."""

    def split_mix(number: int) -> int:
        mask = (1 << 64) - 1
        state = (number + 1) * 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        return (state ^ state >> 31) | 1

    rng = np.random.Generator(np.random.PCG64(3))
    for shape, dtype in [((5,), "<f2"), ((8,), "<f2"), ((3, 5, 3), "|u1"), ((2, 4), "<f2")]:
        keys = rng.integers(0, 256, (6, 16)).astype(np.uint8)
        payload = rng.integers(0, 200, (6, *shape)).astype(dtype)
        for row, check in enumerate(row_checks(keys, payload)):
            content = keys[row].tobytes() + payload[row].tobytes()
            content += bytes(-len(content) % 8)
            words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
            total = 0x9E3779B97F4A7C15 + sum(split_mix(at) * word for at, word in enumerate(words))
            assert int(check) == total % (1 << 64)


def test_all_finite__of_every_float16():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert [all_finite(value) for value in every[:, None]] == np.isfinite(every).tolist()
    assert all_finite(every[np.isfinite(every)]) and all_finite(every[:0])


# -- Commits and reading ---------------------------------------------------------------------------------------------


def test_append__same_bytes_whatever_the_commit_size(tmp_path):
    trees = []
    for number, size in enumerate((1, 5, 16, 33, 100)):
        cache = tmp_path / str(number)
        array = KeyedArray.create(cache, "image", "enc", (12,), DESCRIPTION)
        for start in range(0, 100, size):
            some = range(start, min(start + size, 100))
            assert array.append(keys_of(some), rows_of(some)) == len(some)
        array.finish()
        trees.append(tree_bytes(cache / "arrays.zarr"))
    assert all(tree == trees[0] for tree in trees)
    assert not [name for name in trees[0] if "partial" in name]


def test_append__stores_each_key_once(tmp_path):
    array = filled(tmp_path, 10)
    again = np.array([9, 10, 10, 3, 11])
    assert array.append(keys_of(again), rows_of(again)) == 2
    np.testing.assert_array_equal(array.keys, keys_of(range(12)))


def test_append__another_handle_sees_rows_and_leaves_them_out(tmp_path):
    first = filled(tmp_path, 20)
    second = KeyedArray.open(tmp_path, "image", "enc")
    first.append(keys_of(range(20, 50)), rows_of(range(20, 50)))
    assert second.append(keys_of(range(30, 60)), rows_of(range(30, 60))) == 10
    assert len(first) == 50
    first.refresh()
    np.testing.assert_array_equal(first.read_all(), rows_of(range(60)))


@pytest.mark.parametrize(
    ("keys", "rows", "said"),
    [
        (np.zeros((1, 16), np.uint8), rows_of([1]), "all zeros"),
        (keys_of([1]), np.full((1, 12), np.nan, "<f2"), "NaN or infinity"),
        (keys_of([1]), rows_of([1]).astype(np.float32), "must be float16"),
        (keys_of([1]), rows_of([1], 13), "must be float16 \\(12,\\)"),
        (keys_of([1, 2]), rows_of([1]), "keys of enc"),
    ],
    ids=["key of nothing", "not finite", "dtype", "shape", "lengths"],
)
def test_append__refuses_rows_that_are_none(tmp_path, keys, rows, said):
    array = filled(tmp_path, 3)
    with pytest.raises(CacheError, match=said):
        array.append(keys, rows)
    assert len(array) == 3


def test_read__any_order_against_numpy(tmp_path):
    array = filled(tmp_path, 90)
    values, rng = rows_of(range(90)), np.random.Generator(np.random.PCG64(1))
    for rows in (rng.integers(0, 90, 200), np.arange(90), np.arange(20, 60), np.array([], int), np.array([89, 0, 0])):
        np.testing.assert_array_equal(array.read(rows), values[rows])
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in array.chunks()]), values)
    with pytest.raises(IndexError):
        array.read(np.array([90]))


def test_read__a_map_made_before_an_append_shows_later_rows(tmp_path):
    writer = filled(tmp_path, 5)
    reader = KeyedArray.open(tmp_path, "image", "enc")
    held = next(reader.chunks())[1]
    writer.append(keys_of(range(5, 40)), rows_of(range(5, 40)))
    assert len(reader) == 5
    reader.refresh()
    np.testing.assert_array_equal(reader.read_all(), rows_of(range(40)))
    np.testing.assert_array_equal(held, rows_of(range(5)))


def test_refresh__shows_a_rebuilt_array_and_until_then_the_old_one_is_read_whole(tmp_path):
    filled(tmp_path, 90)
    reader = KeyedArray.open(tmp_path, "image", "enc")
    held = next(reader.chunks())[1]
    rebuilt = filled(tmp_path / "new", 60)
    form = replace(rebuilt.form, generation=1)
    (rebuilt.folder / METADATA).write_bytes(array_format.document_bytes(form.group_document()))
    snapshot = reader.snapshot()
    reader.folder.rename(tmp_path / "old")
    rebuilt.folder.rename(reader.folder)
    np.testing.assert_array_equal(reader.read_all(), rows_of(range(90)))
    shutil.rmtree(tmp_path / "old")
    np.testing.assert_array_equal(reader.read(np.array([80, 3])), rows_of([80, 3]))
    reader.refresh()
    np.testing.assert_array_equal(snapshot.read_all(), rows_of(range(90)))
    np.testing.assert_array_equal(snapshot.find(keys_of([80, 3, 95])), [80, 3, -1])
    assert (len(reader), reader.form.generation) == (60, 1)
    np.testing.assert_array_equal(reader.read_all(), rows_of(range(60)))
    np.testing.assert_array_equal(held, rows_of(range(16)))
    assert reader.append(keys_of(range(55, 70)), rows_of(range(55, 70))) == 10


def test_snapshot__has_the_rows_of_its_moment_only(tmp_path):
    array = filled(tmp_path, 20)
    snapshot = array.snapshot()
    array.append(keys_of(range(20, 40)), rows_of(range(20, 40)))
    assert (len(snapshot), len(array)) == (20, 40) and len(snapshot.keys) == 20
    np.testing.assert_array_equal(snapshot.find(keys_of([19, 20])), [19, -1])
    np.testing.assert_array_equal(snapshot.read_all(), rows_of(range(20)))
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in snapshot.chunks()]), rows_of(range(20)))
    with pytest.raises(IndexError, match=r"rows 20\.\.20 asked of 20"):
        snapshot.read(np.array([20]))


def test_refresh__by_several_threads_learns_each_row_once(tmp_path):
    writer = filled(tmp_path, 5)
    reader = KeyedArray.open(tmp_path, "image", "enc")
    done, wrong = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            reader.refresh()
            rows = reader.find(keys_of(range(len(reader))))
            if not np.array_equal(rows, np.arange(len(rows))):
                wrong.append(rows)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(5, 200, 3):
        writer.append(keys_of(range(start, start + 3)), rows_of(range(start, start + 3)))
    done.set()
    for thread in threads:
        thread.join()
    reader.refresh()
    assert not wrong and len(reader) == 200
    np.testing.assert_array_equal(reader.read_all(), rows_of(range(200)))


def test_find__against_a_dictionary():
    rng = np.random.Generator(np.random.PCG64(2))
    keys = rng.integers(0, 256, (3000, 16)).astype(np.uint8)
    keys[:, :8] = keys[rng.integers(0, 40, 3000), :8]  # first words that collide
    keys = keys[first_occurrences(keys)]
    known = {key.tobytes(): row for row, key in enumerate(keys)}
    lookup = RowLookup()
    start = 0
    while start < len(keys):
        size = int(rng.integers(1, 300))
        lookup.add(keys[start : start + size])
        start += size
        questions = np.concatenate([keys[rng.integers(0, len(keys), 200)], rng.integers(0, 256, (50, 16), np.uint8)])
        expected = [row if (row := known.get(key.tobytes(), -1)) < min(start, len(keys)) else -1 for key in questions]
        np.testing.assert_array_equal(lookup.find(questions), expected)
        assert [lookup.find_one(key.tobytes()) for key in questions] == expected


def test_create__refuses_another_shape_and_lists_arrays(tmp_path):
    filled(tmp_path, 1)
    KeyedArray.create(tmp_path, "tokens", "enc@3", (2, 4), DESCRIPTION)
    assert list_arrays(tmp_path) == [("image", "enc"), ("tokens", "enc@3")]
    with pytest.raises(CacheError, match="two encoders must not share the id"):
        KeyedArray.create(tmp_path, "image", "enc", (13,), DESCRIPTION)
    with pytest.raises(CacheError, match="cannot name an array"):
        KeyedArray.create(tmp_path, "image", "../enc", (13,), DESCRIPTION)
    with pytest.raises(CacheError, match="no array text/enc"):
        KeyedArray.open(tmp_path, "text", "enc")


def test_open__newer_format_version_is_refused(tmp_path):
    path = filled(tmp_path, 3).folder / METADATA
    flipped = path.read_text().replace('"format_version": 1', '"format_version": 2')
    path.write_text(flipped)
    with pytest.raises(CacheError, match=r"format version 2, this fluoroscope reads versions up to 1; upgrade"):
        KeyedArray.open(tmp_path, "image", "enc")
    assert "format version is damaged" in verify_array(tmp_path, "image", "enc")[1][0].problem
    digest = json.loads(flipped)["attributes"]["digest"]
    path.write_text(flipped.replace(digest, digest[::-1]))  # as a version with other rules would leave it
    with pytest.raises(CacheError, match="format version 2"):
        verify_array(tmp_path, "image", "enc")


# -- Kills, several writers, full disks ------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend the test's time on imports


def _write_missing(cache: Path, count: int, size: int) -> None:
    array = KeyedArray.create(cache, "image", "enc", (12,), DESCRIPTION)
    numbers = np.arange(count)
    missing = numbers[array.find(keys_of(numbers)) < 0]
    for start in range(0, len(missing), size):
        some = missing[start : start + size]
        array.append(keys_of(some), rows_of(some))
    array.finish()


@pytest.mark.parametrize(
    ("rounds", "rows", "least"), [(12, 500, 3), pytest.param(150, 6000, 80, marks=pytest.mark.slow)]
)
def test_kill__at_random_moments_ends_with_the_same_bytes(tmp_path, rounds, rows, least):
    rng = np.random.Generator(np.random.PCG64(5))
    _write_missing(tmp_path / "calm", rows, 5)
    killed = 0
    for _ in range(rounds):
        writer = FORK.Process(target=_write_missing, args=(tmp_path / "rough", rows, 5))
        writer.start()
        writer.join(float(rng.uniform(0.005, 0.1)))
        writer.kill()
        writer.join()
        killed += writer.exitcode == -signal.SIGKILL
        if not list_arrays(tmp_path / "rough"):
            continue
        array = KeyedArray.open(tmp_path / "rough", "image", "enc")
        np.testing.assert_array_equal(array.read_all(), rows_of(range(len(array))))
        assert verify_array(tmp_path / "rough", "image", "enc") == (len(array), [])
        group = zarr.open_group(array.folder, mode="r")
        shown = group["key"].shape[0]
        np.testing.assert_array_equal(group["embedding"][:shown], rows_of(range(shown)))
    assert killed >= least
    _write_missing(tmp_path / "rough", rows, 5)
    assert tree_bytes(tmp_path / "rough" / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")
    assert not list((tmp_path / "rough" / "tmp").rglob("*.partial"))


def _append_overlapping(cache: Path, seed: int) -> None:
    array_format.CHUNK_BYTES = 16 * 24
    rng = np.random.Generator(np.random.PCG64(seed))
    array = KeyedArray.create(cache, "image", "enc", (12,), DESCRIPTION)
    for _ in range(15):
        some = rng.integers(0, 150, 20)
        array.append(keys_of(some), rows_of(some))


def test_append__four_processes_at_once_leave_no_double_and_no_hole(tmp_path):
    writers = [FORK.Process(target=_append_overlapping, args=(tmp_path, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if list_arrays(tmp_path):
            array = KeyedArray.open(tmp_path, "image", "enc")
            np.testing.assert_array_equal(array.read_all()[:, 0], array.keys.view("<u8")[:, 1] % 100)
            assert len(array) >= seen
            seen = len(array)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert verify_array(tmp_path, "image", "enc") == (150, [])


def test_append__threads_of_one_process(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def add(seed: int) -> int:
        some = np.random.Generator(np.random.PCG64(seed)).permutation(120)
        array = KeyedArray.create(tmp_path, "image", "enc", (12,), DESCRIPTION)
        return sum(array.append(keys_of(part), rows_of(part)) for part in np.split(some, 12))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(add, range(4))) == 120
    assert verify_array(tmp_path, "image", "enc") == (120, [])


def test_full_disk__is_named_with_path_and_bytes_and_leaves_a_valid_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 1 << 16)
    array = filled(tmp_path, 100)

    def fill_the_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    child = os.fork()
    if not child:  # the limit cannot be raised again, so it is another process that writes
        fill_the_disk()
        try:
            array.append(keys_of(range(100, 200)), rows_of(range(100, 200)))
        except CacheError as error:
            os._exit(0 if "no space left while writing" in str(error) and "embedding/c.0.0" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verify_array(tmp_path, "image", "enc") == (100, [])
    assert not list((tmp_path / "tmp").rglob("*.partial"))
    assert array.append(keys_of(range(100, 200)), rows_of(range(100, 200))) == 100


def test_commit__that_dies_before_the_keys_has_committed_nothing(tmp_path, monkeypatch):
    array = filled(tmp_path, 20)
    real = durable._place

    def dies_at_keys(temporary, path):
        if path.parent.name == "key":
            raise OSError("pulled the plug")
        real(temporary, path)

    monkeypatch.setattr(durable, "_place", dies_at_keys)
    with pytest.raises(OSError, match="plug"):
        array.append(keys_of(range(20, 60)), rows_of(range(20, 60)))
    monkeypatch.setattr(durable, "_place", real)
    assert verify_array(tmp_path, "image", "enc") == (20, [])
    again = KeyedArray.open(tmp_path, "image", "enc")
    assert again.append(keys_of(range(30, 35)), rows_of(range(30, 35))) == 5
    np.testing.assert_array_equal(again.read_all(), rows_of([*range(20), *range(30, 35)]))


def test_append__never_lets_a_chunk_of_keys_count_again_that_a_power_cut_has_left_behind(tmp_path):
    """A file system may lose the rename of an earlier chunk of keys and keep that of a later one."""
    array = filled(tmp_path, 20)
    metadata = {path: path.read_bytes() for path in array.folder.rglob(METADATA)}
    array.append(keys_of(range(20, 60)), rows_of(range(20, 60)))
    for path, content in metadata.items():
        path.write_bytes(content)
    before = filled(tmp_path / "before", 20)
    shutil.copy(before.folder / "key" / "c.1.0", array.folder / "key" / "c.1.0")
    again = KeyedArray.open(tmp_path, "image", "enc")
    assert len(again) == 20
    for start, stop in ((80, 92), (92, 95), (95, 130)):  # the first ends with its chunk
        again.append(keys_of(range(start, stop)), rows_of(range(start, stop)))
        numbers = [*range(20), *range(80, stop)]
        again = KeyedArray.open(tmp_path, "image", "enc")
        np.testing.assert_array_equal(again.keys, keys_of(numbers))
        np.testing.assert_array_equal(again.read_all(), rows_of(numbers))
    assert verify_array(tmp_path, "image", "enc")[1] == []


def test_append__syncs_payload_and_checks_before_the_keys_appear(tmp_path, monkeypatch):
    array = filled(tmp_path, 20)
    events = []
    real_replace = os.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("place", str(new))), real_replace(old, new)))
    array.append(keys_of(range(20, 40)), rows_of(range(20, 40)))
    first_key = events.index(("place", str(array.folder / "key" / "c.1.0")))
    for part in ("embedding", "check"):
        folder = str(array.folder / part)
        placed = [at for at, (what, path) in enumerate(events) if what == "place" and f"{folder}/c." in path]
        synced = events.index(("sync", folder))
        assert len(placed) == 2 and max(placed) < synced < first_key
    for at, (what, path) in enumerate(events):
        partial = f"/{Path(path).name}.{os.getpid()}-"
        assert what != "place" or any(name == "sync" and partial in synced for name, synced in events[:at])
    assert events.index(("sync", str(array.folder / "key"))) > first_key


# -- Damage ----------------------------------------------------------------------------------------------------------


def test_damage__every_flipped_byte_of_a_row_is_found(tmp_path):
    array = filled(tmp_path, 40)
    rng = np.random.Generator(np.random.PCG64(7))
    for part in ("embedding", "key", "check"):
        for path in sorted((array.folder / part).glob("c.*")):
            content = path.read_bytes()
            rows_here = min(16, 40 - 16 * int(path.name.split(".")[1]))
            for at in rng.integers(0, len(content) * rows_here // 16, 6):
                flipped = bytearray(content)
                flipped[at] ^= 1 << rng.integers(8)
                path.write_bytes(flipped)
                row = int(path.name.split(".")[1]) * 16 + int(at) // (len(content) // 16)
                damage = verify_array(tmp_path, "image", "enc")[1]
                assert any(item.rows == str(row) for item in damage), (part, at, damage)
                with pytest.raises(CacheError, match=f"row {row} in chunk {row // 16}"):
                    KeyedArray.open(tmp_path, "image", "enc").read_all()
            path.write_bytes(content)
    assert verify_array(tmp_path, "image", "enc") == (40, [])


def test_damage__swapped_missing_and_short_chunks(tmp_path):
    array = filled(tmp_path, 60)
    one, two = (array.folder / "embedding" / f"c.{number}.0" for number in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)
    damage = verify_array(tmp_path, "image", "enc")[1]
    assert [(item.part, item.chunk, item.rows) for item in damage] == [
        ("embedding", 1, "16-31"),
        ("embedding", 2, "32-47"),
    ]
    assert "swapped" in damage[0].problem
    one.unlink(), two.write_bytes(second[:-2])
    problems = [item.problem for item in verify_array(tmp_path, "image", "enc")[1]]
    assert "cannot be read" in problems[0] and "bytes instead of" in problems[1]
    with pytest.raises(CacheError, match="cannot be read"):
        KeyedArray.open(tmp_path, "image", "enc").read_all()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_damage__a_lost_key_chunk_is_an_error_and_not_fewer_rows(tmp_path, number):
    array = filled(tmp_path, 60)
    (array.folder / "key" / f"c.{number}.0").unlink()
    with pytest.raises(CacheError, match=f"chunk {number} of the keys is missing"):
        KeyedArray.open(tmp_path, "image", "enc")
    damage = verify_array(tmp_path, "image", "enc")[1]
    assert any((item.part, item.chunk) == ("key", number) for item in damage)


def test_damage__an_emptied_description_is_an_error_that_names_its_file(tmp_path):
    path = filled(tmp_path, 3).folder / METADATA
    path.write_bytes(b"")
    with pytest.raises(CacheError, match=f"{path} is not the metadata of a keyed array.*--repair"):
        KeyedArray.open(tmp_path, "image", "enc")


def test_damage__metadata_that_differ_from_the_description(tmp_path):
    array = filled(tmp_path, 40)
    for path in sorted(array.folder.rglob(METADATA)):
        content = path.read_bytes()
        rng = np.random.Generator(np.random.PCG64(len(content)))
        for at in rng.integers(0, len(content), 25):
            flipped = bytearray(content)
            flipped[at] ^= 1
            path.write_bytes(flipped)
            try:
                assert verify_array(tmp_path, "image", "enc")[1], (path, at)
            except CacheError as error:
                assert "format version" in str(error)
        path.write_bytes(content)
    document = array.form.array_document("embedding", 41)
    (array.folder / "embedding" / METADATA).write_bytes(array_format.document_bytes(document))
    (array.folder / "embedding" / "c.9.0.partial").write_bytes(b"left over")
    problems = " ".join(item.problem for item in verify_array(tmp_path, "image", "enc")[1])
    assert "promises 41 rows" in problems and "does not belong there" in problems
