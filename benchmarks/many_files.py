"""Many files: how fast unchanged ones are recognised, what new ones among them cost, and how memory grows.

    python benchmarks/many_files.py [--files 100000] [--new 1000] [--rounds 3] [--table] [--folder DIR] [--write]

All with a model that costs next to nothing, on tiny PNGs, through `Cache.embed`; peak memory is that of a process of
its own for each size.
Printed: recognising `--files` unchanged files (no image is opened), beside one bare `os.stat` a file; then `--new` new
ones among them, beside `--new` files alone in an empty cache; then the peak memory of embedding a tenth of the files
and of embedding all. With `--table` the files are named by a parquet table instead of found in their folder.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from comparing import write_record
from materials import write_small_pngs, write_tiny_model

from engine.cache import Cache
from engine.encoder import load_encoder
from engine.sources import open_dataset

RESULTS = Path(__file__).parent / "results"


def source(images: Path, table: bool) -> str:
    """Return the data set of all files below a folder, as it is now."""
    if not table:
        return f"folder:{images}"
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    patients = [f"p{number // 3}" for number in range(len(names))]
    pd.DataFrame({"image": names, "patient_id": patients}).to_parquet(images.with_suffix(".parquet"))
    return f"table:{images.with_suffix('.parquet')}?root={images}"


def embed(model: Path, data: str, cache: Path, rows: slice = slice(None)) -> tuple[float, int, int]:
    """Return the seconds, rows computed and images opened of one `Cache.embed`; opening the data set is included."""
    encoder = load_encoder(f"local-dir:{model}", device="cpu")
    start = time.perf_counter()
    dataset = open_dataset(data)
    if rows != slice(None):
        dataset = dataset.take(np.arange(len(dataset))[rows])
    report = Cache(cache).embed(dataset, encoder)
    return time.perf_counter() - start, report.computed["image"], report.opened


def peak(model: Path, data: str, cache: Path, count: int) -> tuple[float, float]:
    """Return peak memory in MB and seconds of embedding so many files, in a process of its own."""
    command = [sys.executable, __file__, "--child", str(model), data, str(cache), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, seconds = done.stdout.split()[-2:]
    return float(memory), float(seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="name the files by a parquet table")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true", help="store the figures in results/")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        model, data, cache, count = options.child
        seconds = embed(Path(model), data, Path(cache), slice(0, int(count)))[0]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        images, cache = folder / "images", folder / "cache"
        model = write_tiny_model(folder / "model")
        write_small_pngs(images, options.files)
        data = source(images, options.table)
        small, _ = peak(model, data, folder / "tenth", options.files // 10)
        large, first = peak(model, data, cache, options.files)
        unchanged, bare = [], []
        for _ in range(options.rounds):
            seconds, computed, opened = embed(model, data, cache)
            assert (computed, opened) == (0, 0), (computed, opened)
            unchanged.append(seconds)
            start = time.perf_counter()
            for name in images.rglob("*.png"):
                os.stat(name)
            bare.append(time.perf_counter() - start)
        added, alone = [], []
        for number in range(options.rounds):
            fresh = folder / f"fresh-{number}"
            # Other pixels than all before: a size of their own.
            write_small_pngs(fresh, options.new, size=17 + number)
            seconds, computed, _ = embed(model, source(fresh, options.table), folder / f"alone-{number}")
            alone.append(seconds)
            shutil.copytree(fresh, images / f"new-{number}")
            data = source(images, options.table)
            seconds, again, opened = embed(model, data, cache)
            assert computed == again == opened == options.new, (computed, again, opened)
            added.append(seconds)
    figures = {
        "files": options.files,
        "unchanged_seconds": statistics.median(unchanged),
        "stat_seconds": statistics.median(bare),
        "new": options.new,
        "new_among_them_seconds": statistics.median(added),
        "new_alone_seconds": statistics.median(alone),
        "peak_mb_of_a_tenth": small,
        "peak_mb": large,
        "first_pass_images_per_second": options.files / first,
    }
    extra = figures["new_among_them_seconds"] - figures["unchanged_seconds"]
    print(f"{options.files:,} unchanged files recognised in {figures['unchanged_seconds']:.2f} s (limit 3 s)")
    print(f"  walking and os.stat alone       {figures['stat_seconds']:.2f} s")
    print(f"{options.new:,} new among them: {extra:.2f} s more; alone {figures['new_alone_seconds']:.2f} s")
    print(f"peak memory {small:,.0f} MB for {options.files // 10:,}, {large:,.0f} MB for all: {large / small:.3f}")
    print(f"first pass {figures['first_pass_images_per_second']:,.0f} images/s")
    if options.write:
        write_record(RESULTS / f"many_files{'_table' * options.table}.json", vars(options), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
