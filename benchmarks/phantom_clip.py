"""phantom-clip on phantoms that it has never seen: AUROC of each label, zero-shot and by linear probe.

    python benchmarks/phantom_clip.py [--model local-dir:configs/phantom-clip] [--test 5000] [--write]

Zero-shot is the cosine between an image and a label's bare name (and, beside it, the mean of a few prompts). The probe
is one logistic regression a label on phantoms of a second seed, its C chosen on a third. None of the three seeds is the
training's, nor one that data sets draw from; rare labels are enriched, so that each has at least 100 positives.
`--write` stores the figures in benchmarks/results/phantom_clip.json and in the model's card.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.labels import STUDY_LABELS
from engine.phantom import GENERATOR_VERSION, draw_phantom
from engine.pixels import Preprocess

if TYPE_CHECKING:
    from engine.encoder import Encoder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "phantom_clip.json"
TEST_SEED, PROBE_SEED, TUNING_SEED = 2001, 2002, 2003
ENRICH = 0.1
PART = 250
TEMPLATES = ("{}", "a chest radiograph showing {}", "there is {}", "findings suggesting {}")


def draw_part(seed: int, first: int, count: int, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Return preprocessed pixels (count, s, s, 3) uint8 and labels (count, 14) of some phantoms."""
    drawn = [draw_phantom(seed, first + row, enrich=ENRICH) for row in range(count)]
    pixels = np.stack([preprocess(Image.fromarray(phantom.pixels))[0] for phantom in drawn])
    return pixels, np.stack([phantom.labels for phantom in drawn])


def embed(encoder: Encoder, pool: ProcessPoolExecutor, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings (count, d) float32, un-normalised, and labels (count, 14)."""
    firsts = range(0, count, PART)
    rows, labels = [], []
    waiting = [pool.submit(draw_part, seed, first, min(PART, count - first), encoder.preprocess) for first in firsts]
    for part in waiting:
        pixels, truth = part.result()
        rows.append(encoder.encode_pixels(pixels).cpu().numpy())
        labels.append(truth)
    return np.concatenate(rows), np.concatenate(labels)


def names(encoder: Encoder, templates: tuple[str, ...]) -> np.ndarray:
    """Return one text vector a label, the mean over the templates of normalised embeddings, (14, d)."""
    vectors = []
    for template in templates:
        text = encoder.encode_text([template.format(label.lower()) for label in STUDY_LABELS]).cpu().numpy()
        vectors.append(text / np.linalg.norm(text, axis=1, keepdims=True))
    return np.mean(vectors, axis=0)


def table(figures: dict) -> str:
    """Return the card's table of figures, in Markdown."""
    lines = ["| label | positives | zero-shot | linear probe |", "|---|---:|---:|---:|"]
    for label, row in figures["labels"].items():
        lines.append(f"| {label} | {row['positives']} | {row['zero_shot']:.3f} | {row['probe']:.3f} |")
    macro = figures["macro"]
    lines.append(f"| **mean of the 14** | | **{macro['zero_shot']:.3f}** | **{macro['probe']:.3f}** |")
    return "\n".join(lines)


def write_card(card: Path, figures: dict) -> None:
    """Put the table between the card's two marks."""
    text = card.read_text(encoding="utf-8")
    marked = f"<!-- figures -->\n{table(figures)}\n<!-- /figures -->"
    changed = re.sub(r"<!-- figures -->.*<!-- /figures -->", lambda _: marked, text, flags=re.DOTALL)
    card.write_text(changed, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"local-dir:{ROOT / 'configs' / 'phantom-clip'}")
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--probe", type=int, default=5000)
    parser.add_argument("--tuning", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    # Imported here: drawing processes import this file too, and need none of it.
    from analysis.metrics import auroc
    from analysis.probes import fit_probe
    from analysis.zeroshot import zero_shot_scores
    from engine.encoder import load_encoder

    began = time.perf_counter()
    encoder = load_encoder(chosen.model, device="cpu")
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
        test_x, test_y = embed(encoder, pool, TEST_SEED, chosen.test)
        probe_x, probe_y = embed(encoder, pool, PROBE_SEED, chosen.probe)
        tuning_x, tuning_y = embed(encoder, pool, TUNING_SEED, chosen.tuning)
    bare = auroc(test_y, zero_shot_scores(test_x, names(encoder, ("{}",)), normalize=True))
    prompts = auroc(test_y, zero_shot_scores(test_x, names(encoder, TEMPLATES), normalize=True))
    raw_text = encoder.encode_text([label.lower() for label in STUDY_LABELS]).cpu().numpy()
    raw = auroc(test_y, zero_shot_scores(test_x, raw_text, normalize=False))
    result = fit_probe(probe_x, probe_y, tuning_x, tuning_y, label_names=STUDY_LABELS)
    probe = auroc(test_y, result.head.logits(test_x))
    by_label = {
        label: {
            "positives": int(test_y[:, column].sum()),
            "zero_shot": round(float(bare[column]), 4),
            "zero_shot_prompts": round(float(prompts[column]), 4),
            "zero_shot_not_normalised": round(float(raw[column]), 4),
            "probe": round(float(probe[column]), 4),
        }
        for column, label in enumerate(STUDY_LABELS)
    }
    columns = ("zero_shot", "zero_shot_prompts", "zero_shot_not_normalised", "probe")
    figures = {
        "encoder": encoder.id,
        "generator": GENERATOR_VERSION,
        "test": {"seed": TEST_SEED, "n": chosen.test, "enrich": ENRICH},
        "macro": {name: round(float(np.mean([row[name] for row in by_label.values()])), 4) for name in columns},
        "least": {name: min(row[name] for row in by_label.values()) for name in columns},
        "labels": by_label,
        "seconds": round(time.perf_counter() - began, 1),
    }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    if chosen.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        write_card(ROOT / "configs" / "phantom-clip" / "README.md", figures)


if __name__ == "__main__":
    main()
