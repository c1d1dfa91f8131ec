"""engine/memory.py: what is freed is taken again without asking the system, and imports are not looked through."""

import ctypes
import gc
import subprocess
import sys

import pytest

from engine.memory import importing

# Memory from the C library itself, 20 MB at a time as a batch's activations are, every page written to.
SCRIPT = """
import ctypes, resource, sys
from engine.memory import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def take_and_free():
    place = ctypes.c_void_p(library.malloc(ctypes.c_size_t(20 << 20)))
    ctypes.memset(place, 1, 20 << 20)
    after = ctypes.c_void_p(library.malloc(ctypes.c_size_t(40 << 20)))
    ctypes.memset(after, 1, 40 << 20)
    library.free(after)
    library.free(place)
take_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's own choice")
def test_keep_freed_memory__pages_are_mapped_once():
    given_back, kept = faults("given back"), faults("kept")
    assert given_back > 10_000  # the test would see it
    assert kept < 200


def test_importing__the_collector_rests_and_what_was_imported_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "of_this_test", None)
    before = gc.get_freeze_count()
    try:
        with importing("of_this_test"):
            assert gc.isenabled()  # imported before: nothing to be spared
        assert gc.get_freeze_count() == before
        monkeypatch.delitem(sys.modules, "of_this_test")
        with pytest.raises(ImportError), importing("of_this_test"):
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
