"""Extraction past one process: blocks of rows as tasks of Dask distributed.

Comes in: a job's `Work` and its blocks. Goes out: what became of each block, as they finish. Workers commit to the
cache themselves, block by block, under the same short lock as everybody; the driver sees keys and tallies, never a row.

- A worker that is killed costs the rows of its block that it had not committed: the task runs again elsewhere, and what
  is stored is not computed twice. Workers that come later get blocks too.
- Ctrl-C reaches the driver alone. After it, or an error, each worker finishes its batch in hand and stores what it has
  computed; then the driver goes on its way. A scheduler that dies, or all workers for good, end the job.
- Nothing that depends on a machine is the driver's: workers take the device that was asked for, not the one that it
  has; batch size and compilation go by their machines, decoding threads by a worker's share of its own.
- What happens in a worker is `engine.cluster_worker`.
- A cluster that is started here listens on the loopback interface alone.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from engine import cluster_worker
from engine.blocks import Block, Computed, Work
from engine.cluster_worker import EncoderRecipe
from engine.errors import FluoroscopeError, UsageError
from engine.extract import EncoderLike, Progress
from engine.machine import usable_cores
from engine.memory import keep_freed_memory
from engine.plan import Plan, default_batch_size

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# A killed worker loses at most a block: so many batches, or fewer where there would be too few blocks to go round.
BATCHES_A_BLOCK = 16
BLOCKS_A_WORKER = 4
# Blocks handed out a worker: one to compute, one to go on with.
WAITING_A_WORKER = 2
SECONDS_TO_CONNECT = 30
# Workers come back, restarted by their nannies or by a batch system; not for ever.
SECONDS_WITHOUT_WORKERS = 120
SECONDS_BETWEEN_LOOKS = 2
# A batch of a large model on few cores, and storing it.
SECONDS_TO_STOP = 120

Made = TypeVar("Made")


class Cluster:
    """Workers that compute blocks.

    Parameters
    ----------
    client : distributed.Client
    recipe : callable, optional
        Makes the encoder in a worker; by default the driver's encoder is loaded there by its name.
    elsewhere : bool
        Whether the workers may be on machines with other devices than this one.
    """

    def __init__(
        self, client: Any, recipe: Callable[[], EncoderLike] | None = None, *, elsewhere: bool = False
    ) -> None:
        self.client, self._recipe, self._elsewhere = client, recipe, elsewhere
        self._last_seen = time.monotonic()  # when there was a worker

    @property
    def workers(self) -> int:
        """How many workers there are now, at least one."""
        return max(len(self._hosts()), 1)

    def batch_size(self, encoder: EncoderLike) -> int:
        """Return the batch size for the workers' device; one of them speaks for all where it may not be ours."""
        wanted = getattr(encoder, "wanted_device", "")
        if not self._elsewhere or self._recipe is not None or wanted != "auto":
            return default_batch_size(encoder)
        return self._answer(cluster_worker.batch_size, wanted)

    def settled(self, plan: Plan, encoder: EncoderLike, images: int) -> Plan:
        """Return a plan with nothing left open; see `engine.plan.Plan.settled`.

        Workers of this machine share its cores as they share the images. Elsewhere one of them speaks for all: whether
        compiling pays depends on its machine, and on the share of the images that comes to that.
        """
        if not self._elsewhere or plan.compiled is not None:
            return plan.settled(encoder, images)
        hosts = self._hosts()
        share, recipe = -(-images // max(len(hosts), 1)), self._recipe or _recipe_of(encoder)
        return self._answer(cluster_worker.settled, plan, recipe, encoder.id, share, Counter(hosts.values()))

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
        take: Callable[[Computed], None],
        progress: Progress | None = None,
    ) -> None:
        """Compute blocks.

        Parameters
        ----------
        take : callable(computed)
            Told what became of each block, in the order in which they finish; also of those that an error elsewhere or
            Ctrl-C has cut short.

        Raises
        ------
        FluoroscopeError
            A block's workers died again and again, all workers or their scheduler are gone, or a worker's encoder is
            another one.
        Exception
            What a part of the pipeline died of, from whichever worker.
        """
        recipe, job = self._recipe or _recipe_of(encoder), uuid.uuid4().hex
        sizes: dict[Any, int] = {}
        done = 0

        def hand_out(hosts: dict[str, str]) -> None:
            crowds = Counter(hosts.values())
            while len(sizes) < WAITING_A_WORKER * max(len(hosts), 1):
                block = next(blocks, None)
                if block is None:
                    return
                sizes[self.client.submit(cluster_worker.run_block, work, recipe, block, job, crowds, pure=False)] = len(
                    block
                )

        if progress is not None:
            progress(name, 0, total)
        self._last_seen = time.monotonic()
        try:
            hand_out(self._hosts())
            while sizes:
                for future in self._ready(sizes, hand_out):
                    computed = self._result(future)
                    if computed is None:  # it died with its worker, and is computed anew
                        continue
                    done += sizes.pop(future)
                    take(computed)
                    if progress is not None:
                        progress(name, done, total)
        except BaseException:
            self._wind_up(job, list(sizes), take)
            raise

    def _ready(
        self, futures: Collection[Any], meanwhile: Callable[[dict[str, str]], None] = lambda hosts: None
    ) -> list[Any]:
        """Wait until some tasks are finished, and return them; FluoroscopeError where nobody is left to compute.

        `meanwhile` is called at each look with the workers' machines: some may have come, and may be given tasks.
        """
        while self.client.status == "running" and time.monotonic() - self._last_seen < SECONDS_WITHOUT_WORKERS:
            hosts = self._hosts()
            if hosts:
                self._last_seen = time.monotonic()
            meanwhile(hosts)
            ready = self._finished(list(futures))
            if ready:
                return ready
        raise FluoroscopeError(
            "the cluster has lost its scheduler or all of its workers; what they had committed is stored, and the same "
            "command goes on from there"
        )

    def _wind_up(self, job: str, futures: list[Any], take: Callable[[Computed], None]) -> None:
        """Have the workers store what they have computed of their blocks, and give back the others."""
        if self.client.status != "running":
            return
        deadline = time.monotonic() + SECONDS_TO_STOP
        with suppress(Exception):  # another error is on its way, and the scheduler may be gone
            asked = set(self.client.run(cluster_worker.stop, job, on_error="ignore"))
            # A worker that comes up only now knows nothing of this, and would begin a block of one that has died.
            while futures and set() < set(self._hosts()) <= asked and time.monotonic() < deadline:
                for future in self._finished(futures):
                    futures.remove(future)
                    with suppress(Exception):
                        take(future.result(SECONDS_BETWEEN_LOOKS))
            self.client.cancel(futures, force=True)

    def _answer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a worker answers."""
        future, self._last_seen = self.client.submit(function, *arguments, pure=False), time.monotonic()
        while (answer := self._result(*self._ready([future]))) is None:
            pass
        return answer

    def _finished(self, futures: list[Any]) -> list[Any]:
        """Return the blocks that are finished, after a while none."""
        from distributed import CancelledError, wait

        with suppress(TimeoutError, CancelledError), self.client.as_current():
            wait(futures, SECONDS_BETWEEN_LOOKS, "FIRST_COMPLETED")
        return [future for future in futures if future.status in ("finished", "error", "cancelled")]

    def _hosts(self) -> dict[str, str]:
        """Return the machine of each worker that there is now, by the worker's address."""
        with suppress(OSError):  # a scheduler that has just died
            return {
                name: worker["host"] for name, worker in self.client.scheduler_info(n_workers=-1)["workers"].items()
            }
        return {}

    @staticmethod
    def _result(future: Any) -> Any:
        """Return what a finished task returned; None where its worker has died with it before it came here."""
        from distributed import CancelledError, KilledWorker

        failed = future.status == "error"  # what it has failed of is here
        try:
            return future.result(None if failed else SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            if failed:
                raise
            return None
        except CancelledError as error:
            raise FluoroscopeError(
                f"the cluster has given up a block of rows ({error}): its scheduler is gone, or somebody has cancelled "
                "it; what was committed is stored, and the same command goes on from there"
            ) from error
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
            try:
                client.wait_for_workers(1, SECONDS_TO_CONNECT)
            except TimeoutError as error:
                raise UsageError(
                    f"the Dask scheduler at {scheduler!r} has no workers; start some with `dask worker {scheduler}`"
                ) from error
            yield Cluster(client, elsewhere=True)
        return
    if workers is None or workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    own = threads or max(1, usable_cores() // workers)
    with _out_of_reach(lambda: _local_cluster(workers, own)) as local, Client(local, set_as_default=False) as client:
        client.run(_leave_untidied)
        client.run(keep_freed_memory)
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
        options |= {"processes": True, "memory_limit": 0}
        if 0 < workers <= _gpus():  # dask-cuda starts no more workers than there are GPUs
            try:
                from dask_cuda import LocalCUDACluster

                return LocalCUDACluster(**options)
            except ImportError:
                log.info("dask-cuda is not installed; the workers agree among them who takes which GPU")
        return LocalCluster(**options)


def _out_of_reach(make: Callable[[], Made]) -> Made:
    """Return what `make` returns, having called it in a thread to which Ctrl-C is not delivered.

    Threads and processes that it starts inherit that. A terminal sends Ctrl-C to all processes of a job, and workers
    that it reached would die with what they have computed.
    """
    made: Future[Made] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    resource_tracker.ensure_running()  # which else would be started, and open the way, from that thread
    threading.Thread(target=run, name="start workers", daemon=True).start()
    return made.result()


def _leave_untidied() -> None:
    """Have a worker's process end as soon as it is to end: taking torch apart takes seconds, and all is stored."""
    atexit.register(os._exit, 0)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _recipe_of(encoder: EncoderLike) -> EncoderRecipe:
    source, precision = getattr(encoder, "source", None), getattr(encoder, "precision", "fp32")
    if source is None:
        raise UsageError(f"workers cannot load the encoder {encoder.id!r} by a name; give the cluster a recipe")
    return EncoderRecipe(source, precision, encoder.preprocess.decoder, getattr(encoder, "wanted_device", "auto"))
