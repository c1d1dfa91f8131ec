"""Exact search beside brute force in float64: whatever computes the products, however the rows lie."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from engine.arrays.keyed_array import KeyedArray
from engine.errors import CacheError
from engine.index import exact, products
from engine.index.exact import ExactRows
from engine.index.products import Way

DIM = 24
LIBRARIES = ["torch", "numpy", "bf16"]


@pytest.fixture(autouse=True)
def small_blocks_and_two_cores(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 128)
    monkeypatch.setattr(exact, "FEW_LEFT", 16)
    monkeypatch.setattr(products, "usable_threads", lambda: 2)


def stored(folder, values: np.ndarray) -> KeyedArray:
    array = KeyedArray.create(folder, "image", "x", (values.shape[1],), {})
    keys = np.arange(2 * len(values), dtype=np.uint64).view(np.uint8).reshape(-1, 16)
    array.append(keys, values.astype(np.float16))
    return array


def gaussian(rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.standard_normal((rows, dim)) * rng.uniform(0.01, 50, (rows, 1))


def brute(values, queries, k, among=None):
    """Return scores and rows of the k largest cosines, equal ones (as float32) in order of rows."""

    def unit(rows):
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1)

    scores = (unit(queries) @ unit(values.astype(np.float16)).T).astype(np.float32)
    if among is not None:
        scores[:, np.setdiff1d(np.arange(len(values)), among)] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("rows", "k"), [(1000, 1), (1000, 10), (1000, 70), (130, 130), (1, 1)])
def test_it_finds_what_brute_force_finds_whatever_multiplies(tmp_path, library, rows, k):
    values, queries = gaussian(rows), gaussian(37, 1)
    scores, found = ExactRows(stored(tmp_path, values), rows, Way(library)).search(queries, k)
    best, truth = brute(values, queries, k)
    np.testing.assert_array_equal(found, truth)
    np.testing.assert_allclose(scores, best, rtol=0, atol=6e-8)


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_that_hardly_differ_are_told_apart_in_float64(tmp_path, library):
    """In half precision the neighbours of one direction differ by far less than bfloat16 and float32 products do."""
    rng = np.random.Generator(np.random.PCG64(3))
    values = (rng.standard_normal(DIM) * 30 + rng.standard_normal((1500, DIM)) * 0.02).astype(np.float16)
    queries = values[::100].astype(np.float64) + rng.standard_normal((15, DIM)) * 1e-3
    found = ExactRows(stored(tmp_path, values), len(values), Way(library)).search(queries, 5)
    best, truth = brute(values, queries, 5)
    np.testing.assert_array_equal(found[0], best)
    np.testing.assert_array_equal(found[1], truth)


@pytest.mark.parametrize("library", LIBRARIES)
def test_equal_rows_come_in_their_order(tmp_path, library):
    values = np.repeat(gaussian(4), 300, axis=0)
    scores, found = ExactRows(stored(tmp_path, values), len(values), Way(library)).search(values[[0, 450, 1199]], 7)
    np.testing.assert_array_equal(found, np.array([[0], [300], [900]]) + np.arange(7))
    np.testing.assert_array_equal(scores, np.ones((3, 7)))


def test_zeros_have_cosine_zero_with_everything(tmp_path):
    values = gaussian(300)
    values[:200] = 0
    rows = ExactRows(stored(tmp_path, values), 300, Way("torch"))
    scores, found = rows.search(np.zeros((1, DIM)), 4)
    assert not scores.any() and found[0].tolist() == [0, 1, 2, 3]
    truth = brute(values, values[250:251], 250)[1]
    scores, found = rows.search(values[250:251], 250)
    np.testing.assert_array_equal(found, truth)


def test_some_rows_only_and_rows_that_came_later(tmp_path):
    values, queries = gaussian(900), gaussian(9, 1)
    array = stored(tmp_path, values)
    among = np.sort(np.random.Generator(np.random.PCG64(5)).permutation(900)[:350])
    rows = ExactRows(array, 900, Way("numpy"))
    np.testing.assert_array_equal(rows.search(queries, 12, among)[1], brute(values, queries, 12, among)[1])
    np.testing.assert_array_equal(ExactRows(array, 500).search(queries, 9)[1], brute(values[:500], queries, 9)[1])


def test_many_queries_go_through_in_batches_and_memory_stays_that_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(exact, "BLOCK_PRODUCTS", 16 * 128)
    sizes, empty = [], torch.empty

    def recorded(*shape, **options):
        sizes.append(np.prod(shape[0]))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    values, queries = gaussian(700), gaussian(50, 1)
    array = stored(tmp_path, values)
    monkeypatch.setattr(array, "read_all", lambda: pytest.fail("all rows at once"))
    np.testing.assert_array_equal(
        ExactRows(array, 700, Way("torch")).search(queries, 6)[1], brute(values, queries, 6)[1]
    )
    assert max(sizes) == 16 * 128 and len(sizes) == 2, "one block of products a core"


def test_threads_of_the_libraries_are_as_before(tmp_path):
    before = torch.get_num_threads()
    ExactRows(stored(tmp_path, gaussian(900)), 900, Way("torch")).search(gaussian(3, 1), 3)
    assert torch.get_num_threads() == before


def test_an_error_in_one_core_is_an_error(tmp_path):
    array = stored(tmp_path, gaussian(900))
    path = sorted(
        path for path in (array.folder / "embedding").rglob("*") if path.is_file() and path.name != "zarr.json"
    )[0]
    content = bytearray(path.read_bytes())
    content[DIM * 2 * 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match="do not match their checks"):
        ExactRows(KeyedArray.open(tmp_path, "image", "x"), 900, Way("torch")).search(gaussian(3, 1), 3)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_bound_on_rounding_holds(library):
    rng = np.random.Generator(np.random.PCG64(0))
    for dim in (3, 512):
        rows, queries = (rng.standard_normal((200, dim)) for _ in range(2))
        rows, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, queries))
        rows[:100] = queries[:100]  # products near one are rounded most
        out = torch.empty((200, 200))
        singles = [torch.from_numpy(np.ascontiguousarray(each, np.float32)) for each in (rows, queries.T)]
        found = Way(library).multiply(*singles, out).numpy()
        assert np.abs(found - rows @ queries.T).max() <= Way(library).error(dim)


def test_the_fastest_way_is_one_of_those_tried_and_has_a_rate():
    way = products.fastest_way()
    assert way.library in LIBRARIES and way.rate > 0
