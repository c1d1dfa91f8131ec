"""How many threads work together on the probes' products, and how problems are dealt out to the cores.

A product that several threads share makes them wait for each other many times a second: on a machine where something
else runs as well, a sweep then takes ten times as long. So each core solves problems of its own, and where there are
too few of them for that, one thread does it all or all share each product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
# Multiplications of one pass over all problems below which threads cost more in waiting than they bring.
_WORTH_SHARING = 4_000_000


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Work on one thread where there is little to share; on a busy machine waiting for each other costs 20 times."""
    if multiplications >= _WORTH_SHARING:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_on_a_core(work: Callable[[Item], None], items: Sequence[Item], most: int) -> None:
    """Do some work for every item, on `most` cores at once, each with its share of torch's threads.

    Parameters
    ----------
    work : callable
        Must write to places of its own.
    most : int
        Items at a time; 1 does one after the other with all threads.
    """
    threads = torch.get_num_threads()
    workers = min(most, threads, len(items))
    if workers < 2:
        for item in items:
            work(item)
        return

    def alone(item: Item) -> None:
        torch.set_num_threads(max(1, threads // workers))
        work(item)

    try:
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(alone, item) for item in items]:
                future.result()
    finally:
        torch.set_num_threads(threads)
