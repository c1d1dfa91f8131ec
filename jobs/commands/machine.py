"""The verb `doctor`."""

from __future__ import annotations

from typing import Any

from jobs.commands import options
from jobs.commands.verb import verb


@verb("doctor", "jobs.doctor")
@options.cache
def doctor(**given: Any) -> dict[str, Any]:
    """Tell what this machine offers, and what that means for speed.

    Looks at accelerator, processor, memory, compiler, torch, model libraries, FAISS (with a real search), zarr, image
    decoders, the cache and the shipped files. Findings never make it fail.
    """
    return given
