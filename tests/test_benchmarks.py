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


def test_retrieval_prints_ours_beside_the_limit_and_the_peers(tmp_path):
    text = printed("retrieval.py", tmp_path)
    for name in ("best bare product / ours", "FAISS as it comes / ours", "scikit-learn / ours", "ours / bare FAISS"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert float(line[44:].split()[0]) > 0
    assert "one query beyond FAISS, ms" in text and "rows as in brute force" in text


def ran(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_extraction_prints_each_stage_the_limit_and_ours(tmp_path):
    options = ["--model", "phantom-clip", "--device", "cpu", "--batch-size", "8", "--folder", str(tmp_path)]
    text = ran("extraction.py", "--images", "24", *options)
    for stage in (
        "decode",
        "encode",
        "limit",
        "ours",
        "ours / limit",
        "storing",
        "pixels from the cache",
        "fast decoder",
        "ours with it",
    ):
        assert f"  {stage}" in text
    assert "pixels as open_clip gives them         equal" in text


def test_texts_are_those_of_the_plain_loop():
    text = ran("text.py", "--data", "phantom:30", "--model", "phantom-clip", "--device", "cpu")
    line = next(line for line in text.splitlines() if "largest difference" in line)
    assert float(line.split()[4]) < 1e-4


@pytest.mark.parametrize("source", [(), ("--table",)], ids=["folder", "table"])
def test_many_files_counts_what_is_opened(source):
    text = ran("many_files.py", "--files", "60", "--new", "10", "--rounds", "1", *source)
    assert "60 unchanged files recognised" in text and "10 new among them" in text


def test_distances_prints_each_measure_beside_its_peer():
    text = ran("distances.py", "--quick")
    tasks = ("silhouette ", "10 neighbours", "uniformity", "every pair at once", "Davies-Bouldin", "CKA", "Procrustes")
    for task in tasks:
        line = next(line for line in text.splitlines() if line.startswith(task))
        assert float(line[50:].split()[0]) >= 0
    assert "peak GiB" in text


@pytest.mark.parametrize(
    "name",
    [
        "arrays",
        "growth",
        "extraction_jpeg",
        "heatmaps",
        "text",
        "many_files",
        "startup",
        "distances",
        "retrieval",
        "probes",
        "finetuning_files",
        "finetuning_tokens",
        "finetuning_limit",
        "finetuning_precision",
    ],
)
def test_committed_figures_name_machine_and_versions(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} has not been measured yet")
    record = json.loads(path.read_text())
    assert record["machine"]["processor"] and record["versions"]["numpy"] and record["commit"]
    assert record["figures"]


def test_finetuning_prints_ours_beside_the_usual_ways():
    text = printed_quickly("finetuning.py")
    for name in ("loader / ours", "ours / all blocks", "bf16 / float32", "ours / bare, small", "ours / bare, large"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {name}"))
        assert float(line.split()[-1]) > 0


def printed_quickly(script: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_metrics_agree_with_scikit_learn_and_stand_beside_its_loop():
    text = ran("metrics.py", "--quick")
    line = next(line for line in text.splitlines() if line.startswith("bootstrap, 80 samples"))
    assert len(line[32:].split()) == 4
    assert "no label's prevalence in a part is more than" in text


def test_probes_solve_all_problems_beside_scikit_learn():
    text = ran("probes.py", "--quick")
    lines = {line[2:36].strip(): line[36:].split() for line in text.splitlines() if line.startswith("  ")}
    assert lines["converged"][:3] == ["700", "of", "700,"]
    assert float(lines["ours above scikit-learn's"][0]) < 1e-6
    assert {"ours", "products alone", "scikit-learn, same objective", "scikit-learn, default tolerance"} <= set(lines)


@pytest.mark.slow
def test_full_size_study_runs_the_studys_config_on_both_layouts(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/full_size_study.py"), "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for layout in ("official", "kaggle"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{layout}: "))
        assert "peak memory" in line
    assert "fine-tuning (paper)" in done.stdout.partition("kaggle: ")[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_heatmaps_are_the_librarys_and_stand_beside_its_loop_and_the_bare_passes(tmp_path):
    text = ran("heatmaps.py", "--model", "phantom-clip", "--labels", "3", "--result", str(tmp_path / "record.json"))
    figures = {line[:55].strip(): line[55:].strip() for line in text.splitlines()}
    assert float(figures["least correlation with the library's maps"]) > 0.999
    for name in ("library's loop / all labels from pixels", "all labels from pixels / limit", "limit from tokens, s"):
        assert float(figures[name]) > 0
    assert json.loads((tmp_path / "record.json").read_text())["figures"]["device"] == "cpu"
