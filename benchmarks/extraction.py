"""Extraction beside its own limit: images from JPEG, from large grey PNG and from the pixel cache.

    python benchmarks/extraction.py [--source jpeg|png] [--images 512] [--model ViT-B-32] [--precision fp32]
                                    [--rounds 3] [--batch-size 32] [--compiled] [--device auto] [--folder DIR]
                                    [--write NAME]

The stages are measured as bare library calls, not by our code: Pillow decoding and open_clip's own geometry in a pool
of threads; the model's `encode_image` on ready float batches; the copy to the device where there is one. The limit is
the slowest stage's rate where the stages have their own hardware (a GPU), and the harmonic sum of all stages' rates
where they share the processor's cores. "ours" is `Cache.embed` in the steady state: a loaded model, files in the page
cache, an empty cache; all rows are committed and synced at its end. The rounds take turns; figures are medians.

Printed beside it: whether ours sees the pixels that open_clip's transform gives, bit by bit; what the fast decoder
changes in pixels and embeddings, and its rate; and the rate at which a second encoder gets its pixels from the cache,
against Pillow's bare decode-and-transform rate.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import write_record
from materials import model_named, write_grey_pngs, write_jpegs
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms

from engine import pixels
from engine.cache import Cache
from engine.encoder import Encoder, load_encoder
from engine.machine import usable_cores
from engine.sources import open_dataset

RESULTS = Path(__file__).parent / "results"


class Stages:
    """The stages of an extraction as bare calls of the libraries that do the work."""

    def __init__(self, encoder: Encoder, paths: list[Path], batch_size: int, compiled: bool) -> None:
        self.encoder, self.paths, self.batch_size = encoder, paths, batch_size
        whole = image_transform(encoder.preprocess.size, is_train=False, mean=encoder.preprocess.mean)
        # Up to the pixels: conversion to a tensor and normalising belong to the device here.
        self.geometry = transforms.Compose([step for step in whole.transforms if _is_geometry(step)])
        self.forward: Callable[[torch.Tensor], torch.Tensor] = encoder.model.encode_image
        if compiled:
            self.forward = torch.compile(encoder.model.encode_image, dynamic=False)
        size = (batch_size, 3, *encoder.preprocess.size)
        self.batch = torch.rand(size, device=encoder.device).to(encoder.dtype)
        self.bytes = torch.zeros((batch_size, *encoder.preprocess.size, 3), dtype=torch.uint8)
        if encoder.device.type == "cuda":
            self.bytes = self.bytes.pin_memory()

    def transformed(self, path: Path) -> np.ndarray:
        """Decode one image and take open_clip's way to the model's size."""
        with Image.open(path) as image:
            return np.asarray(self.geometry(image))

    def decode(self) -> float:
        """Return images a second, all cores busy."""
        with ThreadPoolExecutor(usable_cores()) as pool:
            start = time.perf_counter()
            for _ in pool.map(self.transformed, self.paths):
                pass
            return len(self.paths) / (time.perf_counter() - start)

    def encode(self, batches: int) -> float:
        """Return images a second of the forward pass alone."""
        with torch.no_grad():
            self.forward(self.batch)
            self._wait()
            start = time.perf_counter()
            for _ in range(batches):
                self.forward(self.batch)
            self._wait()
        return batches * self.batch_size / (time.perf_counter() - start)

    def copy(self, batches: int) -> float:
        """Return images a second of the way to the device alone."""
        self._wait()
        start = time.perf_counter()
        for _ in range(batches):
            self.bytes.to(self.encoder.device, non_blocking=True)
        self._wait()
        return batches * self.batch_size / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize(self.encoder.device)

    def limit(self, rates: dict[str, float]) -> float:
        """Return the pipeline's limit from its stages' rates."""
        if self.encoder.device.type == "cuda":
            return min(rates.values())
        return 1 / sum(1 / rate for rate in rates.values())


def _is_geometry(step: Any) -> bool:
    name = getattr(step, "__name__", "")
    return isinstance(step, transforms.Resize | transforms.CenterCrop) or name == "_convert_to_rgb"


def embedded(
    folder: Path, cache: Path, encoder: Encoder, what: list[str], options: argparse.Namespace
) -> tuple[float, float]:
    """Embed into an empty cache (pixels that are there are kept); return images a second, and storing's share of it."""
    shutil.rmtree(cache / "arrays.zarr" / "image", ignore_errors=True)
    dataset = open_dataset(f"folder:{folder}")
    report = Cache(cache).embed(dataset, encoder, what, batch_size=options.batch_size, compiled=options.compiled)
    assert not len(report.failures), report.failures
    assert report.computed[what[-1]] == len(dataset), report.computed
    return len(dataset) / report.seconds, report.waits["store"] / report.seconds


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write = write_jpegs if options.source == "jpeg" else write_grey_pngs
    images = folder / f"{options.source}-{options.images}"
    paths = write(images, options.images)
    model = model_named(options.model, folder)
    encoder = load_encoder(model, device=options.device, precision=options.precision)
    stages = Stages(encoder, paths, options.batch_size, options.compiled)
    same = all(
        np.array_equal(encoder.preprocess(pixels.decode(path.read_bytes()))[0], _three(stages.transformed(path)))
        for path in paths[:: max(1, len(paths) // 32)]
    )
    batches = max(2, min(16, options.images // options.batch_size))
    embedded(images, folder / "cache", encoder, ["image"], options)  # warm: kernels, page cache, compilation
    rounds: dict[str, list[float]] = {"decode": [], "encode": [], "ours": [], "limit": [], "ratio": [], "storing": []}
    if encoder.device.type == "cuda":
        rounds["copy"] = []
    for _ in range(options.rounds):
        rates = {"decode": stages.decode(), "encode": stages.encode(batches)}
        if encoder.device.type == "cuda":
            rates["copy"] = stages.copy(batches)
        ours, storing = embedded(images, folder / "cache", encoder, ["image"], options)
        # The model once more: machines that others share change their pace from minute to minute.
        rates["encode"] = (rates["encode"] + stages.encode(batches)) / 2
        limit = stages.limit(rates)
        for name, value in (
            *rates.items(),
            ("ours", ours),
            ("limit", limit),
            ("ratio", ours / limit),
            ("storing", storing),
        ):
            rounds[name].append(value)
    figures: dict[str, Any] = {name: statistics.median(values) for name, values in rounds.items()}
    figures |= {"rounds": rounds, "bit_equal_pixels": same, "batch_size": options.batch_size}
    figures |= _pixel_cache(images, folder, encoder, options, stages)
    if options.source == "jpeg":
        figures |= _fast_decoder(paths, folder, model, encoder, stages, options)
    return figures


def _pixel_cache(
    images: Path, folder: Path, encoder: Encoder, options: argparse.Namespace, stages: Stages
) -> dict[str, float]:
    """Return the rate at which a second pass gets its pixels, and at which it embeds from them."""
    cache, dataset = Cache(folder / "cache"), open_dataset(f"folder:{images}")
    embedded(images, folder / "cache", encoder, ["pixels", "image"], options)
    rates = []
    for _ in range(options.rounds):
        bare = stages.decode()
        start = time.perf_counter()
        stored = cache.pixels(dataset, encoder.preprocess)
        for first in range(0, len(stored), options.batch_size):
            stored[first : first + options.batch_size]
        rates.append((len(stored) / (time.perf_counter() - start), bare))
    ours, _ = embedded(images, folder / "cache", encoder, ["image"], options)
    cached = statistics.median(rate for rate, _ in rates)
    ratio = statistics.median(rate / bare for rate, bare in rates)
    return {"cached_pixels": cached, "cached_pixels_over_pillow": ratio, "ours_from_pixel_cache": ours}


def _fast_decoder(
    paths: list[Path], folder: Path, model: str, encoder: Encoder, stages: Stages, options: argparse.Namespace
) -> dict[str, float]:
    fast = load_encoder(model, device=options.device, precision=options.precision, decoder="fast")

    def decoded(path: Path) -> np.ndarray:
        return fast.preprocess(pixels.decode(path.read_bytes(), at_least=fast.preprocess.at_least))[0]

    some = paths[: 2 * options.batch_size]
    exact, quick = np.stack([_three(stages.transformed(path)) for path in some]), np.stack([decoded(p) for p in some])
    with ThreadPoolExecutor(usable_cores()) as pool:
        start = time.perf_counter()
        for _ in pool.map(decoded, paths):
            pass
        rate = len(paths) / (time.perf_counter() - start)
    whole = [embedded(paths[0].parent, folder / "cache-fast", fast, ["image"], options) for _ in range(options.rounds)]
    cosines = torch.nn.functional.cosine_similarity(encoder.encode_pixels(exact), encoder.encode_pixels(quick))
    difference = np.abs(exact.astype(int) - quick)
    return {
        "fast_decode": rate,
        "ours_fast": statistics.median(rate for rate, _ in whole),
        "fast_mean_grey_levels": float(difference.mean()),
        "fast_largest_grey_levels": float(difference.max()),
        "fast_least_cosine": float(cosines.min()),
    }


def _three(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=["jpeg", "png"], default="jpeg")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip's, or a model's name")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept, so that images and models are made once")
    parser.add_argument("--write", metavar="NAME", help="store the figures as results/NAME.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(options, options.folder or Path(temporary))
    print(f"{options.model} {options.precision}, {options.images} images from {options.source}, images/s (medians)")
    for name in ("decode", "copy", "encode", "limit", "ours"):
        if name in figures:
            print(f"  {name:<34}{figures[name]:10.1f}")
    print(f"  {'ours / limit (at least 0.90)':<34}{figures['ratio']:10.3f}")
    print(f"  {'pixels as open_clip gives them':<34}{'equal' if figures['bit_equal_pixels'] else 'DIFFERENT':>10}")
    for name, label in (
        ("storing", "storing, of its time (under 0.02)"),
        ("cached_pixels", "pixels from the cache"),
        ("cached_pixels_over_pillow", "over Pillow's rate (at least 20)"),
        ("ours_from_pixel_cache", "ours from cached pixels"),
        ("fast_decode", "fast decoder alone"),
        ("ours_fast", "ours with it"),
        ("fast_mean_grey_levels", "its mean error, grey levels"),
        ("fast_least_cosine", "least cosine of its embeddings"),
    ):
        if name in figures:
            print(f"  {label:<34}{figures[name]:10.4g}")
    if options.write:
        write_record(RESULTS / f"{options.write}.json", vars(options), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
