"""Every place for a cache against one list of promises, and arrays in archives and on web servers."""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from engine.arrays import array_format
from engine.arrays.array_folder import list_arrays
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.storage import LocalStorage, Storage, storage_of
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from tests.engine.read_only_copies import READ_ONLY, read_only_copy, served

WRITABLE = ("folder", "memory")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 16 * 24)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextmanager
def empty_storage(way: str, tmp_path: Path) -> Iterator[Storage]:
    if way == "folder":
        yield storage_of(tmp_path / "cache")
        return
    name = uuid.uuid4().hex
    yield storage_of(f"memory://{name}")
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.fixture(params=WRITABLE)
def storage(request, tmp_path) -> Iterator[Storage]:
    with empty_storage(request.param, tmp_path) as empty:
        yield empty


def keys_of(numbers) -> np.ndarray:
    keys = np.zeros((len(numbers), 16), np.uint8)
    keys.view("<u8")[:, 0] = np.asarray(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    return keys


def rows_of(numbers) -> np.ndarray:
    return (np.asarray(numbers)[:, None] % 100 + np.arange(12) / 16).astype("<f2")


def filled(place: Storage | Path | str, count: int) -> KeyedArray:
    array = KeyedArray.create(place, "image", "enc", (12,), {"model": "tiny"})
    for start in range(0, count, 7):
        some = range(start, min(start + 7, count))
        array.append(keys_of(some), rows_of(some))
    array.finish()
    return array


class TestEveryPlaceThatCanBeWritten:
    """What `Storage` promises, of every implementation."""

    def test_files_are_read_as_they_were_put(self, storage):
        storage.make_folder("a/b")
        storage.put(
            [[("a/b/one", [b"12", np.array([3, 4], np.uint8)])], [("a/b/two", [])]], "tmp", [("a/three", [b"3"])]
        )
        assert storage.read("a/b/one") == b"12\x03\x04"
        assert storage.read_many(["a/b/one", "a/b/two", "a/three"]) == [b"12\x03\x04", b"", b"3"]
        storage.put([[("a/b/one", [b"anew"])]], "tmp")
        assert storage.read("a/b/one") == b"anew"

    def test_files_appear_in_their_order(self, storage):
        storage.make_folder("a")
        seen = []

        def parts(number: int) -> list[bytes]:
            seen.append([storage.exists(f"a/{earlier}") for earlier in range(number)])
            return [b"x"]

        storage.put([[(f"a/{number}", parts(number))] for number in range(40)], "tmp")
        for before in seen:
            assert before == sorted(before, reverse=True), "a file was there before one that comes earlier"

    def test_what_is_not_there_is_said(self, storage):
        with pytest.raises(FileNotFoundError):
            storage.read("nothing/here")
        assert not storage.exists("nothing/here")
        assert storage.names("nothing") == []
        storage.make_folder("a")
        storage.put([[("a/1", [b"1"]), ("a/3", [b"3"])]], "tmp")
        assert storage.read_many(["a/1", "a/2", "a/3"]) == [b"1", None]
        storage.remove("a/2")

    def test_names_of_a_folder_are_sorted_files_and_folders(self, storage):
        storage.make_folder("a/c")
        storage.put([[("a/2", [b"2"]), ("a/c/deep", [b"3"]), ("a/1", [b"1"])]], "tmp")
        assert storage.names("a") == ["1", "2", "c"]

    def test_removed_is_gone(self, storage):
        storage.make_folder("a")
        storage.put([[("a/1", [b"1"])]], "tmp")
        storage.remove("a/1")
        assert not storage.exists("a/1") and storage.read_many(["a/1"]) == [None]

    def test_a_folder_is_put_whole(self, storage):
        storage.put_folder("a/new", [("part/x", [b"x"]), ("last", [b"y"])], "tmp/scratch")
        assert storage.read("a/new/part/x") == b"x" and storage.read("a/new/last") == b"y"

    def test_written_and_read_as_local_files(self, storage):
        with storage.writing("a/b.bin", "tmp") as path:
            path.write_bytes(b"content")
        assert storage.read("a/b.bin") == b"content"
        with storage.reading("a/b.bin") as path:
            assert path.read_bytes() == b"content"
        with storage.reading("a/nothing") as path:
            assert not path.exists()
        with pytest.raises(ValueError, match="on the way"), storage.writing("a/b.bin", "tmp") as path:
            path.write_bytes(b"half")
            raise ValueError("on the way")
        assert storage.read("a/b.bin") == b"content"

    def test_a_lock_is_held_by_one_at_a_time(self, storage):
        inside, most = [], []

        def work() -> None:
            with storage.lock("locks/x.lock"):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.005)
                inside.pop()

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 6

    def test_a_storage_can_be_sent_to_another_process(self, storage):
        storage.make_folder("a")
        storage.put([[("a/1", [b"1"])]], "tmp")
        again = pickle.loads(pickle.dumps(storage))
        assert again.read("a/1") == b"1" and again.address == storage.address

    def test_a_keyed_array_ends_with_the_same_bytes_everywhere(self, storage, tmp_path):
        local = filled(tmp_path / "local", 75).folder
        array = filled(storage, 75)
        for path in sorted(local.rglob("*")):
            if path.is_file():
                assert storage.read(f"arrays.zarr/image/enc/{path.relative_to(local)}") == path.read_bytes(), path
        reader = KeyedArray.open(storage, "image", "enc")
        rows = np.random.Generator(np.random.PCG64(1)).integers(0, 75, 200)
        np.testing.assert_array_equal(reader.read(rows), rows_of(rows))
        np.testing.assert_array_equal(reader.read_all(), rows_of(range(75)))
        np.testing.assert_array_equal(np.concatenate([values for _, values in reader.chunks()]), rows_of(range(75)))
        assert array.append(keys_of(range(70, 90)), rows_of(range(70, 90))) == 15
        reader.refresh()
        np.testing.assert_array_equal(reader.read_all(), rows_of(range(90)))
        assert list_arrays(storage) == [("image", "enc")]

    def test_damage_is_found_when_it_is_read(self, storage):
        filled(storage, 75)
        name = "arrays.zarr/image/enc/embedding/c.2.0"
        content = bytearray(storage.read(name))
        content[5] ^= 1
        storage.put([[(name, [bytes(content)])]], "tmp")
        with pytest.raises(CacheError, match="do not match their checks"):
            KeyedArray.open(storage, "image", "enc").read_all()
        storage.put([[(name, [bytes(content[:-9])])]], "tmp")
        with pytest.raises(CacheError, match=r"c\.2\.0 has 375 bytes instead of 384"):
            KeyedArray.open(storage, "image", "enc").read_all()
        storage.remove(name)
        with pytest.raises(CacheError, match=r"c\.2\.0 cannot be read"):
            KeyedArray.open(storage, "image", "enc").read_all()

    def test_several_threads_append_at_once(self, storage):
        array = KeyedArray.create(storage, "image", "enc", (12,), {"model": "tiny"})

        def add(seed: int) -> None:
            handle = KeyedArray.open(storage, "image", "enc")
            numbers = np.random.Generator(np.random.PCG64(seed)).permutation(60)
            for some in np.split(numbers, 6):
                handle.append(keys_of(some), rows_of(some))

        threads = [threading.Thread(target=add, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        array.refresh()
        assert len(array) == 60
        np.testing.assert_array_equal(array.read(array.find(keys_of(range(60)))), rows_of(range(60)))


class TestReadOnlyPlaces:
    @pytest.fixture(params=READ_ONLY)
    def copy(self, request, tmp_path) -> Iterator[tuple[Path, str]]:
        """A local cache and the address of its copy."""
        filled(tmp_path / "cache", 75)
        with read_only_copy(tmp_path / "cache", request.param) as address:
            yield tmp_path / "cache", address

    def test_rows_are_those_of_the_folder(self, copy):
        folder, address = copy
        here, there = (KeyedArray.open(place, "image", "enc") for place in (folder, storage_of(address)))
        assert Cache(address).array("image", "enc").keys.tobytes() == here.keys.tobytes()
        np.testing.assert_array_equal(there.keys, here.keys)
        rows = np.random.Generator(np.random.PCG64(1)).integers(0, 75, 200)
        assert there.read(rows).tobytes() == here.read(rows).tobytes()
        assert there.read_all().tobytes() == here.read_all().tobytes()
        for (start, values), (other, expected) in zip(there.chunks(), here.chunks(), strict=True):
            assert start == other and values.tobytes() == expected.tobytes()
        there.refresh()
        there.finish()
        assert there.attributes == here.attributes

    def test_writing_is_refused_and_says_why(self, copy):
        array = KeyedArray.open(copy[1], "image", "enc")
        with pytest.raises(CacheError, match="is read-only, as archives and web servers are; name a folder"):
            array.append(keys_of([99]), rows_of([99]))
        with pytest.raises(CacheError, match="is read-only"):
            KeyedArray.create(copy[1], "text", "other", (3,), {})

    def test_what_is_not_there_is_said(self, copy):
        with pytest.raises(CacheError, match="has no text rows of 'enc'"):
            Cache(copy[1]).array("text", "enc")
        with pytest.raises(CacheError, match="is not a folder of this machine"):
            Cache(copy[1]).path  # noqa: B018


def test_web_server_that_lists_nothing__says_so_where_a_listing_is_needed(tmp_path):
    filled(tmp_path / "cache", 5)
    with served(tmp_path, lists=False) as url, pytest.raises(CacheError, match="does not list its folders"):
        Cache(f"{url}/cache").arrays()
    with served(tmp_path) as url:
        assert Cache(f"{url}/cache").arrays() == [("image", "enc")]


def test_nothing_at_a_read_only_address__is_an_error(tmp_path):
    with served(tmp_path) as url, pytest.raises(CacheError, match="there is no cache at http"):
        Cache(f"{url}/cache")
    with pytest.raises(UsageError, match="no such file"):
        Cache(f"zip://{tmp_path}/missing.zip")
    with pytest.raises(UsageError, match="nosuch"):
        Cache("nosuch://place")


def test_storage_of__takes_paths_urls_and_storages(tmp_path):
    for given in (tmp_path, str(tmp_path), f"file://{tmp_path}", LocalStorage(tmp_path)):
        found = storage_of(given)
        assert isinstance(found, LocalStorage) and found.folder == tmp_path
    (tmp_path / "odd.zip").mkdir()
    assert isinstance(storage_of(tmp_path / "odd.zip"), LocalStorage)
