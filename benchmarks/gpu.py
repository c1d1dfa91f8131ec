"""All that a GPU should be measured on, in under ten minutes: from extraction to metrics, distances and a study.

    python benchmarks/gpu.py [--seconds 540] [--folder DIR] [--write]

Extraction of ViT-B/16 and ViT-L/14 in bfloat16 from JPEG and from the pixel cache beside the limit of its slowest stage
(`benchmarks/extraction.py`); exact search of 1,000 queries among 1,000,000 embeddings beside torch's own product and
top-k; the sweep of 700 probes (`benchmarks/probes.py`), the bootstrap of all metrics (`benchmarks/metrics.py`) and the
shape of a space of 20,000 embeddings, each there and on the processor and their results compared; the demo study, with
its probes, fine-tuning and heatmaps. A part that does not fit into the time is named and left out. `--write` stores the
figures with the card's name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extraction
import metrics
import numpy as np
import probes
import torch
from comparing import write_record

from analysis.bootstrap import bootstrap_metrics
from analysis.probes import LogisticFits, solve_logistic
from analysis.space import measure_space, measure_table
from engine.faiss_loader import load_faiss

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def extract(model: str, images: int, folder: Path) -> dict[str, Any]:
    """Measure one tower from JPEG and from the pixel cache."""
    options = argparse.Namespace(
        source="jpeg",
        images=images,
        model=model,
        precision="bf16",
        device="cuda",
        batch_size=256,
        compiled=False,
        rounds=3,
    )
    figures = extraction.measure(options, folder)
    return {name: value for name, value in figures.items() if name != "rounds"}


def search(rows: int = 1_000_000, dim: int = 512, queries: int = 1000, k: int = 10) -> dict[str, float]:
    """Time exact search by FAISS on the processor or GPU that it finds, and by torch on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, device="cuda"), dim=1)
    asked = torch.nn.functional.normalize(torch.randn(queries, dim, generator=generator, device="cuda"), dim=1)

    def by_torch() -> np.ndarray:
        return (asked @ base.T).topk(k, dim=1).indices.cpu().numpy()

    faiss = load_faiss()
    index = faiss.IndexFlatIP(dim)
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(base.cpu().numpy())
    host = asked.cpu().numpy()
    seconds = {"torch": _best(by_torch), "faiss": _best(lambda: index.search(host, k)[1])}
    same = float((np.sort(by_torch(), 1) == np.sort(index.search(host, k)[1], 1)).mean())
    return {f"{name}_queries_per_second": queries / taken for name, taken in seconds.items()} | {"agreement": same}


def probe_sweep(rows: int = 7470, dim: int = 512) -> dict[str, float]:
    """Time the sweep of 700 probes on the GPU and on the processor, and compare what they reach."""
    x, y = probes.embeddings(rows, dim, unit=True)
    fold = np.arange(rows) % probes.FOLDS
    seen = np.stack([fold != number for number in range(probes.FOLDS)])
    found: dict[str, LogisticFits] = {}

    def solve(device: str) -> None:
        features = torch.from_numpy(x).to(device)
        found[device] = solve_logistic(features, y, probes.C_GRID, row_weights=seen)

    seconds = {
        device: _best(lambda device=device: solve(device), rounds) for device, rounds in (("cuda", 3), ("cpu", 1))
    }
    there, here = found["cuda"].objective, found["cpu"].objective
    return {
        "cuda_seconds": seconds["cuda"],
        "cpu_seconds": seconds["cpu"],
        "converged": float(found["cuda"].converged.mean()),
        "largest_relative_excess": float(np.nanmax((there - here) / here)),
    }


def bootstrap(samples: int = 20_000, replicates: int = 2000) -> dict[str, float]:
    """Time all metrics of three settings under resamples, on the GPU and on the processor."""
    y, predictions, patients = metrics.study(samples)
    options = {"label_names": metrics.LABELS, "replicates": replicates}
    drawn: dict[str, Any] = {}

    def on(device: str) -> None:
        drawn[device] = bootstrap_metrics(y, predictions, patients, device=device, **options)

    seconds = {f"{device}_seconds": _best(lambda device=device: on(device), 3) for device in ("cuda", "cpu")}
    apart = np.nanmax(np.abs(drawn["cuda"].replicates - drawn["cpu"].replicates))
    return seconds | {"largest_difference": float(apart)}


def distances(rows: int = 20_000, dim: int = 512, classes: int = 14) -> dict[str, float]:
    """Time the measures of one space, on the GPU and on the processor."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(rows, dim)).astype(np.float32)
    of_class = generator.integers(0, classes, rows)
    features[:, 0] += of_class
    y = of_class[:, None] == np.arange(classes)
    options = {"label_names": metrics.LABELS[:classes], "replicates": 20, "permutations": 20}
    found: dict[str, Any] = {}

    def on(device: str) -> None:
        found[device] = measure_table(measure_space(features, of_class, y, device=device, **options))

    seconds = {f"{device}_seconds": _best(lambda device=device: on(device), 1) for device in ("cuda", "cpu")}
    apart = np.abs(found["cuda"]["value"] / found["cpu"]["value"] - 1).max()
    return seconds | {"largest_relative_difference": float(apart)}


def study(folder: Path) -> dict[str, float]:
    """Time the demo study on the GPU: probes, fine-tuning and heatmaps of phantom-clip."""
    command = [sys.executable, "-m", "jobs.cli", "study", "demo", "--cache", str(folder / "cache"), "--device", "cuda"]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(folder / "study")], check=True, capture_output=True)
    return {"demo_study_seconds": time.perf_counter() - start}


def _best(run: Callable[[], Any], rounds: int = 5) -> float:
    run()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[rounds // 2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true", help=f"store the figures in results/{RESULTS.name}")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 1
    start = time.perf_counter()
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "extraction ViT-B-16": lambda: extract("ViT-B-16", 8192, folder),
            "extraction ViT-L-14": lambda: extract("ViT-L-14", 4096, folder),
            "exact search": search,
            "700 probes": probe_sweep,
            "bootstrap of metrics": bootstrap,
            "distances": distances,
            "demo study": lambda: study(folder),
        }
        for name, part in parts.items():
            if time.perf_counter() - start > options.seconds * 0.8:
                figures[name] = "left out: no time"
            else:
                try:
                    figures[name] = part()
                except Exception as error:  # one part that fails is a finding, and no reason to lose the others
                    figures[name] = f"failed: {type(error).__name__}: {error}"
            print(name, figures[name], flush=True)
    if options.write:
        write_record(RESULTS, vars(options), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
