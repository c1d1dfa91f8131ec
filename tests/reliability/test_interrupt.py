"""Interrupts: Ctrl-C stores what is computed, tells what was kept and how to go on, and leaves soon and wholly.

Soon is within two seconds of the batch in hand; wholly, without a thread or a process of its own left behind. The same
command then goes on, and ends with the very files of one that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from engine.cache import Cache
from engine.encoder import TEXT_ROWS
from tests import models
from tests.conftest import ROOT
from tests.engine.fakes import write_images
from tests.engine.web_server import WebFiles, web_server
from tests.reliability import long_job
from tests.reliability.command_line import Running, until
from tests.reliability.long_job import SAMPLES, SlowEncoder, tree_bytes

SECONDS_TO_LEAVE = 2.0
BATCH = 4
BATCH_SECONDS = 0.25
STOPPED = 130
HOW = pytest.mark.parametrize("group", [False, True], ids=["sent to the process", "pressed on a terminal"])

PIPELINE = ("embed", "blocks", "extract", "decoding", "batches", "row_buffer", "storing")

# Python that runs first in a `fluoro`: a device that takes its time, and notes each batch that it begins.
SLOW_DEVICE = f"""
import time
from engine.batches import Runner
compute = Runner._compute
def slowly(self, *arguments):
    open({{notes!r}}, "a").write(".")
    time.sleep({BATCH_SECONDS})
    return compute(self, *arguments)
Runner._compute = slowly
"""
# The same for texts.
SLOW_TEXTS = f"""
import time
from engine.encoder import Encoder
compute = Encoder._encode_words
def slowly(self, words):
    open({{notes!r}}, "a").write(".")
    time.sleep({BATCH_SECONDS})
    return compute(self, words)
Encoder._encode_words = slowly
"""
# A disk that takes its time, and notes that a commit has begun.
SLOW_DISK = """
import time
from engine.arrays import durable
write = durable._written
def slowly(*arguments):
    open({notes!r}, "a").write(".")
    time.sleep({seconds})
    return write(*arguments)
durable._written = slowly
"""


class Place(NamedTuple):
    """A model, images, and a cache in which they were embedded without a disturbance."""

    model: Path
    images: Path
    calm: Path

    def arguments(self, cache: Path, *more: str, dataset: str = "") -> list[str]:
        # Where a device has a faster precision, its trial on the first images would come before the first batch.
        model = ["--model", f"local-dir:{self.model}", "--device", "cpu", "--precision", "fp32"]
        model += ["--batch-size", str(BATCH)]
        return ["embed", dataset or f"folder:{self.images}", *model, "--cache", str(cache), *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory, server) -> Place:
    folder = tmp_path_factory.mktemp("interrupt")
    made = Place(models.open_clip_vit(folder / "model"), folder / "images", folder / "calm")
    write_images(made.images, range(SAMPLES))
    calm = server.fluoro(folder, *made.arguments(made.calm))
    assert calm.wait() == 0, calm.said
    return made


def rows_in(cache: Path, what: str = "image") -> int:
    """Return how many rows of images (or texts) a cache holds, all of them held against their checks."""
    if not cache.exists():
        return 0
    long_job.assert_valid(cache)
    return sum(len(Cache(cache).array(kind, name)) for kind, name in Cache(cache).arrays() if kind == what)


def count(notes: Path) -> int:
    return len(notes.read_bytes()) if notes.exists() else 0


def crowd() -> float:
    """Return how many processes share a core: the promise is for a machine that has time for it."""
    return max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)


def runs(process: psutil.Process) -> bool:
    """Tell whether a process still does something; one that waits to be buried by the system does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leaves(job: Running, seconds: float = SECONDS_TO_LEAVE) -> int:
    """Return the exit status of a job that was interrupted just now; it must leave soon, and nothing of it remain."""
    processes, start = job.processes(), time.monotonic()
    status = job.wait()
    took = time.monotonic() - start
    assert took < seconds * crowd(), f"took {took:.1f} s:\n{job.said}"
    until(lambda: None if any(map(runs, processes)) else True, 0.5 * crowd(), lambda: f"left behind: {processes}")
    assert "Traceback" not in job.said and "Exception" not in job.said, job.said
    return status


# -- While it computes -----------------------------------------------------------------------------------------------


@HOW
def test_ctrl_c_stores_what_is_computed_and_the_same_command_goes_on(tmp_path, place, server, group):
    notes = tmp_path / "notes"
    begun = partial(count, notes)
    job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"), before=SLOW_DEVICE.format(notes=str(notes)))
    job.wait_for(lambda: begun() >= 6)
    job.interrupt(group=group)
    assert leaves(job, SECONDS_TO_LEAVE + BATCH_SECONDS) == STOPPED
    kept = rows_in(tmp_path / "cache")
    assert kept in (BATCH * begun(), BATCH * (begun() - 1))
    assert re.search(rf"stopped: {kept} image rows of \S+ are kept; the same command goes on from there", job.said)

    again = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"))
    assert again.wait() == 0 and f"image: {SAMPLES - kept} computed, {kept} there already" in again.said
    assert tree_bytes(tmp_path / "cache" / "arrays.zarr") == tree_bytes(place.calm / "arrays.zarr")


@HOW
def test_ctrl_c_stores_the_texts_that_are_computed_and_the_same_command_goes_on(tmp_path, place, server, group):
    """Texts are sorted by length and come in batches of their own; what is left comes in the same order."""
    notes, table = tmp_path / "notes", tmp_path / "texts.csv"
    words = ["clear", "lungs", "no", "effusion", "or", "pneumothorax"]
    texts = [" ".join(words[: 1 + number % 6] * (1 + number % 5)) + f" {number}" for number in range(SAMPLES)]
    table.write_text("".join(["id,text\n", *(f"{number},{text}\n" for number, text in enumerate(texts))]))
    begun = partial(count, notes)

    def job(cache: Path, before: str = "") -> Running:
        return server.fluoro(
            tmp_path, *place.arguments(cache, "--what", "text", dataset=f"table:{table}"), before=before
        )

    calm, stopped = job(tmp_path / "calm"), job(tmp_path / "cache", SLOW_TEXTS.format(notes=str(notes)))
    stopped.wait_for(lambda: begun() >= 6)
    stopped.interrupt(group=group)
    assert leaves(stopped, SECONDS_TO_LEAVE + BATCH_SECONDS) == STOPPED
    kept = rows_in(tmp_path / "cache", "text")
    # The last batch of a length is not full.
    assert TEXT_ROWS["cpu"] * (begun() - 1) - 3 * TEXT_ROWS["cpu"] < kept <= TEXT_ROWS["cpu"] * begun()
    assert f"stopped: {kept} text rows of" in stopped.said

    again = job(tmp_path / "cache")
    assert again.wait() == 0 and f"text: {SAMPLES - kept} computed, {kept} there already" in again.said
    assert calm.wait() == 0
    assert tree_bytes(tmp_path / "cache" / "arrays.zarr") == tree_bytes(tmp_path / "calm" / "arrays.zarr")


def test_ctrl_c_while_a_commit_is_written_or_waited_for_loses_no_row(tmp_path, place, server):
    """A disk so slow that the first commit is still being written when the job is stopped."""
    devices, disk = tmp_path / "batches", tmp_path / "writes"
    slow = SLOW_DEVICE.format(notes=str(devices)) + SLOW_DISK.format(notes=str(disk), seconds=0.5)
    options = ["--set", f"commit_seconds={2 * BATCH_SECONDS}"]
    job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache", *options), before=slow)
    job.wait_for(lambda: count(disk) >= 1 and count(devices) >= 4)
    job.interrupt(group=True)
    assert job.wait() == STOPPED
    assert rows_in(tmp_path / "cache") >= BATCH * (count(devices) - 1)


def test_a_second_ctrl_c_leaves_without_waiting_for_the_disk(tmp_path, place, server):
    """What was not stored is computed again; what was, is whole."""
    devices, disk = tmp_path / "batches", tmp_path / "writes"
    slow = SLOW_DEVICE.format(notes=str(devices)) + SLOW_DISK.format(notes=str(disk), seconds=30)
    job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"), before=slow)
    job.wait_for(lambda: count(devices) >= 3)
    job.interrupt(group=True)
    job.wait_for(lambda: count(disk) >= 1)
    time.sleep(0.3)
    job.interrupt(group=True)
    assert leaves(job) == STOPPED and "nothing was computed yet" in job.said
    again = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"))
    assert again.wait() == 0 and f"image: {SAMPLES} computed" in again.said
    assert tree_bytes(tmp_path / "cache" / "arrays.zarr") == tree_bytes(place.calm / "arrays.zarr")


def test_ctrl_c_while_a_source_hangs_leaves_at_the_second_one_and_keeps_what_is_computed(tmp_path, place, server):
    """The first one waits for the images that are being read, as for a batch."""
    hung, devices = tmp_path / "hung", tmp_path / "batches"
    slow = f"""
import time
from engine.sources.files import FileReader
read = FileReader.read
def hangs(self, uri):
    if "0050" in uri:
        open({str(hung)!r}, "a").write(".")
        time.sleep(60)
    return read(self, uri)
FileReader.read = hangs
"""
    slow += SLOW_DEVICE.format(notes=str(devices))
    job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"), before=slow)
    job.wait_for(lambda: hung.exists() and count(devices) == 48 / BATCH)
    time.sleep(crowd())
    job.interrupt(group=True)
    time.sleep(0.5 * crowd())
    job.interrupt(group=True)
    assert leaves(job) == STOPPED
    assert rows_in(tmp_path / "cache") == 48


@pytest.mark.parametrize("every", [97, pytest.param(13, marks=pytest.mark.slow)])
def test_ctrl_c_between_any_two_lines_of_the_pipeline_loses_no_computed_batch(tmp_path, monkeypatch, every):
    """Python raises KeyboardInterrupt wherever the driving thread happens to be, so it is raised everywhere.

    Entering the end of the storing context is the one place where nothing can catch it; there the rows since the last
    commit are computed again, as after a kill.
    """
    long_job.small_chunks(monkeypatch)
    dataset = long_job.dataset_in(tmp_path / "images").take(np.arange(20))
    long_job.embed(tmp_path / "calm", dataset, batch_size=4, commit_rows=8)
    calm = tree_bytes(tmp_path / "calm" / "arrays.zarr")
    losing, line = set(), 0
    while True:
        cache, encoder = tmp_path / "cache", SlowEncoder()
        stopped_in = raised_at(line, partial(long_job.embed, cache, dataset, encoder, batch_size=4, commit_rows=8))
        if not stopped_in:
            break
        texts = sum(map(len, encoder.text_batches[:-1]))
        if rows_in(cache) < 4 * (len(encoder.image_batches) - 1) or rows_in(cache, "text") < texts:
            losing.add(stopped_in)
        until(lambda: None if pipeline_threads() else True, 10, lambda: f"left running: {pipeline_threads()}")
        long_job.embed(cache, dataset, batch_size=4, commit_rows=8)
        assert tree_bytes(cache / "arrays.zarr") == calm
        shutil.rmtree(cache)
        line += every
    assert line > 1000 and losing <= {"__exit__"}


def pipeline_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "store"))]


def raised_at(line: int, operation: Callable[[], object]) -> str:
    """Raise KeyboardInterrupt before one of the lines of the pipeline; return its function, "" if it ended before."""
    files, left, where = {str(ROOT / "engine" / f"{name}.py") for name in PIPELINE}, line, ""

    def trace(frame: FrameType, event: str, _: object) -> object:
        return trace_lines if frame.f_code.co_filename in files else None

    def trace_lines(frame: FrameType, event: str, _: object) -> object:
        nonlocal left, where
        left -= event == "line"
        if left < 0:
            where = frame.f_code.co_name
            raise KeyboardInterrupt
        return trace_lines

    sys.settrace(trace)
    try:
        operation()
    except KeyboardInterrupt:
        assert where
    finally:
        sys.settrace(None)
    return where


# -- Before it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presses", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_ctrl_c_while_it_starts_leaves_at_once(tmp_path, place, server, presses):
    """Reading the config, scanning the images, loading the model, making the run's folder."""
    rng = np.random.Generator(np.random.PCG64(1))
    for number in range(presses):
        job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"))
        time.sleep(rng.uniform(0, 0.6))
        with suppress(ProcessLookupError):
            job.interrupt(group=True)
        assert leaves(job) in (STOPPED, 0), number
    again = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache"))
    assert again.wait() == 0
    assert tree_bytes(tmp_path / "cache" / "arrays.zarr") == tree_bytes(place.calm / "arrays.zarr")


@pytest.mark.parametrize("seconds", [0.4, 2.5, *(pytest.param(n / 4, marks=pytest.mark.slow) for n in range(1, 40))])
def test_ctrl_c_while_libraries_are_imported_leaves_at_once(tmp_path, place, seconds):
    """A fresh interpreter, for which importing torch and the like takes seconds."""
    job = subprocess.Popen(
        [sys.executable, "-c", "from jobs.cli import main; main()", *place.arguments(tmp_path / "cache")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    pressed = time.monotonic()
    os.killpg(job.pid, signal.SIGINT)
    said, _ = job.communicate(timeout=60)
    assert job.returncode in (STOPPED, 0) and "Traceback" not in said, said
    assert job.returncode == 0 or time.monotonic() - pressed < SECONDS_TO_LEAVE * crowd()


# -- Workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_web(place) -> Iterator[WebFiles]:
    """Images and a table of them on a web server that takes its time."""
    with web_server() as web:
        for path in place.images.iterdir():
            web.files[f"/{path.name}"] = path.read_bytes()
        rows = [f"{name[1:]},{name[1:]}\n" for name in sorted(web.files)]
        web.files["/images.csv"] = "".join(["id,image\n", *rows]).encode()
        yield web


@HOW
def test_ctrl_c_with_workers_stores_what_they_have_computed_and_leaves_no_process(
    tmp_path, place, server, slow_web, group
):
    slow_web.seconds, slow_web.asked[:] = 0.2, []
    dataset = f"table:{slow_web.url}/images.csv"
    job = server.fluoro(tmp_path, *place.arguments(tmp_path / "cache", "--workers", "2", dataset=dataset))
    job.wait_for(lambda: sum(command == "sent" for command, _, _ in slow_web.asked) >= 30)
    assert len(job.processes()) >= 3
    job.interrupt(group=group)
    assert leaves(job) == STOPPED
    kept = rows_in(tmp_path / "cache")
    assert kept >= 8 and f"stopped: {kept} image rows" in job.said
