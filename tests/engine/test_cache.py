"""The cache: nothing is computed twice, nothing stale is served, no sample vanishes."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import zarr

from engine import sample_scan
from engine.arrays import array_format
from engine.arrays.array_verify import verify_array
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.keys import key_of_bytes, key_of_text
from tests.engine.fakes import (
    ArrayReader,
    FakeEncoder,
    FolderReader,
    dataset_of,
    folder_dataset,
    settle,
    write_images,
)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No syncing, which only a power cut needs, and small chunks."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 1 << 10)


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images", range(20))
    settle()
    return tmp_path / "images"


def expected_features(dataset, encoder) -> np.ndarray:
    from engine.pixels import decode

    pixels = np.stack([encoder.preprocess(decode(dataset.reader.read(uri)))[0] for uri in dataset.samples["uri"]])
    return encoder._project(pixels).astype(np.float16).astype(np.float32)


def test_embed__features_are_what_the_encoder_gives(tmp_path, images):
    cache, encoder, dataset = Cache(tmp_path / "cache"), FakeEncoder(), folder_dataset(images)
    report = cache.embed(dataset, encoder, batch_size=8)
    assert report.computed == {"image": 20} and report.reused == {"image": 0} and not len(report.failures)
    assert encoder.image_batches == [8, 8, 8]
    features = cache.features(dataset, encoder)
    np.testing.assert_array_equal(features.values, expected_features(dataset, encoder))
    np.testing.assert_array_equal(features.rows, np.arange(20))
    assert not len(features.missing)
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(20)
    again = cache.features(dataset.take(shuffled), encoder.id, normalize=True)
    lengths = np.linalg.norm(features.values, axis=1, keepdims=True)
    np.testing.assert_allclose(again.values, (features.values / lengths)[shuffled], rtol=1e-6)


def test_embed__twice_computes_nothing_and_opens_no_image(tmp_path, images):
    Cache(tmp_path / "cache").embed(folder_dataset(images), FakeEncoder(), batch_size=8)
    encoder, dataset = FakeEncoder(), folder_dataset(images)
    report = Cache(tmp_path / "cache").embed(dataset, encoder, batch_size=8)
    assert report.computed == {"image": 0} and report.reused == {"image": 20}
    assert encoder.image_batches == [] and dataset.reader.opened == [] and report.opened == 0
    assert Cache(tmp_path / "cache").features(dataset, encoder).values.shape == (20, 12)
    assert dataset.reader.opened == []


def test_embed__ten_more_images_compute_ten(tmp_path, images):
    cache = Cache(tmp_path / "cache")
    cache.embed(folder_dataset(images), FakeEncoder(), batch_size=8)
    write_images(images, range(100, 110))
    dataset = folder_dataset(images)
    report = cache.embed(dataset, FakeEncoder(), batch_size=8)
    assert report.computed == {"image": 10} and report.reused == {"image": 20}
    assert sorted(dataset.reader.opened) == [f"{number:04d}.png" for number in range(100, 110)]
    assert len(cache.features(dataset, FakeEncoder())) == 30


def test_embed__identical_images_and_texts_are_computed_once(tmp_path, images):
    for number in range(5):
        shutil.copy(images / f"{number:04d}.png", images / f"copy{number}.png")
    settle()
    dataset = folder_dataset(images, texts=["clear lungs", "", "cardiomegaly"] * 8 + ["effusion"])
    encoder, cache = FakeEncoder(), Cache(tmp_path / "cache")
    report = cache.embed(dataset, encoder, ["image", "text"], batch_size=4)
    assert report.computed == {"image": 20, "text": 3} and report.reused == {"image": 5, "text": 14}
    assert encoder.text_batches == [["effusion", "clear lungs", "cardiomegaly"]]  # by length
    text = cache.features(dataset, encoder, "text")
    assert len(text) == 17 and list(text.missing) == [f"s{number}" for number in range(1, 24, 3)]
    np.testing.assert_array_equal(text.values[0], text.values[2])
    assert len(cache.features(dataset, encoder)) == 25


def test_embed__the_same_content_elsewhere_is_not_computed_again(tmp_path, images):
    cache = Cache(tmp_path / "cache")
    cache.embed(folder_dataset(images), FakeEncoder())
    shutil.copytree(images, tmp_path / "elsewhere")
    encoder = FakeEncoder()
    report = cache.embed(folder_dataset(tmp_path / "elsewhere"), encoder)
    assert report.computed == {"image": 0} and report.opened == 20 and encoder.image_batches == []


def test_embed__another_encoder_id_shares_nothing(tmp_path, images):
    cache, dataset = Cache(tmp_path / "cache"), folder_dataset(images)
    cache.embed(dataset, FakeEncoder("one-fp32-000000000000"))
    assert cache.embed(dataset, FakeEncoder("one-bf16-000000000000")).computed == {"image": 20}
    assert [entry["id"] for entry in cache.encoders()] == ["one-bf16-000000000000", "one-fp32-000000000000"]
    with pytest.raises(CacheError, match=r"no image rows of 'other'; it has those of one-bf16.*`fluoro embed`"):
        cache.features(dataset, "other")


def test_embed__a_changed_file_is_never_served_stale(tmp_path, images):
    cache, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    cache.embed(folder_dataset(images), encoder)
    times = os.stat(images / "0003.png")
    write_images(images, [77])
    os.replace(images / "0077.png", images / "0003.png")
    os.utime(images / "0003.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    features = Cache(tmp_path / "cache").features(folder_dataset(images), encoder)
    assert list(features.missing) == ["s3"] and len(features) == 19
    dataset = folder_dataset(images)
    assert cache.embed(dataset, encoder).computed == {"image": 1}
    np.testing.assert_array_equal(cache.features(dataset, encoder).values, expected_features(dataset, encoder))


def test_embed__files_as_young_as_the_scan_are_read_again_and_rehash_reads_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_scan, "MOMENT", 10**12)
    write_images(tmp_path / "images", range(6))
    cache = Cache(tmp_path / "cache")
    cache.embed(folder_dataset(tmp_path / "images"), FakeEncoder())
    dataset, encoder = folder_dataset(tmp_path / "images"), FakeEncoder()
    report = cache.embed(dataset, encoder)
    assert len(dataset.reader.opened) == 6 and report.computed == {"image": 0} and encoder.image_batches == []
    monkeypatch.setattr(sample_scan, "MOMENT", 0)
    settled = folder_dataset(tmp_path / "images")
    assert cache.embed(settled, encoder).opened == 0
    assert cache.embed(settled, encoder, rehash=True).opened == 6


def test_embed__failures_are_listed_and_everything_else_is_done(tmp_path, images):
    (images / "0002.png").write_bytes((images / "0002.png").read_bytes()[:60])
    shutil.copy(images / "0002.png", images / "twin.png")
    (images / "0005.png").write_bytes(b"")
    dataset = folder_dataset(images)
    (images / "0007.png").unlink()
    cache, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    for _ in range(2):  # also the second time: a failure stays a failure until the file is mended
        report = cache.embed(dataset, encoder, ["image", "pixels"], batch_size=8)
        assert report.failures["id"].tolist() == ["s2", "s5", "s7", "s20"]
        assert report.failures["uri"].tolist() == ["0002.png", "0005.png", "0007.png", "twin.png"]
        assert set(report.failures["what"]) == {"pixels,image"}
        assert "zero bytes" in report.failures["reason"][1] and "No such file" in report.failures["reason"][2]
    assert report.computed == {"image": 0, "pixels": 0} and report.reused == {"image": 17, "pixels": 17}
    features = cache.features(dataset, encoder)
    assert list(features.missing) == ["s2", "s5", "s7", "s20"] and len(features) == 17
    assert np.isfinite(features.values).all() and features.values.any(axis=1).all()


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN or infinity"), (7e4, "beyond float16"), (np.inf, "NaN or")])
def test_embed__values_that_float16_cannot_hold_are_failures(tmp_path, images, value, said):
    from engine.pixels import decode

    dataset, poisoned = folder_dataset(images), FakeEncoder()
    red = int(poisoned.preprocess(decode(dataset.reader.read("0004.png")))[0][0, 0, 0])
    encoder = FakeEncoder(poison={red: value})
    report = Cache(tmp_path / "cache").embed(dataset, encoder, batch_size=8)
    assert "s4" in set(report.failures["id"]) and all(said in reason for reason in report.failures["reason"])
    assert set(report.failures["what"]) == {"image"}
    assert report.computed["image"] == 20 - len(report.failures)


def test_embed__samples_without_image_or_text_are_no_failures(tmp_path, images):
    uris = ["0000.png", "", "0001.png"]
    dataset = dataset_of(uris, FolderReader(images), ["", "one", "two"])
    cache, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    report = cache.embed(dataset, encoder, ["image", "text"])
    assert report.computed == {"image": 2, "text": 2} and not len(report.failures)
    assert list(cache.features(dataset, encoder).missing) == ["s1"]


def test_embed__pixels_and_tokens_from_one_decode_and_pixels_instead_of_a_decode(tmp_path, images):
    cache, encoder, dataset = Cache(tmp_path / "cache"), FakeEncoder(), folder_dataset(images)
    report = cache.embed(dataset, encoder, ["pixels", "tokens@-1"], batch_size=8)
    assert report.computed == {"pixels": 20, "tokens@2": 20} and len(dataset.reader.opened) == 20
    assert cache.arrays() == [("pixels", "8-fake"), ("tokens", "fake-fp32-0123456789ab@2")]
    assert "mean" not in cache.array("pixels", "8-fake").form.description
    report = cache.embed(dataset, encoder, ["image"], batch_size=8)
    assert report.computed == {"image": 20} and len(dataset.reader.opened) == 20  # from the cached pixels
    np.testing.assert_array_equal(cache.features(dataset, encoder).values, expected_features(dataset, encoder))
    pixels, tokens = cache.pixels(dataset, encoder.preprocess), cache.tokens(dataset, encoder, -1)
    assert pixels.shape == (20, 8, 8, 3) and pixels.dtype == np.uint8 and tokens.shape == (20, 4, 3)
    np.testing.assert_array_equal(encoder.tokens(pixels[5:9], 2), tokens[5:9].astype(np.float32))
    np.testing.assert_array_equal(pixels[-1], pixels[np.array([19])][0])
    np.testing.assert_array_equal(pixels[3], pixels[np.arange(20) == 3][0])


def test_embed__drawn_samples_without_fingerprint(tmp_path):
    dataset = dataset_of([str(number) for number in range(10)], ArrayReader())
    cache, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    assert cache.embed(dataset, encoder).computed == {"image": 10}
    assert len(cache.features(dataset, encoder)) == 10 and len(dataset.reader.opened) == 10
    again = dataset_of([str(number) for number in range(10)], ArrayReader())
    assert cache.embed(again, encoder).computed == {"image": 0} and len(again.reader.opened) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"what": ["images"]}, "unknown product 'images'; known: image, text, pixels, tokens@LAYER"),
        ({"what": "image"}, "list of products"),
        ({"what": ["tokens@3"]}, "3 blocks, numbered 0 to 2"),
        ({"what": ["tokens@last"]}, "give its number"),
        ({"limits": {"max_pixel": 3}}, "unknown limit 'max_pixel'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_embed__wrong_requests(tmp_path, images, arguments, said):
    with pytest.raises(UsageError, match=said):
        Cache(tmp_path / "cache").embed(folder_dataset(images), FakeEncoder(), **arguments)


def test_embed__limits(tmp_path, images):
    report = Cache(tmp_path / "cache").embed(folder_dataset(images), FakeEncoder(), limits={"max_pixels": 100})
    assert len(report.failures) == 20 and "exceeds the limit of 100" in report.failures["reason"][0]


def test_embed__counts_doubles_of_each_kind_among_what_did_not_fail_of_it(tmp_path, images):
    """A sample whose image is broken still has a text, which another may share."""
    write_images(tmp_path / "own", range(4))
    (tmp_path / "own" / "0003.png").write_bytes((tmp_path / "own" / "0000.png").read_bytes())
    (tmp_path / "own" / "0002.png").write_bytes(b"no image")
    dataset = folder_dataset(tmp_path / "own", texts=["one", "two", "two", "one"])
    found = Cache(tmp_path / "cache").embed(dataset, FakeEncoder(), ["image", "text"]).doubles
    ids = dataset.ids
    assert found == {"image": (1, ids[0], ids[3]), "text": (2, ids[1], ids[2])}
    (tmp_path / "own" / "0003.png").write_bytes(b"none either")
    found = Cache(tmp_path / "other").embed(dataset, FakeEncoder(), ["image", "text"]).doubles
    assert found == {"image": (0, "", ""), "text": (2, ids[1], ids[2])}


def test_stored_rows__are_read_as_numpy_reads_them(tmp_path, images):
    cache, dataset = Cache(tmp_path / "cache"), folder_dataset(images)
    cache.embed(dataset, FakeEncoder())
    stored = cache.stored_features(dataset, FakeEncoder())
    whole = stored[:]
    assert whole.shape == stored.shape == (20, 12)
    for which in (3, -1, np.int64(2), slice(4, 9), slice(None, None, -3), [5, 5, 1], (3, 2), (-1, slice(2, 5)),
                  (slice(0, 4), 7), (slice(None), slice(None, None, 2))):  # fmt: skip
        np.testing.assert_array_equal(stored[which], whole[which])
    # Lists of rows and of columns are a grid, as dask has them, and not pairs.
    np.testing.assert_array_equal(stored[[8, 2], [0, 1, 5]], whole[[8, 2]][:, [0, 1, 5]])


def test_sample_table__holds_one_row_a_sample(tmp_path, images):
    cache, dataset = Cache(tmp_path / "cache"), folder_dataset(images, texts=[f"text {n % 3}" for n in range(20)])
    cache.embed(dataset, FakeEncoder())
    table = pd.read_parquet(cache.datasets_path / "fake.parquet")
    assert table["id"].tolist() == dataset.ids.tolist() and table["in_last_scan"].all()
    assert table["key"][4] == key_of_bytes((images / "0004.png").read_bytes())
    assert table["text_key"][4] == key_of_text("text 1")
    assert [list(labels) for labels in table["labels"][:2]] == [[], ["Odd"]]
    cache.embed(dataset.take(np.arange(5)), FakeEncoder())
    table = pd.read_parquet(cache.datasets_path / "fake.parquet")
    assert len(table) == 20 and table["in_last_scan"].sum() == 5
    assert cache.embed(folder_dataset(images), FakeEncoder()).opened == 0


def test_sample_table__an_unreadable_one_is_made_again(tmp_path, images):
    cache = Cache(tmp_path / "cache")
    cache.embed(folder_dataset(images), FakeEncoder())
    (cache.datasets_path / "fake.parquet").write_bytes(b"PAR1 and nothing else")
    assert cache.embed(folder_dataset(images), FakeEncoder()).opened == 20
    assert cache.embed(folder_dataset(images), FakeEncoder()).opened == 0


def test_text_features__prompts_are_computed_once(tmp_path):
    cache, encoder = Cache(tmp_path / "cache"), FakeEncoder()
    values = cache.text_features(["a", "b", "a"], encoder)
    assert values.shape == (3, 12) and values.dtype == np.float32
    np.testing.assert_array_equal(values, encoder.encode_text(["a", "b", "a"]).astype(np.float16))
    asked = len(encoder.text_batches)
    np.testing.assert_array_equal(cache.text_features(["b"], encoder)[0], values[1])
    assert len(encoder.text_batches) == asked
    np.testing.assert_allclose(np.linalg.norm(cache.text_features(["b"], encoder, normalize=True)), 1, rtol=1e-6)
    with pytest.raises(UsageError, match="an empty text"):
        cache.text_features(["a", ""], encoder)


def test_cache__newer_format_version_and_empty_folder(tmp_path, images):
    assert Cache(tmp_path / "nothing").arrays() == [] and not (tmp_path / "nothing").exists()
    Cache(tmp_path / "cache").embed(folder_dataset(images), FakeEncoder())
    assert verify_array(tmp_path / "cache", "image", FakeEncoder().id) == (20, [])
    root = tmp_path / "cache" / "arrays.zarr" / "zarr.json"
    assert zarr.open_group(root.parent, mode="r").attrs["format_version"] == 1
    root.write_text(root.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(CacheError, match=r"format version 9.*upgrade fluoroscope"):
        Cache(tmp_path / "cache")
