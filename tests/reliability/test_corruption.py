"""Corruption: every flipped byte, shortened, swapped or lost file is found, and named with array, chunk and rows."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from engine.arrays import array_format
from engine.arrays.array_format import CHECK, KEY, METADATA, STORE, ArrayFormat
from engine.arrays.array_verify import Damage, verify_array
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.dataset import Dataset
from engine.upkeep.repair import repair_cache
from engine.upkeep.verify import array_folders, verify_cache, wrong_indexes, wrong_tables
from tests.reliability import small_cache
from tests.reliability.small_cache import FIRST, SECOND, changed, flipped

FULL = pytest.param("full", marks=pytest.mark.slow)
EVERY = {"quick": 41, "full": 1}  # of the bytes of metadata and keys
SAMPLED = {"quick": 2, "full": 150}  # bytes of each payload and check file


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Dataset:
    return small_cache.write_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, images) -> Iterator[Path]:
    """A whole cache, which each test damages and puts right again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("corruption")
        small_cache.fill(folder / "cache", images)
        assert verify_cache(folder / "cache").damage == []
        yield folder / "cache"
        assert verify_cache(folder / "cache").damage == [], "a test has not put the cache right again"


def damage_of(cache: Path, *paths: Path) -> list[Damage]:
    """Verify what `verify_cache` would, but only the arrays that the files belong to where they are of arrays."""
    parts = [path.relative_to(cache).parts for path in paths]
    if not paths or any(len(each) < 4 for each in parts):
        return verify_cache(cache).damage
    return [item for kind, name in sorted({each[1:3] for each in parts}) for item in verify_array(cache, kind, name)[1]]


def forms(cache: Path) -> Iterator[tuple[Path, ArrayFormat, int]]:
    """Yield folder, format and rows of each array."""
    for kind, name in array_folders(cache):
        array = KeyedArray.open(cache, kind, name)
        yield cache / STORE / kind / name, array.form, len(array)


def chunk_files(cache: Path, *parts: str) -> Iterator[tuple[Path, ArrayFormat, str, int, int]]:
    """Yield path, format, part, chunk and rows in it of each chunk file; the payload is called "payload"."""
    for folder, form, rows in forms(cache):
        for part in parts:
            part = form.payload if part == "payload" else part
            for number in range(-(-rows // form.chunk_rows)):
                some = min(form.chunk_rows, rows - number * form.chunk_rows)
                yield folder / part / form.chunk_file(part, number), form, part, number, some


def row_of(form: ArrayFormat, part: str, number: int, at: int) -> str:
    return str(number * form.chunk_rows + at // (form.chunk_file_bytes(part) // form.chunk_rows))


# -- Flipped bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["quick", FULL])
def test_every_flipped_byte_of_metadata_is_found(cache, size):
    rng = np.random.Generator(np.random.PCG64(1))
    paths = sorted((cache / STORE).rglob(METADATA))
    assert len(paths) == 1 + 4 + 4 * 7, "the store's, the kinds', and four of each array (pixels are shared)"
    for path in paths:
        content = path.read_bytes()
        for at in range(int(rng.integers(EVERY[size])), len(content), EVERY[size]):
            with changed(path, flipped(content, at, int(rng.integers(1, 256)))):
                found = damage_of(cache, path)
            assert found, f"byte {at} of {path}"
            places = [f"{item.array}/{item.part}".rstrip("/") for item in found]
            named = path.relative_to(cache if len(path.relative_to(cache).parts) < 4 else cache / STORE)
            assert {str(named), str(named.parent)} & set(places), (path, at, found)


@pytest.mark.parametrize("size", ["quick", FULL])
def test_every_flipped_byte_of_a_key_is_found_with_its_row(cache, size):
    rng = np.random.Generator(np.random.PCG64(2))
    for path, form, part, number, rows in chunk_files(cache, KEY):
        content = path.read_bytes()
        for at in range(int(rng.integers(EVERY[size])), 16 * rows, EVERY[size]):
            with changed(path, flipped(content, at, int(rng.integers(1, 256)))):
                found = damage_of(cache, path)
            assert [(item.array, item.chunk, item.rows) for item in found] == [
                (f"{form.kind}/{form.name}", number, row_of(form, part, number, at))
            ], (path, at)


@pytest.mark.parametrize("size", ["quick", FULL])
def test_flipped_bytes_of_payload_and_checks_are_found_with_their_rows(cache, size):
    rng = np.random.Generator(np.random.PCG64(3))
    for path, form, part, number, rows in chunk_files(cache, "payload", CHECK):
        content = path.read_bytes()
        # What stands behind the last row belongs to nobody: a killed writer may have left it there.
        for at in rng.integers(0, len(content) // form.chunk_rows * rows, SAMPLED[size]):
            with changed(path, flipped(content, at, int(rng.integers(1, 256)))):
                found = damage_of(cache, path)
            assert [(item.array, item.part, item.chunk, item.rows) for item in found] == [
                (f"{form.kind}/{form.name}", form.payload, number, row_of(form, part, number, at))
            ], (path, at)


@pytest.mark.parametrize("size", ["quick", FULL])
def test_flipped_bytes_of_sample_tables_and_indexes_are_found(cache, size):
    rng = np.random.Generator(np.random.PCG64(4))
    paths = [*(cache / "datasets").iterdir(), *(cache / "indexes").iterdir()]
    assert len(paths) == 1 + 2 * 2
    for path in paths:
        content = path.read_bytes()
        for at in range(int(rng.integers(EVERY[size])), len(content), EVERY[size]):
            with changed(path, flipped(content, at, int(rng.integers(1, 256)))):
                found = [*wrong_tables(cache), *wrong_indexes(cache)]
            assert [item.array.rpartition(".")[0] for item in found] == [f"{path.parent.name}/{path.stem}"], (path, at)


# -- Shortened, lost and swapped files -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["quick", FULL])
def test_every_shortened_or_lost_file_is_found(cache, size):
    rng = np.random.Generator(np.random.PCG64(5))
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        if path.relative_to(cache).parts[0] in ("locks", "tmp"):
            continue
        content = path.read_bytes()
        lengths = {0, len(content) - 1, *rng.integers(0, len(content), SAMPLED[size] // 10).tolist()}
        for length in [*lengths, None]:
            if length is None and path.suffix == ".parquet":
                continue  # a table that is not there is made again by the next embedding
            with changed(path, None if length is None else content[:length]):
                assert damage_of(cache, path), (path, length)


def test_a_lost_chunk_is_named_with_its_rows(cache):
    for path, form, part, number, rows in chunk_files(cache, "payload", CHECK, KEY):
        start = number * form.chunk_rows
        with changed(path, None):
            found = [item for item in damage_of(cache, path) if item.part == part and item.chunk == number]
        assert found and found[0].array == f"{form.kind}/{form.name}", path
        last = start + (form.chunk_rows if part == KEY else rows) - 1
        assert found[0].rows == f"{start}-{last}" if last > start else str(start)


@pytest.mark.parametrize("size", ["quick", FULL])
def test_two_swapped_chunks_are_found_with_their_rows(cache, size):
    """Within an array, and between arrays of one form: each file alone is as it was written."""
    by_form: dict[tuple, list[tuple[Path, str, int]]] = {}
    for path, form, part, number, _ in chunk_files(cache, "payload", CHECK, KEY):
        by_form.setdefault((part, form.chunk_file_bytes(part)), []).append((path, f"{form.kind}/{form.name}", number))
    swaps = 0
    for files in by_form.values():
        pairs = itertools.combinations(files, 2) if size == "full" else itertools.pairwise(files)
        for (one, array_one, chunk_one), (two, array_two, chunk_two) in pairs:
            first, second = one.read_bytes(), two.read_bytes()
            if first == second:
                continue  # the encoders have the same keys
            with changed(one, second), changed(two, first):
                found = {(item.array, item.chunk) for item in damage_of(cache, one, two)}
            assert {(array_one, chunk_one), (array_two, chunk_two)} <= found, (one, two)
            swaps += 1
    assert swaps > 50


def test_a_whole_array_in_the_place_of_another_is_found(cache):
    one, two = (cache / STORE / "image" / name for name in (FIRST, SECOND))
    aside = cache / "aside"
    os.rename(one, aside), os.rename(two, one), os.rename(aside, two)
    problems = {item.array: item.problem for item in damage_of(cache)}
    os.rename(one, aside), os.rename(two, one), os.rename(aside, two)
    assert f"says it is image/{SECOND}" in problems[f"image/{FIRST}"].replace("attributes say", "says")


def test_a_newer_version_is_refused_and_not_called_damage(cache):
    path = cache / STORE / METADATA
    newer = path.read_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    with changed(path, newer):
        # The arrays' digests say version 1, so here it is a damaged digit.
        assert [item.array for item in damage_of(cache)] == [f"{STORE}/{METADATA}"]


def test_a_cache_in_an_archive_or_in_memory_is_verified_as_one_in_a_folder(cache, tmp_path):
    rough = Path(shutil.copytree(cache, tmp_path / "cache"))
    sound = shutil.make_archive(tmp_path / "sound", "zip", rough)
    flip(rough / STORE / IMAGE / "embedding/c.0.0", 5 * 24 + 3)
    shorten(rough / STORE / TEXT / "key/c.0.0")
    damaged = shutil.make_archive(tmp_path / "damaged", "zip", rough)
    assert verify_cache(sound) == verify_cache(cache)
    assert verify_cache(damaged) == verify_cache(rough) and len(verify_cache(rough).damage) > 1
    memory = fsspec.filesystem("memory")
    memory.put(str(rough), "/verified", recursive=True)
    assert verify_cache("memory://verified").damage == verify_cache(rough).damage
    memory.rm("/verified", recursive=True)


# -- Repair ----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    path.write_bytes(flipped(path.read_bytes(), at, 0x40))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)


IMAGE, PIXELS, TEXT = f"image/{FIRST}", "pixels/8-fake", f"text/{FIRST}"
# What is done to an array's folder (its chunks have 16 rows of 20), and which rows have to be computed again.
DAMAGES = {
    "a flipped payload byte": (IMAGE, lambda array: flip(array / "embedding/c.0.0", 5 * 24 + 3), [5]),
    "a flipped check": (IMAGE, lambda array: flip(array / "check/c.1", 2 * 8), [18]),
    "a flipped key": (IMAGE, lambda array: flip(array / "key/c.0.0", 7 * 16 + 3), []),
    "a payload chunk lost": (IMAGE, lambda array: (array / "embedding/c.1.0").unlink(), range(16, 20)),
    "a check chunk shortened": (IMAGE, lambda array: shorten(array / "check/c.0"), range(16)),
    "a payload chunk longer by a byte": (IMAGE, lambda array: lengthen(array / "embedding/c.0.0"), []),
    "a check chunk longer by a byte": (IMAGE, lambda array: lengthen(array / "check/c.0"), []),
    "the first key chunk lost": (IMAGE, lambda array: (array / "key/c.0.0").unlink(), []),
    "the last key chunk lost": (IMAGE, lambda array: (array / "key/c.1.0").unlink(), []),
    "two payload chunks swapped": (PIXELS, lambda array: swap(array / "pixels/c.2.0.0.0", array / "pixels/c.5.0.0.0"),
                                   [4, 5, 10, 11]),
    "two key chunks swapped": (PIXELS, lambda array: swap(array / "key/c.2.0", array / "key/c.5.0"), []),
    "a key and a payload byte of one row": (
        TEXT, lambda array: (flip(array / "key/c.0.0", 48), flip(array / "embedding/c.0.0", 72)), [3]),
    "the group's metadata": (IMAGE, lambda array: flip(array / METADATA, 300), []),
    "the group's metadata lost": (TEXT, lambda array: (array / METADATA).unlink(), []),
    "the metadata of preprocessed pixels": (PIXELS, lambda array: shorten(array / METADATA), []),
    "an array's metadata": (IMAGE, lambda array: flip(array / "check" / METADATA, 100), []),
    "metadata and a row": (IMAGE, lambda array: (flip(array / METADATA, 60), flip(array / "check/c.0", 8)), [1]),
    "the store's metadata": (IMAGE, lambda array: flip(array.parent.parent / METADATA, 20), []),
    "a kind's metadata lost": (IMAGE, lambda array: (array.parent / METADATA).unlink(), []),
    "a foreign file": (IMAGE, lambda array: (array / "key/c.1.0.partial").write_bytes(b"?"), []),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_drops_exactly_the_damaged_rows_and_embedding_makes_the_cache_whole(cache, images, tmp_path, damage):
    name, harm, rows = DAMAGES[damage]
    undamaged = small_cache.rows_by_key(cache)
    kind, encoder = name.split("/")
    keys = [key.tobytes() for key in KeyedArray.open(cache, kind, encoder).keys]
    rough = Path(shutil.copytree(cache, tmp_path / "cache"))
    harm(rough / STORE / name)
    assert verify_cache(rough).damage
    repaired = repair_cache(rough)
    assert verify_cache(rough).damage == [] and not repaired.tables
    left = small_cache.rows_by_key(rough)
    assert undamaged[kind, encoder].keys() - left[kind, encoder].keys() == {keys[row] for row in rows}
    assert {name for name in undamaged if undamaged[name] != left[name]} == ({(kind, encoder)} if len(rows) else set())
    known = [key.tobytes() for array in repaired.arrays for key in array.dropped]
    unnamed = sum(array.unnamed for array in repaired.arrays)
    assert len(known) + unnamed == len(rows) and set(known) <= {keys[row] for row in rows}
    computed = 0
    for each in small_cache.encoders():
        report = Cache(rough).embed(images, each, small_cache.EVERYTHING, batch_size=8)
        computed += sum(report.computed.values())
    assert computed == len(rows)
    assert small_cache.rows_by_key(rough) == undamaged and verify_cache(rough).damage == []


def test_repair_of_a_damaged_table_or_index_removes_it_and_leaves_all_rows(cache, tmp_path):
    rough = Path(shutil.copytree(cache, tmp_path / "cache"))
    table = next((rough / "datasets").iterdir())
    flip(table, 200)
    flip(rough / "indexes" / f"{FIRST}-image-exact.faiss", 100)
    flip(rough / "indexes" / f"{SECOND}-image-exact.json", 30)
    repaired = repair_cache(rough)
    assert repaired.tables == [table.stem] and len(repaired.indexes) == 2 and not repaired.arrays
    assert verify_cache(rough).damage == [] and small_cache.rows_by_key(rough) == small_cache.rows_by_key(cache)
    assert not list((rough / "indexes").iterdir())


def test_repair_names_an_array_that_nothing_describes_and_takes_a_description(cache, tmp_path):
    rough = Path(shutil.copytree(cache, tmp_path / "cache"))
    for kind in ("text", "tokens"):
        for folder in (rough / STORE / kind).glob(f"{FIRST}*"):
            shutil.rmtree(folder)
    flip(rough / STORE / IMAGE / METADATA, 250)
    lost = repair_cache(rough).arrays[0]
    assert lost.lost and lost.name == FIRST and len(verify_cache(rough).damage) == 1
    encoder = small_cache.encoders()[0]
    repaired = repair_cache(rough, {encoder.id: encoder.description}).arrays[0]
    assert not repaired.lost and repaired.rows == small_cache.SAMPLES
    assert verify_cache(rough).damage == []
    assert Cache(rough).array("image", FIRST).form.description == encoder.description


def test_repair_leaves_an_array_under_another_ones_name_alone(cache, tmp_path):
    rough = Path(shutil.copytree(cache, tmp_path / "cache"))
    os.rename(rough / STORE / IMAGE, rough / STORE / "image" / "stranger")
    assert [(array.name, array.lost) for array in repair_cache(rough).arrays] == [("stranger", True)]
    assert (rough / STORE / "image" / "stranger" / "embedding").is_dir()
