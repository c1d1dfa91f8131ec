"""Fine-tuning beside the usual ways of doing it, and beside what the towers themselves allow.

    python benchmarks/finetuning.py [--part files|tokens|precision|limit ...] [--device auto] [--rounds 3] [--quick]
                                    [--images 2000] [--distinct 200] [--opened 400] [--small phantom-clip]
                                    [--large ViT-B-16] [--batch-size 32] [--folder DIR] [--write NAME]

- **files**: an epoch of a small tower from the pixel cache, the whole call with its start, against the usual loader
  that opens the files in every epoch: torch's `DataLoader` with a process a core, Pillow, open_clip's own transform,
  and a plain loop of forward, backward and AdamW. Grey PNGs of 2048 x 2500, the size of IU-Xray's Kaggle copy.
  `--images` of them are links to `--distinct` different ones; the loader opens `--opened` of them a round and is
  scaled. All files are in the page cache. What filling the pixel cache costs, once, stands beside.
- **tokens**: the last block, the projection and a head of a large tower, from its cached tokens, against the plain loop
  over all blocks of which the earlier ones are frozen.
- **precision**: the large tower whole, in float32 and with bfloat16 autocast.
- **limit**: the training loop (rows, optimiser, clipping, checks) against bare forward and backward passes of the same
  tower on random tensors that lie ready on the device, for both towers.

Ways take turns; figures are medians. On a GPU the large tower trains with bfloat16 autocast in both ways.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import write_record
from materials import model_named, write_grey_pngs, write_jpegs
from open_clip.transform import image_transform
from PIL import Image
from torch import nn

from analysis.finetuning import FinetuneConfig, FinetuneResult, finetune
from engine.cache import Cache
from engine.encoder import Encoder, load_encoder
from engine.machine import usable_cores
from engine.sources import open_dataset

RESULTS = Path(__file__).parent / "results"
PARTS = ("files", "tokens", "precision", "limit")
LABELS = 14


def in_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each way says of itself (images a second) in each round; the order turns."""
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(ways[name]())
    return found


class Bench:
    """One machine, its folder of materials, and the options."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.rng = np.random.default_rng(0)

    def encoder(self, name: str) -> Encoder:
        """Return a loaded model."""
        return load_encoder(model_named(name, self.folder / "models"), device=self.options.device)

    def labels(self, count: int) -> np.ndarray:
        """Return random labels."""
        return (self.rng.random((count, LABELS)) < 0.2).astype(int)

    def mixed(self, encoder: Encoder, kind: str) -> AbstractContextManager:
        """Return the context of mixed precision."""
        return torch.autocast(encoder.device.type, torch.bfloat16) if kind == "bf16" else nullcontext()

    # -- An epoch, by files and by the cache -----------------------------------------------------------------------

    def files(self) -> dict[str, Any]:
        """Measure an epoch by files and by the cache."""
        options = self.options
        encoder = self.encoder(options.small)
        real = write_grey_pngs(self.folder / "distinct", options.distinct, *((256, 320) if options.quick else ()))
        linked = self.folder / f"linked-{options.images}"
        linked.mkdir(parents=True, exist_ok=True)
        paths = [linked / f"{number:06d}.png" for number in range(options.images)]
        for number, path in enumerate(paths):
            if not path.exists():
                os.link(real[number % len(real)], path)
        dataset = open_dataset(f"folder:{linked}")
        cache = Cache(self.folder / "cache")
        start = time.perf_counter()
        cache.embed(dataset, encoder, ["pixels"])
        filling = time.perf_counter() - start
        rows = cache.pixels(dataset, encoder.preprocess)
        assert len(rows) == options.images
        y = self.labels(options.images)
        train, val = np.arange(1, options.images), np.arange(1)
        config = FinetuneConfig(epochs=1, batch_size=options.batch_size)

        def ours() -> float:
            begun = time.perf_counter()
            finetune(encoder, rows, y, train, val, config)
            return time.perf_counter() - begun

        opened = paths[: options.opened]
        found = in_turns(
            {"ours": ours, "loader": lambda: self._loader_epoch(encoder, opened, y) / len(opened) * options.images},
            options.rounds,
        )
        return {
            **_seconds(found),
            "filling the pixel cache, once": filling,
            "loader / ours (5 asked)": _ratio(found, "loader", "ours"),
        }

    def _loader_epoch(self, encoder: Encoder, paths: list[Path], y: np.ndarray) -> float:
        transform = image_transform(
            encoder.preprocess.size, is_train=False, mean=encoder.preprocess.mean, std=encoder.preprocess.std
        )
        batch_size = self.options.batch_size
        loader = torch.utils.data.DataLoader(
            Files(paths, y, transform), batch_size, shuffle=True, num_workers=usable_cores()
        )
        model, optimizer = plain_model(encoder)
        begun = time.perf_counter()
        for images, labels in loader:
            plain_step(model, optimizer, images.to(encoder.device), labels.to(encoder.device))
        _finish(encoder)
        return time.perf_counter() - begun

    # -- The last block --------------------------------------------------------------------------------------------

    def tokens(self) -> dict[str, Any]:
        """Measure the last block's training from tokens and from images."""
        options = self.options
        encoder = self.encoder(options.large)
        kind = "bf16" if encoder.device.type == "cuda" else "none"
        count = 3 * options.batch_size
        images = self.folder / f"jpegs-{count}"
        write_jpegs(images, count, 256)
        dataset = open_dataset(f"folder:{images}")
        cache = Cache(self.folder / "cache")
        cache.embed(dataset, encoder, ["pixels", "tokens@-1"])
        pixels = cache.pixels(dataset, encoder.preprocess)
        tokens = cache.tokens(dataset, encoder, -1)
        y = self.labels(count + 1)
        epochs = 2 if options.quick else 8
        config = FinetuneConfig(
            from_block=-1, epochs=epochs, patience=epochs, batch_size=options.batch_size, autocast=kind
        )
        model, optimizer = plain_model(encoder, last_block_only=True)

        def frozen() -> float:
            begun = time.perf_counter()
            for first in range(0, count, options.batch_size):
                chosen = np.arange(first, first + options.batch_size)
                images = encoder.preprocess.normalise(torch.from_numpy(pixels[chosen]).to(encoder.device))
                labels = torch.from_numpy(y[chosen]).float().to(encoder.device)
                with self.mixed(encoder, kind):
                    plain_step(model, optimizer, images, labels)
            _finish(encoder)
            return count / (time.perf_counter() - begun)

        def ours() -> float:
            return finetune(encoder, tokens, y[:count], np.arange(1, count), np.arange(1), config).images_per_second

        found = in_turns({"ours": ours, "all blocks, frozen": frozen}, options.rounds)
        return {
            **_rates(found),
            "ours / all blocks (6 asked)": _ratio(found, "ours", "all blocks, frozen"),
            "bytes of tokens an image": int(np.prod(tokens.shape[1:]) * 2),
        }

    # -- Precision -------------------------------------------------------------------------------------------------

    def precision(self) -> dict[str, Any]:
        """Measure both precisions."""
        encoder = self.encoder(self.options.large)
        found = in_turns(
            {
                name: lambda kind=kind: self._ours(encoder, kind)
                for name, kind in (("float32", "none"), ("bf16", "bf16"))
            },
            self.options.rounds,
        )
        return {**_rates(found), "bf16 / float32": _ratio(found, "bf16", "float32")}

    # -- The limit -------------------------------------------------------------------------------------------------

    def limit(self) -> dict[str, Any]:
        """Measure the loop beside bare passes."""
        figures: dict[str, Any] = {}
        for which in ("small", "large"):
            encoder = self.encoder(getattr(self.options, which))
            kind = "bf16" if encoder.device.type == "cuda" else "none"
            found = in_turns(
                {
                    f"ours, {which}": lambda encoder=encoder, kind=kind: self._ours(encoder, kind),
                    f"bare, {which}": lambda encoder=encoder, kind=kind: self._bare(encoder, kind),
                },
                self.options.rounds,
            )
            figures |= _rates(found)
            figures[f"ours / bare, {which} (0.9 asked)"] = _ratio(found, f"ours, {which}", f"bare, {which}")
        return figures

    def _steps(self, encoder: Encoder) -> int:
        if self.options.quick:
            return 2
        parameters = sum(weights.numel() for weights in encoder.model.visual.parameters())
        return 100 if encoder.device.type == "cuda" else 20 if parameters < 20e6 else 2

    def _ours(self, encoder: Encoder, kind: str) -> float:
        """Return our images a second over the training loop of the whole tower."""
        count = self._steps(encoder) * self.options.batch_size
        pixels = self.rng.integers(0, 256, (count + 1, *encoder.preprocess.size, 3), dtype=np.uint8)
        config = FinetuneConfig(epochs=1, batch_size=self.options.batch_size, autocast=kind)  # type: ignore[arg-type]
        result: FinetuneResult = finetune(
            encoder, pixels, self.labels(count + 1), np.arange(count), np.array([count]), config
        )
        return result.images_per_second

    def _bare(self, encoder: Encoder, kind: str) -> float:
        """Return the images a second of forward and backward passes on tensors that lie ready."""
        model, _ = plain_model(encoder)
        images = torch.randn(self.options.batch_size, 3, *encoder.preprocess.size, device=encoder.device)
        labels = torch.from_numpy(self.labels(self.options.batch_size)).float().to(encoder.device)
        steps = self._steps(encoder)
        begun = time.perf_counter()
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            with self.mixed(encoder, kind):
                loss = nn.functional.binary_cross_entropy_with_logits(model(images).float(), labels)
            loss.backward()
        _finish(encoder)
        return steps * len(images) / (time.perf_counter() - begun)


class Files(torch.utils.data.Dataset):
    """The usual data set: a file is opened whenever it is asked for."""

    def __init__(self, paths: list[Path], y: np.ndarray, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.y, self.transform = paths, torch.from_numpy(y).float(), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.paths[number]) as image:
            return self.transform(image), self.y[number]


class Plain(nn.Module):
    """open_clip's tower and a linear head."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.visual = copy.deepcopy(encoder.model.visual).float().train()
        self.head = nn.Linear(encoder.dim, LABELS).to(encoder.device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        found = self.visual(images)
        return self.head(found[0] if isinstance(found, tuple) else found)


def plain_model(encoder: Encoder, last_block_only: bool = False) -> tuple[Plain, torch.optim.Optimizer]:
    """Return a tower with a head as anyone would write it, and AdamW over what trains."""
    model = Plain(encoder).requires_grad_(True)
    if last_block_only:
        model.visual.requires_grad_(False)
        depth = len(encoder.trunk.blocks)
        for name, weights in model.visual.named_parameters():
            late = f"blocks.{depth - 1}." in name or f"resblocks.{depth - 1}." in name
            weights.requires_grad_(late or name.startswith(("ln_post", "proj", "trunk.norm", "head.")))
    free = [weights for weights in model.parameters() if weights.requires_grad]
    return model, torch.optim.AdamW(free, lr=1e-4)


def plain_step(model: Plain, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Take one step."""
    loss = nn.functional.binary_cross_entropy_with_logits(model(images).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _finish(encoder: Encoder) -> None:
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)


def _seconds(found: Mapping[str, list[float]]) -> dict[str, Any]:
    return {f"{name}, seconds an epoch": statistics.median(values) for name, values in found.items()}


def _rates(found: Mapping[str, list[float]]) -> dict[str, Any]:
    return {f"{name}, images/s": statistics.median(values) for name, values in found.items()}


def _ratio(found: Mapping[str, list[float]], one: str, other: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(first / second for first, second in zip(found[one], found[other], strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="all of them unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--opened", type=int, default=400)
    parser.add_argument("--small", default="phantom-clip")
    parser.add_argument("--large", default="ViT-B-16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--folder", type=Path, help="kept, so that files and models are made once")
    parser.add_argument("--write", metavar="NAME", help="store the figures as results/NAME.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.distinct, options.opened, options.batch_size, options.rounds = 24, 6, 12, 8, 1
        options.large = "phantom-clip"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, options.folder or Path(temporary))
        for part in options.part or PARTS:
            figures[part] = getattr(bench, part)()
            print(f"{part} ({load_names(options, part)})")
            for name, value in figures[part].items():
                print(f"  {name:<40}{value:12.4g}")
    if options.write:
        write_record(RESULTS / f"{options.write}.json", vars(options), figures)
    return 0


def load_names(options: argparse.Namespace, part: str) -> str:
    """Return which towers a part is about."""
    if part == "files":
        return f"{options.small}, {options.images} files of which {options.distinct} differ, {options.opened} opened"
    return f"{options.small} and {options.large}" if part == "limit" else options.large


if __name__ == "__main__":
    sys.exit(main())
