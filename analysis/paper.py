"""``protocol: paper``: the study's own steps, one function a step, so that each can be held against its text and code.

Source: Sadman, Zulkernine, Kwan, "Interpreting Biomedical VLMs on High-Imbalance Out-of-Distributions: An Insight into
BiomedCLIP on Radiology" (arXiv 2506.14136, BioKDD 2025), its code (github.com/Nafiz95/BioVLM_Eval_CXR, the notebook)
and its table of results (`REFERENCE_ROWS`). In short:

* 14 labels; only value 1 is positive; an image with none is No Finding (`truth_of`).
* Frontal images; 70/15/15 % of the uids, not stratified, seed 42 (`split`).
* Prompts are the bare label names (`prompts`); scores are dot products of un-normalised embeddings
  (`zero_shot_scores`).
* Decisions: each image's scores scaled by their own minimum and maximum, then > 0.5 (`decisions`); the cuts tried for
  zero-shot, 0.20 to 0.90, are all shown (`threshold_sweep`). Another cell scores classes by ``score > 0``
  (`decisions_above_zero`, `above_zero_figures`).
* Row of the table: macro-F1, exact match, LRAP, coverage error (`table_row`), distances of the first positive label's
  classes on un-normalised embeddings (`distances_of`).
* Domains of labels (`by_domain`, `domain_figures`); AUROC and average precision on scaled scores (`scaled_ranking`).
* Probe: `linear_probe`. Fine-tuning: `paper_finetune_settings`, carried out by `analysis.finetuning`.
* Heatmaps of 15 test images (`heatmap_positions`).

What cannot be matched to the digit: the label table, the zero-shot threshold of the published row and the radiologist's
annotations are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import distances, probes, thresholds
from analysis.metrics import auroc, average_precision, check_truth, precision_recall_f1, summary
from analysis.prompts import Prompts, build_prompts
from analysis.zeroshot import zero_shot_scores as dot_products
from engine import splits
from engine.errors import DataError
from engine.labels import DOMAINS, NO_FINDING, STUDY_LABELS

SOURCE = "arXiv 2506.14136"
SEED = 42
CUT = 0.5
CUTS = tuple(round(0.20 + 0.05 * step, 2) for step in range(15))
HEATMAP_IMAGES = 15

REFERENCE_METRICS = ("inter", "intra", "ratio", "f1_macro", "exact_match", "lrap", "coverage_error", "minutes")
# The published table, test set; None where it has a dash.
REFERENCE_ROWS: dict[str, tuple[float | None, ...]] = {
    "zero-shot": (31.890, 21.160, 1.506, 0.105, 0.000, 0.250, 7.70, None),
    "fine-tuning": (22.754, 12.756, 1.784, 0.235, 0.134, 0.779, 2.750, 15.47),
    "linear probe": (31.894, 21.160, 1.507, 0.183, 0.143, 0.741, 3.077, 6.10),
}
# What the study says of its data: frontal images, uids and images a part, and positive images of each label.
FRONTAL_IMAGES, UIDS = 3818, 3689
SPLIT_IMAGES = {"train": 2670, "val": 575, "test": 573}
POSITIVE_IMAGES = dict(
    zip(STUDY_LABELS, (70, 415, 516, 165, 49, 31, 68, 216, 20, 129, 56, 127, 163, 2400), strict=True)
)
MODEL = "BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


def reference_table() -> pd.DataFrame:
    """Return the published figures, one a row: setting, metric, value."""
    rows = [
        (setting, metric, value)
        for setting, values in REFERENCE_ROWS.items()
        for metric, value in zip(REFERENCE_METRICS, values, strict=True)
        if value is not None
    ]
    return pd.DataFrame(rows, columns=["setting", "metric", "value"])


def truth_of(values: np.ndarray, label_names: Sequence[str] = STUDY_LABELS) -> np.ndarray:
    """Return truth from a CheXpert-like table: 1 is positive, -1 and blank are not; none positive is No Finding.

    Parameters
    ----------
    values : ndarray of float, (n, L)
        1, 0, -1 or NaN.
    label_names : sequence of str, length L

    Returns
    -------
    ndarray of int8, (n, L)
        No Finding is added where a row has no positive and the label exists; it is not taken away beside a finding.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise DataError(f"label values of shape {table.shape} for {len(label_names)} label names")
    truth = (table == 1).astype(np.int8)
    if NO_FINDING in label_names:
        truth[~truth.any(axis=1), list(label_names).index(NO_FINDING)] = 1
    return truth


def split(uids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return the study's split of frontal images by the uid of each, in file order; (n,) of "train", "val", "test"."""
    return splits.study_split(uids)


def prompts(label_names: Sequence[str] = STUDY_LABELS) -> Prompts:
    """Return the bare label names as prompts."""
    return build_prompts(label_names, "bare")


def zero_shot_scores(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return dot products (n, L) of un-normalised image (n, d) and text (L, d) embeddings; no logit scale."""
    return dot_products(image, text, normalize=False)


def decisions(scores: np.ndarray, cut: float = CUT) -> np.ndarray:
    """Return decisions (n, L): scores scaled by each image's own minimum and maximum (+ 1e-8), then a strict > cut."""
    return thresholds.minmax_decisions(scores, cut)


def decisions_above_zero(scores: np.ndarray) -> np.ndarray:
    """Return decisions (n, L) of the study's per-class figures for zero-shot: raw score > 0."""
    return np.asarray(scores) > 0


def threshold_sweep(y: np.ndarray, scores: np.ndarray) -> dict[float, dict[str, float]]:
    """Return macro-F1, micro-F1 and exact match at every cut that the study tried, 0.20 to 0.90 in steps of 0.05.

    The cut of the published zero-shot row is not recorded; LRAP and coverage error do not depend on it.
    """
    found = {}
    for cut in CUTS:
        overall = summary(y, scores, decisions(scores, cut))["overall"]
        found[cut] = {name: overall[name] for name in ("f1_macro", "f1_micro", "exact_match")}
    return found


def table_row(y: np.ndarray, scores: np.ndarray, cut: float = CUT) -> dict[str, float]:
    """Return what the study's table says of one setting on the test rows: f1_macro, exact_match, lrap, coverage_error.

    As in its code the ranking metrics, too, are taken on the per-image scaled scores (an image's ranking is the same).
    """
    scaled = thresholds.minmax_per_image(scores)
    overall = summary(y, scaled, scaled > cut)["overall"]
    return {name: overall[name] for name in ("f1_macro", "exact_match", "lrap", "coverage_error")}


def scaled_ranking(y: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision of each label, (L,) each, on per-image scaled scores.

    The study's code takes them there; the scaling compares images by their relative scores, so these are not the AUROC
    and AP of the raw scores.
    """
    scaled = thresholds.minmax_per_image(scores)
    return auroc(y, scaled), average_precision(y, scaled)


def distances_of(features: np.ndarray, y: np.ndarray) -> distances.Distances:
    """Return inter, intra and ratio on un-normalised embeddings (n, d), the first positive label being the class."""
    truth = check_truth(y)
    return distances.class_distances(features, distances.first_positive(truth), classes=truth.shape[1])


def by_domain(
    y: np.ndarray, decided: np.ndarray, label_names: Sequence[str] = STUDY_LABELS
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return truth and decisions (n, D) of the study's domains: positive where any label of the domain is.

    Only domains with a label in `label_names` take part; No Finding is in none.
    """
    names = list(label_names)
    members = {domain: [names.index(label) for label in labels if label in names] for domain, labels in DOMAINS.items()}
    members = {domain: columns for domain, columns in members.items() if columns}
    truth, said = check_truth(y), np.asarray(decided, dtype=bool)
    if not members:
        raise DataError(f"none of the labels {', '.join(names)} belongs to a domain of the study")
    gather = [
        np.stack([table[:, columns].any(axis=1) for columns in members.values()], axis=1) for table in (truth, said)
    ]
    return tuple(members), gather[0], gather[1]


def linear_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str] = STUDY_LABELS,
    seed: int = SEED,
    encoder_id: str = "",
) -> probes.ProbeResult:
    """Train the study's probe (`analysis.probes.paper_probe`) with its own settings."""
    return probes.paper_probe(train_x, train_y, val_x, val_y, label_names=label_names, seed=seed, encoder_id=encoder_id)


def paper_finetune_settings() -> dict[str, Any]:
    """Return the study's fine-tuning recipe, in the words of `analysis.finetuning.FinetuneConfig`.

    The whole image tower and a head (weight Xavier-uniform, bias as torch's default) train from the first epoch at one
    rate; AdamW is made anew every epoch at 1e-5, so its moments are lost and the cosine schedule, made anew with it,
    never moves the rate; all parameters decay. Batches of 24, no augmentation, plain BCE, fp16 autocast with a scaled
    loss on CUDA, best epoch by validation BCE.
    """
    return {
        "trainable": "all",
        "objective": "bce",
        "epochs": 10,
        "batch_size": 24,
        "learning_rate": 1e-5,
        "weight_decay": 1e-2,
        "decay_all": True,
        "warmup": 0.0,
        "schedule": "constant",
        "remake_optimizer": True,
        "normalize": False,
        "monitor": "bce",
        "patience": 5,
        "min_improvement": 1e-4,
        "autocast": "fp16-on-cuda",
        "gradient_clip": None,
    }


def above_zero_figures(y: np.ndarray, scores: np.ndarray, label_names: Sequence[str] = STUDY_LABELS) -> pd.DataFrame:
    """Return zero-shot's figures of each label as one of the study's cells takes them, from raw score > 0.

    Returns
    -------
    DataFrame
        label, positives, said (counts), precision, recall, f1 (0 where undefined).
    """
    return _label_figures(check_truth(y), decisions_above_zero(scores), label_names)


def domain_figures(y: np.ndarray, decided: np.ndarray, label_names: Sequence[str] = STUDY_LABELS) -> pd.DataFrame:
    """Return the figures of each domain (`by_domain`): label (the domain), positives, said, precision, recall, f1."""
    names, truth, said = by_domain(y, decided, label_names)
    return _label_figures(truth, said, names)


def _label_figures(truth: np.ndarray, said: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    right = (truth & said).sum(axis=0)
    precision, recall, f1 = precision_recall_f1(right, (~truth & said).sum(axis=0), (truth & ~said).sum(axis=0))
    columns = {"label": list(names), "positives": truth.sum(axis=0), "said": said.sum(axis=0)}
    return pd.DataFrame(columns | {"precision": precision, "recall": recall, "f1": f1})


def heatmap_positions(test_samples: int, count: int = HEATMAP_IMAGES) -> np.ndarray:
    """Return which of the test images the study explains: positions of ``test_df.sample(n=15, random_state=42)``."""
    frame = pd.DataFrame(index=pd.RangeIndex(test_samples))
    return frame.sample(n=min(count, test_samples), random_state=SEED).index.to_numpy()
