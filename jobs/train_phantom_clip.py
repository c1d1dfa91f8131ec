"""Train phantom-clip, the demo's model, from nothing: `fluoro model train-phantom-clip`.

In comes a config; out goes a model folder (`jobs.phantom_clip_folder`) and a log line now and then. Steps: workers draw
phantoms of a seed that no data set uses; a vocabulary is made from their reports; a small ViT and a small BERT are
trained together with the project's own contrastive objective (`analysis.contrastive`); the running average of the
weights is written in float16, and looked at as zero-shot AUROC on phantoms of another seed.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import roc_auc_score
from torch import nn

from analysis import contrastive, contrastive_training
from engine.errors import UsageError
from engine.labels import STUDY_LABELS
from engine.resources import resource
from jobs import phantom_clip_folder, phantom_pool
from jobs.config import JobConfig, load_config

log = logging.getLogger(__name__)

RESERVED_SEEDS = 100  # data sets, tests and users draw from these


class VisionOptions(JobConfig):
    """The image tower: open_clip's own ViT."""

    image_size: int = Field(default=144, description="side of the model's input, pixels")
    patch_size: int = Field(default=12, description="side of a patch, pixels")
    width: int = Field(default=128, description="length of a token")
    layers: int = Field(default=4, description="transformer blocks")
    head_width: int = Field(default=32, description="length of an attention head")


class TextOptions(JobConfig):
    """The text tower: a Hugging Face BERT."""

    width: int = Field(default=128, description="length of a token")
    layers: int = Field(default=2, description="transformer blocks")
    heads: int = Field(default=4, description="attention heads")
    context_length: int = Field(default=96, description="most tokens of a text")
    vocabulary: int = Field(default=1200, description="most pieces of the vocabulary")


class ObjectiveOptions(JobConfig):
    """The objective and the optimiser, see `analysis.contrastive.ContrastiveConfig`."""

    steps: int = Field(default=4266, ge=1, description="optimiser steps")
    batch_size: int = Field(default=16, ge=2, description="images a batch")
    parallel: int = Field(default=2, ge=1, description="batches a step, side by side in threads")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak rate")
    warmup_steps: int = Field(default=150, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's weight decay")
    average_decay: float = Field(default=0.998, ge=0, lt=1, description="decay of the running average of the weights")
    caption_weight: float = Field(default=0.25, ge=0, description="factor of images against captions")
    name_weight: float = Field(default=1.0, ge=0, description="factor of images against label names")
    region_weight: float = Field(default=15.0, ge=0, description="factor of regions against label names at the start")
    region_weight_end: float = Field(default=5.0, ge=0, description="the same at the end")
    region_block: int = Field(default=-2, description="block whose output the region term reads")
    limit_minutes: float | None = Field(default=75, gt=0, description="wall time of the loop; null for none")


class Config(JobConfig):
    """What `fluoro model train-phantom-clip` needs."""

    output: Path = Field(default=Path("phantom-clip"), description="model folder to write")
    overwrite: bool = Field(default=False, description="replace a model folder that is there")
    seed: int = Field(default=1001, ge=0, description="seed of the training phantoms, weights and batches")
    phantoms: int = Field(default=30_000, ge=1, description="phantoms to train on")
    first_phantoms: int = Field(default=3_000, ge=1, description="phantoms drawn before training starts")
    growth: int = Field(default=8, ge=0, description="further phantoms for each batch after the first")
    vocabulary_phantoms: int = Field(default=3_000, ge=1, description="phantoms whose reports make the vocabulary")
    enrich: float = Field(default=0.12, ge=0, description="least share of each label")
    check_seed: int = Field(default=1999, ge=0, description="seed of the phantoms that the training is watched on")
    check_phantoms: int = Field(default=700, ge=0, description="how many; 0 for none")
    check_every: int = Field(default=400, ge=1, description="steps between two looks, and between two saved states")
    embed_dim: int = Field(default=128, ge=1, description="length of an embedding")
    vision: VisionOptions = Field(default_factory=VisionOptions)
    text: TextOptions = Field(default_factory=TextOptions)
    objective: ObjectiveOptions = Field(default_factory=ObjectiveOptions)
    workers: int = Field(default=2, ge=0, description="processes that draw phantoms")
    threads: int | None = Field(default=None, ge=1, description="threads of the training; null for all cores")
    pool_directory: Path | None = Field(default=None, description="where drawn phantoms are kept for the next run")


@dataclass(frozen=True)
class Result:
    """What came out: the folder, its size, minutes taken, and AUROC by label on the watched phantoms."""

    folder: Path
    bytes: int
    minutes: float
    steps: int
    auroc: dict[str, float]


def run(config: Config, progress: Callable[[str, int, int], None] | None = None) -> Result:
    """Train and write the model folder.

    Parameters
    ----------
    config : Config
    progress : callable, optional
        Called with what is being done, how much is done, and of how much.

    Raises
    ------
    UsageError
        If the output exists and is not to be replaced, or a seed is one that data sets draw from.
    """
    _check(config)
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    vision = config.vision
    pool_config = phantom_pool.PoolConfig(
        config.seed, config.phantoms, config.enrich, vision.image_size, vision.patch_size
    )
    watched = _draw_watched(config)
    pool = phantom_pool.Pool(pool_config, config.workers, config.pool_directory)
    try:
        pool.wait_for(max(config.first_phantoms, config.vocabulary_phantoms))
        log.info("%d phantoms drawn after %.0f s", pool.filled, time.perf_counter() - began)
        folder = _prepare_folder(config, pool)
        model = phantom_clip_folder.build_model(folder)
        tokenize = CachedTokenizer(folder, config.text.context_length)
        log.info("towers: image %s, text %s parameters", _millions(model.visual), _millions(model.text))
        options = config.objective.model_dump(exclude={"batch_size"})
        settings = contrastive.ContrastiveConfig(**options)
        source = phantom_pool.batches(
            pool,
            tokenize,
            batch_size=config.objective.batch_size,
            mean=phantom_clip_folder.PIXEL_MEAN,
            std=phantom_clip_folder.PIXEL_STD,
            seed=config.seed,
            first=min(config.first_phantoms, config.phantoms),
            growth=config.growth,
            with_coverage=settings.region_weight > 0 or settings.region_weight_end > 0,
        )
        watch = _Watch(config, folder, watched, tokenize, pool, progress)
        averaged = contrastive_training.train(model, source, len(STUDY_LABELS), settings, watch)
    finally:
        pool.close()
    auroc = zero_shot_auroc(averaged, tokenize, *watched) if watched is not None else {}
    phantom_clip_folder.write_weights(averaged, folder)
    _publish(folder, config)
    size = sum(path.stat().st_size for path in config.output.iterdir())
    minutes = (time.perf_counter() - began) / 60
    log.info("%s: %.2f MB after %d steps and %.1f minutes", config.output, size / 1e6, watch.steps, minutes)
    return Result(config.output, size, minutes, watch.steps, auroc)


class CachedTokenizer:
    """Tokenise texts, each once, and trim the padding that all of them share."""

    def __init__(self, folder: Path, context_length: int):
        self.tokenizer = phantom_clip_folder.build_tokenizer(folder, context_length)
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return tokens, int64 (t, longest)."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self.tokenizer(new).numpy(), strict=True))
        tokens = np.stack([self.known[text] for text in texts])
        longest = int((tokens != 0).sum(axis=1).max())
        return torch.from_numpy(tokens[:, :longest])


@torch.no_grad()
def embed_pixels(model: Any, pixels: np.ndarray, batch_size: int = 100) -> torch.Tensor:
    """Embed grey pixels u1 (n, s, s), and return normalised rows, float32 (n, d)."""
    rows = []
    for first in range(0, len(pixels), batch_size):
        part = torch.from_numpy(pixels[first : first + batch_size]).float() / 255
        part = (part - phantom_clip_folder.PIXEL_MEAN) / phantom_clip_folder.PIXEL_STD
        rows.append(model.encode_image(part[:, None].expand(-1, 3, -1, -1), normalize=True))
    return torch.cat(rows)


@torch.no_grad()
def zero_shot_auroc(
    model: Any, tokenize: Callable[[Sequence[str]], torch.Tensor], pixels: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Return each label's AUROC of the cosine between images and bare label names, where both classes are there."""
    names = model.encode_text(tokenize([label.lower() for label in STUDY_LABELS]), normalize=True)
    scores = (embed_pixels(model, pixels) @ names.T).numpy()
    return {
        label: float(roc_auc_score(labels[:, column], scores[:, column]))
        for column, label in enumerate(STUDY_LABELS)
        if 0 < labels[:, column].sum() < len(labels)
    }


class _Watch:
    """Called after each step: takes in new phantoms, says how it goes, and saves a state now and then."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        watched: tuple[np.ndarray, np.ndarray] | None,
        tokenize: CachedTokenizer,
        pool: phantom_pool.Pool,
        progress: Callable[[str, int, int], None] | None,
    ):
        self.config, self.folder, self.watched = config, folder, watched
        self.tokenize, self.pool, self.progress = tokenize, pool, progress
        self.began = time.perf_counter()
        self.steps = 0
        self.sums: dict[str, float] = {}
        self.since = 0

    def __call__(self, step: int, terms: dict[str, float], averaged: Any) -> None:
        self.steps = step + 1
        self.since += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        objective = self.config.objective
        if self.progress is not None:
            self.progress("train", self.steps, objective.steps)
        if self.steps % 50 == 0:
            elapsed = time.perf_counter() - self.began
            means = " ".join(f"{name} {value / self.since:.4g}" for name, value in self.sums.items())
            rate = self.steps * objective.batch_size * objective.parallel / elapsed
            place = f"step {self.steps}/{objective.steps}"
            log.info("%s %.1f min %.0f images/s pool %d %s", place, elapsed / 60, rate, self.pool.filled, means)
            self.sums, self.since = {}, 0
        if self.steps % self.config.check_every == 0:
            phantom_clip_folder.write_weights(averaged, self.folder)
            if self.watched is not None:
                auroc = zero_shot_auroc(averaged, self.tokenize, *self.watched)
                parts = " ".join(f"{label} {value:.3f}" for label, value in auroc.items())
                log.info("zero-shot AUROC %.4f: %s", np.mean(list(auroc.values())), parts)


def _check(config: Config) -> None:
    for name in ("seed", "check_seed"):
        if getattr(config, name) < RESERVED_SEEDS:
            raise UsageError(
                f"{name} {getattr(config, name)} is one that data sets and tests draw from: "
                f"take {RESERVED_SEEDS} or more"
            )
    if config.seed == config.check_seed:
        raise UsageError(f"seed and check_seed are both {config.seed}: the model would be watched on its own examples")
    if config.output.exists() and not config.overwrite:
        raise UsageError(f"{config.output} is there already: give another output, remove it, or set overwrite=true")
    if config.vision.image_size % config.vision.patch_size:
        raise UsageError(
            f"image_size {config.vision.image_size} is no multiple of patch_size {config.vision.patch_size}"
        )


def _draw_watched(config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    if config.check_phantoms == 0:
        return None
    vision = config.vision
    chosen = phantom_pool.PoolConfig(
        config.check_seed, config.check_phantoms, config.enrich, vision.image_size, vision.patch_size
    )
    pool = phantom_pool.Pool(chosen, config.workers, config.pool_directory)
    pool.wait_for(config.check_phantoms)
    pool.close()
    return pool.pixels, pool.labels


def _prepare_folder(config: Config, pool: phantom_pool.Pool) -> Path:
    folder = config.output.with_name(f".{config.output.name}.training")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spoken = [*pool.reports[: config.vocabulary_phantoms], *phantom_pool.all_phrases()]
    vocabulary = phantom_clip_folder.build_vocabulary(spoken, config.text.vocabulary)
    text = config.text
    phantom_clip_folder.write_text_tower(
        folder, vocabulary, width=text.width, layers=text.layers, heads=text.heads, context_length=text.context_length
    )
    vision = {**config.vision.model_dump(), "pool_type": "tok"}
    phantom_clip_folder.write_model_config(
        folder, embed_dim=config.embed_dim, vision=vision, context_length=text.context_length
    )
    return folder


def _publish(folder: Path, config: Config) -> None:
    """Put the finished folder in the place of the output, keeping what else lies there (the card)."""
    config.output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.replace(config.output / path.name)
    folder.rmdir()


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"


def main(arguments: Sequence[str]) -> int:
    """Run from the command line: ``key=value`` pairs over the shipped config."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = load_config(Config, resource("configs/phantom_clip.yaml"), list(arguments))
    result = run(config)
    summary: dict[str, Any] = {"folder": str(result.folder), "bytes": result.bytes, "minutes": round(result.minutes, 2)}
    sys.stdout.write(json.dumps({**summary, "steps": result.steps, "auroc": result.auroc}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
