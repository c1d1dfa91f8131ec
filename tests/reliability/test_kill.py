"""Kill: a job that is killed at any moment, and started again, ends with the very files of a job left in peace.

No row is missing, doubled or half-written, whoever reads meanwhile sees whole rows only, and a kill costs at most a
minute of computing.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zarr

from engine import blocks
from engine.arrays import durable
from engine.arrays.array_folder import list_arrays
from engine.arrays.array_format import PARTS
from engine.cache import Cache
from engine.dataset import Dataset
from engine.row_buffer import CommitPolicy
from tests import models
from tests.engine.fakes import TEXT_ROWS, ArrayReader, dataset_of
from tests.reliability import long_job
from tests.reliability.command_line import Running
from tests.reliability.killing import Payloads, killed_at, reader_beside
from tests.reliability.long_job import BATCH, FORK, NAME, SAMPLES, Signal, SlowEncoder, tree_bytes
from tests.reliability.small_cache import rows_by_key

BATCH_SECONDS = 0.03


class Calm(NamedTuple):
    """A job that nobody disturbed: its cache, data set, what it stored, and how long it took from the first decode."""

    cache: Path
    images: Path
    dataset: Dataset
    rows: Payloads
    seconds: float


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        long_job.small_chunks(patch)
        yield


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    dataset = long_job.dataset_in(folder / "images")
    began = Signal()
    job = start(folder / "cache", folder / "images", began)
    began.wait(job)
    start_of_work = time.perf_counter()
    job.join()
    assert job.exitcode == 0 and long_job.chunks_of(folder / "cache") >= 40
    seconds = time.perf_counter() - start_of_work
    return Calm(folder / "cache", folder / "images", dataset, rows_by_key(folder / "cache"), seconds)


def start(cache: Path, images: Path, began: Signal, notes: Path | None = None):
    """Start the job in a process of its own; `began` is given at its first decode."""
    job = FORK.Process(
        target=lambda: long_job.embed(cache, long_job.dataset_in(images, began), SlowEncoder(BATCH_SECONDS, notes))
    )
    job.start()
    return job


# -- At any moment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_job_killed_at_random_moments_and_started_again_ends_with_the_same_files(calm, tmp_path, kills):
    rng = np.random.Generator(np.random.PCG64(20))
    killed = rounds = 0
    while killed < kills:
        cache, began, notes = tmp_path / f"cache-{rounds}", Signal(), tmp_path / f"notes-{rounds}"
        this_time = 0
        with reader_beside(cache, calm.rows), zarr_reader_beside(cache, calm.rows):
            while True:
                job = start(cache, calm.images, began, notes)
                began.wait(job)
                job.join(rng.uniform(0, calm.seconds))
                job.kill()
                job.join()
                assert_whole(cache, calm.rows)
                if job.exitcode == 0:
                    break
                assert job.exitcode == -signal.SIGKILL
                this_time += 1
        assert tree_bytes(cache / "arrays.zarr") == tree_bytes(calm.cache / "arrays.zarr")
        assert nothing_left_lying(cache)
        # Two commits of two batches may be under way or waiting, and one batch is in hand.
        assert SAMPLES <= sum(notes.read_bytes()) <= SAMPLES + this_time * 5 * BATCH
        killed, rounds = killed + this_time, rounds + 1
        shutil.rmtree(cache)
        began.close()
    assert rounds > 1


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_job_killed_between_any_two_of_its_file_operations_ends_with_the_same_files(calm, tmp_path, every):
    """From the first array that is made, over chunks that are filled up and gone on with, to the sample table."""
    few = calm.dataset.take(np.arange(20))
    long_job.embed(tmp_path / "calm", few)
    cache, step = tmp_path / "killed", 0
    while killed_at(step, partial(long_job.embed, cache, few)):
        assert_whole(cache, calm.rows)
        long_job.embed(cache, few)
        assert tree_bytes(cache / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr"), f"step {step}"
        assert nothing_left_lying(cache)
        shutil.rmtree(cache)
        step += every
    assert step > 150, step


def assert_whole(cache: Path, expected: Payloads) -> None:
    """Hold what a killed job has left against its checks and against what must be there; also as plain zarr sees it."""
    long_job.assert_valid(cache)
    for name, rows in rows_by_key(cache).items():
        assert rows.items() <= expected[name].items()
        seen = rows_by_zarr(cache, *name)
        assert seen.items() <= rows.items()


def rows_by_zarr(cache: Path, kind: str, name: str) -> dict[bytes, bytes]:
    """Return payload by key as plain zarr reads them: the shape first, then so many rows."""
    group = zarr.open_group(cache / "arrays.zarr" / kind / name, mode="r")
    keys = group["key"][:]
    values = group[PARTS[kind][0]][: len(keys)]
    assert keys.any(axis=1).all(), "the shape promises a row that is not there"
    return {key.tobytes(): value.tobytes() for key, value in zip(keys, values, strict=True)}


@contextmanager
def zarr_reader_beside(cache: Path, expected: Payloads) -> Iterator[None]:
    """Read a cache with plain zarr in another process for as long as the context lasts."""
    stop = FORK.Event()

    def read_on() -> None:
        while not stop.is_set():
            for name in list_arrays(cache):
                assert rows_by_zarr(cache, *name).items() <= expected[name].items()
            time.sleep(0.01)

    reader = FORK.Process(target=read_on)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()
    assert reader.exitcode == 0, "plain zarr saw something wrong, see above"


def nothing_left_lying(cache: Path) -> bool:
    return not [path for path in (cache / "tmp").rglob("*") if path.is_file()]


# -- What it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_seconds", [1, 3, 10])
@pytest.mark.parametrize("what", [("image", "pixels"), ("text",)], ids=["images", "texts"])
def test_a_kill_costs_at_most_a_minute_of_computing(tmp_path, monkeypatch, what, batch_seconds):
    """With the default plan, on a clock that only computing moves, and a disk so slow that commits are waited for."""
    count = SAMPLES if what != ("text",) else 3 * SAMPLES
    dataset = dataset_of([str(number) for number in range(count)], ArrayReader(), map("text {}".format, range(count)))
    real_write = durable.write_in_steps

    def slowly(*arguments):
        time.sleep(0.3)
        real_write(*arguments)

    def killed_after(batches: int, cache: Path) -> None:
        encoder = SlowEncoder()
        done = encoder.image_batches if what != ("text",) else encoder.text_batches
        computing = lambda: batch_seconds * len(done)  # noqa: E731
        monkeypatch.setattr(durable, "write_in_steps", slowly)
        monkeypatch.setattr(blocks, "CommitPolicy", partial(CommitPolicy, clock=computing))

        def dying(encode):
            def encode_and_die(batch):
                values = encode(batch)
                if len(done) == batches:
                    os.kill(os.getpid(), signal.SIGKILL)
                return values

            return encode_and_die

        encoder.encode_pixels, encoder.encode_text = dying(encoder.encode_pixels), dying(encoder.encode_text)
        Cache(cache).embed(dataset, encoder, what, batch_size=1)

    kind, rows_a_batch = what[0], 1 if what != ("text",) else TEXT_ROWS
    worst = 0.0
    for batches in range(5, count // rows_a_batch, 10):
        cache = tmp_path / f"after-{batches}"
        job = FORK.Process(target=killed_after, args=(batches, cache))
        job.start()
        job.join()
        assert job.exitcode == -signal.SIGKILL
        rows = len(Cache(cache).array(kind, NAME)) if (kind, NAME) in Cache(cache).arrays() else 0
        worst = max(worst, (batches - rows / rows_a_batch) * batch_seconds)
    assert 10 < worst <= 60, worst


# -- The real thing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_a_real_model_embedded_by_the_command_line_and_killed_ends_with_the_same_files(tmp_path, server, kills):
    model, images = models.open_clip_vit(tmp_path / "model"), tmp_path / "images"
    long_job.dataset_in(images)
    rng = np.random.Generator(np.random.PCG64(6))
    small = "from engine.arrays import array_format; array_format.CHUNK_BYTES = 4096"
    small += "; import os; os.fsync = lambda file: None"
    options = ["--what", "image,pixels", "--batch-size", "4", "--set", "commit_seconds=0.01"]

    def started(cache: Path) -> Running:
        target = [f"folder:{images}", "--model", f"local-dir:{model}", "--cache", str(cache), "--device", "cpu"]
        return server.fluoro(tmp_path, "embed", *target, *options, before=small)

    begun = time.perf_counter()
    calm = started(tmp_path / "calm")
    assert calm.wait() == 0, calm.said
    seconds = time.perf_counter() - begun
    assert long_job.chunks_of(tmp_path / "calm") >= 40
    killed = 0
    while killed < kills:
        cache = tmp_path / "killed"
        for _ in range(50):
            job = started(cache)
            try:
                job.wait(rng.uniform(0, seconds))
            except TimeoutError:
                job.kill()
            if job.wait() == 0:
                break
            killed += 1
            long_job.assert_valid(cache)
        assert tree_bytes(cache / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")
        shutil.rmtree(cache)
