"""How an extraction is to run: what only makes it faster or safer, and is not part of any id.

Comes in: what the caller asks for, the encoder, and how many images there are to compute. Goes out: a `Plan`. Batch
size and compilation also move the last bits of a row, so a job that goes on keeps the plan that it began with
(`engine.unfinished`).

Compiling the image tower has to pay for itself. It has been seen to on processors with AMX in bfloat16 (ViT-B/32: a
fifth faster), and not elsewhere on processors; on CUDA the forward pass is captured as a graph already, and what
compiling adds has not been measured. So it is chosen on the former alone, for jobs of `COMPILE_FROM` seconds of
computing: a sixth of those is more than compiling was seen to take at its slowest (133 s, ViT-B/32 on two busy cores).
How long a job computes is reckoned from the tower's operations and the cores, not timed, so that the same job on the
same machine is planned alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.decoding import default_threads
from engine.errors import UsageError
from engine.machine import instruction_sets, usable_cores
from engine.row_buffer import COMMIT_SECONDS

log = logging.getLogger(__name__)

# Seconds of computing from which on compiling repays what it takes.
COMPILE_FROM = 900.0
# Operations a second that a core with AMX does of a tower in bfloat16: 55 images of ViT-B/32 on two, uncompiled.
AMX_OPERATIONS = 2.4e11
GOING_ON = "as in the stopped job that is gone on with"


@dataclass(frozen=True)
class Plan:
    """What only makes extraction faster or safer; the batch size also moves last bits, so a job that goes on keeps it.

    Parameters
    ----------
    batch_size : int
        Of every batch, the last one filled up.
    threads : int, optional
        Threads that read and decode; None: as many as there are cores where it is computed.
    commit_rows : int, optional
        Rows a commit; 64 MiB unless given.
    commit_seconds : float
    max_pixels : int, optional
        Larger images are refused.
    compiled : bool, optional
        Compile the image tower's forward pass; decided by the size of the job where None.
    compiled_reason : str
        Why.
    """

    batch_size: int
    threads: int | None
    commit_rows: int | None = None
    commit_seconds: float = COMMIT_SECONDS
    max_pixels: int | None = None
    compiled: bool | None = None
    compiled_reason: str = "as asked for"

    def settled(self, encoder: Any, images: int) -> Plan:
        """Return the plan of a job that has so many images to compute, with nothing left open."""
        if self.compiled is not None:
            return self
        reason = _why_not_compiled(encoder, images)
        computing = "the job is long enough to repay it"
        return replace(self, compiled=not reason, compiled_reason=reason or computing)

    def say(self, encoder: Any) -> None:
        """Log in one line how a job computes: precision, batches, compiled or not, and why."""
        log.info(
            "%s: precision %s (%s), batches of %d, %s (%s)",
            getattr(encoder, "name", encoder.id),
            getattr(encoder, "precision", "fp32"),
            getattr(encoder, "precision_reason", "as asked for"),
            self.batch_size,
            "compiled" if self.compiled else "not compiled",
            self.compiled_reason,
        )


def _why_not_compiled(encoder: Any, images: int) -> str:
    """Return why compiling the image tower would not pay, "" where it does."""
    device = getattr(getattr(encoder, "device", None), "type", "cpu")
    if device == "cuda":
        return "what compiling gains beside a captured graph has not been measured"
    if device != "cpu" or getattr(encoder, "precision", "fp32") != "bf16" or "amx_bf16" not in instruction_sets():
        return "compiling pays in bf16 on a processor with AMX only"
    seconds = images * encoder.image_operations / (AMX_OPERATIONS * usable_cores())
    if seconds < COMPILE_FROM:
        return f"{images:,} images are computed in less than the {COMPILE_FROM:.0f} s from which on compiling pays"
    return ""


def make_plan(
    encoder: Any,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    commit_rows: int | None = None,
    commit_seconds: float = COMMIT_SECONDS,
    limits: Mapping[str, int] | None = None,
    compiled: bool | None = None,
    kept: Mapping[str, Any] | None = None,
    cluster: Any = None,
) -> Plan:
    """Return a plan with its defaults: batches of 32 on a CPU and 256 elsewhere, a thread a core (at most 16).

    `kept` is what a job that goes on has kept of its plan, and holds where nothing else is asked for. With a `cluster`
    the batch size is for its workers' device, and threads are left to them: this machine's cores say nothing of theirs.
    """
    unknown = set(limits or {}) - {"max_pixels"}
    if unknown:
        raise UsageError(f"unknown limit {min(unknown)!r}; known: max_pixels")
    for name, value in (("batch_size", batch_size), ("threads", threads), ("commit_rows", commit_rows)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    kept = kept or {}
    usual_batch_size = default_batch_size if cluster is None else cluster.batch_size
    return Plan(
        batch_size or kept.get("batch_size") or usual_batch_size(encoder),
        threads or (default_threads() if cluster is None else None),
        commit_rows,
        commit_seconds,
        (limits or {}).get("max_pixels"),
        kept.get("compiled") if compiled is None else compiled,
        GOING_ON if compiled is None and kept.get("compiled") is not None else "as asked for",
    )


def default_batch_size(encoder: Any) -> int:
    """Return the batch size for an encoder's device; fixed by the kind of device, so that a job goes on as it began."""
    return batch_size_for(getattr(getattr(encoder, "device", None), "type", "cpu"))


def batch_size_for(device_type: str) -> int:
    """Return the batch size for a kind of device."""
    return 32 if device_type == "cpu" else 256
