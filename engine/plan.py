"""How an extraction is to run: what only makes it faster or safer, and is not part of any id.

Comes in: what the caller asks for, the encoder, and how many images there are to compute. Goes out: a `Plan`. Batch
size and compilation also move the last bits of a row, so a job that goes on keeps the plan that it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.decoding import default_threads
from engine.errors import UsageError
from engine.row_buffer import COMMIT_SECONDS

log = logging.getLogger(__name__)

# From how many images on compiling the image tower repays its minute or so, by device and precision. On processors
# without bfloat16 units it gains nothing (0.97 to 1.1 times), on those with them a fifth; see benchmarks/extraction.py.
COMPILE_FROM = {("cpu", "bf16"): 50_000, ("cuda", "bf16"): 500_000, ("cuda", "fp16"): 500_000}


@dataclass(frozen=True)
class Plan:
    """What only makes extraction faster or safer; the batch size also moves last bits, so a job that goes on keeps it.

    Parameters
    ----------
    batch_size : int
        Of every batch, the last one filled up.
    threads : int
        Threads that read and decode.
    commit_rows : int, optional
        Rows a commit; 64 MiB unless given.
    commit_seconds : float
    max_pixels : int, optional
        Larger images are refused.
    compiled : bool, optional
        Compile the image tower's forward pass; decided by the number of images to compute where None.
    """

    batch_size: int
    threads: int
    commit_rows: int | None = None
    commit_seconds: float = COMMIT_SECONDS
    max_pixels: int | None = None
    compiled: bool | None = None

    def settled(self, encoder: Any, images: int) -> Plan:
        """Return the plan of a job that has so many images to compute, with nothing left open."""
        if self.compiled is not None:
            return self
        device = getattr(getattr(encoder, "device", None), "type", "cpu")
        pays_from = COMPILE_FROM.get((device, getattr(encoder, "precision", "fp32")))
        compiled = pays_from is not None and images >= pays_from
        if compiled:
            log.info("%d images are enough for compiling the image tower (from %d on)", images, pays_from)
        elif pays_from is not None:
            log.info("%d images are too few for compiling the image tower to pay (from %d on)", images, pays_from)
        return replace(self, compiled=compiled)


def make_plan(
    encoder: Any,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    commit_rows: int | None = None,
    commit_seconds: float = COMMIT_SECONDS,
    limits: Mapping[str, int] | None = None,
    compiled: bool | None = None,
) -> Plan:
    """Return a plan with its defaults: batches of 32 on a CPU and 256 elsewhere, a thread a core (at most 16)."""
    unknown = set(limits or {}) - {"max_pixels"}
    if unknown:
        raise UsageError(f"unknown limit {min(unknown)!r}; known: max_pixels")
    for name, value in (("batch_size", batch_size), ("threads", threads), ("commit_rows", commit_rows)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    return Plan(
        batch_size or default_batch_size(encoder),
        threads or default_threads(),
        commit_rows,
        commit_seconds,
        (limits or {}).get("max_pixels"),
        compiled,
    )


def default_batch_size(encoder: Any) -> int:
    """Return the batch size for an encoder's device; fixed by the kind of device, so that a job goes on as it began."""
    return 32 if getattr(getattr(encoder, "device", None), "type", "cpu") == "cpu" else 256
