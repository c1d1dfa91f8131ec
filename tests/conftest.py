"""What all tests share: one thread a library, a cache of their own, and the way to real data where it is at hand."""

import os
import signal
from pathlib import Path

import pytest

# Before torch, NumPy or FAISS start their pools: tests run beside one another on few cores.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell starts what it puts into the background deaf to Ctrl-C, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def shared_data(relative: str) -> Path:
    """Return a file or folder of the shared real data; skip the test, with the reason, where it is not at hand."""
    folder = Path(os.environ.get("FLUOROSCOPE_SHARED") or ROOT.parent / "shared")
    path = folder / relative
    if not path.exists():
        pytest.skip(f"needs {relative} in $FLUOROSCOPE_SHARED or in a folder 'shared' beside the checkout")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep tests away from the user's cache."""
    monkeypatch.setenv("FLUOROSCOPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
