"""How many threads work together on the probes' products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
