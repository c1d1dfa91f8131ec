"""Search in a million rows beside bare matrix products, FAISS and scikit-learn.

    python benchmarks/retrieval.py [--rows 1000000] [--dim 512] [--queries 1000] [--rounds 3] [--folder DIR]
                                   [--quick] [--write]

Rows are written as float16 through the cache, around a thousand directions, and searched from there. Everything is
done in turns, the times are medians:

- exact search, top 10, beside the bare product of the same blocks in float32 (by torch and by NumPy, rows and queries
  ready in memory, nothing selected), and beside FAISS's flat index as the wheel comes and as it is set up here;
- the same beside scikit-learn's NearestNeighbors, on as many rows as that does in time;
- an IVF index beside bare FAISS on the same index with the same parameters;
- what one query costs beyond FAISS itself: from its vector to samples with their columns.

The answers are compared with brute force in float32 on the way: another row counts where the cosines differ by more
than float32 rounds. `--write` stores the figures in results/retrieval.json, `--quick` is a smoke run on few rows.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import faiss  # before the engine sets it up for this processor, so that it is timed as it comes
import numpy as np
import pandas as pd
import torch
from comparing import Way, in_turns, medians, write_record
from sklearn.neighbors import NearestNeighbors

from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.dataset import Dataset
from engine.faiss_loader import DATABASE_BLOCK
from engine.index import Index, build_index, products
from engine.sample_search import SampleSearch
from jobs.search_output import hit_records

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
ENCODER, K, CELLS = "bench", 10, 1024
SKLEARN_ROWS, AS_IT_COMES = 100_000, 1024
BLOCK = 4096
# What the project promises at full size: rate of the best bare product, time of FAISS, milliseconds a query.
LEAST_SHARE, MOST_TIMES, MOST_MILLISECONDS = 0.7, 1.05, 5.0


class _Bench:
    """Rows in a cache, the same in memory for the others, and queries."""

    def __init__(self, folder: Path, rows: int, dim: int, queries: int) -> None:
        self.rows, self.dim, self.count = rows, dim, queries
        array = KeyedArray.create(folder, "image", ENCODER, (dim,), {"of": "benchmark"})
        rng = np.random.Generator(np.random.PCG64(0))
        centres = rng.standard_normal((1000, dim), np.float32)
        for start in range(0, rows, 1 << 15):
            size = min(1 << 15, rows - start)
            values = centres[rng.integers(0, 1000, size)] + 2 * rng.standard_normal((size, dim), np.float32)
            array.append(rng.integers(0, 256, (size, 16), np.uint8), values.astype(np.float16))
        array.finish()
        self.cache = Cache(folder)
        asked = centres[rng.integers(0, 1000, queries)] + 2 * rng.standard_normal((queries, dim), np.float32)
        self.queries = asked / np.linalg.norm(asked, axis=1, keepdims=True)
        self.exact = build_index(self.cache, ENCODER, save=False)
        self.unit = np.empty((rows, dim), np.float32)
        for start, some in array.chunks():
            values = some.astype(np.float32)
            self.unit[start : start + len(some)] = values / np.linalg.norm(values, axis=1, keepdims=True)

    def bare(self, library: str) -> None:
        """Multiply all blocks, select nothing."""
        rows, queries = torch.from_numpy(self.unit), torch.from_numpy(np.ascontiguousarray(self.queries.T))
        out = torch.empty((BLOCK, self.count))
        for start in range(0, self.rows, BLOCK):
            some = rows[start : start + BLOCK]
            if library == "torch":
                torch.mm(some, queries, out=out[: len(some)])
            else:
                np.matmul(some.numpy(), queries.numpy(), out=out[: len(some)].numpy())

    def flat(self, index: object, block: int) -> np.ndarray:
        """Search with FAISS's flat index, which takes so many rows a product."""
        before = faiss.cvar.distance_compute_blas_database_bs
        faiss.cvar.distance_compute_blas_database_bs = block
        try:
            return index.search(self.queries, K)[1]  # type: ignore[attr-defined]
        finally:
            faiss.cvar.distance_compute_blas_database_bs = before

    def check_exact(self, others: np.ndarray) -> None:
        """Compare ours with others' rows: where they differ, the cosines must not."""
        scores, rows = self.exact.search_rows(self.queries, K)
        theirs = np.einsum("qkd,qd->qk", self.unit[others].astype(np.float64), self.queries.astype(np.float64))
        if np.abs(scores - theirs).max() > 1e-6:
            raise SystemExit("exact search and brute force in float32 do not agree")
        print(f"{'rows as in brute force':44s}{(rows == others).mean():10.5f}  (the others are equal within 1e-6)")


def exact_figures(bench: _Bench, rounds: int) -> dict[str, object]:
    index = faiss.IndexFlatIP(bench.dim)
    index.add(bench.unit)
    bench.check_exact(bench.flat(index, DATABASE_BLOCK))
    ways = {
        "ours": Way(lambda: bench.exact.search_rows(bench.queries, K)),
        "bare torch": Way(lambda: bench.bare("torch")),
        "bare numpy": Way(lambda: bench.bare("numpy")),
        "FAISS as it comes": Way(lambda: bench.flat(index, AS_IT_COMES)),
        "FAISS set up": Way(lambda: bench.flat(index, DATABASE_BLOCK)),
    }
    taken = in_turns(ways, rounds)
    middle = medians(taken)
    limit = min(middle["bare torch"], middle["bare numpy"])
    work = 2.0 * bench.rows * bench.dim * bench.count
    for name, seconds in middle.items():
        print(f"{'exact, ' + name:44s}{seconds:10.3f} s {work / seconds / 1e9:8.1f} GFLOP/s")
    share, beside = limit / middle["ours"], middle["FAISS as it comes"] / middle["ours"]
    told(bench, "best bare product / ours", share, share >= LEAST_SHARE, f"at least {LEAST_SHARE}")
    told(bench, "FAISS as it comes / ours", beside, beside >= 1, "at least 1")
    way = products.fastest_way()
    return {"task": "exact", "seconds": middle, "share": share, "faiss": beside, "library": way.library, "all": taken}


def sklearn_figures(bench: _Bench, rounds: int) -> dict[str, object]:
    rows = min(SKLEARN_ROWS, bench.rows)
    among = np.arange(rows)
    theirs = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(bench.unit[:rows])
    ways = {
        "ours": Way(lambda: bench.exact.search_rows(bench.queries, K, among=among)),
        "scikit-learn": Way(lambda: theirs.kneighbors(bench.queries)),
    }
    taken = in_turns(ways, rounds)
    middle = medians(taken)
    for name, seconds in middle.items():
        print(f"{f'exact in {rows:,} rows, {name}':44s}{seconds:10.3f} s")
    ratio = middle["scikit-learn"] / middle["ours"]
    told(bench, "scikit-learn / ours", ratio, ratio >= 1, "at least 1")
    return {"task": "scikit-learn", "rows": rows, "seconds": middle, "ratio": ratio, "all": taken}


def approximate_figures(bench: _Bench, index: Index, rounds: int) -> dict[str, object]:
    bare = index.engine
    parameters = faiss.SearchParametersIVF(nprobe=index.info.parameters["nprobe"])
    ways = {
        "ours": Way(lambda: index.search_rows(bench.queries, K)),
        "bare FAISS": Way(lambda: bare.search(bench.queries, K, params=parameters)),
    }
    taken = in_turns(ways, rounds)
    middle = medians(taken)
    for name, seconds in middle.items():
        print(f"{index.info.how + ', ' + name:44s}{seconds:10.3f} s")
    ratio = middle["ours"] / middle["bare FAISS"]
    told(bench, "ours / bare FAISS", ratio, ratio <= MOST_TIMES, f"at most {MOST_TIMES}")
    return {"task": "approximate", "how": index.info.how, "seconds": middle, "ratio": ratio, "all": taken}


def overhead_figures(bench: _Bench, index: Index) -> dict[str, object]:
    """Measure one query from vector to samples with their columns, less FAISS's own search."""
    count = np.arange(bench.rows)
    names = pd.Series(count).astype(str)
    columns = dict.fromkeys(("id", "uri", "group"), names) | dict.fromkeys(("text", "view", "split"), "")
    labels = np.zeros((bench.rows, 14), np.int8)
    labels[count, count % 14] = 1
    reader: object = None
    label_names = tuple(f"label {number}" for number in range(14))
    dataset = Dataset("bench:", "bench", pd.DataFrame(columns), label_names, labels, reader)  # type: ignore[arg-type]
    search = SampleSearch(index, count, count)
    own = np.array([0])
    parameters = faiss.SearchParametersIVF(nprobe=index.info.parameters["nprobe"])
    beyond = []
    for number in range(min(60, bench.count)):
        query = bench.queries[number : number + 1]
        seconds = []
        # Each is asked for as many rows as a query by a sample needs: one more than k, to leave itself out.
        for run in (
            lambda query=query: index.engine.search(query, K + 1, params=parameters),
            lambda query=query: hit_records(dataset, search.search(query, K, own)[0]),
        ):
            run()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        beyond.append(1e3 * (seconds[1] - seconds[0]))
    middle = statistics.median(beyond)
    told(bench, "one query beyond FAISS, ms", middle, middle <= MOST_MILLISECONDS, f"at most {MOST_MILLISECONDS}")
    return {"task": "one query", "milliseconds": middle, "all": beyond}


def told(bench: _Bench, name: str, value: float, met: bool, limit: str) -> None:
    full = bench.rows >= 1_000_000 and bench.dim >= 512
    print(f"{name:44s}{value:10.3f}" + (f"  {limit}: {'met' if met else 'MISSED'}" if full else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the rows are written; a temporary one unless given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.dim, options.queries, options.rounds = 20_000, 64, 100, 1
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fluoroscope-retrieval-", dir=options.folder))
    print(f"{options.queries:,} queries in {options.rows:,} x {options.dim} float16, top {K}; {options.rounds} rounds")
    try:
        bench = _Bench(folder, options.rows, options.dim, options.queries)
        figures = [exact_figures(bench, options.rounds), sklearn_figures(bench, options.rounds)]
        cells = min(CELLS, options.rows // 100)
        index = build_index(bench.cache, ENCODER, how=f"IVF{cells},Flat", save=False)
        figures += [approximate_figures(bench, index, options.rounds), overhead_figures(bench, index)]
    finally:
        shutil.rmtree(folder)
    if options.write:
        write_record(RESULTS, vars(options), figures)


if __name__ == "__main__":
    sys.exit(main())
