"""The benchmarks of arrays and their growth run, agree with NumPy on what they compare, and print what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def printed(script: str, folder: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.iterdir()), "a benchmark leaves nothing behind"
    return done.stdout


def test_arrays_prints_each_task_beside_numpy_and_zarr(tmp_path):
    text = printed("arrays.py", tmp_path)
    for task in ("write", "read all, checked", "random rows, unchecked", "look up 10,000 keys", "append 10 rows"):
        line = next(line for line in text.splitlines() if line.startswith(task))
        assert len(line[36:].split()) == (3 if task.startswith("look up") else 4)


def test_growth_prints_slopes_beside_numpy(tmp_path):
    text = printed("growth.py", tmp_path)
    assert text.count("steeper by") == 4
    assert "10,000" in text and "31,623" in text


@pytest.mark.parametrize("name", ["arrays", "growth"])
def test_committed_figures_name_machine_and_versions(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} has not been measured yet")
    record = json.loads(path.read_text())
    assert record["machine"]["processor"] and record["versions"]["numpy"] and record["commit"]
    assert record["figures"]
