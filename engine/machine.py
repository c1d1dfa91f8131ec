"""What this machine offers: processor and its instruction sets, memory, accelerators, compiler, libraries.

Comes in: the operating system and, where asked for, torch. Goes out: plain dicts, for `fluoro doctor` and for the
provenance of every run (figures of two machines are comparable only when one knows the machines).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.version import __version__

LIBRARIES = (
    "torch", "torchvision", "open_clip_torch", "timm", "transformers", "zarr", "faiss-gpu", "faiss-cpu", "dask",
    "distributed", "scikit-learn", "grad-cam", "opencv-python-headless", "pillow", "numpy", "scipy", "pandas",
    "pyarrow", "pydantic", "click", "rich", "matplotlib", "safetensors", "fsspec", "pydicom",
)  # fmt: skip
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")


def describe_machine(accelerators: bool = True) -> dict[str, Any]:
    """Return what this machine offers.

    Parameters
    ----------
    accelerators : bool
        Ask torch for them; it is imported then, which takes seconds.

    Returns
    -------
    dict
        system, python, processor, cores (usable by this process), instruction_sets (list), memory_total and
        memory_available (bytes; the container's limit where there is one), compiler, accelerators (list of dicts with
        name, memory in bytes, compute_capability).
    """
    total, available = memory()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "instruction_sets": instruction_sets(),
        "memory_total": total,
        "memory_available": available,
        "compiler": compiler(),
        "accelerators": accelerator_list() if accelerators else [],
    }


def versions() -> dict[str, str]:
    """Return the version of fluoroscope and of every library that can change its numbers."""
    found = {"fluoroscope": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the checkout's commit, with "+changes" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    try:
        commit = _output_of("git", "-C", str(root), "rev-parse", "HEAD")
        changed = _output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def usable_cores() -> int:
    """Return the cores this process may use, which in a container can be fewer than the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_value("cpu.max")
    if quota and not quota.startswith("max"):
        share, period = quota.split()[:2]
        cores = min(cores, max(1, round(int(share) / int(period))))
    return cores


def processor_name() -> str:
    """Return the processor's name as its maker writes it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _text_of("/proc/cpuinfo"), re.M)
    return match[1].strip() if match else platform.processor() or platform.machine()


def processor_vendor() -> str:
    """Return the maker as an x86 processor spells it, such as "GenuineIntel" or "AuthenticAMD"; "" elsewhere."""
    match = re.search(r"^vendor_id\s*:\s*(\S+)", _text_of("/proc/cpuinfo"), re.M)
    return match[1] if match else ""


def instruction_sets() -> list[str]:
    """Return those vector and matrix instruction sets that matter for speed here and that the processor has."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text_of("/proc/cpuinfo"), re.M)
    flags = set(match[1].split()) if match else set()
    return [name for name in INSTRUCTION_SETS if name in flags]


def memory() -> tuple[int, int]:
    """Return total and available memory in bytes, within the container's limit where there is one."""
    import psutil

    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    limit = _cgroup_value("memory.max")
    if limit and limit.isdigit() and int(limit) < total:
        used = _cgroup_value("memory.current")
        total = int(limit)
        available = min(available, total - int(used)) if used and used.isdigit() else min(available, total)
    return total, available


def compiler() -> str | None:
    """Return the first line a C++ compiler says about itself, None where there is none (torch.compile needs one)."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++", "gcc"):
        path = shutil.which(name) if name else None
        if path:
            try:
                return _output_of(path, "--version").splitlines()[0]
            except (OSError, subprocess.SubprocessError, IndexError):
                continue
    return None


def accelerator_list() -> list[dict[str, Any]]:
    """Return the CUDA devices and Apple's, as torch sees them."""
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            found.append(
                {
                    "device": f"cuda:{number}",
                    "name": device.name,
                    "memory": int(device.total_memory),
                    "compute_capability": f"{device.major}.{device.minor}",
                    "bf16": bool(torch.cuda.is_bf16_supported()),
                }
            )
    elif torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory": None, "compute_capability": None, "bf16": False})
    return found


def _output_of(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    return ran.stdout.strip()


def _cgroup_value(name: str) -> str | None:
    return _text_of(f"/sys/fs/cgroup/{name}").strip() or None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def best_seconds(run: Callable[[], object], least_seconds: float) -> float:
    """Return the shortest time that something took, after a first time, in rounds of at least so many seconds."""
    run()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < least_seconds:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
