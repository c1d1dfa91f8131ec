"""How long `fluoro search` on a ready cache takes to its first answer, beside importing torch and loading the model.

    python benchmarks/startup.py [--model ViT-B-32] [--images 200] [--rounds 5] [--folder DIR] [--write]

Whole processes from start to end, in turns, medians. Bare is a Python that imports torch and open_clip and loads the
same folder by open_clip's own `create_model_and_transforms` and `get_tokenizer`. Both read files from the page cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from comparing import Way, in_turns, medians, write_record
from materials import write_jpegs, write_model

RESULTS = Path(__file__).parent / "results" / "startup.json"
BARE = """
import sys, torch, open_clip
name = "local-dir:" + sys.argv[1]
open_clip.create_model_and_transforms(name)
open_clip.get_tokenizer(name)
"""


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="kept, so that images and models are made once")
    parser.add_argument("--write", action="store_true", help=f"store the figures in results/{RESULTS.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        images, cache = folder / f"jpeg-{options.images}", folder / "search-cache"
        write_jpegs(images, options.images)
        model = write_model(folder / options.model, options.model)
        fluoro = [sys.executable, "-m", "jobs.cli"]
        common = [f"folder:{images}", "--model", f"local-dir:{model}", "--cache", str(cache)]
        run([*fluoro, "embed", *common])
        ways = {
            "ours": Way(lambda: run([*fluoro, "search", *common, "--text", "a cat", "-k", "3", "--json"])),
            "bare": Way(lambda: run([sys.executable, "-c", BARE, str(model)])),
        }
        taken = in_turns(ways, options.rounds)
    figures = medians(taken)
    ratio = figures["ours"] / figures["bare"]
    print(f"fluoro search, first answer {figures['ours']:.2f} s; importing torch and loading {figures['bare']:.2f} s")
    print(f"  ours / bare (at most 1.5) {ratio:.2f}")
    if options.write:
        write_record(RESULTS, vars(options), {**figures, "ratio": ratio, "rounds": taken})
    return 0


if __name__ == "__main__":
    sys.exit(main())
