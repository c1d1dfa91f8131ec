"""Whole processes on the same files: `fluoro embed` beside clip-retrieval's `clip inference`.

    python benchmarks/clip_retrieval.py --peer PYTHON [--images 512] [--model ViT-B-32] [--setting default|best]
                                        [--rounds 3] [--folder DIR] [--write NAME]

`--peer` is the Python of an environment that has clip-retrieval 2.45 (its pins exclude ours: numpy below 2, pyarrow
below 16). It gets the same random weights, by open_clip's own `create_model_and_transforms` from the same folder. Wall
time from process start to process end, files in the page cache, an empty cache and an empty output folder; the rounds
take turns, ours once with each decoder. "default" is clip-retrieval's batch of 256 with 4 workers, "best" its best
setting on two cores: 64 with 2. Peak memory is that of the process and its children together, sampled.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from comparing import write_record
from materials import write_jpegs, write_model

RESULTS = Path(__file__).parent / "results"
SETTINGS = {"default": (256, 4), "best": (64, 2)}
# clip-retrieval loads open_clip models by a name that a hub knows; here the name is the folder's.
PEER = """
import sys
import open_clip
images, output, model, batch, workers = sys.argv[1:]
real = open_clip.create_model_and_transforms
open_clip.create_model_and_transforms = lambda *a, **k: real("local-dir:" + model, device=k.get("device", "cpu"))
real_tokenizer = open_clip.get_tokenizer
open_clip.get_tokenizer = lambda *a, **k: real_tokenizer("local-dir:" + model)
from clip_retrieval.clip_inference.main import main
main(images, output, batch_size=int(batch), num_prepro_workers=int(workers), enable_text=False, use_jit=False,
     clip_model="open_clip:ViT-B-32/random")
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return wall seconds and the peak memory of it and its children, GB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, sum(_memory(each) for each in [watched, *_children(watched)]))
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{output.read()[-3000:]}")
    return seconds, peak / 1e9


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="Python of an environment with clip-retrieval")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--setting", choices=SETTINGS, default="default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept, so that images and models are made once")
    parser.add_argument("--write", metavar="NAME", help="store the figures as results/NAME.json")
    options = parser.parse_args(arguments)
    batch, workers = SETTINGS[options.setting]
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        images = folder / f"jpeg-{options.images}"
        write_jpegs(images, options.images)
        model = write_model(folder / options.model, options.model)
        cache, output = folder / "wall-cache", folder / "wall-peer"
        ours = [sys.executable, "-m", "jobs.cli", "embed", f"folder:{images}", "--model", f"local-dir:{model}"]
        ours += ["--cache", str(cache)]
        peer = [str(options.peer), "-c", PEER, str(images), str(output), str(model), str(batch), str(workers)]
        for _ in range(options.rounds):
            for name, command in (("ours", ours), ("ours_fast", [*ours, "--decoder", "fast"]), ("peer", peer)):
                shutil.rmtree(cache, ignore_errors=True)
                shutil.rmtree(output, ignore_errors=True)
                taken, most = timed(command)
                seconds.setdefault(name, []).append(taken)
                memory[name] = max(memory.get(name, 0.0), most)
    rates = {name: options.images / statistics.median(values) for name, values in seconds.items()}
    ratio, fast = (
        statistics.median(peer / own for own, peer in zip(seconds[name], seconds["peer"], strict=True))
        for name in ("ours", "ours_fast")
    )
    print(f"{options.images} JPEGs, {options.model}, wall time of whole processes (peer: {options.setting} setting)")
    for name, label in (
        ("ours", "fluoro embed"), ("ours_fast", "fluoro embed --decoder fast"), ("peer", "clip inference")
    ):  # fmt: skip
        print(f"  {label:<30}{rates[name]:8.1f} images/s{memory[name]:8.1f} GB")
    print(f"  ratio {ratio:.2f}, with the faster decoder {fast:.2f}")
    if options.write:
        figures = {"rates": rates, "ratio": ratio, "ratio_fast": fast, "seconds": seconds, "peak_gb": memory}
        write_record(RESULTS / f"{options.write}.json", vars(options), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
