"""Corruption: every flipped byte, shortened, swapped or lost file is found, and named with array, chunk and rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import array_format
from engine.array_format import CHECK, KEY, METADATA, STORE, ArrayFormat
from engine.array_verify import Damage, verify_array
from engine.keyed_array import KeyedArray
from engine.upkeep.verify import array_folders, verify_cache, wrong_indexes, wrong_tables
from tests.reliability import small_cache
from tests.reliability.small_cache import FIRST, SECOND, changed, flipped

FULL = pytest.param("full", marks=pytest.mark.slow)
EVERY = {"quick": 41, "full": 1}  # of the bytes of metadata and keys
SAMPLED = {"quick": 2, "full": 150}  # bytes of each payload and check file


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    """A whole cache, which each test damages and puts right again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("corruption")
        small_cache.fill(folder / "cache", small_cache.write_dataset(folder / "images"))
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
