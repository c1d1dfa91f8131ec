"""Concurrency: four processes embed overlapping data sets into one cache at once, and some of them are killed.

Every key is stored once with the payload that belongs to it, nobody waits longer than the commits ahead of it, and
after the killed ones were started again nothing is missing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from engine import sample_table
from engine.arrays import storage
from engine.arrays.array_format import STORE
from engine.dataset import Dataset
from engine.upkeep import removal, verify
from engine.upkeep.verify import wrong_tables
from tests.engine.fakes import write_images
from tests.reliability import long_job, small_cache
from tests.reliability.killing import Payloads, reader_beside
from tests.reliability.long_job import FORK, SlowEncoder
from tests.reliability.small_cache import FIRST, SECOND, rows_by_key

IMAGES = 120
# What each process embeds: images from and to, and by which encoder; all share the pixels.
SHARES = ((0, 80, FIRST), (40, 120, FIRST), (20, 100, FIRST), (0, 120, SECOND))
BATCH_SECONDS = 0.02
# Waking a waiting process, on a machine whose cores many share.
SECONDS_TO_WAKE = 0.25


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        long_job.small_chunks(patch)
        yield


class Alone(NamedTuple):
    """The data sets, and what one process after the other stores of them."""

    datasets: list[Dataset]
    rows: Payloads


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    write_images(folder / "images", range(IMAGES))
    whole = long_job.dataset_in(folder / "images")
    datasets = [whole.take(np.arange(first, last)) for first, last, _ in SHARES]
    for dataset, (_, _, encoder) in zip(datasets, SHARES, strict=True):
        long_job.embed(folder / "cache", dataset, SlowEncoder(name=encoder))
    return Alone(datasets, rows_by_key(folder / "cache"))


class Hold(NamedTuple):
    """One holding of a lock: by whom, since when it was asked for, got, and given back (0: it was killed with it)."""

    process: int
    asked: int
    got: int
    ended: int


def start(cache: Path, dataset: Dataset, encoder: str, holds: Path) -> Any:
    """Start to embed in a process of its own, which notes when it asked for, got and gave back each lock."""

    def run() -> None:
        real = storage.record_lock

        @contextmanager
        def noted(path: Path) -> Iterator[None]:
            asked = time.monotonic_ns()
            with real(path):
                got = time.monotonic_ns()
                note(holds, path, asked, got, 0)
                yield
                note(holds, path, asked, got, time.monotonic_ns())

        storage.record_lock = noted
        long_job.embed(cache, dataset, SlowEncoder(BATCH_SECONDS, name=encoder))

    process = FORK.Process(target=run)
    process.start()
    return process


def note(holds: Path, lock: Path, *times: int) -> None:
    """Append a line in one piece, so that a kill leaves it whole or not at all."""
    line = " ".join(map(str, [lock.parent.name, lock.name, os.getpid(), *times])) + "\n"
    with holds.open("ab", buffering=0) as file:
        file.write(line.encode())


@pytest.mark.parametrize(
    ("rounds", "kills"), [(1, 0), (2, 3), pytest.param(30, 4, marks=pytest.mark.slow)], ids=["calm", "some", "many"]
)
def test_four_processes_store_every_key_once_and_wait_for_no_more_than_the_commits_ahead(
    tmp_path, alone, rounds, kills
):
    rng = np.random.Generator(np.random.PCG64(kills))
    for number in range(rounds):
        cache, holds = tmp_path / f"cache-{number}", tmp_path / f"holds-{number}"
        with reader_beside(cache, alone.rows):
            jobs = [start(cache, data, share[2], holds) for data, share in zip(alone.datasets, SHARES, strict=True)]
            for _ in range(kills):
                time.sleep(rng.uniform(0.02, 0.3))
                victim = int(rng.integers(len(jobs)))
                jobs[victim].kill()
                jobs[victim].join()
                long_job.assert_valid(cache)
                jobs[victim] = start(cache, alone.datasets[victim], SHARES[victim][2], holds)
            for job in jobs:
                job.join(120)
                assert job.exitcode == 0
        long_job.assert_valid(cache)
        assert rows_by_key(cache) == alone.rows
        assert_no_long_waits(read_holds(holds))


def read_holds(path: Path) -> dict[str, list[Hold]]:
    """Return how each lock was held, in the order in which it was got."""
    by_lock: dict[str, dict[int, Hold]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        kind, name, *numbers = line.split()
        hold = Hold(*map(int, numbers))
        by_lock[f"{kind}/{name}"][hold.got] = hold  # the second line of a holding says when it ended
    return {lock: sorted(holds.values(), key=lambda hold: hold.got) for lock, holds in by_lock.items()}


def assert_no_long_waits(by_lock: dict[str, list[Hold]]) -> None:
    """Hold each wait against the time for which others had the lock meanwhile, and how often each of them got it."""
    assert len(by_lock) >= 6 and sum(map(len, by_lock.values())) > 40
    to_wake = SECONDS_TO_WAKE * 1e9 * max(os.getloadavg()[0] / (os.cpu_count() or 1), 1)
    for holds in by_lock.values():
        following = [hold.got for hold in holds[1:]] + [holds[-1].got]
        ended = [hold.ended or got for hold, got in zip(holds, following, strict=True)]
        for number, hold in enumerate(holds):
            ahead = [place for place in range(number) if ended[place] > hold.asked]
            held = sum(ended[place] - max(holds[place].got, hold.asked) for place in ahead)
            assert hold.got - hold.asked <= held + to_wake, (hold, held)
            # Who asked about as early may have been the first to queue; what counts is who asked later and got it.
            turns = [holds[place].process for place in ahead if holds[place].asked > hold.asked + to_wake]
            assert all(turns.count(process) <= 2 for process in turns), "somebody pushed in again and again"


def test_an_encoder_that_is_removed_while_a_cache_is_verified_is_no_damage(tmp_path, monkeypatch):
    small_cache.fill(tmp_path / "cache", small_cache.write_dataset(tmp_path / "images"))
    inspect = verify.inspect_array

    def remove_first(place, kind, name):
        if name == SECOND and (tmp_path / "cache" / STORE / kind / name).exists():
            removal.remove_parts(tmp_path / "cache", removal.parts_of(tmp_path / "cache", SECOND))
        return inspect(place, kind, name)

    monkeypatch.setattr(verify, "inspect_array", remove_first)
    found = verify.verify_cache(tmp_path / "cache")
    assert found.damage == []
    assert ("image", SECOND) not in verify.array_folders(tmp_path / "cache")


def test_a_sample_table_that_is_replaced_while_it_is_read_is_one_of_the_two(tmp_path, monkeypatch):
    """Taken for empty, it would let a compaction drop every row as unused."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    place, done = storage.LocalStorage(tmp_path), threading.Event()
    tables = {}
    for count in (20, 900):
        names = pa.array([f"{count}-{number}" for number in range(count)], sample_table.TEXT)
        blank = {field.name: pa.nulls(count, field.type) for field in sample_table.COLUMNS}
        tables[count] = pa.table({**blank, "id": names}, schema=sample_table.COLUMNS)
    sample_table.put_table(place, "one", tables[20])

    def replace_on_and_on() -> None:
        while not done.is_set():
            for table in tables.values():
                sample_table.put_table(place, "one", table)

    writer = threading.Thread(target=replace_on_and_on)
    writer.start()
    try:
        for _ in range(200):
            found = sample_table.load_from(place, "one")
            assert len(found) in tables and found.equals(tables[len(found)])
            assert not list(wrong_tables(place))
    finally:
        done.set()
        writer.join()
