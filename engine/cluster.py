"""Extraction past one process: blocks of rows as tasks of Dask distributed.

Comes in: a job's `Work` and its blocks. Goes out: what became of each block, as they finish. Workers commit to the cache
themselves, block by block, under the same short lock as everybody; the driver sees keys and tallies only, never a row.

- A worker that is killed costs the rows of its block that it had not committed: the task runs again elsewhere, and what
  is stored is not computed twice.
- A worker loads the encoder once, and must get the id that the driver has: other weights on another machine are an error.
- One GPU a worker: dask-cuda's cluster where it is installed, else the workers share the devices out by their number.
- A cluster that is started here listens on the loopback interface alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from engine.blocks import Block, Computed, Work, compute_block
from engine.errors import FluoroscopeError, UsageError
from engine.extract import EncoderLike, Progress
from engine.machine import usable_cores

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# A killed worker loses at most a block: so many batches, or fewer where there would be too few blocks to go round.
BATCHES_A_BLOCK = 16
BLOCKS_A_WORKER = 4
# Blocks handed out a worker: one to compute, one to go on with.
WAITING_A_WORKER = 2
SECONDS_TO_CONNECT = 30


@dataclass(frozen=True)
class EncoderRecipe:
    """How a worker comes by the encoder; see `engine.encoder.load_encoder`.

    Parameters
    ----------
    name, precision, decoder : str
    device : str
        "auto" and "cuda" mean one GPU a worker where there are several.
    """

    name: str
    precision: str = "fp32"
    decoder: str = "exact"
    device: str = "auto"

    def __call__(self, number: int = 0) -> EncoderLike:
        """Load the encoder in the worker of a number."""
        import torch

        from engine.encoder import load_encoder

        device = self.device
        if device in ("auto", "cuda") and torch.cuda.device_count() > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
            device = f"cuda:{number % torch.cuda.device_count()}"
        return load_encoder(self.name, device=device, precision=self.precision, decoder=self.decoder)


class Cluster:
    """Workers that compute blocks.

    Parameters
    ----------
    client : distributed.Client
    recipe : callable(number), optional
        Makes the encoder in a worker; by default the driver's encoder is loaded there by its name.
    """

    def __init__(self, client: Any, recipe: Callable[[int], EncoderLike] | None = None) -> None:
        self.client, self._recipe = client, recipe

    @property
    def workers(self) -> int:
        """How many workers there are now, at least one."""
        return max(len(self.client.scheduler_info(n_workers=-1)["workers"]), 1)

    def block_rows(self, total: int, batch_size: int) -> int:
        """Return the rows of a block: whole batches, few enough that every worker gets several blocks."""
        batches = -(-total // (batch_size * self.workers * BLOCKS_A_WORKER))
        return batch_size * max(1, min(BATCHES_A_BLOCK, batches))

    def compute(
        self,
        work: Work,
        encoder: EncoderLike,
        blocks: Iterator[Block],
        name: str,
        total: int,
        progress: Progress | None = None,
    ) -> Iterator[Computed]:
        """Yield what became of each block, in the order in which they finish.

        Raises
        ------
        FluoroscopeError
            A block's workers died again and again, or a worker's encoder is another one.
        Exception
            What a part of the pipeline died of, from whichever worker.
        """
        from distributed import as_completed

        recipe = self._recipe or _recipe_of(encoder)
        sizes: dict[str, int] = {}
        done = 0
        finished = as_completed(loop=self.client.loop)

        def submit() -> None:
            block = next(blocks, None)
            if block is not None:
                future = self.client.submit(_run_block, work, recipe, block, pure=False)
                sizes[future.key] = len(block)
                finished.add(future)

        if progress is not None:
            progress(name, 0, total)
        try:
            for _ in range(WAITING_A_WORKER * self.workers):
                submit()
            for future in finished:
                computed = self._result(future)
                submit()
                done += sizes.pop(future.key)
                if progress is not None:
                    progress(name, done, total)
                yield computed
        finally:
            with suppress(Exception):  # the scheduler may be gone
                self.client.cancel(list(finished.futures), force=True)

    @staticmethod
    def _result(future: Any) -> Computed:
        from distributed import KilledWorker

        try:
            return future.result()
        except KilledWorker as error:
            raise FluoroscopeError(
                f"a block of rows was given up: {error}; what else was computed is stored. The workers' memory or a "
                "library that crashes on one of its images are the usual reasons: run the same command again with "
                "--threads 1 and without --workers to find the image"
            ) from error


@contextmanager
def start_cluster(
    workers: int | None = None, scheduler: str | None = None, *, threads: int | None = None
) -> Iterator[Cluster]:
    """Start workers on this machine, or connect to a scheduler; nothing is left running at the end.

    Parameters
    ----------
    workers : int, optional
        Processes to start here.
    scheduler : str, optional
        Address of a running one, such as tcp://host:8786.
    threads : int, optional
        Of each worker's libraries; this machine's cores shared out unless given.

    Raises
    ------
    UsageError
        Both, a number below one, or no scheduler at that address.
    """
    from distributed import Client

    if (workers is None) == (scheduler is None):
        raise UsageError("say either how many workers to start (--workers N) or where they are (--scheduler ADDRESS)")
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError, ImportError) as error:
            raise UsageError(
                f"no Dask scheduler answers at {scheduler!r} ({error}); start one with `dask scheduler` and workers "
                "with `dask worker`"
            ) from error
        with client:
            yield Cluster(client)
        return
    if workers is None or workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    own = threads or max(1, usable_cores() // workers)
    with _local_cluster(workers, own) as local, Client(local, set_as_default=False) as client:
        yield Cluster(client)


def _local_cluster(workers: int, threads: int) -> Any:
    """Return a cluster of processes on this machine, with a GPU each where dask-cuda is installed."""
    import dask
    from distributed import LocalCluster

    settings: dict[str, Any] = {
        "distributed.worker.preload": [],
        "distributed.nanny.pre-spawn-environ": {
            **dask.config.get("distributed.nanny.pre-spawn-environ", {}),
            **{name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        },
        # Images that are slow to decode are no reason to think a worker dead.
        "distributed.scheduler.worker-ttl": None,
        "distributed.admin.tick.limit": "1h",
    }
    with dask.config.set(settings):
        options = {"n_workers": workers, "threads_per_worker": 1, "host": LOOPBACK, "dashboard_address": None}
        if _has_cuda():
            try:
                from dask_cuda import LocalCUDACluster

                return LocalCUDACluster(**options)
            except ImportError:
                log.info("dask-cuda is not installed; the workers share the GPUs out by their number")
        return LocalCluster(**options, processes=True, memory_limit=0)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _recipe_of(encoder: EncoderLike) -> EncoderRecipe:
    source, precision = getattr(encoder, "source", None), getattr(encoder, "precision", "fp32")
    if source is None:
        raise UsageError(f"workers cannot load the encoder {encoder.id!r} by a name; give the cluster a recipe")
    device = getattr(getattr(encoder, "device", None), "type", "auto")
    return EncoderRecipe(source, precision, encoder.preprocess.decoder, device)


def _run_block(work: Work, recipe: Callable[[int], EncoderLike], block: Block) -> Computed:
    """Compute one block in a worker, whose encoder is loaded once."""
    from distributed import get_worker

    worker = get_worker()
    encoders: dict[Any, EncoderLike] = worker.__dict__.setdefault("fluoroscope_encoders", {})
    if work.encoder_id not in encoders:
        digits = "".join(letter for letter in str(worker.name) if letter.isdigit())
        loaded = recipe(int(digits or 0))
        if loaded.id != work.encoder_id:
            raise FluoroscopeError(
                f"worker {worker.address} loaded the encoder {loaded.id}, the job wants {work.encoder_id}: the model's "
                "files differ between the machines"
            )
        encoders[work.encoder_id] = loaded
    return compute_block(work, encoders[work.encoder_id], block)
