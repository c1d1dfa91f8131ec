"""Dead parts: a scan, reader, decoder, device or writer that dies ends the job at once with its own error.

Not with a hang, and not with another error than its own; what was computed before is kept, no thread or process stays
behind, and when the part is mended the same job goes on to the very files of one that was never disturbed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import cluster as clusters
from engine import pixels, sample_table
from engine.arrays import durable
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.sources import open_dataset
from tests import models
from tests.conftest import ROOT
from tests.engine import fakes
from tests.reliability import long_job
from tests.reliability.command_line import until
from tests.reliability.long_job import BATCH, FORK, NAME, SAMPLES, SlowEncoder, tree_bytes
from tests.reliability.small_cache import rows_by_key

SECONDS = 20  # in which a job must have ended, also on a machine that has little time for it


class PartDied(Exception):
    """What a part dies of: nothing that the pipeline knows or expects."""


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        long_job.small_chunks(patch)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dead") / "images"
    long_job.dataset_in(folder)
    return folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory, images) -> dict[str, bytes]:
    cache = tmp_path_factory.mktemp("calm")
    long_job.embed(cache, long_job.dataset_in(images))
    return tree_bytes(cache / "arrays.zarr")


# Where each part does its work, and how often it is called by a job of 96 images before it dies.
PARTS: dict[str, tuple[Any, str, int]] = {
    "the scan": (fakes.FolderReader, "fingerprint", 50),
    "the reader": (fakes.FolderReader, "read", 50),
    "the decoder": (pixels, "decode", 50),
    "the preprocessing": (fakes.FakePreprocess, "__call__", 50),
    "the device": (SlowEncoder, "encode_pixels", 6),
    "the text tower": (SlowEncoder, "encode_text", 0),
    "the writer": (KeyedArray, "append", 7),
    "a thread of the writer": (durable, "_written", 40),
    "the writer of the sample table": (sample_table, "save_table", 0),
}


def dying(real: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    """Return a function that does what the real one does so many times, and then dies at each call."""
    lock, left = threading.Lock(), [calls]

    def work(*arguments: Any, **options: Any) -> Any:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise error
        return real(*arguments, **options)

    return work


@pytest.mark.parametrize("error", [PartDied("by itself"), SystemExit(3)], ids=["an error", "an exit"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_dies_ends_the_job_with_its_own_error_and_keeps_what_was_computed(
    tmp_path, images, calm, part, error
):
    owner, name, calls = PARTS[part]
    said, says = FORK.Pipe(duplex=False)

    def job() -> None:
        setattr(owner, name, dying(getattr(owner, name), calls, error))
        encoder = SlowEncoder(0.02)
        try:
            long_job.embed(tmp_path, long_job.dataset_in(images), encoder, commit_rows=3 * BATCH)
        except BaseException as ended:
            left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
            says.send((type(ended).__name__, str(ended), len(encoder.image_batches), left))

    child = FORK.Process(target=job)
    child.start()
    child.join(SECONDS)
    hung = child.is_alive()
    child.kill()
    says.close()
    assert not hung, "the job hangs"
    kind, message, batches, left = said.recv()
    assert (kind, message) == (type(error).__name__, str(error))
    assert left == []
    long_job.assert_valid(tmp_path)
    rows = len(Cache(tmp_path).array("image", NAME)) if ("image", NAME) in Cache(tmp_path).arrays() else 0
    # The writer works beside the others: it may die when these small batches are all computed.
    late = ("the text tower", "the writer of the sample table", "the writer", "a thread of the writer")
    assert batches < SAMPLES // BATCH or part in late
    if part not in ("the writer", "a thread of the writer"):  # what a dead writer had in hand is lost
        assert rows >= BATCH * (batches - 1)
    long_job.embed(tmp_path, long_job.dataset_in(images))
    assert tree_bytes(tmp_path / "arrays.zarr") == calm


def test_on_the_command_line_it_is_exit_status_1_and_the_same_command_goes_on(tmp_path, server):
    model, folder = models.open_clip_vit(tmp_path / "model"), tmp_path / "images"
    long_job.dataset_in(folder)
    arguments = ["embed", f"folder:{folder}", "--model", f"local-dir:{model}", "--device", "cpu", "--batch-size", "4"]
    arguments += ["--cache", str(tmp_path / "cache")]
    device_dies = """
from engine.batches import Runner
compute, left = Runner._compute, [6]
def dies(self, *arguments):
    left[0] -= 1
    if left[0] < 0:
        raise RuntimeError("the device fell off the bus")
    return compute(self, *arguments)
Runner._compute = dies
"""
    job = server.fluoro(tmp_path, *arguments, before=device_dies)
    assert job.wait(SECONDS * 3) == 1 and "the device fell off the bus" in job.said
    again = server.fluoro(tmp_path, *arguments)
    assert again.wait() == 0 and f"image: {SAMPLES - 24} computed, 24 there already" in again.said


# -- Past one process ------------------------------------------------------------------------------------------------


def slow_encoder() -> SlowEncoder:
    """Make the encoder in a worker."""
    return SlowEncoder(0.3)


@pytest.fixture
def dask() -> Iterator[dict[str, subprocess.Popen]]:
    """A scheduler and two workers as they are started by hand, by name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

    def started(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    running = {"scheduler": started("scheduler", "--host", address)}
    for number in range(2):
        running[f"worker {number}"] = started("worker", address, "--nthreads", "1", "--no-nanny")
    yield {"address": address, **running}
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["scheduler", "worker"])
def test_a_scheduler_or_all_workers_that_die_end_the_job_and_what_was_committed_stays(tmp_path, images, dask, dies):
    said, says = FORK.Pipe(duplex=False)

    def job() -> None:
        clusters.SECONDS_WITHOUT_WORKERS = 5
        try:
            with clusters.start_cluster(scheduler=dask["address"]) as cluster:
                workers = clusters.Cluster(cluster.client, slow_encoder)
                Cache(tmp_path).embed(open_dataset(f"folder:{images}"), SlowEncoder(), batch_size=2, cluster=workers)
        except BaseException as ended:
            says.send((type(ended).__name__, str(ended)))

    child = FORK.Process(target=job)
    child.start()
    until(lambda: any(rows_by_key(tmp_path).values()) or None, 120, lambda: "nothing was computed")
    for name, process in dask.items():
        if name.startswith(dies):
            process.kill()
    child.join(240)  # on a machine that does something else as well it takes one
    hung = child.is_alive()
    child.kill()
    says.close()
    assert not hung, "the job hangs"
    kind, message = said.recv()
    assert kind == "FluoroscopeError" and "the same command goes on from there" in message, message
    long_job.assert_valid(tmp_path)
    report = Cache(tmp_path).embed(open_dataset(f"folder:{images}"), SlowEncoder(), batch_size=2)
    assert report.computed["image"] < SAMPLES  # on a busy machine all may be there before the driver hears of it
    (rows,) = rows_by_key(tmp_path).values()
    assert len(rows) == SAMPLES
