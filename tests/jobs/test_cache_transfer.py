"""`cache export` and `cache import`: out goes what is cached, and what others made comes in under its own id."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pytest

from engine import pixels
from engine.arrays import array_format
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import CacheError, DataError, UsageError
from engine.upkeep import export
from jobs import cache_export, cache_import
from jobs.plain import plain
from tests import models
from tests.engine.fakes import write_images
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
    keys = (tmp_path / "rows.csv").read_text()
    for other in ("rows.faiss", "rows.csv"):
        with pytest.raises(UsageError, match=r"rows\.csv would hold .* and is that of .*rows\.npy; give another path"):
            exported(cache, tmp_path / other, overwrite=True)
    assert (tmp_path / "rows.csv").read_text() == keys and not (tmp_path / "rows.faiss").exists()
    exported(cache, tmp_path / "rows.parquet")
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


def test_export__beside_another_to_the_same_file_is_refused_and_a_dead_ones_leavings_are_written_over(cached, tmp_path):
    cache, _ = cached
    (tmp_path / ".rows.csv.partial").write_bytes(b"x" * 10_000)
    with export._Replacements([tmp_path / "rows.npy", tmp_path / "rows.csv"]):
        with pytest.raises(UsageError, match=r"another process is writing .*rows\.npy"):
            exported(cache, tmp_path / "rows.npy")
        assert len(list(tmp_path.iterdir())) == 2, "what the other one writes is left alone"
    exported(cache, tmp_path / "rows.npy", overwrite=True)
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(np.load(tmp_path / "rows.npy")) == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.npy"]


# -- Import ----------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, images: Path, parts: int = 2, dim: int = 6, dtype: str = "float16") -> np.ndarray:
    """Write embeddings of all images as clip-retrieval does, in some parts; return all vectors."""
    names = sorted(path.name for path in images.iterdir())
    rng = np.random.Generator(np.random.PCG64(1))
    vectors = rng.standard_normal((len(names), dim)).astype(dtype)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(names)), parts)):
        np.save(folder / "img_emb" / f"img_emb_{number:02d}.npy", vectors[rows])
        np.save(folder / "text_emb" / f"text_emb_{number:02d}.npy", vectors[rows] * 2)
        table = {"image_path": [names[row] for row in rows], "caption": [f"caption {row % 7}" for row in rows]}
        pd.DataFrame(table).to_parquet(folder / "metadata" / f"metadata_{number}.parquet")
    return vectors


def imported(cache: Path, folder: Path, **values) -> cache_import.Imported:
    return cache_import.run(cache_import.Config(cache=cache, folder=folder, **values))


def test_import__stores_rows_under_the_keys_of_images_and_captions(tmp_path):
    write_images(tmp_path / "images", range(12))
    vectors = write_folder(tmp_path / "theirs", tmp_path / "images")
    done = imported(tmp_path / "cache", tmp_path / "theirs", name="Their Model", root=tmp_path / "images")
    assert done.encoder.startswith("imported-Their-Model-") and not len(done.failures)
    assert done.rows.to_numpy().tolist() == [["image", 12, 12, 0, 0], ["text", 12, 7, 5, 0]]
    dataset = small_cache.reopened(tmp_path / "images")
    features = Cache(tmp_path / "cache").features(dataset, done.encoder)
    np.testing.assert_array_equal(features.values, vectors.astype(np.float32))
    stored = Cache(tmp_path / "cache").array("text", done.encoder)
    np.testing.assert_array_equal(stored.read_all(), vectors[:7] * 2)
    again = imported(tmp_path / "cache", tmp_path / "theirs", name="Their Model", root=tmp_path / "images")
    assert again.encoder == done.encoder and again.rows["added"].tolist() == [0, 0]
    other = imported(tmp_path / "cache", tmp_path / "theirs", name="Their Model", description="bf16", kind="text")
    assert other.encoder != done.encoder and other.rows["kind"].tolist() == ["text"]
    # Under the imported id they are exported and searched as all rows are.
    out = cache_export.run(cache_export.Config(cache=tmp_path / "cache", out=tmp_path / "x.npy", encoder=done.encoder))
    assert out.rows == 12


def test_import__lists_rows_without_an_image_or_with_numbers_that_cannot_be_stored(tmp_path):
    write_images(tmp_path / "images", range(10))
    vectors = write_folder(tmp_path / "theirs", tmp_path / "images", dtype="float32")
    (tmp_path / "images" / "0004.png").unlink()
    vectors[1, 2], vectors[7, 0], vectors[8] = np.nan, 1e5, 0
    for number, rows in enumerate(np.array_split(np.arange(10), 2)):
        np.save(tmp_path / "theirs" / "img_emb" / f"img_emb_{number:02d}.npy", vectors[rows])
    done = imported(tmp_path / "cache", tmp_path / "theirs", name="m", root=tmp_path / "images", kind="image")
    assert done.rows.to_numpy().tolist() == [["image", 10, 6, 0, 4]]
    reasons = dict(zip(done.failures["id"], done.failures["reason"], strict=True))
    assert {name.partition(" of ")[0]: name.rpartition("(")[2][:4] for name in reasons} == {
        "row 1": "0001", "row 4": "0004", "row 2": "0007", "row 3": "0008"}  # fmt: skip
    said = " ".join(reasons.values())
    assert "NaN" in said and "beyond float16" in said and "all zeros" in said and "no such file" in said
    assert "--root" in "\n".join(done.lines())
    with pytest.raises(DataError, match=r"none can be taken in: .*--root"):
        imported(tmp_path / "cache", tmp_path / "theirs", name="m", kind="image")


def test_import__names_files_that_do_not_belong_together_before_anything_is_stored(tmp_path):
    write_images(tmp_path / "images", range(9))
    theirs = tmp_path / "theirs"
    write_folder(theirs, tmp_path / "images", parts=3)
    middle = theirs / "img_emb" / "img_emb_01.npy"
    np.save(middle, np.zeros((0, 6), "float16"))
    with pytest.raises(DataError, match=r"img_emb_01\.npy has 0 rows, .*metadata_1\.parquet has 3"):
        imported(tmp_path / "cache", theirs, name="m", root=tmp_path / "images")
    np.save(middle, np.ones((3, 5), "float16"))
    with pytest.raises(DataError, match=r"img_emb_00\.npy has 6 numbers a row, .*img_emb_01\.npy has 5"):
        imported(tmp_path / "cache", theirs, name="m", root=tmp_path / "images")
    middle.write_bytes(b"")
    with pytest.raises(DataError, match=r"img_emb_01\.npy cannot be read"):
        imported(tmp_path / "cache", theirs, name="m", root=tmp_path / "images")
    middle.unlink()
    with pytest.raises(DataError, match=r"metadata_1\.parquet has no partner in .*img_emb"):
        imported(tmp_path / "cache", theirs, name="m", root=tmp_path / "images")
    with pytest.raises(UsageError, match="holds no embeddings"):
        imported(tmp_path / "cache", tmp_path / "images", name="m")
    with pytest.raises(ValueError, match="which model made these embeddings"):
        cache_import.Config(folder=theirs)
    assert not (tmp_path / "cache").exists()


def test_import__of_files_side_by_side_finds_img2datasets_images_by_key(tmp_path):
    shard = tmp_path / "theirs" / "00000"
    write_images(shard, range(3))
    for number in range(3):
        (shard / f"{number:04d}.png").rename(shard / f"00000000{number}.jpg")
    np.save(tmp_path / "theirs" / "0.npy", np.ones((3, 4), "float16"))
    table = pd.DataFrame({"key": [f"00000000{number}" for number in range(3)], "caption": ["a", "b", None]})
    table.to_parquet(tmp_path / "theirs" / "0.parquet")
    done = imported(tmp_path / "cache", tmp_path / "theirs", name="m", root=tmp_path / "theirs", kind="image")
    assert done.rows["added"].tolist() == [3]
    texts = imported(tmp_path / "cache", tmp_path / "theirs", name="m", kind="text")
    assert texts.rows["added"].tolist() == [2] and texts.failures["reason"].tolist() == ["the caption is blank"]


def write_as_from_tars(folder: Path, images: Path, shards: int = 2, own_keys: bool = True) -> np.ndarray:
    """Write the images as img2dataset does by default, and their embeddings as clip-retrieval does of such tars.

    img2dataset 1.47: ``00000.tar`` and ``00000.parquet`` for each shard; keys of five digits for the shard and four
    for the sample (older versions numbered the samples of each shard from 0 on: ``own_keys=False``); a sample is
    KEY.png (``--encode_format png``), KEY.json and KEY.txt. clip-retrieval 2.45, ``--input_format webdataset
    --enable_metadata``: ``image_path`` is the key, and the fields of the .json are further columns.
    """
    contents = [path.read_bytes() for path in sorted(images.iterdir())]
    vectors = np.random.Generator(np.random.PCG64(2)).standard_normal((len(contents), 6)).astype("float16")
    told = []
    (folder / "shards").mkdir(parents=True)
    for shard, rows in enumerate(np.array_split(np.arange(len(contents)), shards)):
        metadata = []
        with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as tar:
            for number, row in enumerate(rows.tolist()):
                key = f"{10_000 * shard * own_keys + number:09d}"
                fields = {"caption": f"caption {row}", "url": f"http://host/{row}", "key": key, "status": "success"}
                members = {"png": contents[row], "json": json.dumps(fields, indent=4).encode(), "txt": b"caption"}
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                metadata.append(fields)
                told.append({"image_path": key, **fields})
        pd.DataFrame(metadata).to_parquet(folder / "shards" / f"{shard:05d}.parquet")
    for name in ("img_emb", "metadata"):
        (folder / "theirs" / name).mkdir(parents=True)
    np.save(folder / "theirs" / "img_emb" / "img_emb_0.npy", vectors)
    pd.DataFrame(told).to_parquet(folder / "theirs" / "metadata" / "metadata_0.parquet")
    return vectors


def test_import__finds_images_in_img2datasets_tars(tmp_path):
    write_images(tmp_path / "images", range(11))
    vectors = write_as_from_tars(tmp_path, tmp_path / "images", shards=3)
    root = f"tar:{tmp_path}/shards/{{00000..00002}}.tar"
    done = imported(tmp_path / "cache", tmp_path / "theirs", name="m", root=root)
    assert done.rows.to_numpy().tolist() == [["image", 11, 11, 0, 0]] and not len(done.failures)
    # The same images in a folder find them: rows are stored by content.
    features = Cache(tmp_path / "cache").features(small_cache.reopened(tmp_path / "images"), done.encoder)
    np.testing.assert_array_equal(features.values, vectors.astype(np.float32))


def test_import__from_tars_lists_keys_that_are_in_none_or_in_several(tmp_path):
    """An older img2dataset numbered the samples of each shard from 0 on: the key alone does not tell the image."""
    write_images(tmp_path / "images", range(7))
    vectors = write_as_from_tars(tmp_path, tmp_path / "images", own_keys=False)
    # Only the fourth sample of the first tar, of four, has no namesake in the second, of three.
    both, second = f"tar:{tmp_path}/shards", f"tar:{tmp_path}/shards/00001.tar"
    done = imported(tmp_path / "cache", tmp_path / "theirs", name="m", root=both)
    assert done.rows.to_numpy().tolist() == [["image", 7, 1, 0, 6]]
    assert done.failures["reason"].str.contains("several rows have this key").sum() == 6
    array = Cache(tmp_path / "cache").array("image", done.encoder)
    np.testing.assert_array_equal(array.read_all(), vectors[3:4])
    # Not the second tar's images for rows of the first either.
    with pytest.raises(DataError, match=r"none can be taken in: .*several rows have this key"):
        imported(tmp_path / "other", tmp_path / "theirs", name="m", root=second)

    np.save(tmp_path / "theirs" / "img_emb" / "img_emb_0.npy", vectors[4:])
    metadata = tmp_path / "theirs" / "metadata" / "metadata_0.parquet"
    pd.read_parquet(metadata)[4:].to_parquet(metadata)
    with pytest.raises(DataError, match=r"2 samples have this key \(00000.tar, 00001.tar\); import .* one tar"):
        imported(tmp_path / "other", tmp_path / "theirs", name="m", root=both)
    done = imported(tmp_path / "other", tmp_path / "theirs", name="m", root=second + "?image=png")
    assert done.rows.to_numpy().tolist() == [["image", 3, 3, 0, 0]]
    features = Cache(tmp_path / "other").features(small_cache.reopened(tmp_path / "images"), done.encoder)
    assert features.rows.tolist() == [4, 5, 6]
    np.testing.assert_array_equal(features.values, vectors[4:].astype(np.float32))
    wrong = {second + "?image=webp": "no sample of the tars has", tmp_path / "shards": "'tar:PATTERN' for"}
    for root, said in wrong.items():
        with pytest.raises(DataError, match=rf"none can be taken in: .*{said}"):
            imported(tmp_path / "third", tmp_path / "theirs", name="m", root=root)


def test_import__finds_images_below_a_url_and_says_where_there_is_no_root(tmp_path):
    write_images(tmp_path / "images", range(4))
    vectors = write_folder(tmp_path / "theirs", tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in (tmp_path / "images").iterdir():
            archive.write(path, f"images/{path.name}")
    asked = {"name": "m", "kind": "image"}
    done = imported(tmp_path / "cache", tmp_path / "theirs", root=f"zip://images::file://{tmp_path}/x.zip", **asked)
    features = Cache(tmp_path / "cache").features(small_cache.reopened(tmp_path / "images"), done.encoder)
    np.testing.assert_array_equal(features.values, vectors.astype(np.float32))
    with pytest.raises(UsageError, match=r"no such folder .*imagse"):
        imported(tmp_path / "cache", tmp_path / "theirs", root=tmp_path / "imagse", **asked)


def test_import__as_a_models_own_rows_only_where_some_computed_again_agree(tmp_path):
    write_images(tmp_path / "images", range(6))
    model = f"local-dir:{models.open_clip_vit(tmp_path / 'model')}"
    encoder = load_encoder(model, device="cpu")
    write_folder(tmp_path / "theirs", tmp_path / "images", dim=encoder.dim)
    asked = {
        "encoder_id": encoder.id,
        "model": model,
        "precision": "fp32",
        "device": "cpu",
        "root": tmp_path / "images",
    }
    with pytest.raises(UsageError, match=f"not the embeddings of {encoder.id}: row .* has a cosine of"):
        imported(tmp_path / "cache", tmp_path / "theirs", **asked)
    paths = sorted((tmp_path / "images").iterdir())
    inputs = np.stack([encoder.preprocess(pixels.decode(path.read_bytes()))[0] for path in paths])
    own = encoder.encode_pixels(inputs).numpy()
    for name in ("img_emb_00", "img_emb_01"):
        half = own[:3] if name.endswith("0") else own[3:]
        scaled = half / np.linalg.norm(half, axis=1, keepdims=True) * 3
        np.save(tmp_path / "theirs" / "img_emb" / f"{name}.npy", scaled.astype("float16"))
    with pytest.raises(UsageError, match="are scaled"):
        imported(tmp_path / "cache", tmp_path / "theirs", kind="image", **asked)
    np.save(tmp_path / "theirs" / "img_emb" / "img_emb_00.npy", own[:3])
    np.save(tmp_path / "theirs" / "img_emb" / "img_emb_01.npy", own[3:])
    assert not (tmp_path / "cache").exists()
    done = imported(tmp_path / "cache", tmp_path / "theirs", kind="image", **asked)
    assert done.encoder == encoder.id and done.compared == 6 and done.least_cosine > 0.999
    report = Cache(tmp_path / "cache").embed(small_cache.reopened(tmp_path / "images"), encoder, ["image"])
    assert report.computed["image"] == 0, "the rows are found as the model's own"
    with pytest.raises(UsageError, match=r"is .*, not 'another'"):
        imported(tmp_path / "cache", tmp_path / "theirs", kind="image", **{**asked, "encoder_id": "another"})
