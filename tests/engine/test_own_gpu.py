"""Processes beside one another agree on GPUs, also where they number them differently and where some are killed."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from engine import own_gpu

FORK = multiprocessing.get_context("fork")
GPUS = 3
Starter = Callable[[str], tuple]


@pytest.fixture
def started(tmp_path, monkeypatch) -> Iterator[Starter]:
    """Return what starts a process that sees GPUs in some order and says which one is its own, by UUID."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    processes = []

    def start(visible: str) -> tuple:
        order = [int(number) for number in visible.split(",")]
        said, says = FORK.Pipe(duplex=False)

        def worker() -> None:
            torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=f"GPU-{order[number]}")
            says.send(order[own_gpu.own_gpu()])
            FORK.Event().wait()

        process = FORK.Process(target=worker)
        process.start()
        processes.append(process)
        assert said.poll(30)
        return process, said.recv()

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_each_takes_one_of_its_own_and_then_they_share(started):
    taken = [started("0,1,2")[1] for _ in range(2 * GPUS + 1)]
    assert taken[:GPUS] == [0, 1, 2] and sorted(taken[GPUS : 2 * GPUS]) == [0, 1, 2]
    assert max(Counter(taken).values()) == 3


def test_dask_cuda_puts_each_workers_own_first_and_so_it_stays(started):
    assert [started(visible)[1] for visible in ("0,1,2", "1,2,0", "2,0,1")] == [0, 1, 2]


def test_some_of_the_gpus_are_seen_under_other_numbers(started):
    assert [started(visible)[1] for visible in ("2,1,0", "0,1,2", "2,0,1")] == [2, 0, 1]


def test_a_worker_that_comes_for_a_killed_one_takes_its_gpu(started):
    workers = [started("0,1,2") for _ in range(GPUS)]
    workers[1][0].kill()
    workers[1][0].join()
    assert started("0,1,2")[1] == 1


@pytest.mark.parametrize(("visible", "expected"), [("GPU-a,MIG-b/1", "MIG-b-1"), (None, "1")])
def test_older_torch_knows_no_uuid(monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert own_gpu._name(1) == expected


def test_without_a_place_for_locks_it_is_said_and_gone_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=number))
    assert 0 <= own_gpu._claimed.__wrapped__()[0] < GPUS
    assert "cannot agree on GPUs" in caplog.text
