"""Shape of the space: ours beside scikit-learn and scipy, and beside the bare matrix product of all pairs.

    python benchmarks/distances.py [--rows 20000] [--large 100000] [--dim 512] [--classes 14] [--rounds 3] [--quick]
                                   [--write]

First table: at a size where scikit-learn and scipy fit, seconds of each measure without intervals (medians of rounds in
turns), both given the same float32 arrays; ours with products in float32 and sums in float64, theirs as they come, both
cores. "every pair at once" is silhouette, 10 neighbours and uniformity together, which is how `fluoro distances` asks
for them; theirs is the sum of the three. "200 resamples and permutations": theirs is one evaluation times their number,
not run. "limit" is the arithmetic that no exact way gets around, and nothing else: of all pairs, the float32 products
of all tiles on and above the diagonal; of centroids, one product of memberships with rows and one reading of all rows;
of CKA, the product of one table with the other and half of that of each with itself; of Procrustes, one product and the
eigenvalues of a matrix of its size.
Second table: ours at the large size in a process of its own, with its peak memory above that of the data.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from comparing import Way, in_turns, medians, write_record
from scipy.spatial import procrustes
from scipy.spatial.distance import pdist
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

from analysis import distances, space
from analysis.space import neighbours, pairwise, resampling, scatter, silhouettes, sphere

RESULTS = Path(__file__).parent / "results" / "distances.json"
AT_LEAST = 10.0
NEIGHBOURS = 10
RESAMPLES = 200
# Theirs take long, so these are not run once more to warm up; what takes tenths of a second has more rounds instead.
SLOW = ("silhouette", "10 neighbours", "uniformity")
FAST_ROUNDS = 3
NONE = {"replicates": 0, "permutations": 0}


def material(rows: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (rows, dim) float32 around class centres, and classes of sizes like a radiograph set's."""
    generator = np.random.Generator(np.random.PCG64(0))
    share = 0.5 ** np.minimum(np.arange(classes), 7)
    labels = generator.choice(classes, rows, p=share / share.sum())
    labels[:classes] = np.arange(classes)
    values = np.empty((rows, dim), np.float32)
    centres = generator.standard_normal((classes, dim), np.float32)
    for start in range(0, rows, 1 << 13):
        part = slice(start, start + (1 << 13))
        values[part] = generator.standard_normal(values[part].shape, np.float32) + 0.3 * centres[labels[part]]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values, labels


def bare_products(values: np.ndarray, tile: int = pairwise.TILE) -> None:
    """Compute the products of all tiles on and above the diagonal, and nothing else."""
    points, buffer = torch.from_numpy(values), torch.empty((tile, tile))
    for first in range(0, len(values), tile):
        rows = points[first : first + tile]
        for second in range(first, len(values), tile):
            columns = points[second : second + tile]
            torch.mm(rows, columns.T, out=buffer.view(-1)[: len(rows) * len(columns)].view(len(rows), len(columns)))


def every_pair(values: np.ndarray, labels: np.ndarray, resamples: int = 0) -> dict[str, float]:
    """Return silhouette, hubness and uniformity from one look at every pair, with sums for resamples if asked."""
    order = np.argsort(labels, kind="stable")
    weights = resampling.resample_weights(np.arange(len(labels)), resamples, 0)
    points = pairwise.Points(values[order])
    nearest = neighbours.Nearest(NEIGHBOURS, np.arange(len(labels)))
    sums = silhouettes.ClassSums(labels[order], weights)
    potential = sphere.GaussianPotential(2.0, weights)
    pairwise.sweep(points, [nearest, potential, sums])
    found = sums.result()
    hubs = neighbours.hubness(nearest.rows.numpy(), **NONE)[0].value
    result = {"silhouette": float(found.means[0]), "uniformity": float(potential.result()[0]), "hubness": hubs}
    if resamples:
        result["silhouette_low"], result["silhouette_high"] = np.quantile(found.means[1:], [0.025, 0.975]).tolist()
    return result


def tasks(values: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, Callable[[], object]]]:
    """Return what is compared: ours, peer, and the limit where there is one."""
    few = values[: min(len(values), 10_000)]
    other = few @ np.random.default_rng(1).standard_normal((values.shape[1],) * 2).astype(np.float32)
    wide = few.astype(np.float64), other.astype(np.float64)
    points = {"few": torch.from_numpy(few), "other": torch.from_numpy(other)}
    cross = torch.from_numpy(wide[0].T @ wide[1])
    members = torch.nn.functional.one_hot(torch.from_numpy(labels)).T.float()

    def centroid_limit() -> None:
        torch.mm(members, torch.from_numpy(values))
        torch.linalg.vector_norm(torch.from_numpy(values), dim=1)

    def cka_limit() -> None:
        for one, another in (("few", "few"), ("few", "other"), ("other", "other")):
            # Half the rows cost what half the product of a table with itself does.
            taken = slice(len(few) // 2 if one == another else len(few))
            torch.mm(points[one][taken].T, points[another][taken])

    def procrustes_limit() -> None:
        torch.mm(points["few"].T, points["other"])
        torch.linalg.eigvalsh(cross @ cross.T)

    def limit() -> None:
        bare_products(values)

    def sklearn_neighbours() -> object:
        return NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(values).kneighbors(values)

    def scipy_uniformity() -> float:
        return float(np.log(np.exp(-2 * pdist(values) ** 2).mean()))

    return {
        "silhouette": {
            "ours": lambda: silhouettes.silhouette_samples(values, labels).mean(),
            "peer": lambda: silhouette_score(values, labels),
            "limit": limit,
        },
        "10 neighbours": {
            "ours": lambda: neighbours.nearest_neighbours(values, NEIGHBOURS),
            "peer": sklearn_neighbours,
            "limit": limit,
        },
        "uniformity": {
            "ours": lambda: sphere.uniformity(values, replicates=0).value,
            "peer": scipy_uniformity,
            "limit": limit,
        },
        "every pair at once": {
            "ours": lambda: every_pair(values, labels),
            "limit": limit,
        },
        "Davies-Bouldin": {
            "ours": lambda: scatter.centroid_measures(values, labels, **NONE),
            "peer": lambda: davies_bouldin_score(values, labels),
            "limit": centroid_limit,
        },
        "Davies-Bouldin and Fisher ratio": {
            "ours": lambda: scatter.centroid_measures(values, labels, **NONE),
            "peer": lambda: (davies_bouldin_score(values, labels), calinski_harabasz_score(values, labels)),
            "limit": centroid_limit,
        },
        f"CKA, {len(few):,} rows": {
            "ours": lambda: space.linear_cka(few, other),
            "peer": lambda: kernel_cka(few, other),
            "limit": cka_limit,
        },
        f"CKA, {len(few):,} rows, both float64": {
            "ours": lambda: space.linear_cka(*wide),
            "peer": lambda: kernel_cka(*wide),
        },
        f"Procrustes, {len(few):,} rows": {
            "ours": lambda: space.procrustes_disparity(few, other),
            "peer": lambda: procrustes(few, other),
            "limit": procrustes_limit,
        },
    }  # fmt: skip


def kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return unbiased CKA as it is defined, from both kernels (n, n)."""
    kernels = [each @ each.T for each in (x, y)]
    for kernel in kernels:
        np.fill_diagonal(kernel, 0.0)
    n = len(x)

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        through = k.sum(axis=0) @ m.sum(axis=0)
        return np.vdot(k, m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * through / (n - 2)

    k, m = kernels
    return float(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)))


def agree(values: np.ndarray, labels: np.ndarray) -> None:
    """Stop where ours and theirs are not the same numbers."""
    some, of = values[:2000], labels[:2000]
    turned = some @ np.random.default_rng(1).standard_normal((some.shape[1],) * 2).astype(np.float32)
    wide = some.astype(np.float64), turned.astype(np.float64)
    _, apart = neighbours.nearest_neighbours(some, NEIGHBOURS)
    theirs = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(wide[0]).kneighbors(wide[0])[0]
    pairs = (
        (apart.sum(), theirs[:, 1:].sum()),
        (space.linear_cka(some, turned), kernel_cka(*wide)),
        (space.procrustes_disparity(some, turned), procrustes(*wide)[2]),
        (silhouettes.silhouette_samples(some, of).mean(), silhouette_score(some, of)),
        (sphere.uniformity(some, replicates=0).value, np.log(np.exp(-2 * pdist(some) ** 2).mean())),
        (scatter.centroid_measures(some, of, **NONE)[3].value, davies_bouldin_score(some.astype(np.float64), of)),
    )
    for ours, theirs in pairs:
        if not abs(ours - theirs) < 1e-5 * max(1.0, abs(theirs)):
            raise SystemExit(f"ours {ours} is not theirs {theirs}")


def compared(values: np.ndarray, labels: np.ndarray, rounds: int, large: bool) -> list[dict]:
    figures = []
    for task, ways in tasks(values, labels).items():
        slow = large and task in SLOW
        taken = in_turns(
            {name: Way(run) for name, run in ways.items()},
            1 if task == "uniformity" else rounds if slow else FAST_ROUNDS * rounds,
            warm=not slow,
        )
        seconds = medians(taken)
        # Theirs look at every pair once for each measure.
        seconds.setdefault("peer", sum(each["seconds"]["peer"] for each in figures))
        figures.append({"task": task, "seconds": seconds, "ratio": seconds["peer"] / seconds["ours"], "all": taken})
        print_figure(figures[-1], large)
    by_task = {figure["task"]: figure["seconds"]["peer"] for figure in figures}
    for task, run in (
        ("silhouette", lambda: silhouettes.silhouette(values, labels, replicates=RESAMPLES, permutations=RESAMPLES)),
        ("Davies-Bouldin", lambda: scatter.centroid_measures(values, labels)),
    ):
        start = time.perf_counter()
        run()
        ours = time.perf_counter() - start
        peer = by_task[task] * (2 * RESAMPLES + 1)
        figures.append(
            {"task": f"{task}, {RESAMPLES} resamples and permutations", "seconds": {"ours": ours, "peer": peer},
             "ratio": peer / ours, "peer_estimated": True}
        )  # fmt: skip
        print_figure(figures[-1], large)
    return figures


def print_figure(figure: dict, large: bool) -> None:
    seconds = figure["seconds"]
    columns = "".join(
        f"{seconds[name]:12.3f}" if name in seconds else f"{'':12s}" for name in ("ours", "peer", "limit")
    )
    bare = seconds["peer"] / seconds["limit"] if "limit" in seconds else float("inf")
    said = ""
    if large and figure["ratio"] >= AT_LEAST:
        said = f"  at least {AT_LEAST:.0f}: met"
    elif large:
        said = f"  at least {AT_LEAST:.0f}: MISSED" + (f"; the products alone reach {bare:.1f}" if bare < 1e9 else "")
    print(f"{figure['task']:50s}{columns}{figure['ratio']:10.1f}{said}", flush=True)


LARGE = {
    "bare products of all pairs": lambda values, labels: bare_products(values),
    "every pair at once, 200 resamples": lambda values, labels: every_pair(values, labels, RESAMPLES),
    "centroid measures": lambda values, labels: scatter.centroid_measures(values, labels, **NONE),
    "centroid measures, 200 resamples, permutations": lambda values, labels: scatter.centroid_measures(values, labels),
    "label separation, 200 resamples, permutations": lambda values, labels: distances.label_separation(
        values, (labels[:, None] == np.arange(labels.max() + 1)).astype(np.int8),
        label_names=tuple(str(number) for number in range(labels.max() + 1)),
    ),
    "CKA and Procrustes": lambda values, labels: space.space_similarity(values, values[:, ::-1].copy(), permutations=0),
}  # fmt: skip


def one_large(task: str, rows: int, dim: int, classes: int) -> dict:
    """Do one task of the second table in this process and return its seconds and peak memory."""
    values, labels = material(rows, dim, classes)
    before = peak_bytes()
    start = time.perf_counter()
    LARGE[task](values, labels)
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    return {"task": task, "rows": rows, "seconds": seconds, "peak_bytes": peak, "added_bytes": peak - before}


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far; what getrusage says begins with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def large_ones(options: argparse.Namespace) -> list[dict]:
    figures = []
    shape = ["--large", str(options.large), "--dim", str(options.dim), "--classes", str(options.classes)]
    for task in LARGE:
        if options.quick:  # a smoke run does not need processes of their own, which take seconds to start
            figures.append(one_large(task, options.large, options.dim, options.classes))
        else:
            done = subprocess.run(
                [sys.executable, __file__, "--one", task, *shape], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            figures.append(json.loads(done.stdout))
        each = figures[-1]
        print(f"{task:50s}{each['seconds']:12.2f}{each['peak_bytes'] / 2**30:12.2f}{each['added_bytes'] / 2**30:12.2f}",
              flush=True)  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_large(options.one, options.large, options.dim, options.classes)))
        return
    if options.quick:
        options.rows, options.large, options.dim = 1500, 3000, 32
    values, labels = material(options.rows, options.dim, options.classes)
    agree(values, labels)
    shape = f"{options.rows:,} x {options.dim} float32, {options.classes} classes"
    print(f"{shape}, seconds, {torch.get_num_threads()} threads")
    print(f"{'':50s}{'ours':>12s}{'peer':>12s}{'limit':>12s}{'peer/ours':>10s}")
    figures = compared(values, labels, options.rounds, large=options.rows >= 20_000 and options.dim >= 512)
    print(f"\n{options.large:,} x {options.dim}: ours{'seconds':>42s}{'peak GiB':>12s}{'above data':>12s}")
    figures += large_ones(options)
    if options.write:
        write_record(RESULTS, vars(options), figures)


if __name__ == "__main__":
    sys.exit(main())
