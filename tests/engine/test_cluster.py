"""Extraction in real worker processes: the same rows as from one process, also when workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from engine import cluster as clusters
from engine import cluster_worker, embed, own_gpu
from engine import encoder as encoders
from engine.arrays.array_verify import verify_array
from engine.arrays.storage import storage_of
from engine.blocks import Block, Computed, Work
from engine.cache import Cache
from engine.cluster import Cluster, _recipe_of, start_cluster
from engine.cluster_worker import EncoderRecipe
from engine.decoding import ImageWork
from engine.encoder import load_encoder
from engine.errors import FluoroscopeError, UsageError
from engine.plan import Plan, make_plan
from engine.products import product_of
from engine.sources import open_dataset
from engine.upkeep.compact import compact_array
from jobs import embed as jobs_embed
from tests import models
from tests.engine.fakes import FakeEncoder, settle, write_images
from tests.reliability.command_line import until

WHAT = ("image", "pixels", "text")
# A worker keeps an encoder by its id.
BROKEN, CRASHING, LATE = (f"{word}-fp32-0123456789ab" for word in ("broken", "crashing", "late"))


def fake(name: str = "fake-fp32-0123456789ab") -> FakeEncoder:
    return FakeEncoder(name)


class DeadlyEncoder(FakeEncoder):
    """Notes what each worker computes, where no kill can undo it; kills its worker, once in all.

    That is at the worker's second batch, when the first one is committed.
    """

    def __init__(self, name: str, notes: Path, cache: Path) -> None:
        super().__init__(name)
        self.notes, self.cache = notes, cache
        self.batches: list[np.ndarray] = []

    def note(self, kind: str, values: np.ndarray, rows: int) -> np.ndarray:
        self.batches.append(values)
        with (self.notes / str(os.getpid())).open("ab") as file:
            file.write(bytes([rows]))
        if len(self.batches) == 2:
            with suppress(FileExistsError):
                os.close(os.open(self.notes / "killed", os.O_CREAT | os.O_EXCL))
                until(lambda: self.is_committed(kind, self.batches[0][0]), 20, lambda: "the first batch is not stored")
                os.kill(os.getpid(), signal.SIGKILL)
        return values

    def is_committed(self, kind: str, row: np.ndarray) -> bool | None:
        if (kind, self.id) not in Cache(self.cache).arrays():
            return None
        return bool((Cache(self.cache).array(kind, self.id).read_all() == row.astype(np.float16)).all(1).any()) or None

    def encode_pixels(self, pixels):
        return self.note("image", super().encode_pixels(pixels), int(pixels.any(axis=(1, 2, 3)).sum()))

    def encode_text(self, texts):
        return self.note("text", super().encode_text(texts), len(texts))


class BrokenEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__(BROKEN)

    def encode_pixels(self, pixels):
        raise RuntimeError("the device fell off the bus")


class CrashingEncoder(FakeEncoder):
    def __init__(self) -> None:
        super().__init__(CRASHING)

    def encode_pixels(self, pixels):
        os.kill(os.getpid(), signal.SIGKILL)


def compacting(cache: str, kept: np.ndarray) -> FakeEncoder:
    """Load an encoder while somebody drops pixels: the blocks that wait for it were made out before."""
    encoder = FakeEncoder(LATE)
    compact_array(Path(cache), "pixels", encoder.preprocess.id, kept)
    return encoder


def deadly(name: str, notes: Path, cache: Path) -> FakeEncoder:
    return DeadlyEncoder(name, notes, cache)


def broken() -> FakeEncoder:
    return BrokenEncoder()


def crashing() -> FakeEncoder:
    return CrashingEncoder()


@pytest.fixture(scope="module")
def running():
    with start_cluster(2, threads=1) as started:
        yield started


@pytest.fixture
def mortal():
    """A cluster for those who kill its workers: on a busy machine it takes long until others are in their places."""
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


@pytest.mark.parametrize(
    ("what", "there"), [("image", 0), ("image", 10), ("text", 10)], ids=["new images", "known images", "texts"]
)
def test_a_killed_worker_costs_its_batch_in_hand_and_its_rows_are_reported(
    tmp_path, monkeypatch, images, mortal, what, there
):
    """What it had committed is neither computed again nor reported as there before the job."""
    monkeypatch.setattr(embed, "TEXTS_A_BATCH", 8)
    name, notes = f"deadly-fp32-{what}-{there}", tmp_path / "notes"
    notes.mkdir()
    dataset = open_dataset(f"folder:{images}").with_columns(text=[f"text {number}" for number in range(120)])
    whole, batch = (119, 4) if what == "image" else (120, 8)
    cache = Cache(tmp_path / "many")
    if there:  # the keys of all images, and some rows
        cache.embed(dataset, FakeEncoder(name), ("pixels",))
        cache.embed(dataset.take(np.arange(20, 20 + there)), FakeEncoder(name), (what,))
    workers = Cluster(mortal.client, partial(deadly, name, notes, tmp_path / "many"))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    report = cache.embed(dataset, FakeEncoder(name), (what,), batch_size=4, commit_seconds=1e-9, cluster=workers)
    assert {process.pid for process in psutil.Process().children(recursive=True)} != before  # one has died
    assert report.computed == {what: whole - there} and report.reused == {what: there}
    (notes / "killed").unlink()
    computed = {path.name: sum(path.read_bytes()) for path in notes.iterdir()}
    assert len(computed) >= 2 and whole - there < sum(computed.values()) <= whole - there + batch
    Cache(tmp_path / "one").embed(dataset, FakeEncoder(name), (what,), batch_size=4)
    assert rows_of(tmp_path / "many", what, name) == rows_of(tmp_path / "one", what, name)


def test_a_block_that_kills_its_workers_is_given_up_with_the_way_to_find_its_image(
    tmp_path, monkeypatch, images, mortal
):
    monkeypatch.setattr(mortal.client.cluster.scheduler, "allowed_failures", 0)
    dataset = open_dataset(f"folder:{images}")
    Cache(tmp_path).embed(dataset.take(np.arange(6)), FakeEncoder(CRASHING), batch_size=4)
    with pytest.raises(FluoroscopeError, match=r"a block of rows was given up: .*--threads 1 and without --workers"):
        workers = Cluster(mortal.client, crashing)
        Cache(tmp_path).embed(dataset, FakeEncoder(CRASHING), batch_size=4, cluster=workers)
    assert len(rows_of(tmp_path, "image", CRASHING)) == 6


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


# -- Who computes what, without real workers -------------------------------------------------------------------------


class Task:
    """What `FakeClient.submit` returns."""

    def __init__(self, answer) -> None:
        self.status, self.answer = "pending", answer

    def result(self, timeout=None):
        return self.answer


class FakeClient:
    """A scheduler with workers on some machines; tasks finish when they are looked at, one at a time."""

    def __init__(self, hosts) -> None:
        self.status, self.hosts = "running", list(hosts)
        self.submitted, self.open, self.most = [], [], 0

    def scheduler_info(self, n_workers: int):
        return {"workers": {f"tcp://{host}:{port}": {"host": host} for port, host in enumerate(self.hosts)}}

    def submit(self, function, *arguments, pure):
        task = Task(Computed() if function is cluster_worker.run_block else function(*arguments))
        self.submitted.append((function, arguments))
        self.open.append(task)
        self.most = max(self.most, len(self.open))
        return task


@pytest.fixture
def one_at_a_time(monkeypatch):
    def finished(self, futures):
        task = self.client.open.pop(0)
        task.status = "finished"
        return [task]

    monkeypatch.setattr(Cluster, "_finished", finished)


def test_workers_that_come_later_get_blocks_too(one_at_a_time):
    client, taken = FakeClient(["a"]), []

    def take(computed) -> None:
        taken.append(computed)
        client.hosts = ["a", "a", "b"] * 4
        if len(taken) == 50:
            client.hosts, client.most = ["a"], 0  # most of them go again

    blocks = iter([Block(texts=["x"])] * 100)
    Cluster(client, fake).compute(None, None, blocks, "embed texts", 100, take)
    assert len(taken) == len(client.submitted) == 100
    in_hand = clusters.WAITING_A_WORKER * 12
    assert max(arguments[4]["a"] for _, arguments in client.submitted) == 8
    assert client.most <= in_hand  # and no further one is handed out until those are done


def test_as_many_blocks_are_in_hand_as_there_are_workers(one_at_a_time):
    client = FakeClient(["a"])
    blocks = iter([Block(texts=["x"])] * 100)
    take = lambda computed: client.hosts.__setitem__(slice(None), ["a"] * 20)  # noqa: E731
    Cluster(client, fake).compute(None, None, blocks, "embed texts", 100, take)
    assert client.most == clusters.WAITING_A_WORKER * 20


class LostTask(Task):
    """Finished, but its worker dies before the result was fetched: `lost` times over."""

    def __init__(self, answer, lost: int, client) -> None:
        super().__init__(answer)
        self.lost, self.client = lost, client

    def result(self, timeout=None):
        if not self.lost:
            return self.answer
        assert timeout is not None, "waits for ever"
        self.lost -= 1
        self.status = "lost"
        self.client.open.append(self)
        raise TimeoutError


def test_a_block_that_dies_with_its_worker_before_it_was_fetched_is_waited_for_again(one_at_a_time):
    client, taken = FakeClient(["a"]), []
    client.submit = lambda *given, **how: client.open.append(LostTask(Computed(), 2, client)) or client.open[-1]
    Cluster(client, fake).compute(None, None, iter([Block(texts=["x"])] * 5), "embed texts", 5, taken.append)
    assert len(taken) == 5


@pytest.mark.parametrize("then", ["lost", "finished"])
def test_results_that_died_with_all_workers_end_the_job(monkeypatch, then):
    client, task = FakeClient([]), LostTask(Computed(), 10**6, FakeClient([]))
    client.as_current, client.run, client.cancel = nullcontext, lambda *given, **how: {}, lambda *given, **how: None
    client.submit = lambda *given, **how: task
    task.status = "finished"
    monkeypatch.setattr(
        "distributed.wait", lambda *given: setattr(task, "status", then if task.client.open else "finished")
    )
    monkeypatch.setattr(clusters, "SECONDS_WITHOUT_WORKERS", 0.2)
    with pytest.raises(FluoroscopeError, match="lost its scheduler or all of its workers"):
        Cluster(client, fake).compute(None, None, iter([Block(texts=["x"])]), "embed texts", 1, lambda computed: None)
    assert task.lost < 10**6  # it was asked for


def encoder_on(device: str, wanted: str):
    encoder = FakeEncoder()
    encoder.device, encoder.wanted_device, encoder.source, encoder.precision = torch.device(device), wanted, "x", "bf16"
    encoder.preprocess.decoder = "exact"
    return encoder


def test_workers_take_the_device_that_was_asked_for_and_not_the_drivers():
    asked = load_encoder("phantom-clip", device="auto")
    assert asked.wanted_device == "auto" and _recipe_of(asked).device == "auto"
    assert _recipe_of(load_encoder("phantom-clip", device="cpu")).device == "cpu"


@pytest.mark.parametrize(
    ("elsewhere", "wanted", "expected"), [(True, "auto", 256), (True, "cpu", 32), (False, "auto", 32)]
)
def test_the_batch_size_goes_by_the_workers_device(one_at_a_time, monkeypatch, elsewhere, wanted, expected):
    """A driver without a GPU, workers that have one."""
    monkeypatch.setattr(encoders, "choose_device", lambda name: torch.device("cuda" if name == "auto" else name))
    workers = Cluster(FakeClient(["a", "b"]), elsewhere=elsewhere)
    assert workers.batch_size(encoder_on("cpu", wanted)) == expected


def test_whether_to_compile_goes_by_a_workers_machine_and_its_share(one_at_a_time, monkeypatch):
    """Three workers, two of them on the machine of the one that is asked: two thirds of the images come to it."""
    encoder, asked = encoder_on("cpu", "cpu"), []
    worker = SimpleNamespace(address="tcp://10.0.0.1:0")
    monkeypatch.setattr("distributed.get_worker", lambda: worker)

    class Settling(Plan):
        def settled(self, encoder, images):
            asked.append((encoder, images))
            return self

    plan, theirs = Settling(8, None), FakeEncoder()
    client = FakeClient(["10.0.0.1", "10.0.0.1", "10.0.0.2"])
    Cluster(client, lambda: theirs, elsewhere=True).settled(plan, encoder, 300)
    Cluster(client, lambda: theirs).settled(plan, encoder, 300)  # all are on the machine that decides
    assert asked == [(theirs, 200), (encoder, 300)]


def test_a_plan_leaves_threads_to_the_workers(tmp_path, running):
    plans = []

    def settled(plan) -> None:
        plans.append(plan)
        raise InterruptedError

    workers, dataset = Cluster(running.client, fake), open_dataset("phantom:4?seed=1&size=64")
    for threads in (None, 3):
        with pytest.raises(InterruptedError):
            Cache(tmp_path).embed(dataset, FakeEncoder(), threads=threads, settled=settled, cluster=workers)
    assert [plan.threads for plan in plans] == [None, 3]


def test_a_worker_decodes_with_its_share_of_its_machine(monkeypatch):
    monkeypatch.setattr(cluster_worker, "usable_cores", lambda: 24)
    crowds = {"10.0.0.1": 4, "10.0.0.2": 1, "10.0.0.3": 100}
    shares = [cluster_worker._share_of_cores(f"tcp://10.0.0.{host}:4567", crowds) for host in (1, 2, 3, 4)]
    assert shares == [6, 16, 1, 16]


def test_a_worker_keeps_its_runner_from_block_to_block(tmp_path, monkeypatch):
    """What a first block warms up (a captured graph, a compiled tower) is not thrown away with it."""
    worker, made = SimpleNamespace(address="tcp://127.0.0.1:1"), []
    monkeypatch.setattr("distributed.get_worker", lambda: worker)
    real = cluster_worker.make_runner
    monkeypatch.setattr(cluster_worker, "make_runner", lambda *a, **o: made.append(a[1]) or real(*a, **o))
    dataset = open_dataset("phantom:12?seed=1&size=64")
    encoder = FakeEncoder()
    products = (product_of("image", encoder),)

    def run(rows: range, batch_size: int = 4) -> Computed:
        work = Work(
            storage_of(tmp_path), dataset.reader, products, make_plan(encoder, batch_size=batch_size), encoder.id
        )
        images = [ImageWork(row, dataset.samples["uri"][row], None) for row in rows]
        return cluster_worker.run_block(work, lambda: encoder, Block(images=images), "job", {})

    assert [run(range(start, start + 4)).tally.computed["image"] for start in (0, 4)] == [4, 4]
    assert made == [4]
    run(range(8, 10), batch_size=2)
    assert made == [4, 2]
    encoder.fail_at = 0
    with pytest.raises(RuntimeError, match="fell off the bus"):
        run(range(10, 12), batch_size=2)
    encoder.fail_at = None
    run(range(10, 12), batch_size=2)
    assert made == [4, 2, 2]  # what an error has gone through is not trusted
    assert len(rows_of(tmp_path, "image", encoder.id)) == 12


# -- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visible", [None, "0,1,2,3"], ids=["all", "as SLURM sets it"])
def test_recipe__one_gpu_a_worker(monkeypatch, visible):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(own_gpu, "own_gpu", lambda: 2)
    monkeypatch.setattr(encoders, "load_encoder", lambda name, *, device, **options: asked.append(device))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for device in ("auto", "cuda", "cpu", "cuda:1"):
        EncoderRecipe("x", device=device)()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a batch system that gives each worker one
    EncoderRecipe("x", device="cuda")()
    assert asked == ["cuda:2", "cuda:2", "cpu", "cuda:1", "cuda"]


class LocalCUDACluster:
    """dask-cuda's, as far as it is used here: as many workers as there are GPUs at most."""

    made: list[dict] = []

    def __init__(self, **options) -> None:
        self.made.append(options)


@pytest.mark.parametrize(("gpus", "installed", "theirs"), [(4, True, True), (1, True, False), (4, False, False)])
def test_dask_cuda_is_used_where_it_is_installed_and_has_a_gpu_for_each(monkeypatch, caplog, gpus, installed, theirs):
    made = []
    monkeypatch.setattr(LocalCUDACluster, "made", made)
    monkeypatch.setitem(sys.modules, "dask_cuda", ModuleType("dask_cuda") if installed else None)
    if installed:
        sys.modules["dask_cuda"].LocalCUDACluster = LocalCUDACluster
    monkeypatch.setattr("distributed.LocalCluster", lambda **options: options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with caplog.at_level("INFO", logger="engine.cluster"):
        started = clusters._local_cluster(2, 3)
    (options,) = made or [started]
    assert isinstance(started, LocalCUDACluster) == theirs
    assert (options["n_workers"], options["threads_per_worker"], options["host"]) == (2, 1, "127.0.0.1")
    assert options["memory_limit"] == 0  # else a worker whose libraries take much memory would be killed
    assert ("dask-cuda is not installed" in caplog.text) == (not installed)


def test_wrong_addresses_and_numbers(monkeypatch):
    monkeypatch.setattr(clusters, "SECONDS_TO_CONNECT", 1)
    with (
        pytest.raises(UsageError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
        start_cluster(scheduler="tcp://127.0.0.1:9"),
    ):
        pass
    with pytest.raises(UsageError, match="workers must be at least 1, not 0"), start_cluster(0):
        pass
    with pytest.raises(UsageError, match="either how many workers"), start_cluster():
        pass
    both = {"dataset": "folder:x", "model": "x", "workers": 2, "scheduler": "tcp://127.0.0.1:9"}
    with pytest.raises(UsageError, match="either how many workers"), jobs_embed._cluster(jobs_embed.Config(**both)):
        pass


def embed_arguments(folder: Path, model: Path, *options: str) -> list[str]:
    model_options = ["--model", f"local-dir:{model}", "--device", "cpu"]
    return ["embed", f"folder:{folder / 'images'}", *model_options, "--cache", str(folder / "cache"), *options]


def fluoro(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_command_line__starts_workers_and_leaves_no_process(tmp_path):
    model = models.biomedclip_like(tmp_path / "model")
    write_images(tmp_path / "images", range(30))
    ended = fluoro(embed_arguments(tmp_path, model, "--workers", "2"))
    assert ended.returncode == 0, ended.stderr
    assert "30 computed" in ended.stdout
    mine = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]


def test_command_line__connects_to_a_scheduler_and_leaves_it_running(tmp_path, running):
    model = models.biomedclip_like(tmp_path / "model", seed=1)
    write_images(tmp_path / "images", range(30))
    address = running.client.scheduler.address
    ended = fluoro(embed_arguments(tmp_path, model, "--scheduler", address, "--batch-size", "4"))
    assert ended.returncode == 0, ended.stderr
    assert "30 computed" in ended.stdout and running.workers == 2
    (name,) = [name for kind, name in Cache(tmp_path / "cache").arrays() if kind == "image"]
    encoder = load_encoder(f"local-dir:{model}", device="cpu", precision=name.split("-")[-2])
    Cache(tmp_path / "one").embed(open_dataset(f"folder:{tmp_path / 'images'}"), encoder, batch_size=4)
    assert rows_of(tmp_path / "cache", "image", name) == rows_of(tmp_path / "one", "image", name)
