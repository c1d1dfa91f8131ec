"""The one place that imports FAISS: set up for this processor, tried with a tiny search, replaced where it fails.

FAISS's wheels carry OpenBLAS 0.3.15, which does not know newer Intel cores and falls to a generic kernel (measured:
seven times slower); naming a kernel that the processor can run, before the library is loaded, mends that. The wheels
for GPUs run on machines without one, with the CPU classes; one that cannot even search is put aside with a warning, and
exact search goes on in NumPy.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

CORE_VARIABLE = "OPENBLAS_CORETYPE"
# How many vectors of the index one matrix product takes; FAISS's own 1,024 starves the BLAS.
DATABASE_BLOCK = 16384


@lru_cache(maxsize=1)
def load_faiss() -> Any | None:
    """Return the faiss module, or None (with one warning) where it does not import or does not search."""
    chosen = _core_type(Path("/proc/cpuinfo")) if CORE_VARIABLE not in os.environ else None
    if chosen:
        os.environ[CORE_VARIABLE] = chosen
    try:
        import faiss

        faiss.cvar.distance_compute_blas_database_bs = DATABASE_BLOCK
        problem = _tiny_search(faiss)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        if chosen:
            # Read once when the library starts; children should choose for themselves.
            del os.environ[CORE_VARIABLE]
    if problem:
        log.warning("FAISS cannot be used (%s); exact search goes on in NumPy, `fluoro doctor` tells more", problem)
        return None
    return faiss


def _tiny_search(faiss: Any) -> str:
    """Return what is wrong with a search whose answer is known, "" where nothing is."""
    vectors = np.eye(8, 16, dtype=np.float32)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    scores, rows = index.search(vectors, 1)
    right = np.array_equal(rows[:, 0], np.arange(8)) and np.allclose(scores, 1)
    return "" if right else "a tiny search gave wrong neighbours"


def _core_type(processor: Path) -> str | None:
    """Return the OpenBLAS kernel for an Intel processor with AVX-512, which old OpenBLAS may not recognise."""
    try:
        text = processor.read_text()
    except OSError:
        return None
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    wanted = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
    return "SkylakeX" if "GenuineIntel" in text and wanted <= flags else None
