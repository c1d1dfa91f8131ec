"""Extraction in real worker processes: the same rows as from one process, also when workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine import cluster as clusters
from engine.arrays.array_verify import verify_array
from engine.cache import Cache
from engine.cluster import Cluster, EncoderRecipe, start_cluster
from engine.encoder import load_encoder
from engine.errors import FluoroscopeError, UsageError
from engine.sources import open_dataset
from engine.upkeep.compact import compact_array
from tests import models
from tests.engine.fakes import FakeEncoder, settle, write_images

WHAT = ("image", "pixels", "text")
# A worker keeps an encoder by its id.
DEADLY, BROKEN, LATE = (f"{word}-fp32-0123456789ab" for word in ("deadly", "broken", "late"))


def fake(number: int = 0, name: str = "fake-fp32-0123456789ab") -> FakeEncoder:
    return FakeEncoder(name)


class DeadlyEncoder(FakeEncoder):
    """Kills its worker at its second batch, once in all."""

    def __init__(self, mark: str) -> None:
        super().__init__(DEADLY)
        self.mark = mark

    def encode_pixels(self, pixels):
        values = super().encode_pixels(pixels)
        if len(self.image_batches) == 2:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return values
            os.kill(os.getpid(), signal.SIGKILL)
        return values


class BrokenEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__(BROKEN)

    def encode_pixels(self, pixels):
        raise RuntimeError("the device fell off the bus")


def compacting(number: int, cache: str, kept: np.ndarray) -> FakeEncoder:
    """Load an encoder while somebody drops pixels: the blocks that wait for it were made out before."""
    encoder = FakeEncoder(LATE)
    compact_array(Path(cache), "pixels", encoder.preprocess.id, kept)
    return encoder


def deadly(number: int, mark: str) -> FakeEncoder:
    return DeadlyEncoder(mark)


def broken(number: int) -> FakeEncoder:
    return BrokenEncoder()


@pytest.fixture(scope="module")
def running():
    with start_cluster(2, threads=1) as started:
        yield started


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images", range(120))
    (tmp_path / "images" / "0007.png").write_bytes(b"no image")
    return tmp_path / "images"


def rows_of(cache, kind: str, name: str) -> dict[bytes, bytes]:
    array = Cache(cache).array(kind, name)
    rows, damage = verify_array(cache, kind, name)
    assert damage == [] and rows == len(array) == len(np.unique(array.keys, axis=0))
    return {key.tobytes(): row.tobytes() for key, row in zip(array.keys, array.read_all(), strict=True)}


def test_workers_store_the_rows_of_one_process_and_report_what_failed(tmp_path, images, running):
    dataset = open_dataset(f"folder:{images}").with_columns(text=[f"text {number % 50}" for number in range(120)])
    told = []
    workers = Cluster(running.client, fake)
    report = Cache(tmp_path / "many").embed(
        dataset, FakeEncoder(), WHAT, batch_size=4, cluster=workers, progress=lambda *told_now: told.append(told_now)
    )
    alone = Cache(tmp_path / "one").embed(dataset, FakeEncoder(), WHAT, batch_size=4)
    assert report.computed == alone.computed == {"image": 119, "pixels": 119, "text": 50}
    assert report.failures.equals(alone.failures) and report.failures["uri"].tolist() == ["0007.png"]
    assert report.opened == 120 and ("embed images", 120, 120) in told and len(told) > 5
    for kind, name in Cache(tmp_path / "one").arrays():
        assert rows_of(tmp_path / "many", kind, name) == rows_of(tmp_path / "one", kind, name)
    again = Cache(tmp_path / "many").embed(dataset, FakeEncoder(), WHAT, batch_size=4, cluster=workers)
    assert again.computed == {"image": 0, "pixels": 0, "text": 0}
    assert again.opened <= 1  # the broken one, until it is mended


def test_a_killed_worker_costs_only_its_block(tmp_path, images, running):
    workers = Cluster(running.client, partial(deadly, mark=str(tmp_path / "mark")))
    dataset = open_dataset(f"folder:{images}")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    report = Cache(tmp_path / "many").embed(dataset, FakeEncoder(DEADLY), ("image",), batch_size=4, cluster=workers)
    assert (tmp_path / "mark").exists()
    assert {process.pid for process in psutil.Process().children(recursive=True)} != before  # one has died
    Cache(tmp_path / "one").embed(dataset, FakeEncoder(DEADLY), ("image",), batch_size=4)
    assert len(report.failures) == 1
    assert rows_of(tmp_path / "many", "image", DEADLY) == rows_of(tmp_path / "one", "image", DEADLY)


def test_workers_that_come_after_a_compaction_compute_each_image_from_its_own_pixels(tmp_path, images, running):
    dataset = open_dataset(f"folder:{images}").take(np.arange(20, 60))
    settle()
    cache = Cache(tmp_path / "many")
    cache.embed(dataset, FakeEncoder(), ("pixels",), batch_size=4)
    kept = cache.image_keys(dataset)[8:]
    recipe = partial(compacting, cache=str(tmp_path / "many"), kept=kept)
    workers = Cluster(running.client, recipe)
    Cache(tmp_path / "many").embed(dataset, FakeEncoder(LATE), ("image",), batch_size=4, cluster=workers)
    assert len(rows_of(tmp_path / "many", "pixels", "8-fake")) == 32
    Cache(tmp_path / "one").embed(dataset, FakeEncoder(LATE), ("image",), batch_size=4)
    assert rows_of(tmp_path / "many", "image", LATE) == rows_of(tmp_path / "one", "image", LATE)


def test_a_dead_device_in_a_worker_stops_the_job_with_its_own_error(tmp_path, images, running):
    with pytest.raises(RuntimeError, match="fell off the bus"):
        Cache(tmp_path).embed(
            open_dataset(f"folder:{images}"), FakeEncoder(BROKEN), batch_size=4, cluster=Cluster(running.client, broken)
        )


def test_a_worker_with_other_weights_is_an_error(tmp_path, images, running):
    workers = Cluster(running.client, partial(fake, name="other-fp32-000000000000"))
    with pytest.raises(FluoroscopeError, match=r"loaded the encoder other-fp32.*files differ between the machines"):
        Cache(tmp_path).embed(open_dataset(f"folder:{images}"), FakeEncoder("mine-fp32-000000000000"), cluster=workers)
    with pytest.raises(UsageError, match="give the cluster a recipe"):
        Cache(tmp_path).embed(open_dataset(f"folder:{images}"), FakeEncoder(), cluster=running)


def test_a_real_encoder_is_loaded_in_the_workers_by_its_name(tmp_path, running):
    encoder = load_encoder(f"local-dir:{models.biomedclip_like(tmp_path / 'model')}", device="cpu", decoder="fast")
    phantoms = open_dataset("phantom:40?seed=3&size=64")
    Cache(tmp_path / "many").embed(phantoms, encoder, ("image", "tokens@-1"), batch_size=4, cluster=running)
    Cache(tmp_path / "one").embed(phantoms, encoder, ("image", "tokens@-1"), batch_size=4)
    for kind, name in Cache(tmp_path / "one").arrays():
        assert rows_of(tmp_path / "many", kind, name) == rows_of(tmp_path / "one", kind, name)


def test_blocks_are_whole_batches_and_enough_to_go_round(running):
    assert running.workers == 2
    assert running.block_rows(100_000, 32) == 32 * clusters.BATCHES_A_BLOCK
    assert running.block_rows(256, 32) == 32 and running.block_rows(1, 8) == 8
    assert running.block_rows(1024, 32) == 128


def test_recipe__one_gpu_a_worker(monkeypatch):
    import torch

    import engine.encoder

    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(engine.encoder, "load_encoder", lambda name, *, device, **options: asked.append(device))
    for number in range(5):
        EncoderRecipe("x", device="cuda")(number)
    EncoderRecipe("x", device="cpu")(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,0,1")  # dask-cuda has put the worker's own first
    EncoderRecipe("x", device="cuda")(1)
    assert asked == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cpu", "cuda"]


def test_wrong_addresses_and_numbers(monkeypatch):
    monkeypatch.setattr(clusters, "SECONDS_TO_CONNECT", 1)
    with pytest.raises(UsageError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'"), start_cluster(
        scheduler="tcp://127.0.0.1:9"
    ):
        pass
    with pytest.raises(UsageError, match="workers must be at least 1, not 0"), start_cluster(0):
        pass
    with pytest.raises(UsageError, match="either how many workers"), start_cluster():
        pass


def test_command_line__starts_workers_and_leaves_no_process(tmp_path):
    model = models.biomedclip_like(tmp_path / "model")
    write_images(tmp_path / "images", range(30))
    command = [sys.executable, "-m", "jobs.cli", "embed", f"folder:{tmp_path / 'images'}"]
    command += ["--model", f"local-dir:{model}", "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    command += ["--workers", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "30 computed" in ended.stdout
    mine = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]
