"""Matrix products in the way that is fastest on this machine, and how long an exact search takes with it.

Torch and NumPy bring libraries of their own for this, and which is faster differs between processors: both are
timed once a process, on a product of the size that a search makes; bfloat16 where the processor has instructions for
it. Goes out: a `Way`, and how long a search will take.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from engine import machine

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Library = Literal["torch", "numpy", "bf16"]
# Rows and queries of the product that is timed; some 15 ms on a core.
TIMED_ROWS, TIMED_QUERIES, TIMED_DIM = 1024, 1024, 512
# Units in the last place of 8, 10 (TF32, cut off and not rounded) and 24 significant bits, halved. In bfloat16 both
# factors and the product are rounded.
HALF_UNIT, TF32_UNIT, SINGLE_UNIT = 2.0**-8, 2.0**-10, 2.0**-24
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
_one_at_a_time = threading.Lock()
# Rows come from memory, and not from a core's cache as when this is timed.
SCAN_SHARE = 0.5
# It leaves more candidates to look at again, so it must be this much faster.
WORTH_BF16 = 1.5


@dataclass(frozen=True)
class Way:
    """How products are computed, and how fast.

    Parameters
    ----------
    library : "torch", "numpy" or "bf16"
        Float32 by torch or NumPy, or bfloat16 by torch.
    device : str
        "cpu" or "cuda:N".
    rate : float
        Multiplications and additions a second, where many queries are asked at once.
    scan : float
        Numbers a second that one query is compared with.
    """

    library: Library
    device: str = "cpu"
    rate: float = 0.0
    scan: float = 0.0

    def error(self, dim: int) -> float:
        """Return a bound on how far a product of two vectors of length one is from the true one.

        The classic bound of a sum of `dim` products in any order (Higham, Accuracy and Stability of Numerical
        Algorithms, section 3.1), with room for what scaling the vectors to length one has rounded.
        """
        single = (dim + 24) * SINGLE_UNIT * 1.01
        if self.library == "bf16":
            return single + 3 * HALF_UNIT * 1.01
        coarse = self.device != "cpu" and torch.backends.cuda.matmul.allow_tf32
        return single + 2 * TF32_UNIT * 1.01 if coarse else single

    def multiply(self, rows: torch.Tensor, queries: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return `out`, (r, q) float32, filled with rows (r, d) times queries (d, q)."""
        if self.library == "bf16":
            return out.copy_(rows.to(torch.bfloat16) @ queries.to(torch.bfloat16))
        if self.library == "numpy":
            np.matmul(rows.numpy(), queries.numpy(), out=out.numpy())
            return out
        return torch.mm(rows, queries, out=out)


@lru_cache(maxsize=1)
def fastest_way() -> Way:
    """Return the fastest way to multiply on this machine's processor; both are timed at the first call (0.2 s)."""
    libraries: list[Library] = ["numpy", "torch"]
    if BF16_INSTRUCTIONS & set(machine.instruction_sets()):
        libraries.append("bf16")
    rates = {library: timed_rate(Way(library)) for library in libraries}
    best: Library = "numpy" if rates["numpy"] > rates["torch"] else "torch"
    if rates.get("bf16", 0.0) > WORTH_BF16 * rates[best]:
        best = "bf16"
    log.debug("matrix products in GFLOP/s: %s", {name: round(rate / 1e9) for name, rate in rates.items()})
    return Way(best, "cpu", rates[best], _timed_scan())


def exact_seconds(rows: int, dim: int, queries: int) -> float:
    """Return about how long exact search takes: so many queries at once in rows of so many numbers."""
    way = fastest_way()
    return rows * dim * (2 * queries / way.rate + 1 / way.scan)


def fast_enough_rows(dim: int, seconds: float = 1.0) -> int:
    """Return up to how many rows exact search answers one query in so many seconds on this machine."""
    return int(seconds * fastest_way().scan / dim)


def timed_rate(way: Way, least_seconds: float = 0.04) -> float:
    """Return multiplications and additions a second of one way, by all cores together as a search uses them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((TIMED_ROWS, TIMED_DIM), generator=generator).to(way.device)
    queries = torch.randn((TIMED_DIM, TIMED_QUERIES), generator=generator).to(way.device)

    def work() -> float:
        out = torch.empty((TIMED_ROWS, TIMED_QUERIES), device=way.device)
        return machine.best_seconds(lambda: way.multiply(rows, queries, out), least_seconds)

    most = usable_threads() if way.device == "cpu" else 1
    return sum(2.0 * TIMED_ROWS * TIMED_QUERIES * TIMED_DIM / seconds for seconds in on_every_core(work, most))


def _timed_scan(least_seconds: float = 0.02) -> float:
    """Return the numbers a second that all cores convert, scale and compare with one query."""
    rows = torch.zeros((TIMED_ROWS, TIMED_DIM), dtype=torch.float16)
    query = torch.ones((TIMED_DIM, 1))

    def work() -> float:
        return machine.best_seconds(lambda: rows.to(torch.float32).mul_(0.5) @ query, least_seconds)

    return sum(SCAN_SHARE * rows.numel() / seconds for seconds in on_every_core(work, usable_threads()))


def usable_threads() -> int:
    """Return how many threads a search takes: as many as torch may."""
    return torch.get_num_threads()


def on_every_core(work: Callable[[], Result], most: int) -> list[Result]:
    """Run the same thing in several threads, each with one core to itself, and return what they return.

    One product by one core beside another one by the other needs no waiting for each other, as it would where the
    libraries' own threads divide a product; and the threads of two libraries do not get into each other's way
    (measured: three times slower). The libraries' numbers of threads are put back afterwards.

    Parameters
    ----------
    work : callable
    most : int
        Threads at most; at most one a core is used.
    """
    threads = min(usable_threads(), max(most, 1))
    if threads == 1:
        return [work()]

    def alone() -> Result:
        torch.set_num_threads(1)
        return work()

    with _one_at_a_time, _libraries().limit(limits=1, user_api="blas"):
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads) as pool:
                return [future.result() for future in [pool.submit(alone) for _ in range(threads)]]
        finally:
            torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """Return the libraries with threads of their own; looking for them takes milliseconds, so once."""
    return ThreadpoolController()
