"""A cache in memory, in archives and on web servers does what one in a folder does: embed, features, tables, search."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from engine.arrays import array_format
from engine.cache import Cache
from engine.embed import EmbedReport
from engine.errors import CacheError
from engine.faiss_loader import load_faiss
from engine.index import build_index, has_index, load_index
from tests.engine.fakes import FakeEncoder, folder_dataset, settle, write_images
from tests.engine.read_only_copies import READ_ONLY, read_only_copy

needs_faiss = pytest.mark.skipif(load_faiss() is None, reason="FAISS does not work here")
TEXTS = ["a normal chest", "pneumothorax on the left", "an enlarged heart"]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 1 << 8)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def images(tmp_path) -> Path:
    write_images(tmp_path / "images", range(30))
    settle()
    return tmp_path / "images"


@pytest.fixture
def memory() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def embedded(cache: Cache, images: Path) -> EmbedReport:
    report = cache.embed(folder_dataset(images), FakeEncoder(), ["image", "pixels"], batch_size=8, threads=1)
    cache.text_features(TEXTS, FakeEncoder())
    return report


def files_of(cache: Cache, folder: str) -> dict[str, bytes]:
    """Return all files below a folder of a cache."""
    found = {}
    for name in cache.storage.names(folder):
        path = f"{folder}/{name}"
        if below := files_of(cache, path):
            found.update(below)
        else:
            found[path] = cache.storage.read(path)
    return found


def test_memory__holds_the_same_bytes_as_a_folder(tmp_path, images, memory):
    local, remote = Cache(tmp_path / "cache"), Cache(memory)
    assert embedded(local, images).computed == embedded(remote, images).computed == {"image": 30, "pixels": 30}
    assert files_of(remote, "arrays.zarr") == files_of(local, "arrays.zarr")
    assert remote.storage.names("datasets") == ["fake.parquet"]
    assert remote.arrays() == local.arrays()


def test_memory__a_second_embedding_computes_nothing_and_opens_no_image(images, memory):
    embedded(Cache(memory), images)
    encoder, dataset = FakeEncoder(), folder_dataset(images)
    report = Cache(memory).embed(dataset, encoder, ["image"], batch_size=8)
    assert report.computed == {"image": 0} and report.opened == 0
    assert encoder.image_batches == [] and dataset.reader.opened == []


@needs_faiss
@pytest.mark.parametrize("how", ["exact", "ivf", "hnsw"])
def test_memory__an_index_is_kept_and_answers_as_one_in_a_folder(tmp_path, images, memory, how):
    encoder, answers = FakeEncoder(), []
    for cache in (Cache(tmp_path / "cache"), Cache(memory)):
        embedded(cache, images)
        assert not has_index(cache, encoder.id, "image", how)
        build_index(cache, encoder.id, "image", how)
        assert has_index(Cache(cache.address), encoder.id, "image", how)
        queries = cache.features(folder_dataset(images), encoder).values[:5]
        scores, keys = load_index(Cache(cache.address), encoder.id, "image", how).search(queries, 4)
        answers.append((scores, keys))
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-6)


@pytest.mark.parametrize("way", READ_ONLY)
def test_read_only_copy__features_texts_and_search_are_those_of_the_folder(tmp_path, images, way):
    local, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    embedded(local, images)
    dataset = folder_dataset(images)
    expected = local.features(dataset, encoder)
    if load_faiss() is not None:
        build_index(local, encoder.id, "image", "exact")
    with read_only_copy(tmp_path / "cache", way) as address:
        cache, reader = Cache(address), folder_dataset(images)
        features = cache.features(reader, encoder)
        assert features.values.tobytes() == expected.values.tobytes()
        assert reader.reader.opened == [], "the sample table tells the keys"
        np.testing.assert_array_equal(
            cache.pixels(reader, encoder.preprocess)[:], local.pixels(dataset, encoder.preprocess)[:]
        )
        np.testing.assert_array_equal(cache.text_features(TEXTS, encoder), local.text_features(TEXTS, encoder))
        assert cache.embed(reader, FakeEncoder(), ["image"]).computed == {"image": 0}
        if load_faiss() is not None:
            keys = load_index(cache, encoder.id).search(features.values[:3], 2)[1]
            np.testing.assert_array_equal(keys, load_index(local, encoder.id).search(expected.values[:3], 2)[1])


@pytest.mark.parametrize("way", ["zip path", "web"])
def test_read_only_copy__refuses_to_compute_what_it_could_not_store(tmp_path, images, way):
    embedded(Cache(tmp_path / "cache"), images)
    with read_only_copy(tmp_path / "cache", way) as address:
        encoder = FakeEncoder(name="another-fp32-000000000000")
        with pytest.raises(CacheError, match="is read-only"):
            Cache(address).embed(folder_dataset(images), encoder, ["image"])
        assert encoder.image_batches == []
        with pytest.raises(CacheError, match="is read-only"):
            Cache(address).text_features(["never seen"], encoder)
        with pytest.raises(CacheError, match="is read-only"):
            build_index(Cache(address), FakeEncoder().id, "image", "hnsw")


def test_cluster__of_several_processes_is_refused_where_one_may_write(images, memory):
    class Workers:
        workers = 2

        def batch_size(self, encoder):
            return 2

    with pytest.raises(CacheError, match="can be written by one process only, not by a cluster's workers"):
        Cache(memory).embed(folder_dataset(images), FakeEncoder(), ["image"], cluster=Workers())
