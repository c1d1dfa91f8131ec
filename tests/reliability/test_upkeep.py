"""Upkeep: compaction, repair, removal and forgetting survive a kill at any file operation, and a reader beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine import array_format, folder_swap
from engine.cache import Cache
from engine.dataset import Dataset
from engine.keyed_array import KeyedArray
from engine.upkeep.compact import compact_cache
from engine.upkeep.repair import repair_cache
from engine.upkeep.verify import verify_cache
from tests.reliability import small_cache
from tests.reliability.killing import Payloads, killed_at, reader_beside
from tests.reliability.small_cache import rows_by_key

QUICK, FULL = 9, pytest.param(1, marks=pytest.mark.slow)


class Whole(NamedTuple):
    """An undamaged cache, which tests copy; its data set, and a smaller one of the same source."""

    cache: Path
    dataset: Dataset
    fewer: Dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("upkeep")
        dataset = small_cache.write_dataset(folder / "images")
        # Few arrays: they are worked on one after the other, and each is killed at every one of its steps.
        small_cache.fill(folder / "cache", dataset, small_cache.encoders()[:1], ["image", "text"])
        fewer = dataset.take(np.r_[0:9, 12:20])
        yield Whole(folder / "cache", dataset, fewer)


def copied(cache: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(cache, folder))


def forget_table(cache: Path, dataset: Dataset) -> None:
    """Let the sample table name fewer samples, as where a data set has shrunk and its table was made anew."""
    for path in (cache / "datasets").iterdir():
        path.unlink()
    Cache(cache).embed(dataset, small_cache.encoders()[0], ["image", "text"], batch_size=8, threads=1)


def kill_everywhere(
    start: Path,
    operation: Callable[[Path], Any],
    check: Callable[[Path, bool], None],
    every: int,
    expected: Payloads,
    unreadable: frozenset[bytes] = frozenset(),
) -> int:
    """Kill an operation at every nth step on copies of a cache, and complete it; return the number of steps.

    Parameters
    ----------
    start : Path
        The cache as it is before the operation.
    check : callable(cache, complete)
        Holds what is left after a kill, and after the operation was run again, against what must be.
    expected, unreadable
        Of the reader beside, see `killing`.
    """
    step = 0
    while True:
        cache = copied(start, start.with_name("killed"))
        with reader_beside(cache, expected, unreadable):
            killed = killed_at(step, partial(operation, cache))
        if killed:
            check(cache, False)
            operation(cache)
        check(cache, True)
        assert not [path for path in (cache / "tmp").rglob("*") if path.is_file()], "nothing is left lying about"
        if not killed:
            return step
        step += every


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_compaction_killed_anywhere_leaves_every_row_that_is_in_use(whole, tmp_path, every):
    everything = rows_by_key(whole.cache)
    used = {
        "key": {key.tobytes() for key in Cache(whole.cache).image_keys(whole.fewer)},
        "text_key": {key.tobytes() for key in Cache(whole.cache).text_keys(whole.fewer)},
    }

    shrunk = copied(whole.cache, tmp_path / "shrunk")
    forget_table(shrunk, whole.fewer)

    def check(cache: Path, complete: bool) -> None:
        # An index over rows that have got other numbers is not used; it goes at the end.
        damage = [item for item in verify_cache(cache).damage if complete or not item.array.startswith("indexes/")]
        assert damage == []
        for name, rows in rows_by_key(cache).items():
            wanted = used["text_key" if name[0] == "text" else "key"]
            left = {key: row for key, row in everything[name].items() if key in wanted}
            assert left.items() <= rows.items() <= everything[name].items()
            assert not complete or rows == left

    steps = kill_everywhere(shrunk, partial(compact_cache, unused=True, texts=True), check, every, everything)
    assert steps > 50, steps


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_repair_killed_anywhere_keeps_every_undamaged_row(whole, tmp_path, every):
    everything = rows_by_key(whole.cache)
    damaged = copied(whole.cache, tmp_path / "damaged")
    unreadable = set()
    for kind, part, at, row in (("image", "embedding/c.0.0", 5 * 24 + 1, 5), ("text", "check/c.0", 3 * 8, 3)):
        array = Cache(whole.cache).array(kind, small_cache.FIRST)
        path = damaged / "arrays.zarr" / kind / small_cache.FIRST / part
        path.write_bytes(small_cache.flipped(path.read_bytes(), at, 0x10))
        unreadable.add(array.keys[row].tobytes())
    left = {name: {key: row for key, row in rows.items() if key not in unreadable} for name, rows in everything.items()}

    def check(cache: Path, complete: bool) -> None:
        if complete:
            assert verify_cache(cache).damage == [] and rows_by_key(cache) == left

    steps = kill_everywhere(damaged, repair_cache, check, every, everything, frozenset(unreadable))
    assert steps > 40, steps


def test_a_swap_without_the_systems_exchange_is_finished_by_the_next_one(whole, tmp_path, monkeypatch):
    """Two renames leave a moment at which the array is nowhere; whoever takes the lock next puts it in place."""
    monkeypatch.setattr(folder_swap, "_exchanged", lambda one, two: False)
    shrunk = copied(whole.cache, tmp_path / "shrunk")
    forget_table(shrunk, whole.fewer)
    done = copied(shrunk, tmp_path / "done")
    compact_cache(done, unused=True)
    nowhere = 0
    for step in range(100):
        cache = copied(shrunk, tmp_path / "killed")
        if not killed_at(step, partial(compact_cache, cache, unused=True), counted=["rename"]):
            break
        lost = ("image", small_cache.FIRST) not in Cache(cache).arrays()
        nowhere += lost
        if lost and nowhere == 1:  # a job that comes first does not begin anew either
            array = KeyedArray.create(cache, "image", small_cache.FIRST, (12,), {})
            assert len(array) == len(whole.fewer)
        compact_cache(cache, unused=True)
        assert rows_by_key(cache) == rows_by_key(done)
    assert nowhere >= 1
