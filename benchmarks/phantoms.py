"""Phantoms: how fast they are drawn, that a small CNN finds every label, and that no trivial statistic does.

    python benchmarks/phantoms.py [--train 8000] [--test 3000] [--epochs 12] [--write]

Speed is drawings a second of one core's processor time. The CNN is tried on an unseen seed at 128 px. Trivial
statistics are each single pixel of a 64 x 64 version, mean, spread, extremes and edge strength of the whole image and
of its quarters; a statistic counts with its better sign. `--write` stores the figures in results/phantoms.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from engine.labels import STUDY_LABELS
from engine.phantom import GENERATOR_VERSION, draw_phantom

RESULTS = Path(__file__).parent / "results" / "phantoms.json"
TRAIN_SEED, TEST_SEED = 101, 202
INPUT = 128
BATCH = 32


def draw_many(seed: int, count: int, enrich: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return 256 px drawings brought to 128 px (count, 128, 128) uint8, labels (count, 14), and drawings a second."""
    images = np.empty((count, INPUT, INPUT), np.uint8)
    labels = np.empty((count, len(STUDY_LABELS)), np.int8)
    seconds = 0.0
    for index in range(count):
        start = time.process_time()
        phantom = draw_phantom(seed, index, 256, enrich)
        seconds += time.process_time() - start
        images[index] = cv2.resize(phantom.pixels, (INPUT, INPUT), interpolation=cv2.INTER_AREA)
        labels[index] = phantom.labels
    return images, labels, count / seconds


def auroc_columns(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the AUROC of each column of scores (n, k) for one label (n,) bool, ties counted half."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=0)
    count = int(positive.sum())
    return (ranks[positive].sum(axis=0) - count * (count + 1) / 2) / (count * (len(positive) - count))


def trivial_statistics(images: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return single pixels and simple summaries of images (n, 128, 128), (n, k) float32, and their names."""
    small = np.stack([cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA) for image in images])
    columns = [small.reshape(len(images), -1).astype(np.float32)]
    names = [f"pixel {y},{x} of 64" for y in range(64) for x in range(64)]
    parts = {"whole": (slice(None), slice(None))}
    half = INPUT // 2
    for row, vertical in (("top", slice(0, half)), ("bottom", slice(half, None))):
        for column, horizontal in (("left", slice(0, half)), ("right", slice(half, None))):
            parts[f"{row} {column}"] = (vertical, horizontal)
    for name, (vertical, horizontal) in parts.items():
        part = images[:, vertical, horizontal].astype(np.float32)
        edges = np.abs(np.diff(part, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(part, axis=2)).mean(axis=(1, 2))
        values = {
            "mean": part.mean(axis=(1, 2)),
            "spread": part.std(axis=(1, 2)),
            "darkest": np.percentile(part, 2, axis=(1, 2)),
            "brightest": np.percentile(part, 98, axis=(1, 2)),
            "edges": edges,
        }
        columns += [value[:, None].astype(np.float32) for value in values.values()]
        names += [f"{key} of {name}" for key in values]
    return np.concatenate(columns, axis=1), names


class SmallCnn(nn.Sequential):
    """Five strided convolutions, about half a million parameters."""

    def __init__(self) -> None:
        widths = (1, 24, 48, 72, 128, 192)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if after in (72, 128):
                layers += [nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(
            *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(widths[-1], len(STUDY_LABELS))
        )


def cnn_scores(train: np.ndarray, y: np.ndarray, test: np.ndarray, epochs: int, seed: int = 0) -> np.ndarray:
    """Train the CNN and return its scores on test, (n, 14)."""
    torch.manual_seed(seed)
    generator = np.random.Generator(np.random.PCG64(seed))
    model = SmallCnn().to(memory_format=torch.channels_last)
    steps = epochs * (len(train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    images, targets = torch.from_numpy(train)[:, None], torch.from_numpy(y).float()
    for epoch in range(epochs):
        order = generator.permutation(len(train))
        for first in range(0, len(train) // BATCH * BATCH, BATCH):
            rows = torch.from_numpy(order[first : first + BATCH])
            loss = nn.functional.binary_cross_entropy_with_logits(model(images[rows].float() / 128 - 1), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(test[k : k + 256])[:, None].float() / 128 - 1) for k in range(0, len(test), 256)
        ]
    return torch.cat(parts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--enrich", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    test, y_test, rate = draw_many(TEST_SEED, options.test, options.enrich)
    print(f"{rate:.0f} phantoms a second a core at 256 px")
    statistics, names = trivial_statistics(test)
    figures: dict[str, dict[str, object]] = {}
    for column, label in enumerate(STUDY_LABELS):
        areas = auroc_columns(statistics, y_test[:, column] == 1)
        areas = np.maximum(areas, 1 - areas)
        figures[label] = {
            "positives": int(y_test[:, column].sum()),
            "trivial": float(areas.max()),
            "by": names[int(areas.argmax())],
        }
        count, by = figures[label]["positives"], figures[label]["by"]
        print(f"{label:28s} {count:5d} positive, best trivial {areas.max():.3f} ({by})", flush=True)
    if options.train:
        train, y_train, _ = draw_many(TRAIN_SEED, options.train, options.enrich)
        start = time.perf_counter()
        scores = cnn_scores(train, y_train, test, options.epochs)
        print(f"CNN trained in {time.perf_counter() - start:.0f} s")
        for column, label in enumerate(STUDY_LABELS):
            figures[label]["cnn"] = float(auroc_columns(scores[:, column : column + 1], y_test[:, column] == 1)[0])
            print(f"{label:28s} CNN {figures[label]['cnn']:.3f}")
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        record = {
            "generator": GENERATOR_VERSION,
            "options": vars(options),
            "phantoms_per_second": rate,
            "labels": figures,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
