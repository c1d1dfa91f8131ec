"""Keyed arrays beside NumPy's own files and plain zarr: writing, reading, random rows, look-up, appending.

    python benchmarks/arrays.py [--rows 1000000] [--dim 512] [--rounds 5] [--folder DIR] [--quick] [--write]

Every row of the table is one task, done in turns by ours, by NumPy on one file of the same bytes, and by plain zarr
(same chunks, no compression); times are medians, the files are in the page cache. Writing and appending are synced to
the disk in all three: NumPy's file by one fsync, zarr's by one of each file, ours by its commits (payload and checks
durable before the keys, in commits of 64 MiB as extraction makes them). "checked" compares every row with its checksum
over key and payload, which the others do not have; what that adds stands in a row of its own. `--write` stores the
figures in results/arrays.json, `--quick` is a smoke run on few rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from comparing import Way, in_turns, medians, write_record

from engine.arrays.keyed_array import KeyedArray

RESULTS = Path(__file__).parent / "results" / "arrays.json"
COMMIT_BYTES = 64 << 20
# What the project promises of each task at full size: NumPy's time by ours, or ours in seconds.
AT_LEAST = {"write": 0.5, "read all, unchecked": 0.85, "read all, checked": 0.85, "random rows, unchecked": 0.5}
AT_MOST_SECONDS = {"append 10 rows": 0.020, "look up 1,000,000 keys": 0.25}


def random_keys(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (count, 16), np.uint8)


def random_rows(count: int, dim: int) -> np.ndarray:
    """Return embeddings (count, dim) float16 of which no two blocks are alike."""
    generator = np.random.Generator(np.random.PCG64(0))
    rows = np.empty((count, dim), np.float16)
    for start in range(0, count, 1 << 14):
        some = rows[start : start + (1 << 14)]
        some[...] = generator.standard_normal(some.shape, np.float32)
    return rows


class _Bench:
    """The same rows in three forms on disk, and the tasks."""

    def __init__(self, folder: Path, rows: int, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self.rows, self.keys = random_rows(rows, dim), random_keys(rows, 1)
        self.npy, self.cache, self.zarr_path = folder / "rows.npy", folder / "cache", folder / "rows.zarr"
        self.numbers = np.random.Generator(np.random.PCG64(2)).integers(0, rows, 10_000)
        self.more = 0

    # -- Writing -----------------------------------------------------------------------------------------------------

    def write_ours(self) -> None:
        array = KeyedArray.create(self.cache, "image", "bench", (self.dim,), {"of": "benchmark"})
        step = max(1, COMMIT_BYTES // self.rows[0].nbytes)
        for start in range(0, len(self.rows), step):
            array.append(self.keys[start : start + step], self.rows[start : start + step])
        array.finish()

    def write_numpy(self) -> None:
        with open(self.npy, "wb") as file:
            np.save(file, self.rows)
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)

    def write_zarr(self) -> None:
        array = zarr.create_array(
            self.zarr_path, shape=self.rows.shape, dtype="float16", chunks=(self.chunk_rows, self.dim), compressors=None
        )
        array[:] = self.rows
        for path in [*self.zarr_path.rglob("*"), self.zarr_path]:
            sync(path)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, as ours has them."""
        probe = self.folder / "probe"
        try:
            return KeyedArray.create(probe, "image", "probe", (self.dim,), {}).form.chunk_rows
        finally:
            shutil.rmtree(probe)

    def remove(self) -> None:
        self.npy.unlink(missing_ok=True)
        for path in (self.cache, self.zarr_path):
            shutil.rmtree(path, ignore_errors=True)
        os.sync()

    def open(self) -> None:
        """Open what was written and look at all of it once."""
        self.array = KeyedArray.open(self.cache, "image", "bench")
        self.array.find(self.keys[:1])
        self.plain = zarr.open_array(self.zarr_path, mode="r+")
        if not np.array_equal(self.array.read_all().view(np.uint16), self.rows.view(np.uint16)):
            raise SystemExit("what was read is not what was written")
        words = self.keys.view(np.uint64)
        self.order = np.argsort(words[:, 0])
        self.sorted_words = words[self.order]
        self.first_words = np.ascontiguousarray(self.sorted_words[:, 0])

    # -- Tasks -------------------------------------------------------------------------------------------------------

    def writing(self) -> dict[str, dict[str, Way]]:
        ours, numpy, plain = (
            Way(run, before=self.remove) for run in (self.write_ours, self.write_numpy, self.write_zarr)
        )
        return {"write": {"ours": ours, "numpy": numpy, "zarr": plain}}

    def reading(self) -> dict[str, dict[str, Way]]:
        numbers, keys = self.numbers, self.keys
        many = np.random.Generator(np.random.PCG64(3)).permutation(len(keys))[:1_000_000]
        memory_map = np.load(self.npy, mmap_mode="r")
        tasks: dict[str, dict[str, Callable[[], object]]] = {}
        for verify, name in ((False, "unchecked"), (True, "checked")):
            tasks[f"read all, {name}"] = {
                "ours": lambda verify=verify: self.array.read_all(verify=verify),
                "numpy": lambda: np.load(self.npy),
                "zarr": lambda: self.plain[:],
            }
            tasks[f"scan, {name}"] = {
                "ours": lambda verify=verify: sum(int(total(some)) for _, some in self.array.chunks(verify=verify)),
                "numpy": self.scan_numpy,
                "zarr": self.scan_zarr,
            }
            tasks[f"random rows, {name}"] = {
                "ours": lambda verify=verify: self.array.read(numbers, verify=verify),
                "numpy": lambda: memory_map[numbers],
                "zarr": lambda: self.plain.oindex[numbers],
            }
        for some in (self.numbers, many):
            tasks[f"look up {len(some):,} keys"] = {
                "ours": lambda some=keys[some]: self.array.find(some),
                "numpy": lambda some=keys[some]: self.look_up_numpy(some),
            }
        tasks["open"] = {
            "ours": lambda: KeyedArray.open(self.cache, "image", "bench"),
            "numpy": lambda: np.load(self.npy, mmap_mode="r"),
            "zarr": lambda: zarr.open_array(self.zarr_path, mode="r"),
        }
        return {task: {name: Way(run) for name, run in ways.items()} for task, ways in tasks.items()}

    def appending(self) -> dict[str, dict[str, Way]]:
        ten = self.rows[:10]

        def ours() -> None:
            self.more += 1
            self.array.append(random_keys(10, 100 + self.more), ten)

        def numpy() -> None:
            with open(self.npy, "ab") as file:
                file.write(ten.data)
                file.flush()
                os.fsync(file.fileno())

        def plain() -> None:
            self.plain.append(ten)
            number = (self.plain.shape[0] - 1) // self.plain.chunks[0]
            for path in ("zarr.json", f"c/{number}/0", f"c/{number}"):
                sync(self.zarr_path / path)

        return {"append 10 rows": {"ours": Way(ours), "numpy": Way(numpy), "zarr": Way(plain)}}

    def scan_numpy(self) -> int:
        memory_map, step = np.load(self.npy, mmap_mode="r"), self.array.form.chunk_rows
        return sum(int(total(memory_map[start : start + step])) for start in range(0, len(memory_map), step))

    def scan_zarr(self) -> int:
        step = self.plain.chunks[0]
        return sum(int(total(self.plain[start : start + step])) for start in range(0, self.plain.shape[0], step))

    def look_up_numpy(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows of keys that are all there: one search in sorted first words, and the comparison."""
        words = keys.view(np.uint64)
        places = np.searchsorted(self.first_words, words[:, 0])
        if not (self.sorted_words[places] == words).all():
            raise SystemExit("a key was not found")
        return self.order[places]


def total(values: np.ndarray) -> np.uint64:
    """Return a sum that touches every byte at memory speed."""
    return np.add.reduce(values.reshape(-1).view(np.uint64))


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measured(bench: _Bench, rounds: int) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    full_size = len(bench.rows) >= 1_000_000 and bench.dim >= 512

    def add(tasks: dict[str, dict[str, Way]], rounds: int) -> None:
        for task, ways in tasks.items():
            taken = in_turns(ways, rounds)
            middle = medians(taken)
            figures.append({"task": task, "seconds": middle, "ratio": middle["numpy"] / middle["ours"], "all": taken})
            print_figure(figures[-1], full_size)

    add(bench.writing(), rounds)
    bench.remove()
    bench.write_ours(), bench.write_numpy(), bench.write_zarr()
    bench.open()
    add(bench.reading(), rounds)
    by_task = {str(figure["task"]): figure["seconds"] for figure in figures}
    for task in ("read all", "scan", "random rows"):
        added = by_task[f"{task}, checked"]["ours"] - by_task[f"{task}, unchecked"]["ours"]
        figures.append({"task": f"{task}: what checking adds", "seconds": {"ours": added}})
        print_figure(figures[-1], full_size)
    add(bench.appending(), max(rounds, 20))
    return figures


def print_figure(figure: dict, full_size: bool) -> None:
    task, seconds = figure["task"], figure["seconds"]
    columns = [f"{seconds[name] * 1e3:12.2f}" if name in seconds else f"{'':12s}" for name in ("ours", "numpy", "zarr")]
    ratio = f"{figure['ratio']:10.2f}" if "ratio" in figure else " " * 10
    said = ""
    if full_size and task in AT_LEAST:
        said = f"  at least {AT_LEAST[task]}: {'met' if figure['ratio'] >= AT_LEAST[task] else 'MISSED'}"
    elif full_size and task in AT_MOST_SECONDS:
        limit = AT_MOST_SECONDS[task]
        said = f"  at most {limit * 1e3:.0f} ms: {'met' if seconds['ours'] <= limit else 'MISSED'}"
    print(f"{task:36s}{''.join(columns)}{ratio}{said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one unless given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.dim, options.rounds = 20_000, 64, 2
    folder = Path(tempfile.mkdtemp(prefix="fluoroscope-arrays-", dir=options.folder))
    print(f"{options.rows:,} rows of {options.dim} float16, medians of {options.rounds} rounds, milliseconds")
    print(f"{'':36s}{'ours':>12s}{'numpy':>12s}{'zarr':>12s}{'numpy/ours':>10s}")
    try:
        figures = measured(_Bench(folder, options.rows, options.dim), options.rounds)
    finally:
        shutil.rmtree(folder)
    if options.write:
        write_record(RESULTS, vars(options), figures)


if __name__ == "__main__":
    sys.exit(main())
