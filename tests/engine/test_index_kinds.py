"""Kinds by plain names and factory strings: built chunk by chunk, grown, filtered, and refused where they cannot be."""

from __future__ import annotations

import json
import logging
import os

import faiss
import numpy as np
import pytest
import torch

from engine import index
from engine.arrays import array_format
from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.index import building, devices, products, searching
from tests.engine.test_index import ENCODER, QUERIES, cosines, filled, keys_of, values_of

ROWS = 800


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("kinds"), ROWS)


def truth_of(k: int, rows: int = ROWS) -> np.ndarray:
    return np.argsort(-cosines(QUERIES, values_of(range(rows))), axis=1)[:, :k]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)]))


@pytest.mark.parametrize(
    ("how", "least"),
    [
        ("pq", 0.3),
        ("IVF4,PQ6x4", 0.3),
        ("IVF8,PQ6x4", 0.3),
        ("HNSW16", 0.9),
        ("OPQ6,PQ6x4", 0.3),
        ("SQ8", 0.95),
        ("Flat", 1),
    ],
)
def test_a_kind_by_its_factory_string_finds_neighbours_with_true_cosines(cache, how, least):
    index.build_index(cache, ENCODER, how=how)
    loaded = index.load_index(Cache(cache.path), ENCODER, how=how)
    scores, rows = loaded.search_rows(QUERIES, 10)
    assert recall(rows, truth_of(10)) >= least
    exact = cosines(QUERIES, values_of(range(ROWS)))
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


FEW = "the {} index is trained on 800 rows; its cells and codes are well placed from 9,984 on"
TWICE = "FAISS trains {0} twice, the second time for a search that is not used here; {0}np does not"


@pytest.mark.parametrize(("how", "told"), [("pq", FEW), ("OPQ6,PQ6np", FEW), ("IVF8,PQ6x4", TWICE), ("IVF8,Flat", "")])
def test_training__is_told_in_a_sentence_of_ours(cache, how, told, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="engine"):
        index.build_index(cache, ENCODER, how=how, save=False)
    assert capfd.readouterr().err == ""  # FAISS writes a line for each clustering
    said = [record.getMessage() for record in caplog.records if "exact search is faster" not in record.getMessage()]
    assert said == ([told.format(how)] if told else [])


def test_pq__is_trained_once_and_as_faiss_does_it_alone(cache):
    """The plain name leaves out what FAISS calls polysemous training; silencing its warnings changes no number."""
    built = index.build_index(cache, ENCODER, how="pq", save=False)
    assert built.info.parameters["factory"] == "IVF20,PQ6np" and not built.engine.do_polysemous_training
    values = values_of(range(ROWS)).astype(np.float32)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    own = faiss.index_factory(24, "OPQ6,PQ6np", faiss.METRIC_INNER_PRODUCT)
    own.train(unit)
    own.add(unit)
    turned = index.build_index(cache, ENCODER, how="OPQ6,PQ6np", save=False).engine
    np.testing.assert_allclose(turned.reconstruct_n(0, ROWS), own.reconstruct_n(0, ROWS), atol=1e-5)


@pytest.mark.parametrize("how", ["ivf", "hnsw", "pq", "IVF8,Flat", "OPQ6,PQ6x4"])
def test_a_filter_leaves_the_right_number_whatever_the_index(cache, how, monkeypatch):
    monkeypatch.setattr(searching, "FEW_ROWS", 5)  # so that the index itself is asked
    built = index.build_index(cache, ENCODER, how=how, save=False)
    among = np.arange(3, ROWS, 40)
    scores, rows = built.search_rows(QUERIES, 15, among=among)
    assert np.isin(rows, among).all() and all(len(set(row)) == 15 for row in rows)
    assert np.isfinite(scores).all()
    everything = built.search_rows(QUERIES[:2], ROWS + 50)
    assert (everything[1][:, ROWS:] == -1).all() and np.isneginf(everything[0][:, ROWS:]).all()
    assert all(len(set(row[:ROWS])) == ROWS for row in everything[1])


def test_training_rows_are_drawn_from_all_and_rows_go_in_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 64 * 24 * 2)
    cache = filled(tmp_path, ROWS)
    seen, sizes = [], []
    read = ArraySnapshot.read
    monkeypatch.setattr(ArraySnapshot, "read_all", lambda *given: pytest.fail("all rows at once"))
    monkeypatch.setattr(building, "TRAINING_BYTES", 4 * 24 * 400)
    monkeypatch.setattr(
        ArraySnapshot, "read", lambda self, rows, **how: (seen.append(rows), read(self, rows, **how))[1]
    )
    added = building._add

    def watched(engine, *given):
        add = engine.add
        monkeypatch.setattr(engine, "add", lambda values: (sizes.append(len(values)), add(values))[1], raising=False)
        added(engine, *given)

    monkeypatch.setattr(building, "_add", watched)
    built = index.build_index(cache, ENCODER, how="IVF8,Flat", save=False)
    sample = seen[0]
    assert len(sample) == 400 == built.info.parameters["trained_rows"]
    assert sample.min() < 40 and sample.max() > ROWS - 40 and len(set(sample)) == 400
    assert sum(sizes) == ROWS and max(sizes) <= 64


@pytest.mark.parametrize("how", ["exact", "ivf", "hnsw", "pq", "IVF8,PQ6x4"])
def test_an_index_behind_its_cache_takes_in_the_new_rows_only(tmp_path, how, monkeypatch):
    cache = filled(tmp_path, 500)
    index.build_index(cache, ENCODER, how=how)
    assert index.update_index(cache, ENCODER, how=how)[1] == 0
    KeyedArray.open(tmp_path, "image", ENCODER).append(keys_of(range(500, ROWS)), values_of(range(500, ROWS)))
    monkeypatch.setattr(building, "build_index", lambda *given, **more: pytest.fail("built anew"))
    grown, added = index.update_index(Cache(tmp_path), ENCODER, how=how)
    assert added == 300 and len(grown) == ROWS and grown.behind(cache) == 0
    assert recall(grown.search_rows(QUERIES, 10)[1], truth_of(10)) >= (0.3 if "PQ" in how.upper() else 0.9)
    again = index.load_index(Cache(tmp_path), ENCODER, how=how)
    np.testing.assert_array_equal(again.search_rows(QUERIES, 10)[1], grown.search_rows(QUERIES, 10)[1])
    file = faiss.read_index(str(cache.indexes_path / f"{again.info.name}.faiss"))
    assert file.ntotal == ROWS
    assert not list((tmp_path / "tmp").rglob("*.partial"))


def test_the_exact_file_is_what_faiss_writes_itself(tmp_path):
    cache = filled(tmp_path, 300)
    built = index.build_index(cache, ENCODER)
    flat = faiss.read_index(str(cache.indexes_path / f"{built.info.name}.faiss"))
    values = values_of(range(300)).astype(np.float32)
    np.testing.assert_allclose(
        flat.reconstruct_n(0, 300), values / np.linalg.norm(values, axis=1, keepdims=True), atol=1e-6
    )
    assert flat.metric_type == faiss.METRIC_INNER_PRODUCT
    own = tmp_path / "own.faiss"
    faiss.write_index(flat, str(own))
    assert own.read_bytes() == (cache.indexes_path / f"{built.info.name}.faiss").read_bytes()


def test_a_damaged_index_is_built_anew_by_an_update(tmp_path, caplog):
    cache = filled(tmp_path, 60)
    built = index.build_index(cache, ENCODER, how="hnsw")
    path = cache.indexes_path / f"{built.info.name}.faiss"
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        _, added = index.update_index(cache, ENCODER, how="hnsw")
    assert added == 60 and "built anew" in caplog.text
    assert len(index.load_index(cache, ENCODER, how="hnsw")) == 60


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("IVF1024", "FAISS cannot make an index of kind 'IVF1024'"),
        ("Nonsense12", "FAISS cannot make an index of kind 'Nonsense12' over rows of 24 numbers"),
        ("PQ7", "of kind 'PQ7'"),
        ("IVF900,Flat", "'IVF900,Flat' cannot be trained on 800 rows"),
        ("../hnsw", "unknown kind of index"),
        ("", "unknown kind of index ''; known: exact"),
    ],
)
def test_a_kind_that_cannot_be_is_refused_with_its_name(cache, how, problem):
    with pytest.raises(UsageError, match=problem):
        index.build_index(cache, ENCODER, how=how)
    assert not list(cache.indexes_path.glob("*IVF900*"))


def test_an_index_of_another_encoder_is_not_used(tmp_path):
    cache = filled(tmp_path, 40)
    other = ENCODER.replace("tiny", "else")
    KeyedArray.create(tmp_path, "image", other, (24,), {"id": other}).append(keys_of(range(40)), values_of(range(40)))
    index.build_index(cache, ENCODER, how="hnsw")
    for suffix in ("faiss", "json"):
        name = cache.indexes_path / f"{ENCODER}-image-hnsw.{suffix}"
        (cache.indexes_path / f"{other}-image-hnsw.{suffix}").write_bytes(name.read_bytes())
    with pytest.raises(CacheError, match=rf"of another encoder, {ENCODER}; build it"):
        index.load_index(cache, other, how="hnsw")


def test_queries_with_nan_or_of_another_length_are_refused(cache):
    built = index.build_index(cache, ENCODER, save=False)
    wrong = QUERIES[:3].copy()
    wrong[1, 5] = np.nan
    with pytest.raises(UsageError, match="query 1 holds NaN"):
        built.search_rows(wrong, 3)
    with pytest.raises(UsageError, match="k must be at least 1"):
        built.search_rows(QUERIES, 0)


def test_indexes_of_the_first_version_are_still_read(tmp_path):
    cache = filled(tmp_path, 400)
    built = index.build_index(cache, ENCODER, how="ivf")
    path = cache.indexes_path / f"{built.info.name}.json"
    values = json.loads(path.read_text())
    values["parameters"] = {"nlist": values["parameters"]["nlist"], "nprobe": 3}
    values["file_digest"], values["digest"] = "", None
    path.write_text(json.dumps(values))
    assert index.load_index(cache, ENCODER, how="ivf").engine.nprobe == 3


class _Gpu:
    """FAISS with a GPU whose index is right or fails."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def get_num_gpus(self) -> int:
        return 1

    def StandardGpuResources(self):
        return object()

    def GpuIndexFlatIP(self, resources, dim):
        if self.fails:
            raise RuntimeError("no kernel image is available for execution on the device")
        return faiss.IndexFlatIP(dim)


@pytest.mark.parametrize("fails", [True, False])
def test_a_gpu_is_used_where_a_search_on_it_is_right_and_it_is_said_once(monkeypatch, caplog, fails):
    devices.gpu_resources.cache_clear()
    monkeypatch.setattr(devices, "load_faiss", lambda: _Gpu(fails))
    with caplog.at_level(logging.INFO, logger="engine"):
        found = [devices.gpu_resources() for _ in range(2)]
    devices.gpu_resources.cache_clear()
    assert (found[0] is None) is fails and len(caplog.records) == 1
    assert ("no kernel image" in caplog.text) is fails


@pytest.mark.parametrize(
    ("there", "product", "told"),
    [
        (False, None, "matrix products on the processor"),
        (True, "right", "torch's matrix products on the GPU"),
        (True, "wrong", "wrong products on the GPU"),
        (True, "fails", "torch cannot use the GPU (no kernel image is available)"),
    ],
)
def test_exact_search__is_on_the_gpu_where_a_product_on_it_is_right_and_it_is_said_once(
    monkeypatch, caplog, there, product, told
):
    eye = torch.eye

    def on_gpu(size, device):
        assert device == "cuda"
        if product == "fails":
            raise RuntimeError("no kernel image is available")
        return eye(size) * (1 if product == "right" else 2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "eye", on_gpu)
    devices.search_device.cache_clear()
    with caplog.at_level(logging.INFO, logger="engine"):
        found = [devices.search_device() for _ in range(2)]
    devices.search_device.cache_clear()
    expected = products.Way("torch", "cuda") if product == "right" else None
    assert found == [expected, expected] and len(caplog.records) == 1 and told in caplog.text
