"""How time and memory grow from ten thousand to ten million rows, beside the bare NumPy operation.

    python benchmarks/growth.py [--most 10000000] [--dim 128] [--rounds 5] [--folder DIR] [--quick] [--write]

Synthetic embeddings are written through a keyed array in commits of 64 MiB; then 10,000 keys are looked up, all rows
are scanned, and 10,000 random rows are read, each row checked. Beside each stands the same in NumPy alone: rows
appended to one file and synced once, a search in sorted numbers with the comparison of the keys, a sum over a memory
map, rows of a memory map. Ours and NumPy take turns, times are medians, files are in the page cache.

The slope of log(time) over log(rows) may exceed NumPy's by 0.05 at most. Memory is what Python and NumPy allocate at
most (tracemalloc, in runs that are not timed) beyond the result and beyond what the open array holds: its keys and the
look-up over them, whose bytes a row are printed. Writing needs up to some 20 bytes a row more for a moment, while keys
are sorted in among the others; all else is constant. `--write` stores the figures in results/growth.json, `--quick` is
a smoke run on few rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from comparing import Way, in_turns, medians, write_record

from engine.arrays.keyed_array import KeyedArray

RESULTS = Path(__file__).parent / "results" / "growth.json"
COMMIT_BYTES = 64 << 20
ASKED = 10_000
STEEPER = 0.05
TASKS = ("write", "look up", "scan", "gather")


def keys_from(start: int, count: int) -> np.ndarray:
    """Return keys (count, 16) as evenly spread as digests are: SplitMix64 of two counters."""
    words = np.empty((count, 2), np.uint64)
    words[:, 0] = np.arange(2 * start, 2 * (start + count), 2)
    words[:, 1] = words[:, 0] + np.uint64(1)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (words ^ (words >> np.uint64(31))).view(np.uint8)


class _Size:
    """One number of rows, written in both forms, and the tasks on it."""

    def __init__(self, folder: Path, rows: int, dim: int) -> None:
        self.rows, self.dim, self.cache, self.npy = rows, dim, folder / "cache", folder / "rows.bin"
        step = COMMIT_BYTES // (2 * dim)
        self.block = np.random.Generator(np.random.PCG64(0)).standard_normal((step, dim), np.float32).astype(np.float16)
        self.numbers = np.random.Generator(np.random.PCG64(1)).integers(0, rows, ASKED)
        self.memory: dict[str, int] = {}

    def blocks(self) -> list[tuple[int, np.ndarray]]:
        step = len(self.block)
        return [(start, self.block[: self.rows - start]) for start in range(0, self.rows, step)]

    def write(self) -> None:
        array = KeyedArray.create(self.cache, "image", "bench", (self.dim,), {"of": "benchmark"})
        for start, rows in self.blocks():
            array.append(keys_from(start, len(rows)), rows)
        array.finish()

    def write_bare(self) -> None:
        with open(self.npy, "wb") as file:
            for start, rows in self.blocks():
                keys_from(start, len(rows))
                rows.tofile(file)
            os.fsync(file.fileno())

    def remove(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)

    def remove_bare(self) -> None:
        self.npy.unlink(missing_ok=True)

    def open(self) -> int:
        """Open what was written, with all keys sorted; return the bytes that the open array holds."""
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        self.array = KeyedArray.open(self.cache, "image", "bench")
        self.array.find(self.array.keys[:1])
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        self.map = np.memmap(self.npy, np.float16, "r", shape=(self.rows, self.dim))
        words = self.array.keys.view(np.uint64)
        self.order = np.argsort(words[:, 0])
        self.sorted_words = words[self.order]
        self.first_words = np.ascontiguousarray(self.sorted_words[:, 0])
        self.asked = self.array.keys[self.numbers]
        return held

    def scan(self) -> int:
        return sum(int(total(rows)) for _, rows in self.array.chunks())

    def scan_bare(self) -> int:
        step = self.array.form.chunk_rows
        return sum(int(total(self.map[start : start + step])) for start in range(0, self.rows, step))

    def look_up_bare(self) -> np.ndarray:
        words = self.asked.view(np.uint64)
        places = np.searchsorted(self.first_words, words[:, 0])
        if not (self.sorted_words[places] == words).all():
            raise SystemExit("a key was not found")
        return self.order[places]

    def tasks(self) -> dict[str, dict[str, Way]]:
        return {
            "look up": {"ours": Way(lambda: self.array.find(self.asked)), "numpy": Way(self.look_up_bare)},
            "scan": {"ours": Way(self.scan), "numpy": Way(self.scan_bare)},
            "gather": {
                "ours": Way(lambda: self.array.read(self.numbers)),
                "numpy": Way(lambda: self.map[self.numbers]),
            },
        }

    def check(self) -> None:
        """Compare both forms, so that the times are those of the same work."""
        if not (
            np.array_equal(self.array.find(self.asked), self.look_up_bare())
            and self.scan() == self.scan_bare()
            and np.array_equal(self.array.read(self.numbers), self.map[self.numbers])
        ):
            raise SystemExit("ours and NumPy do not agree")


def total(values: np.ndarray) -> np.uint64:
    """Return a sum that touches every byte at memory speed."""
    return np.add.reduce(values.reshape(-1).view(np.uint64))


def peak_beyond(run: Callable[[], object], kept: Callable[[], int] = lambda: 0) -> int:
    """Return the bytes that a call allocates at most, beyond its result and what `kept` says stays by design."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - (result.nbytes if isinstance(result, np.ndarray) else 0) - kept()


def measured(folder: Path, rows: int, dim: int, rounds: int) -> dict[str, object]:
    """Return times and memory at one number of rows."""
    size = _Size(folder, rows, dim)
    ways = {"ours": Way(size.write, before=size.remove), "numpy": Way(size.write_bare, before=size.remove_bare)}
    seconds = {"write": medians(in_turns(ways, rounds if rows <= 1_000_000 else 1, warm=rows <= 100_000))}
    held = size.open()
    size.check()
    for task, ways in size.tasks().items():
        seconds[task] = medians(in_turns(ways, rounds))
    memory = {task: peak_beyond(ways["ours"].run) for task, ways in size.tasks().items()}
    del size.array, size.map
    size.remove(), size.remove_bare()
    memory["write"] = peak_beyond(size.write, lambda: held)
    size.remove()
    figure = {"rows": rows, "seconds": seconds, "memory": memory, "held_bytes_a_row": held / rows}
    times = "".join(f"{1e3 * seconds[task][who]:11.2f}" for task in TASKS for who in ("ours", "numpy"))
    peaks = "".join(f"{memory[task] / 2**20:9.1f}" for task in TASKS)
    print(f"{rows:11,}{times}  |{peaks}{held / rows:9.1f}", flush=True)
    return figure


def slope(rows: list[int], seconds: list[float]) -> float:
    """Return the least-squares slope of log(seconds) over log(rows)."""
    return float(np.polyfit(np.log(rows), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one unless given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.most, options.rounds = 40_000, 2
    sizes = [round(10_000 * 10 ** (step / 2)) for step in range(12)]
    sizes = [size for size in sizes if size <= options.most]
    folder = Path(tempfile.mkdtemp(prefix="fluoroscope-growth-", dir=options.folder))
    print(f"{options.dim} float16 a row; times in ms, ours and NumPy's; memory beyond result and array in MiB")
    heads = "".join(f"{task:>16s}      " for task in TASKS), "".join(f"{task:>9s}" for task in TASKS)
    print(f"{'':11s}{heads[0]}  |{heads[1]} held/row")
    try:
        figures = [measured(folder, rows, options.dim, options.rounds) for rows in sizes]
    finally:
        shutil.rmtree(folder)
    slopes = {
        task: {who: slope(sizes, [figure["seconds"][task][who] for figure in figures]) for who in ("ours", "numpy")}
        for task in TASKS
    }
    for task, each in slopes.items():
        steeper = each["ours"] - each["numpy"]
        said = "" if options.quick else f" at most {STEEPER}: {'met' if steeper <= STEEPER else 'MISSED'}"
        print(f"{task:8s} slope {each['ours']:6.3f}, NumPy's {each['numpy']:6.3f}: steeper by {steeper:6.3f}{said}")
    if options.write:
        write_record(RESULTS, vars(options), {"sizes": figures, "slopes": slopes})


if __name__ == "__main__":
    sys.exit(main())
