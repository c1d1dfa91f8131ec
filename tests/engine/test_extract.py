"""The pipeline: order, static batches, kills, Ctrl-C, dead parts, full disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from engine import embed, pixels
from engine.arrays import array_format, durable
from engine.arrays.array_verify import verify_array
from engine.cache import Cache
from engine.decoding import ordered_map
from engine.errors import CacheError
from engine.keys import key_of_content, key_of_text
from engine.row_buffer import CommitPolicy
from tests.engine.fakes import ArrayReader, FakeEncoder, dataset_of

WHAT = ("image", "pixels", "tokens@1")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No syncing, which only a power cut needs, and small chunks."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(array_format, "CHUNK_BYTES", 1 << 10)


def drawn(count: int):
    return dataset_of([str(number) for number in range(count)], ArrayReader())


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- The parallel map ------------------------------------------------------------------------------------------------


def test_ordered_map__keeps_order_and_runs_a_bounded_number_ahead():
    begun, lock = [], threading.Lock()

    def slow(number: int) -> int:
        with lock:
            begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number * number

    results = ordered_map(slow, iter(range(60)), threads=4, ahead=7)
    for number, result in enumerate(results):
        assert result == number * number
        assert len(begun) <= number + 7 + 1
    assert sorted(begun) == list(range(60))


def test_ordered_map__a_dead_worker_stops_it_with_its_own_error():
    begun = []

    def dies(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ZeroDivisionError("worker 5 died")
        return number

    got = []
    with pytest.raises(ZeroDivisionError, match="worker 5 died"):
        for result in ordered_map(dies, range(1000), threads=2, ahead=8):
            got.append(result)
    assert got == list(range(len(got))) and len(got) <= 5 and len(begun) < 30


# -- What is stored --------------------------------------------------------------------------------------------------


def test_extract__rows_stand_in_the_order_in_which_they_were_asked_for(tmp_path):
    dataset = drawn(50)
    Cache(tmp_path).embed(dataset, FakeEncoder(), WHAT, batch_size=8, threads=4, commit_rows=1)
    expected = [key_of_content(dataset.reader.read(uri)) for uri in dataset.samples["uri"]]
    for kind, name in Cache(tmp_path).arrays():
        assert list(map(bytes, Cache(tmp_path).array(kind, name).keys)) == expected
        assert verify_array(tmp_path, kind, name) == (50, [])


def test_extract__bytes_do_not_depend_on_threads_or_commits(tmp_path):
    plans = [{"threads": 1}, {"threads": 5, "commit_rows": 1}, {"threads": 2, "commit_rows": 30}]
    for number, plan in enumerate(plans):
        Cache(tmp_path / str(number)).embed(drawn(45), FakeEncoder(), WHAT, batch_size=8, **plan)
    trees = [tree_bytes(tmp_path / str(number) / "arrays.zarr") for number in range(len(plans))]
    assert trees[0] == trees[1] == trees[2]


def test_commit_policy__by_rows_by_size_and_by_time():
    now = [0.0]

    class Waiting(list):
        nbytes = 0

    policy = CommitPolicy(rows=4, seconds=30, clock=lambda: now[0])
    assert not policy.due([Waiting([1, 2])]) and policy.due([Waiting([1]), Waiting([1, 2, 3, 4])])
    now[0] = 31
    assert policy.due([Waiting([1])]) and not policy.due([Waiting()])
    large = Waiting([1])
    large.nbytes = 1 << 26
    assert CommitPolicy().due([large]) and not CommitPolicy().due([Waiting([1])])


# -- Things that go wrong --------------------------------------------------------------------------------------------


def _embed(cache: Path, count: int, sleep: float) -> None:
    encoder = FakeEncoder()
    encoder.sleep = sleep
    Cache(cache).embed(drawn(count), encoder, WHAT, batch_size=4, threads=2, commit_rows=1)


def test_kill__and_start_again_ends_with_the_same_bytes(tmp_path):
    """As often as it takes: the rows that are there are taken over, and the arrays end as those of a calm run."""
    context = multiprocessing.get_context("fork")
    rng = np.random.Generator(np.random.PCG64(11))
    _embed(tmp_path / "calm", 60, 0)
    killed, seen = 0, -1
    for _ in range(20):
        job = context.Process(target=_embed, args=(tmp_path / "rough", 60, 0.01))
        job.start()
        job.join(float(rng.uniform(0.1, 0.4)))
        if job.is_alive():
            os.kill(job.pid, signal.SIGKILL)
        job.join()
        killed += job.exitcode == -signal.SIGKILL
        for kind, name in Cache(tmp_path / "rough").arrays():
            rows, damage = verify_array(tmp_path / "rough", kind, name)
            assert damage == []
            seen = max(seen, rows)
        if job.exitcode == 0:
            break
    else:
        _embed(tmp_path / "rough", 60, 0)
    assert killed >= 2 and seen > 0
    calm, rough = (tree_bytes(tmp_path / name / "arrays.zarr") for name in ("calm", "rough"))
    assert rough == calm


def test_interrupt__commits_what_is_computed_and_goes_on(tmp_path):
    encoder, done, threads = FakeEncoder(), [], threading.active_count()

    def interrupt(name: str, count: int, total: int) -> None:
        done.append(count)
        if count == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).embed(drawn(50), encoder, WHAT, batch_size=4, progress=interrupt)
    assert len(Cache(tmp_path).array("image", encoder.id)) == 20
    assert threading.active_count() <= threads
    report = Cache(tmp_path).embed(drawn(50), encoder, WHAT, batch_size=4)
    assert report.computed["image"] == 30
    Cache(tmp_path / "calm").embed(drawn(50), FakeEncoder(), WHAT, batch_size=4)
    assert tree_bytes(tmp_path / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")


def test_interrupt__commits_each_batch_of_texts_and_goes_on_in_the_same_order(tmp_path, monkeypatch):
    """Windows of texts are places in the data set, so that what is left falls into the same ones."""
    monkeypatch.setattr(embed, "TEXTS_A_WINDOW", 32)
    texts = [f"{'very ' * (number * 7 % 5)}text {number}" for number in range(100)]
    dataset, expected = dataset_of([""] * 100, ArrayReader(), texts), []
    for start in range(0, 100, 32):
        expected += sorted(texts[start : start + 32], key=len)
    counts, stop_after = [], 24

    def interrupt(name: str, count: int, total: int) -> None:
        counts.append(count)
        if count >= stop_after:
            raise KeyboardInterrupt

    for kept in (24, 48, 72):
        encoder = FakeEncoder()
        with pytest.raises(KeyboardInterrupt):
            Cache(tmp_path).embed(dataset, encoder, ("text",), progress=interrupt)
        assert len(Cache(tmp_path).array("text", encoder.id)) == kept and max(map(len, encoder.text_batches)) == 8
    assert counts == [8, 16, 24] * 3
    assert Cache(tmp_path).embed(dataset, FakeEncoder(), ("text",)).computed == {"text": 28}
    assert list(map(bytes, Cache(tmp_path).array("text", FakeEncoder().id).keys)) == list(map(key_of_text, expected))
    Cache(tmp_path / "calm").embed(dataset, FakeEncoder(), ("text",))
    assert tree_bytes(tmp_path / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")


def test_dead_encoder__stops_the_job_with_its_own_error_and_keeps_the_rows(tmp_path):
    encoder = FakeEncoder()
    encoder.fail_at = 3
    with pytest.raises(RuntimeError, match="fell off the bus"):
        Cache(tmp_path).embed(drawn(50), encoder, batch_size=4)
    assert len(Cache(tmp_path).array("image", encoder.id)) == 12


def test_dead_decoder__stops_the_job_with_its_own_error(tmp_path, monkeypatch):
    def dies(content, max_pixels, at_least):
        raise ZeroDivisionError("a bug, not a bad image")

    monkeypatch.setattr(pixels, "decode", dies)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        Cache(tmp_path).embed(drawn(5), FakeEncoder())


def test_full_disk__names_path_and_bytes_and_the_next_run_goes_on(tmp_path, monkeypatch):
    real, written = durable._write_all, []

    def fills_up(file, buffer):
        written.append(len(buffer))
        if len(written) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_write_all", fills_up)
        with pytest.raises(
            CacheError, match=r"no space left while writing [\d,]+ bytes to .*arrays.zarr.*run the same"
        ):
            Cache(tmp_path).embed(drawn(60), FakeEncoder(), batch_size=4, commit_rows=1)
    kept, damage = verify_array(tmp_path, "image", FakeEncoder().id)
    assert 0 < kept < 60 and damage == []
    assert Cache(tmp_path).embed(drawn(60), FakeEncoder(), batch_size=4).computed == {"image": 60 - kept}
