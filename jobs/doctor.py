"""`fluoro doctor`: what this machine offers, tried out and not only looked up, and what each thing means for speed.

Comes in: the cache folder to look at. Goes out: a list of findings, each with its value, what it means here and, where
something is amiss, the next step. Nothing is changed on the machine; findings never make the command fail.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from engine import faiss_loader, machine
from engine.arrays.storage import LocalStorage, storage_of
from engine.cache import Cache
from engine.resources import resource, shipped_configs
from engine.version import __version__
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes, spoken_rate

log = logging.getLogger(__name__)

State = Literal["good", "slow", "missing", "broken"]
GIB = 1 << 30
LITTLE_SPACE = 2 * GIB
LITTLE_MEMORY = 4 * GIB
# FAISS's search is a product and a selection; one that takes so many times a product has a BLAS for another processor.
SLOW_FAISS = 3.0


class Config(CacheOptions):
    """What `fluoro doctor` needs: the cache folder to look at."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Parameters
    ----------
    name : str
    state : "good" | "slow" | "missing" | "broken"
    value : str
        What is there.
    meaning : str
        What that means for the work.
    next_step : str
        What to do about it, "" where nothing is to be done.
    details : dict
        The same in numbers, for programs.
    """

    name: str
    state: State
    value: str
    meaning: str
    next_step: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """All findings, in the order in which they matter."""

    version: str
    findings: list[Finding]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the findings as one table."""
        rows = [
            {"": item.name, "state": item.state, "here": item.value, "what it means": item.meaning}
            for item in self.findings
        ]
        return {f"fluoroscope {self.version}": pd.DataFrame(rows)}

    def lines(self) -> Iterator[str]:
        """Return the next steps, if there are any."""
        for item in self.findings:
            if item.next_step:
                yield f"{item.name}: {item.next_step}"


def run(config: Config, progress: Progress | None = None) -> Result:
    """Look at this machine."""
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("accelerator", look_at_accelerator),
        ("processor", look_at_processor),
        ("bf16 and AMX", look_at_matrix_speed),
        ("memory", look_at_memory),
        ("compiler", look_at_compiler),
        ("torch", look_at_torch),
        ("models", look_at_models),
        ("FAISS", look_at_faiss),
        ("exact search", look_at_exact_search),
        ("zarr", look_at_zarr),
        ("images", look_at_images),
        ("cache", lambda: look_at_cache(config.cache)),
        ("shipped files", look_at_shipped),
    ]
    findings = []
    with (progress or Progress()).step("look at this machine", total=len(looks), unit="things") as step:
        for name, look in looks:
            findings.append(_looked(name, look))
            step.advance()
    return Result(__version__, findings)


def look_at_accelerator() -> Finding:
    """Find CUDA devices and Apple's."""
    found = machine.accelerator_list()
    if not found:
        return Finding(
            "accelerator",
            "good",
            "none",
            "models run on the processor: right for embedding, probes and search, slow for fine-tuning a large tower",
            details={"accelerators": []},
        )
    value = "; ".join(f"{item['name']}, {spoken_bytes(item['memory'] or 0)}" for item in found)
    best = "bf16 there is fastest" if found[0]["bf16"] else "fp16 there is fastest"
    return Finding(
        "accelerator", "good", value, f"models run on {found[0]['device']}; {best}", details={"accelerators": found}
    )


def look_at_processor() -> Finding:
    """Count the cores and say which vector instructions there are."""
    cores, sets = machine.usable_cores(), machine.instruction_sets()
    threads = os.environ.get("OMP_NUM_THREADS")
    counted = "1 core" if cores == 1 else f"{cores} cores"
    value = f"{machine.processor_name()}, {counted}, {' '.join(sets) or 'no vector extras'}"
    details = {"cores": cores, "instruction_sets": sets, "OMP_NUM_THREADS": threads}
    if threads and threads.isdigit() and int(threads) < cores:
        return Finding(
            "processor",
            "slow",
            value,
            f"OMP_NUM_THREADS={threads} holds models to {threads} of {cores} cores",
            "unset OMP_NUM_THREADS",
            details,
        )
    return Finding("processor", "good", value, f"decoding and models share {cores} cores", details=details)


def look_at_matrix_speed() -> Finding:
    """Time a matrix product in float32 and bfloat16, which tells more than the flags."""
    import torch

    speeds = {kind: _matrix_speed(getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    ratio = speeds["bfloat16"] / speeds["float32"]
    sets = machine.instruction_sets()
    unit = next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in sets), None)
    shown = f"float32 {spoken_rate(speeds['float32'])}, bf16 {spoken_rate(speeds['bfloat16'])} GFLOP/s"
    value = shown + (f" ({unit})" if unit else "")
    if ratio > 1.3:
        meaning = f"--precision bf16 is up to {ratio:.1f} times as fast on the processor; it is another encoder id"
    else:
        meaning = "bf16 brings nothing on this processor; stay with --precision fp32"
    return Finding("bf16 and AMX", "good", value, meaning, details={"gigaflops": speeds, "unit": unit})


def look_at_memory() -> Finding:
    """Say how much memory is free."""
    total, available = machine.memory()
    value = f"{spoken_bytes(available)} free of {spoken_bytes(total)}"
    details = {"total": total, "available": available}
    if available < LITTLE_MEMORY:
        step = "close other programs, or give a small --batch-size and few --threads"
        return Finding("memory", "slow", value, "little for a large model and its workers", step, details)
    return Finding(
        "memory", "good", value, "embeddings are read by mapping files, so they need not fit", details=details
    )


def look_at_compiler() -> Finding:
    """Say whether torch.compile can work."""
    found = machine.compiler()
    if found is None:
        return Finding(
            "compiler",
            "missing",
            "none",
            "models run uncompiled, which costs up to a sixth of the speed",
            "install g++ (Debian: apt-get install g++) if that matters",
        )
    return Finding("compiler", "good", found, "torch.compile can be used", details={"compiler": found})


def look_at_torch() -> Finding:
    """Say which torch this is, and for which CUDA it was built."""
    import torch

    built = torch.version.cuda
    value = f"torch {torch.__version__}, built for {'CUDA ' + built if built else 'the processor'}"
    details = {"torch": torch.__version__, "cuda": built, "threads": torch.get_num_threads()}
    if built and not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        step = "update the NVIDIA driver, or install a torch built for the one there is"
        return Finding("torch", "slow", value, "there is a GPU, and torch cannot use it", step, details)
    return Finding(
        "torch", "good", value, f"{torch.get_num_threads()} threads for a model on the processor", details=details
    )


def look_at_models() -> Finding:
    """Import open_clip and its towers' libraries."""
    names = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}
    for module in names:
        importlib.import_module(module)
    versions = {module: importlib.metadata.version(distribution) for module, distribution in names.items()}
    value = ", ".join(f"{name} {version}" for name, version in versions.items())
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Finding(
            "models", "good", value, "HF_HUB_OFFLINE is set: hf-hub: names load only if cached", details=versions
        )
    return Finding(
        "models", "good", value, "hub names load where there is a network, local-dir: everywhere", details=versions
    )


def look_at_faiss() -> Finding:
    """Run a small search whose answer is known, on the processor and on the GPU if there is one."""
    faiss = faiss_loader.load_faiss()
    if faiss is None:
        step = "install another release: pip install --force-reinstall faiss-cpu"
        return Finding("FAISS", "broken", "does not import or search", "exact search is done by NumPy instead", step)
    vectors = np.random.Generator(np.random.PCG64(0)).standard_normal((500, 16)).astype(np.float32)
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    _, nearest = index.search(vectors[:20], 3)
    truth = np.argsort(-(vectors[:20] @ vectors.T), axis=1, kind="stable")[:, :3]
    options = faiss.get_compile_options().strip()
    devices = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    details: dict[str, Any] = {"version": faiss.__version__, "compiled": options, "gpus": devices}
    value = f"faiss {faiss.__version__} ({options})"
    if not np.array_equal(nearest, truth):
        step = "install another release: pip install --force-reinstall faiss-cpu"
        return Finding("FAISS", "broken", value, "a small search gives wrong neighbours here", step, details)
    times_slower = details["times_of_product"] = round(_faiss_beside_product(faiss), 2)
    if devices:
        problem = _gpu_search_problem(faiss, vectors, truth)
        details["gpu_search"] = problem or "right"
        if problem:
            step = "none needed; a faiss build for this card would make search faster"
            return Finding(
                "FAISS", "slow", value, f"the GPU search fails ({problem}); the processor does it", step, details
            )
        return Finding("FAISS", "good", value, f"a small search is right, on {devices} GPU too", details=details)
    if times_slower > SLOW_FAISS:
        step = (
            "set OPENBLAS_CORETYPE to a kernel that this processor runs (SkylakeX with AVX-512, else Haswell or Zen), "
            "or install faiss-cpu from conda-forge, which brings a newer BLAS"
        )
        meaning = (
            f"its search takes {times_slower:.1f} times as long as torch's product: building ivf and pq indexes is "
            "slow; exact search does not use it"
        )
        return Finding("FAISS", "slow", value, meaning, step, details)
    return Finding("FAISS", "good", value, "a small search is right, on the processor", details=details)


def look_at_exact_search() -> Finding:
    """Say how fast exact search is here, and up to how many rows that is enough."""
    from engine.index import products

    way, rows = products.fastest_way(), products.fast_enough_rows(512)
    thousand = products.exact_seconds(1_000_000, 512, 1000)
    one = products.exact_seconds(1_000_000, 512, 1)
    shown = "bfloat16 by torch, then float64" if way.library == "bf16" else f"float32 by {way.library}"
    value = f"{shown}, {spoken_rate(way.rate / 1e9)} GFLOP/s"
    meaning = (
        f"in 1,000,000 x 512 a query takes about {one:.2f} s, 1,000 at once {thousand:.1f} s; it needs no index up to "
        f"some {rows:,} rows"
    )
    details = {"library": way.library, "rate": way.rate, "fast_enough_rows": rows, "seconds": {1: one, 1000: thousand}}
    return Finding("exact search", "good", value, meaning, details=details)


def look_at_zarr() -> Finding:
    """Write and read a small array."""
    import zarr

    with tempfile.TemporaryDirectory() as folder:
        rows = np.arange(12, dtype=np.float16).reshape(3, 4)
        array = zarr.create_array(store=folder, shape=rows.shape, chunks=(2, 4), dtype=rows.dtype, compressors=None)
        array[:] = rows
        same = np.array_equal(np.asarray(zarr.open_array(folder, mode="r")[:]), rows)
    value = f"zarr {zarr.__version__}"
    if not same:
        return Finding("zarr", "broken", value, "a small array reads back wrong", "install another zarr release")
    return Finding(
        "zarr", "good", value, "the cache opens with plain zarr, xarray and dask", details={"version": zarr.__version__}
    )


def look_at_images() -> Finding:
    """Say what decodes images."""
    import cv2
    import PIL
    from PIL import features

    turbo = bool(features.check_feature("libjpeg_turbo"))
    dicom = importlib.util.find_spec("pydicom") is not None
    value = f"Pillow {PIL.__version__}{' with libjpeg-turbo' if turbo else ''}, OpenCV {cv2.__version__}"
    details = {"pillow": PIL.__version__, "libjpeg_turbo": turbo, "opencv": cv2.__version__, "dicom": dicom}
    if not turbo:
        step = "install Pillow's wheel from PyPI"
        return Finding("images", "slow", value, "JPEG decodes slowly without libjpeg-turbo", step, details)
    return Finding("images", "good", value, "a core decodes some 100 to 150 radiographs a second", details=details)


def look_at_cache(place: Path | str) -> Finding:
    """Say where the cache is, whether it can be written, and how much space there is."""
    storage = storage_of(place)
    if not isinstance(storage, LocalStorage):
        can = "one process may write it" if storage.writable else "it is read-only"
        Cache(storage)
        return Finding("cache", "good", storage.address, f"it can be reached; {can}", details={"path": storage.address})
    there = cache = storage.folder
    while not there.exists() and there.parent != there:
        there = there.parent
    free = shutil.disk_usage(there).free
    value = f"{cache}{'' if cache.exists() else ' (not there yet)'}, {spoken_bytes(free)} free"
    details = {"path": str(cache), "exists": cache.exists(), "free": free}
    if not os.access(there, os.W_OK):
        step = "give a folder of yours with --cache or $FLUOROSCOPE_CACHE"
        return Finding("cache", "broken", value, "it cannot be written", step, details)
    if free < LITTLE_SPACE:
        step = "make room, or give another folder with --cache or $FLUOROSCOPE_CACHE"
        return Finding(
            "cache", "slow", value, "little space: a million embeddings of 512 numbers take 1.1 GB", step, details
        )
    return Finding(
        "cache",
        "good",
        value,
        f"room for some {free // 1100 // 1000 * 1000:,} embeddings of 512 numbers",
        details=details,
    )


def look_at_shipped() -> Finding:
    """Say whether the demo's model and configs are there."""
    configs = shipped_configs()
    try:
        model = resource("configs/phantom-clip")
    except Exception as error:
        log.debug("no demo model", exc_info=error)
        step = "install fluoroscope again, or train it: fluoro model train-phantom-clip"
        return Finding("shipped files", "missing", ", ".join(configs) or "none", "the demo's model is not there", step)
    value = f"phantom-clip; {', '.join(configs)}"
    return Finding("shipped files", "good", value, "fluoro study demo works offline", details={"model": str(model)})


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    """Look at one thing; what breaks while looking is the finding."""
    try:
        return look()
    except Exception as error:
        log.debug("looking at %s failed", name, exc_info=error)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Finding(
            name, "broken", reason, "what needs it will fail", "install fluoroscope again in a fresh environment"
        )


def _matrix_speed(kind: Any, size: int = 768, least_seconds: float = 0.05) -> float:
    """Return billions of operations a second of a square matrix product on the processor."""
    import torch

    matrix = torch.ones((size, size), dtype=kind)
    matrix @ matrix
    start, rounds = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < least_seconds:
        matrix @ matrix
        rounds += 1
    return 2 * size**3 * rounds / seconds / 1e9


def _faiss_beside_product(faiss: Any, rows: int = 16384, queries: int = 256, dim: int = 256) -> float:
    """Return how many times as long FAISS's exact search takes as the bare product of the same size by torch."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vectors, asked = torch.randn((rows, dim), generator=generator), torch.randn((queries, dim), generator=generator)
    index = faiss.IndexFlatIP(dim)
    index.add(vectors.numpy())
    search = machine.best_seconds(lambda: index.search(asked.numpy(), 10), 0.05)
    return search / machine.best_seconds(lambda: vectors @ asked.T, 0.05)


def _gpu_search_problem(faiss: Any, vectors: np.ndarray, truth: np.ndarray) -> str:
    """Return why the GPU search fails, "" where it is right; some wheels lack the kernels of some cards."""
    try:
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), vectors.shape[1])
        index.add(vectors)
        _, nearest = index.search(vectors[: len(truth)], truth.shape[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return "" if np.array_equal(nearest, truth) else "wrong neighbours"
