"""Which GPU of a machine is this process's own, where several processes compute beside one another.

Comes in: the GPUs that this process sees. Goes out: the number of one. Workers come and go, are started by hand, by a
batch system or by dask-cuda, and their names say nothing, so each takes a record lock on the first GPU that nobody has,
and keeps it for as long as it lives; where all are taken, they are shared out evenly. A GPU is known by its own name
(its UUID), since processes may number them differently: dask-cuda puts each worker's own first, and so it stays.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def own_gpu() -> int:
    """Return the number of this process's own GPU among those that it sees, the same for as long as it lives."""
    return _claimed()[0]


@cache
def _claimed() -> tuple[int, int | None]:
    """Return the number, and what holds its lock."""
    names = [_name(number) for number in range(torch.cuda.device_count())]
    folder = Path(tempfile.gettempdir()) / f"fluoroscope-gpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for turn in itertools.count():
            for number, name in enumerate(names):
                held = _lock(folder / f"{name}-{turn}")
                if held is not None:
                    return number, held
    except OSError as error:
        log.warning("the workers cannot agree on GPUs (%s); each takes one by its process number", error)
    return os.getpid() % len(names), None


def _name(number: int) -> str:
    """Return what a GPU is called by all processes of this machine."""
    uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(uuid or (seen.split(",")[number].strip() if seen else number)).replace("/", "-")


def _lock(path: Path) -> int | None:
    """Lock a file, made where missing, and return its descriptor; None where another process has locked it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
