"""Rows in blocks that the processor's cache holds, many of them by several threads.

NumPy lets other threads run while it copies, sums and compares, so large reads and writes use the cores there are;
memory stays that of a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.machine import usable_cores

BLOCK_BYTES = 1 << 22
BYTES_FOR_THREADS = 1 << 25
MOST_THREADS = 4

Result = TypeVar("Result")


def block_rows(row_bytes: int) -> int:
    """Return how many rows a block has."""
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def in_blocks(work: Callable[[slice], Result], count: int, row_bytes: int) -> list[Result]:
    """Call with each block of `count` rows, as a slice, and return the results in their order."""
    step = block_rows(row_bytes)
    blocks = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    if count * row_bytes < BYTES_FOR_THREADS:
        return list(map(work, blocks))
    with ThreadPoolExecutor(min(MOST_THREADS, usable_cores()), "rows") as pool:
        return list(pool.map(work, blocks))
