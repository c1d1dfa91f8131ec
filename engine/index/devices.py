"""Where searches are computed: the GPU where one works, tried by a real search, else the processor. Said once.

Comes in: FAISS and torch as they are on this machine. Goes out: the GPU's copy of an index, or nothing; and the way in
which exact products are computed.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.faiss_loader import load_faiss

if TYPE_CHECKING:
    from engine.index.products import Way

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def search_device() -> Way | None:
    """Return the way of exact search on the GPU, None where the processor does it; the log says it once."""
    import torch

    from engine.index.products import Way

    if not torch.cuda.is_available():
        log.info("exact search is computed by matrix products on the processor")
        return None
    try:
        vectors = torch.eye(64, device="cuda")
        right = bool(((vectors @ vectors) == vectors).all())
    except RuntimeError as error:
        log.warning("torch cannot use the GPU (%s); exact search goes on on the processor", error)
        return None
    if not right:
        log.warning("torch gives wrong products on the GPU; exact search goes on on the processor")
        return None
    log.info("exact search is computed by torch's matrix products on the GPU")
    return Way("torch", "cuda")


@lru_cache(maxsize=1)
def gpu_resources() -> Any | None:
    """Return FAISS's GPU resources where a small search on the GPU is right, else None; said in the log once."""
    faiss = load_faiss()
    if faiss is None or not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return None
    problem = gpu_search_problem(faiss)
    if problem:
        log.warning("FAISS cannot search on this GPU (%s); approximate indexes are searched on the processor", problem)
        return None
    log.info("approximate indexes are searched by FAISS on the GPU")
    return faiss.StandardGpuResources()


def gpu_search_problem(faiss: Any) -> str:
    """Return why a small search on the GPU fails, "" where it is right; some wheels lack the kernels of some cards."""
    vectors = np.random.Generator(np.random.PCG64(0)).standard_normal((500, 16)).astype(np.float32)
    truth = np.argsort(-(vectors[:20] @ vectors.T), axis=1, kind="stable")[:, :3]
    try:
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), vectors.shape[1])
        index.add(vectors)
        _, nearest = index.search(vectors[: len(truth)], truth.shape[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return "" if np.array_equal(nearest, truth) else "wrong neighbours"


def on_gpu(faiss: Any, engine: Any, name: str) -> Any | None:
    """Return a copy of an index on the GPU, None where there is none of its kind or no GPU that works."""
    resources = gpu_resources()
    if resources is None:
        return None
    try:
        return faiss.index_cpu_to_gpu(resources, 0, engine)
    except RuntimeError as error:
        log.info("FAISS has no index of the kind of %s on the GPU (%s); the processor searches it", name, error)
        return None
