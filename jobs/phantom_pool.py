"""A pool of phantoms to train on: drawn by worker processes while the training already runs.

In come a seed, a share of enrichment and the model's input size; out go batches for `analysis.contrastive`: pixels with
small random shifts, contrast and noise (never mirrored: left and right mean something), a caption an image, and how
much of each patch each finding covers.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from analysis.contrastive import ContrastiveBatch, subset_mask
from engine import phantom
from engine.labels import STUDY_LABELS
from jobs.phantom_captions import SYNONYMS, TEMPLATES, CaptionWriter, name_phrases

log = logging.getLogger(__name__)

SHARD = 500


@dataclass(frozen=True)
class PoolConfig:
    """Which phantoms, and what the model sees of them.

    Parameters
    ----------
    seed : int
    count : int
    enrich : float
        Least share of each label.
    drawn_size : int
        Side of the drawn phantom, pixels.
    image_size, patch_size : int
        Side of the model's input and of its patches, pixels.
    """

    seed: int
    count: int
    enrich: float
    image_size: int
    patch_size: int
    drawn_size: int = 256

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


@dataclass
class Shard:
    """n phantoms: pixels u1 (n, s, s), labels i1 (n, 14), coverage u1 (n, 14, g, g) in 255ths, impressions, reports."""

    pixels: np.ndarray
    labels: np.ndarray
    coverage: np.ndarray
    impressions: list[str]
    reports: list[str]


def draw_shard(config: PoolConfig, first: int, count: int) -> Shard:
    """Draw phantoms `first` to `first + count`, resized as the model's preprocessing does it."""
    side, grid = config.image_size, config.grid
    pixels = np.zeros((count, side, side), np.uint8)
    labels = np.zeros((count, len(STUDY_LABELS)), np.int8)
    coverage = np.zeros((count, len(STUDY_LABELS), grid, grid), np.uint8)
    impressions, reports = [], []
    for row in range(count):
        drawn = phantom.draw_phantom(config.seed, first + row, size=config.drawn_size, enrich=config.enrich)
        image = Image.fromarray(drawn.pixels).resize((side, side), Image.Resampling.BICUBIC)
        pixels[row] = np.asarray(image)
        labels[row] = drawn.labels
        for label, mask in drawn.masks.items():
            share = cv2.resize(mask.astype(np.uint8) * 255, (grid, grid), interpolation=cv2.INTER_AREA)
            # What is there must not be rounded to "not there": a thin line covers little of a patch.
            coverage[row, STUDY_LABELS.index(label)] = share
        impressions.append(drawn.report["impression"])
        reports.append(" ".join(drawn.report[part] for part in ("findings", "impression") if drawn.report[part]))
    return Shard(pixels, labels, coverage, impressions, reports)


def _draw_quietly(config: PoolConfig, first: int, count: int, directory: str | None) -> Shard:
    """Draw in a worker, or take what an earlier run of the same generator has left in the directory."""
    if directory is None:
        return draw_shard(config, first, count)
    sizes = f"{config.drawn_size}-{config.image_size}-{config.grid}"
    path = Path(directory) / f"{phantom.GENERATOR_VERSION}-{config.seed}-{config.enrich:g}-{sizes}-{first}-{count}"
    if (path / "done").exists():
        arrays = {part: np.load(path / f"{part}.npy") for part in ("pixels", "labels", "coverage")}
        texts = json.loads((path / "texts.json").read_text(encoding="utf-8"))
        return Shard(**arrays, impressions=texts["impressions"], reports=texts["reports"])
    shard = draw_shard(config, first, count)
    path.mkdir(parents=True, exist_ok=True)
    for part in ("pixels", "labels", "coverage"):
        np.save(path / f"{part}.npy", getattr(shard, part))
    texts = {"impressions": shard.impressions, "reports": shard.reports}
    (path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    (path / "done").touch()
    return shard


def _start_worker() -> None:
    os.nice(5)  # training has the right of way
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


@dataclass
class Pool:
    """Phantoms in memory, growing shard by shard while workers draw.

    Parameters
    ----------
    config : PoolConfig
    workers : int
        Processes that draw; 0 draws here.
    directory : Path, optional
        Where drawn shards are kept for the next run.
    """

    config: PoolConfig
    workers: int = 1
    directory: Path | None = None
    filled: int = 0
    _futures: list[Future[Shard]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count, side, grid = self.config.count, self.config.image_size, self.config.grid
        self.pixels = np.zeros((count, side, side), np.uint8)
        self.labels = np.zeros((count, len(STUDY_LABELS)), np.int8)
        self.coverage = np.zeros((count, len(STUDY_LABELS), grid, grid), np.uint8)
        self.impressions: list[str] = []
        self.reports: list[str] = []
        self._taken = 0
        parts = [(first, min(SHARD, count - first)) for first in range(0, count, SHARD)]
        kept = None if self.directory is None else str(self.directory)
        if self.workers == 0:
            for first, length in parts:
                self._take(_draw_quietly(self.config, first, length, kept))
            return
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker)
        self._futures = [self._executor.submit(_draw_quietly, self.config, *part, kept) for part in parts]

    def _take(self, shard: Shard) -> None:
        rows = slice(self.filled, self.filled + len(shard.pixels))
        self.pixels[rows], self.labels[rows], self.coverage[rows] = shard.pixels, shard.labels, shard.coverage
        self.impressions += shard.impressions
        self.reports += shard.reports
        self.filled += len(shard.pixels)

    def collect(self) -> int:
        """Take in the shards that are ready, in their order, and return how many phantoms there are."""
        while self._taken < len(self._futures) and self._futures[self._taken].done():
            self._take(self._futures[self._taken].result())
            self._futures[self._taken] = Future()  # frees the shard's memory
            self._taken += 1
        return self.filled

    def wait_for(self, count: int) -> None:
        """Wait until so many phantoms are there."""
        while self.filled < count and self.collect() < min(count, self.config.count):
            time.sleep(0.2)

    def close(self) -> None:
        """Stop drawing."""
        if self.workers:
            self._executor.shutdown(wait=False, cancel_futures=True)


def all_phrases() -> list[str]:
    """Return every name and wording that captions use, twice, for the vocabulary."""
    wordings = [wording for label in STUDY_LABELS for wording in (label.lower(), *SYNONYMS[label])]
    return [*wordings, *TEMPLATES] * 2


def augment(
    pixels: torch.Tensor, coverage: torch.Tensor, patch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift, change contrast, and add noise.

    Parameters
    ----------
    pixels : float32 tensor (b, s, s), 0 to 1
    coverage : float32 tensor (b, L, g, g)
    patch : int
        Side of a patch in pixels. Images move by up to a patch and three pixels; whole patches move the coverage too.

    Returns
    -------
    pixels (b, s, s) within 0 to 1, coverage (b, L, g, g) with NaN where the shift brought in what was never drawn
    """
    count, side = len(pixels), pixels.shape[-1]
    margin = patch + 3
    padded = functional.pad(pixels[:, None], [margin] * 4, mode="replicate")[:, 0]
    around = functional.pad(coverage, [1] * 4, value=torch.nan)
    whole = torch.randint(-1, 2, (count, 2), generator=generator)
    fine = torch.randint(-3, 4, (count, 2), generator=generator)
    tops, lefts = (margin + whole * patch + fine).T.tolist()
    moved = torch.stack(
        [image[top : top + side, left : left + side] for image, top, left in zip(padded, tops, lefts, strict=True)]
    )
    grid = coverage.shape[-1]
    shifted = torch.stack(
        [one[:, 1 + y : 1 + y + grid, 1 + x : 1 + x + grid] for one, (y, x) in zip(around, whole.tolist(), strict=True)]
    )
    contrast = torch.empty(count, 1, 1).uniform_(0.8, 1.2, generator=generator)
    brightness = torch.empty(count, 1, 1).uniform_(-0.08, 0.08, generator=generator)
    spread = torch.empty(count, 1, 1).uniform_(0.0, 0.025, generator=generator)
    noise = torch.randn(moved.shape, generator=generator) * spread
    return ((moved - 0.5) * contrast + 0.5 + brightness + noise).clamp_(0, 1), shifted


def batches(
    pool: Pool,
    tokenize: Callable[[Sequence[str]], torch.Tensor],
    *,
    batch_size: int,
    mean: float,
    std: float,
    seed: int,
    first: int,
    growth: int,
    with_coverage: bool = True,
) -> Iterator[ContrastiveBatch]:
    """Yield batches without end, drawn at random from a part of the pool that grows with each batch.

    How far it has grown is counted and waited for, not looked up: the batches do not depend on how fast workers draw.

    Parameters
    ----------
    tokenize : callable
        Distinct texts -> int64 tensor (t, context), padding trimmed.
    mean, std : float
        Of the model's preprocessing, one value for all channels.
    seed : int
    first, growth : int
        Phantoms that the first batch is drawn from, and how many more there are for each further one.
    with_coverage : bool
        Whether batches say where findings are.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    generator = torch.Generator().manual_seed(seed)
    captions = CaptionWriter(rng)
    for number in itertools.count():
        known = min(first + number * growth, pool.config.count)
        pool.wait_for(known)
        rows = rng.integers(0, known, batch_size)
        pixels = torch.from_numpy(pool.pixels[rows]).float() / 255
        coverage = torch.from_numpy(pool.coverage[rows]).float() / 255
        labels = torch.from_numpy(pool.labels[rows]).bool()
        pixels, coverage = augment(pixels, coverage, pool.config.patch_size, generator)
        written, said = captions.write(
            pool.labels[rows], [pool.impressions[row] for row in rows], [pool.reports[row] for row in rows]
        )
        distinct = list(dict.fromkeys(written))
        place = {text: number for number, text in enumerate(distinct)}
        text_of = torch.tensor([place[text] for text in written])
        text_labels = torch.zeros(len(distinct), labels.shape[1], dtype=torch.bool)
        text_labels[text_of] = torch.from_numpy(said).bool()
        yield ContrastiveBatch(
            pixels=((pixels - mean) / std)[:, None].expand(-1, 3, -1, -1).contiguous(),
            texts=tokenize(distinct),
            text_of=text_of,
            also_true=subset_mask(labels, text_labels),
            names=tokenize(name_phrases(rng)),
            labels=labels.float(),
            coverage=coverage.flatten(2) if with_coverage else None,
        )
