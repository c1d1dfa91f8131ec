"""What a program that computes does about memory: keep what it will want again in a moment, and let imports be.

Each batch through a model takes and lets go of hundreds of megabytes. glibc gives such memory back to the system at
once, and the next batch waits while the same pages are mapped and cleared again, one fault a page: 115,000 for 32
images through a ViT-B/32. No number changes by where it lies.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger blocks go back at once, as does what is free beyond so much: other work on the machine may want it.
LARGEST_KEPT, KEPT = 256 << 20, 512 << 20
# What older versions of glibc take at most.
LARGEST_EVER = 32 << 20


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed for what is allocated next; tell whether it does.

    For a whole process, so it is for programs to call and not for libraries. Other C libraries than glibc have no such
    choice and are left alone.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is None:
        return False
    return bool(
        (choose(_MMAP_THRESHOLD, LARGEST_KEPT) or choose(_MMAP_THRESHOLD, LARGEST_EVER))
        and choose(_TRIM_THRESHOLD, KEPT)
    )


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Have Python's garbage collector never look at what a module brings that is imported in this context.

    Importing torch and open_clip makes more than a million objects, which live until the process ends. The collector
    would go through them again and again while they become more, and once more at the end: a third of what importing
    and leaving take.
    """
    if name in sys.modules:
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
