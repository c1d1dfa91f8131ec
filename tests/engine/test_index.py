"""Indexes against brute force, and what they say about what they cover."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from engine import faiss_loader, index
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.index import building
from engine.keys import key_of_text

ENCODER = "tiny-fp32-000000000000"


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No syncing, which only a power cut needs; FAISS looked at anew in each test."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    faiss_loader.load_faiss.cache_clear()
    yield
    faiss_loader.load_faiss.cache_clear()


def keys_of(numbers) -> np.ndarray:
    return np.frombuffer(b"".join(key_of_text(str(number)) for number in numbers), np.uint8).reshape(-1, 16)


def values_of(numbers, dim: int = 24) -> np.ndarray:
    """Return vectors of very different lengths around a few directions."""
    rows = []
    for number in numbers:
        rng = np.random.Generator(np.random.PCG64(number))
        centre = np.random.Generator(np.random.PCG64(10_000 + number % 7)).standard_normal(dim)
        rows.append((centre + 0.5 * rng.standard_normal(dim)) * rng.uniform(0.1, 20))
    return np.array(rows, np.float16).reshape(-1, dim)


def filled(path, count: int) -> Cache:
    array = KeyedArray.create(path, "image", ENCODER, (24,), {"id": ENCODER})
    array.append(keys_of(range(count)), values_of(range(count)))
    return Cache(path)


def cosines(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    queries, values = queries.astype(np.float64), values.astype(np.float64)
    products = queries @ values.T
    return products / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(values, axis=1)


QUERIES = values_of(range(900, 930)).astype(np.float32)


@pytest.mark.parametrize("how", ["exact", "ivf", "hnsw"])
def test_search__against_brute_force(tmp_path, how):
    cache = filled(tmp_path, 800)
    built = index.build_index(cache, ENCODER, "image", how)
    truth = cosines(QUERIES, values_of(range(800)))
    best = np.argsort(-truth, axis=1)[:, :10]
    for searched in (built, index.load_index(cache, ENCODER, "image", how)):
        scores, keys = searched.search(QUERIES, 10)
        _, rows = searched.search_rows(QUERIES, 10)
        np.testing.assert_array_equal(keys, keys_of(range(800))[rows])
        np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, axis=1), atol=2e-6)
        recall = np.mean([len(set(found) & set(right)) / 10 for found, right in zip(rows, best, strict=True)])
        assert recall == 1.0 if how == "exact" else recall >= 0.9


@pytest.mark.parametrize("how", ["exact", "ivf"])
def test_search__among_some_rows_and_fewer_than_k(tmp_path, how):
    built = index.build_index(filled(tmp_path, 500), ENCODER, how=how)
    among = np.array([490, 3, 77])
    scores, keys = built.search(QUERIES[:2], 5, among=among)
    _, rows = built.search_rows(QUERIES[:2], 5, among=among)
    if how == "exact":
        assert all(set(found[:3]) == set(among) for found in rows)
    assert set(rows.ravel()) <= {*among, -1}
    assert (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all() and not keys[:, 3:].any()


def test_behind__counts_rows_added_since(tmp_path):
    cache = filled(tmp_path, 50)
    built = index.build_index(cache, ENCODER)
    assert built.behind(cache) == 0
    KeyedArray.open(tmp_path, "image", ENCODER).append(keys_of(range(50, 61)), values_of(range(50, 61)))
    assert built.behind(cache) == 11 and index.load_index(Cache(tmp_path), ENCODER).behind(Cache(tmp_path)) == 11
    assert index.build_index(cache, ENCODER).behind(cache) == 0
    beside = json.loads((cache.indexes_path / f"{ENCODER}-image-exact.json").read_text())
    assert (beside["encoder"], beside["kind"], beside["how"], beside["rows"]) == (ENCODER, "image", "exact", 61)
    assert not list((tmp_path / "tmp").rglob("*.partial"))


def test_load__says_what_is_wrong_and_how_to_mend_it(tmp_path):
    cache = filled(tmp_path / "one", 30)
    with pytest.raises(CacheError, match=r"no index .*fluoro index --cache .* --how hnsw"):
        index.load_index(cache, ENCODER, how="hnsw")
    built = index.build_index(cache, ENCODER)
    path = cache.indexes_path / f"{built.info.name}.faiss"
    content, beside = path.read_bytes(), path.with_suffix(".json").read_text()
    for damaged in (content[:-8], content[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="not the one that its JSON describes"):
            index.load_index(cache, ENCODER)
    path.write_bytes(content)
    path.with_suffix(".json").write_text(beside.replace('"rows": 30', '"rows": 29'))
    with pytest.raises(CacheError, match=r"does not match its digest .* fluoro index"):
        index.load_index(cache, ENCODER)
    path.with_suffix(".json").write_bytes(replace(built.info, rows=29).document())
    with pytest.raises(CacheError, match="built over other rows"):
        index.load_index(cache, ENCODER)
    path.with_suffix(".json").write_bytes(replace(built.info, version=2).document())
    with pytest.raises(CacheError, match="newer version 2; upgrade"):
        index.load_index(cache, ENCODER)


def test_load__an_index_that_is_replaced_before_it_is_read_is_loaded_anew(tmp_path, monkeypatch):
    """Else it would answer with rows that its description does not cover."""
    index.build_index(filled(tmp_path, 50), ENCODER, how="hnsw")
    read = building._read

    def replaced_first(*arguments):
        monkeypatch.setattr(building, "_read", read)
        index.update_index(filled(tmp_path, 60), ENCODER, how="hnsw")
        return read(*arguments)

    monkeypatch.setattr(building, "_read", replaced_first)
    loaded = index.load_index(Cache(tmp_path), ENCODER, how="hnsw")
    assert len(loaded) == loaded.engine.ntotal == 60
    scores, rows = loaded.search_rows(QUERIES, 60)
    np.testing.assert_allclose(scores, -np.sort(-cosines(QUERIES, values_of(range(60))), axis=1), atol=1e-4)
    assert (np.sort(rows, axis=1) == np.arange(60)).all()


def test_build__wrong_requests(tmp_path):
    cache = filled(tmp_path, 5)
    with pytest.raises(UsageError, match="unknown kind of index 'flat'; known: exact, ivf, hnsw, pq, or a FAISS"):
        index.build_index(cache, ENCODER, how="flat")
    with pytest.raises(UsageError, match="'pixels' rows cannot be searched"):
        index.build_index(cache, ENCODER, "pixels")
    built = index.build_index(cache, ENCODER)
    with pytest.raises(UsageError, match=r"queries must have shape \(q, 24\)"):
        built.search(np.zeros((2, 23)), 3)
    assert built.search(np.zeros((0, 24)), 3)[0].shape == (0, 3)


def test_without_faiss__exact_search_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    cache = filled(tmp_path, 200)
    index.build_index(cache, ENCODER, how="hnsw")
    faiss_loader.load_faiss.cache_clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with caplog.at_level(logging.WARNING):
        built = index.build_index(cache, ENCODER, save=False)
    assert "exact search goes on in NumPy" in caplog.text
    among = np.arange(0, 200, 3)
    for some in (None, among):
        _, rows = built.search_rows(QUERIES, 5, among=some)
        truth = cosines(QUERIES, values_of(range(200)))
        if some is not None:
            truth[:, np.setdiff1d(np.arange(200), some)] = -2
        np.testing.assert_array_equal(rows, np.argsort(-truth, axis=1)[:, :5])
    with pytest.raises(CacheError, match="needs FAISS"):
        index.load_index(cache, ENCODER, how="hnsw")


def test_faiss__a_wheel_that_gives_wrong_neighbours_is_put_aside(monkeypatch, caplog):
    import faiss

    monkeypatch.setattr(faiss.IndexFlatIP, "search", lambda self, x, k: (np.zeros((len(x), k)), np.zeros((len(x), k))))
    assert faiss_loader.load_faiss() is None and "wrong neighbours" in caplog.text


@pytest.mark.parametrize(
    ("vendor", "flags", "chosen"),
    [
        ("GenuineIntel", "avx2 avx512f avx512bw avx512dq avx512vl avx512cd amx_tile", "SkylakeX"),
        ("GenuineIntel", "avx2", None),
        ("AuthenticAMD", "avx2 avx512f avx512bw avx512dq avx512vl avx512cd", None),
    ],
)
def test_faiss__kernel_for_new_intel_cores_only(tmp_path, vendor, flags, chosen):
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\nflags\t\t: fpu {flags}\n")
    assert faiss_loader._core_type(tmp_path / "cpuinfo") == chosen
    assert faiss_loader._core_type(tmp_path / "absent") is None
