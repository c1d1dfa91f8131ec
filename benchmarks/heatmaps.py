"""Heatmaps on demand: one label and fourteen, batched, against pytorch-grad-cam's loop and the bare passes.

A ViT with random weights (the numbers cost the same), one image, Grad-CAM at the layer that suits a class token.

- *first map*: a fresh `Explainer` of a loaded model, one label, one image: from pixels, and from cached tokens.
- *ours*: one `Explainer.batch` of all labels; *peer*: the library called once a label, as its documentation shows, its
  hooks placed once and gradients of the image asked for, since the weights are frozen.
- *limit*: a bare forward pass of the tower (from tokens: of the last block) and one bare backward pass of the last
  block.

Maps are compared label by label before anything is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import Way, in_turns, medians, write_record
from materials import model_named
from pytorch_grad_cam import GradCAM

from analysis import cam
from engine.encoder import load_encoder

RESULT = Path(__file__).parent / "results" / "heatmaps.json"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip architecture, or a model's name")
    parser.add_argument("--labels", type=int, default=14)
    parser.add_argument("--images", type=int, default=1, help="images a batch, for the batched way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(model_named(options.model, Path(folder)), device=options.device)
    figures = measure(encoder, options.labels, options.images, options.rounds)
    for name, value in figures.items():
        print(f"{name:55} {value:.4g}" if isinstance(value, float) else f"{name:55} {value}")
    write_record(options.result, vars(options), figures)


def measure(encoder: Any, labels: int, images: int, rounds: int) -> dict[str, Any]:
    """Return medians in seconds, and ratios."""
    encoder.model.requires_grad_(False)
    rng = np.random.default_rng(0)
    height, width = encoder.preprocess.size
    coarse = rng.integers(0, 255, (images, height // 16, width // 16, 3), dtype=np.uint8)
    pixels = coarse.repeat(16, axis=1).repeat(16, axis=2)
    targets = [cam.TextTarget(rng.standard_normal(encoder.dim)) for _ in range(labels)]
    last = len(encoder.trunk.blocks) - 1
    tokens = cam.Tokens(encoder.tokens(pixels, last).cpu().numpy(), last)
    explainer = cam.Explainer(encoder)
    peer = library(encoder, explainer.layer)

    def loop() -> list[np.ndarray]:
        inputs = encoder.input_of(pixels)
        return [peer(image[None], target) for image in inputs for target in targets]

    likeness = compare(explainer, pixels, targets, loop())
    ways = {
        "first map, from pixels": lambda: cam.Explainer(encoder).heatmaps(pixels[0], targets[:1]),
        "first map, from tokens": lambda: cam.Explainer(encoder).heatmaps(
            cam.Tokens(tokens.values[:1], last), targets[:1]
        ),
        "all labels, from pixels": lambda: wait(explainer.batch(pixels, targets)),
        "all labels, from tokens": lambda: wait(explainer.batch(tokens, targets)),
        "limit from pixels": lambda: bare(encoder, pixels, None),
        "limit from tokens": lambda: bare(encoder, pixels, tokens),
        "library's loop": loop,
    }
    seconds = medians(in_turns({name: Way(synchronised(encoder, way)) for name, way in ways.items()}, rounds))
    return {
        "device": str(encoder.device),
        "least correlation with the library's maps": likeness,
        **{f"{name}, s": value for name, value in seconds.items()},
        "library's loop / all labels from pixels": seconds["library's loop"] / seconds["all labels, from pixels"],
        "library's loop / all labels from tokens": seconds["library's loop"] / seconds["all labels, from tokens"],
        "all labels from pixels / limit": seconds["all labels, from pixels"] / seconds["limit from pixels"],
        "all labels from tokens / limit": seconds["all labels, from tokens"] / seconds["limit from tokens"],
    }


def library(encoder: Any, layer: Any) -> Callable[[torch.Tensor, Any], np.ndarray]:
    """Return a call of pytorch-grad-cam for one image and one label."""
    grad_cam = GradCAM(encoder.model.visual, [layer.module], reshape_transform=layer.reshape)
    return lambda image, target: grad_cam(image.clone().requires_grad_(), [target.score])[0]


def compare(explainer: cam.Explainer, pixels: np.ndarray, targets: list[Any], theirs: list[np.ndarray]) -> float:
    """Return the least correlation of our maps with the library's, over labels that have one."""
    ours = [found for of_image in explainer.batch_heatmaps(pixels, targets) for found in of_image]
    pairs = [(one.map, other) for one, other in zip(ours, theirs, strict=True) if not one.empty]
    return min(float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) for one, other in pairs)


def bare(encoder: Any, pixels: np.ndarray, tokens: cam.Tokens | None) -> torch.Tensor:
    """Do one forward pass, and one backward pass of the last block."""
    trunk = encoder.trunk
    last = len(trunk.blocks) - 1
    with torch.no_grad():
        entered = encoder.tokens(pixels, last) if tokens is None else torch.as_tensor(tokens.values).to(encoder.device)
    entered = entered.requires_grad_()
    return torch.autograd.grad(trunk.from_tokens(entered, last).sum(), entered)[0]


def synchronised(encoder: Any, way: Callable[[], Any]) -> Callable[[], Any]:
    """Return a way that ends when its device has finished."""

    def run() -> Any:
        found = way()
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def wait(found: cam.RawMaps) -> np.ndarray:
    """Return raw maps where they are of use."""
    return found.raw.cpu().numpy()


if __name__ == "__main__":
    main()
