"""What happens in a worker of a cluster: the encoder is loaded once, and blocks are computed one after the other.

Comes in: a job's `Work`, how to come by its encoder, and a block. Goes out: rows in the cache, and what the driver
(`engine.cluster`) has to know of them.

- The encoder is loaded on the worker's own device and must have the driver's id: other weights elsewhere are an error.
- One GPU a worker: dask-cuda puts the worker's own first; else workers agree among them (`engine.own_gpu`).
- What the first block warms up is kept: a captured graph, a compiled tower, a batch size that fits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engine.batches import Runner, make_runner
from engine.blocks import Block, Computed, Work, compute_block
from engine.decoding import MOST_THREADS
from engine.errors import FluoroscopeError
from engine.extract import EncoderLike
from engine.machine import usable_cores
from engine.plan import Plan, batch_size_for


@dataclass(frozen=True)
class EncoderRecipe:
    """How a worker comes by the encoder; see `engine.encoder.load_encoder`.

    Parameters
    ----------
    name, precision, decoder : str
    device : str
        As it was asked for: "auto" and "cuda" mean one GPU a worker where there are several.
    """

    name: str
    precision: str = "fp32"
    decoder: str = "exact"
    device: str = "auto"

    def __call__(self) -> EncoderLike:
        """Load the encoder in a worker."""
        import torch

        from engine.encoder import load_encoder
        from engine.own_gpu import own_gpu

        device = self.device
        if device in ("auto", "cuda") and torch.cuda.device_count() > 1:
            device = f"cuda:{own_gpu()}"
        return load_encoder(self.name, device=device, precision=self.precision, decoder=self.decoder)


@dataclass
class _Held:
    """What a worker keeps from block to block: encoders by id, the runner of each, and the jobs that are stopped."""

    encoders: dict[str, EncoderLike] = field(default_factory=dict)
    runners: dict[str, Runner] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    # Workers may be started with many threads; an encoder, and a GPU, serves one block at a time.
    computing: threading.Lock = field(default_factory=threading.Lock)


def _held_by(worker: Any) -> _Held:
    held: _Held = worker.__dict__.setdefault("fluoroscope", _Held())
    return held


def run_block(
    work: Work, recipe: Callable[[], EncoderLike], block: Block, job: str, crowds: Mapping[str, int]
) -> Computed:
    """Compute one block in a worker, whose encoder is loaded once; `crowds` is how many workers each machine has."""
    from distributed import get_worker

    worker = get_worker()
    held = _held_by(worker)
    with held.computing:
        if job in held.stopped:
            return Computed()
        encoder = _encoder(held, recipe, work.encoder_id, worker.address)
        if work.plan.threads is None:
            work = replace(work, plan=replace(work.plan, threads=_share_of_cores(worker.address, crowds)))
        runner = _warm_runner(held, work, encoder) if block.images else None
        computed = compute_block(work, encoder, block, runner=runner, stopped=lambda: job in held.stopped)
        if runner is not None:  # one that an error has gone through is not used again
            held.runners[encoder.id] = runner
        return computed


def _encoder(held: _Held, recipe: Callable[[], EncoderLike], wanted: str, address: str) -> EncoderLike:
    """Return the encoder of an id, loaded where it was not yet."""
    if wanted not in held.encoders:
        loaded = recipe()
        if loaded.id != wanted:
            raise FluoroscopeError(
                f"worker {address} loaded the encoder {loaded.id}, the job wants {wanted}: the model's files differ "
                "between the machines"
            )
        held.encoders[wanted] = loaded
    return held.encoders[wanted]


def _warm_runner(held: _Held, work: Work, encoder: EncoderLike) -> Runner:
    """Take the runner of the block before: its graph is captured, its tower compiled, its batches fit."""
    runner, size, compiled = held.runners.pop(encoder.id, None), work.plan.batch_size, bool(work.plan.compiled)
    if runner is not None and (runner.batch_size, runner.compiled) == (size, compiled):
        return runner
    return make_runner(encoder, size, compiled=compiled)


def _share_of_cores(address: str, crowds: Mapping[str, int]) -> int:
    """Return how many threads a worker may decode with beside the others on its machine."""
    return max(1, min(usable_cores() // _crowd(address, crowds), MOST_THREADS))


def _crowd(address: str, crowds: Mapping[str, int]) -> int:
    from distributed.comm import get_address_host

    return max(1, crowds.get(get_address_host(address), 1))


def batch_size(wanted: str) -> int:
    """Return the batch size for the device that a worker takes where one is wanted by this name."""
    from engine.encoder import choose_device

    return batch_size_for(choose_device(wanted).type)


def settled(
    plan: Plan, recipe: Callable[[], EncoderLike], encoder_id: str, images: int, crowds: Mapping[str, int]
) -> Plan:
    """Return a plan with nothing left open for so many images a worker, on this machine."""
    from distributed import get_worker

    worker = get_worker()
    held = _held_by(worker)
    with held.computing:
        encoder = _encoder(held, recipe, encoder_id, worker.address)
        return plan.settled(encoder, images * _crowd(worker.address, crowds))


def stop(job: str, dask_worker: Any = None) -> None:
    """Have a worker compute no further batch of a job."""
    _held_by(dask_worker).stopped.add(job)
