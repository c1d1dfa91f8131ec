"""Row numbers: a compaction gives rows other numbers, and nobody who held the old ones gets another row for his own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from engine import blocks, index
from engine.arrays import address_range, array_format
from engine.blocks import Block, Work, compute_block
from engine.cache import Cache
from engine.dataset import Dataset
from engine.decoding import ImageWork
from engine.plan import make_plan
from engine.products import product_of
from engine.sample_search import SampleSearch
from engine.upkeep.compact import compact_array
from engine.upkeep.forget import forget, plan_forgetting
from engine.upkeep.removal import parts_of, remove_parts
from engine.upkeep.verify import verify_cache
from tests.reliability import small_cache
from tests.reliability.small_cache import FIRST, SECOND, rows_by_key

GONE = 3  # the first samples of the data set, whose rows are compacted away


class Filled(NamedTuple):
    """A cache of one encoder, its data set, and the keys of its images in row order."""

    cache: Path
    dataset: Dataset
    keys: np.ndarray


@pytest.fixture
def filled(tmp_path, monkeypatch) -> Iterator[Filled]:
    monkeypatch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    dataset = small_cache.write_dataset(tmp_path / "images")
    small_cache.settle()
    cache = Cache(tmp_path / "cache")
    cache.embed(dataset, small_cache.encoders()[0], small_cache.EVERYTHING, batch_size=8)
    yield Filled(tmp_path / "cache", dataset, cache.image_keys(dataset))


def compact(filled: Filled, kind: str, name: str) -> None:
    """Drop the rows of the first samples, so that all others get lower numbers."""
    assert compact_array(filled.cache, kind, name, filled.keys[GONE:]).unused == GONE


def embedded_anew(filled: Filled, folder: Path) -> dict[bytes, bytes]:
    """Return the second encoder's rows by key, as a cache without pixels gets them."""
    Cache(folder).embed(filled.dataset, small_cache.encoders()[1], ["image"], batch_size=4)
    return rows_by_key(folder)["image", SECOND]


# -- The pixel cache, looked up by one handle and read by another --------------------------------------------------


def test_a_block_handed_out_before_a_compaction_is_computed_from_its_own_images(filled, tmp_path):
    encoder = small_cache.encoders()[1]
    held = blocks.pixel_cache(filled.cache, encoder).find(filled.keys)
    uris = filled.dataset.samples["uri"]
    images = [
        ImageWork(place, uris.iloc[place], filled.keys[place].tobytes(), ("image",), int(held[place]))
        for place in range(len(filled.dataset))
    ]
    compact(filled, "pixels", encoder.preprocess.id)
    plan = make_plan(encoder, batch_size=4).settled(encoder, len(images))
    work = Work(filled.cache, filled.dataset.reader, (product_of("image", encoder),), plan, encoder.id)
    filled.dataset.reader.opened.clear()
    done = compute_block(work, encoder, Block(images=images))
    opened = sorted(filled.dataset.reader.opened)  # by several threads, in any order
    assert not done.tally.failed_keys and not done.tally.failed_positions
    assert rows_by_key(filled.cache)["image", SECOND] == embedded_anew(filled, tmp_path / "anew")
    assert opened == uris.tolist()[:GONE], "those that are gone are decoded again, and no others"


def test_an_embedding_that_a_compaction_falls_into_stores_each_image_under_its_own_key(filled, tmp_path):
    encoder = small_cache.encoders()[1]

    def compact_at_the_start(name: str, done: int, total: int) -> None:
        if done == 0:
            compact(filled, "pixels", encoder.preprocess.id)

    report = Cache(filled.cache).embed(filled.dataset, encoder, ["image"], batch_size=4, progress=compact_at_the_start)
    assert report.computed == {"image": len(filled.dataset)} and not len(report.failures)
    assert rows_by_key(filled.cache)["image", SECOND] == embedded_anew(filled, tmp_path / "anew")
    assert verify_cache(filled.cache).damage == []


# -- Rows that are held while the cache takes in what became of the array ------------------------------------------


@pytest.fixture(params=["side by side", "recent"])
def mapped(request, monkeypatch) -> None:
    """Both ways of reading chunk files, whatever this system would choose."""
    if request.param == "recent":
        monkeypatch.setattr(address_range, "supported", lambda: False)


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_stored_rows_stay_those_of_their_samples(filled, mapped, kind):
    encoder, cache = small_cache.encoders()[0], Cache(filled.cache)

    def asked(dataset: Dataset):
        return cache.pixels(dataset, encoder.preprocess) if kind == "pixels" else cache.tokens(dataset, encoder, 1)

    some = np.arange(5, 20)
    rows = asked(filled.dataset.take(some))
    before = rows[:].copy()
    compact(filled, kind, encoder.preprocess.id if kind == "pixels" else f"{FIRST}@1")
    after = asked(filled.dataset)  # another part of the same job; the cache takes in the new numbers
    assert len(after) == len(filled.dataset) - GONE and len(after.missing) == GONE
    np.testing.assert_array_equal(rows[:], before)
    np.testing.assert_array_equal(rows[np.array([14, 0])], before[[14, 0]])
    np.testing.assert_array_equal(rows.keys, filled.keys[some])
    np.testing.assert_array_equal(after[:][some - GONE], before)


@pytest.mark.parametrize("how", ["exact", "hnsw"])
def test_an_index_in_memory_goes_on_answering_in_the_rows_that_it_was_built_over(filled, mapped, how):
    cache = Cache(filled.cache)
    values = cache.features(filled.dataset, FIRST).values
    built = index.build_index(cache, FIRST, "image", how)
    scores, keys = built.search(values, 3)
    np.testing.assert_array_equal(keys[:, 0], filled.keys)
    compact(filled, "image", FIRST)
    built.behind(cache)  # the cache takes in the new numbers
    again = built.search(values, 3)
    np.testing.assert_array_equal(again[0], scores)
    np.testing.assert_array_equal(again[1], keys)
    few = np.array([2, 9, 17])
    np.testing.assert_array_equal(built.search(values[few], 1, among=few)[1][:, 0], filled.keys[few])
    samples = SampleSearch(built, built.array.find(filled.keys), np.arange(len(filled.dataset)))
    assert [hits.samples.tolist() for hits in samples.search(values, 1)] == [[place] for place in range(len(values))]
    np.testing.assert_array_equal(built.exactly().search(values, 3)[1], keys)


def test_an_index_over_older_rows_is_not_brought_up_to_date_but_built_anew(filled):
    cache = Cache(filled.cache)
    index.build_index(cache, FIRST)
    compact(filled, "image", FIRST)
    updated, added = index.update_index(cache, FIRST)
    assert added == len(updated) == len(filled.dataset) - GONE
    values = cache.features(filled.dataset, FIRST).values
    np.testing.assert_array_equal(updated.search(values, 1)[1][:, 0], filled.keys[GONE:])


def test_forgetting_a_patient_while_rows_are_held_changes_none_of_them(filled):
    encoder, cache = small_cache.encoders()[0], Cache(filled.cache)
    rows = cache.pixels(filled.dataset, encoder.preprocess)
    before = rows[:].copy()
    forget(filled.cache, plan_forgetting(filled.cache, "fake", groups=["p0"]))
    assert len(cache.pixels(filled.dataset, encoder.preprocess)) == len(rows) - 2
    np.testing.assert_array_equal(rows[:], before)


def test_an_array_that_was_removed_and_made_anew_is_read_anew(filled):
    encoder, cache = small_cache.encoders()[0], Cache(filled.cache)
    held = cache.array("image", FIRST)
    expected = rows_by_key(filled.cache)["image", FIRST]
    remove_parts(filled.cache, parts_of(filled.cache, FIRST))
    backwards = filled.dataset.take(np.arange(len(filled.dataset))[::-1])
    Cache(filled.cache).embed(backwards, encoder, ["image"], batch_size=8)
    np.testing.assert_array_equal(held.keys, filled.keys)
    assert [row.tobytes() for row in held.read_all()] == [expected[key.tobytes()] for key in filled.keys]
    now = cache.array("image", FIRST)
    np.testing.assert_array_equal(now.keys, filled.keys[::-1])
    assert [row.tobytes() for row in now.read_all()] == [expected[key.tobytes()] for key in now.keys]


def test_a_writer_that_has_an_array_open_adds_to_the_one_that_took_its_place(filled):
    """Fewer rows than before: what the writer believes to be there must not come back as holes."""
    encoder = small_cache.encoders()[0]
    buffer = Work(filled.cache, None, (product_of("image", encoder),), make_plan(encoder), FIRST).buffers()["image"]
    expected = rows_by_key(filled.cache)["image", FIRST]
    remove_parts(filled.cache, parts_of(filled.cache, FIRST))
    Cache(filled.cache).embed(filled.dataset.take([4]), encoder, ["image"], batch_size=8)
    wanted = filled.keys[[4, 7]]
    rows = [np.frombuffer(expected[key.tobytes()], np.float16) for key in wanted]
    assert buffer.array.append(wanted, np.stack(rows)) == 1
    assert rows_by_key(filled.cache)["image", FIRST] == {key.tobytes(): expected[key.tobytes()] for key in wanted}
    assert [item for item in verify_cache(filled.cache).damage if not item.array.startswith("indexes/")] == []
