"""`cache export` and `cache import`: out goes what is cached, and what others made comes in under its own id."""

from __future__ import annotations

import json
import os
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pytest

from engine import array_format
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from jobs import cache_export
from jobs.plain import plain
from tests.reliability import small_cache
from tests.reliability.small_cache import FIRST


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A cache of 20 samples, its data set, and one sample of it that is not embedded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("transfer")
        dataset = small_cache.write_dataset(folder / "images")
        (folder / "images" / "0005.png").write_bytes(b"broken")
        small_cache.fill(folder / "cache", dataset)
        yield folder / "cache", dataset


def exported(cache: Path, out: Path, **values) -> cache_export.Exported:
    return cache_export.run(cache_export.Config(cache=cache, out=out, encoder=FIRST, **values))


# -- Export ----------------------------------------------------------------------------------------------------------


def test_export__of_all_rows_is_what_the_array_holds(cached, tmp_path):
    cache, _ = cached
    array = Cache(cache).array("image", FIRST)
    done = exported(cache, tmp_path / "new" / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "rows.npy"), array.read_all())
    keys = [key.tobytes().hex() for key in array.keys]
    assert pd.read_csv(tmp_path / "new" / "rows.csv")["key"].tolist() == keys
    assert done.rows == 19 and done.bytes == sum(path.stat().st_size for path in done.files) and json.dumps(plain(done))
    exported(cache, tmp_path / "keys.csv")
    assert pd.read_csv(tmp_path / "keys.csv").equals(pd.DataFrame({"key": keys}))
    exported(cache, tmp_path / "rows.faiss", kind="text")
    texts = Cache(cache).array("text", FIRST).read_all().astype(np.float32)
    index = faiss.read_index(str(tmp_path / "rows.faiss"))
    expected = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct_n(0, index.ntotal), expected, atol=1e-6)


def test_export__of_a_data_set_has_a_row_a_sample_with_its_id_and_names_those_without(cached, tmp_path, monkeypatch):
    from engine.upkeep import export

    monkeypatch.setattr(export, "MOST_BLOCK_ROWS", 7)  # several blocks
    cache, dataset = cached
    features = Cache(cache).features(dataset, FIRST, "text")
    done = exported(cache, tmp_path / "rows.parquet", kind="text", dataset="fake:fake")
    table = pd.read_parquet(tmp_path / "rows.parquet")
    assert table["id"].tolist() == dataset.ids.tolist() and table["text"].tolist() == dataset.samples["text"].tolist()
    np.testing.assert_array_equal(np.stack(table["embedding"].tolist()), features.values)
    assert table["key"].tolist() == [key.tobytes().hex() for key in features.keys] and not done.missing
    done = exported(cache, tmp_path / "rows.npy", dataset="fake", normalize=True)
    assert done.missing == ["s5"] and "1 samples have no row and are left out: s5" in "\n".join(done.lines())
    images = Cache(cache).features(dataset, FIRST, "image", normalize=True)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), images.values, atol=1e-6)
    beside = pd.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    assert beside["id"].tolist() == dataset.ids[images.rows].tolist()
    assert list(beside) == ["id", "uri", "group", "view", "split", "key", "text"]


def test_export__refuses_what_it_cannot_write(cached, tmp_path):
    cache, _ = cached
    (tmp_path / "rows.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"rows\.csv exists; give --overwrite"):
        exported(cache, tmp_path / "rows.npy")
    assert not (tmp_path / "rows.npy").exists() and (tmp_path / "rows.csv").read_text() == "mine"
    exported(cache, tmp_path / "rows.npy", overwrite=True)
    with pytest.raises(UsageError, match="does not say what to write"):
        exported(cache, tmp_path / "rows")
    with pytest.raises(UsageError, match=r"pixels rows of shape \(8, 8, 3\) do not fit parquet"):
        cache_export.run(cache_export.Config(cache=cache, out=tmp_path / "p.parquet", kind="pixels"))
    with pytest.raises(UsageError, match="no sample table of the data set 'other'"):
        exported(cache, tmp_path / "other.npy", dataset="other")


def test_export__of_a_damaged_row_leaves_no_file(cached, tmp_path):
    cache, _ = cached
    path = cache / "arrays.zarr" / "image" / FIRST / "check" / "c.0"
    with (
        small_cache.changed(path, small_cache.flipped(path.read_bytes(), 3, 1)),
        pytest.raises(CacheError, match="check"),
    ):
        exported(cache, tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())
