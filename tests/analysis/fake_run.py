"""A run folder with made-up numbers in the form that a study leaves, to test what reads it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from analysis.run_record import Scores, write_scores

LABELS = ("Cardiomegaly", "Lung Opacity", "Edema", "Fracture", "No Finding")
SETTINGS = ("Zero-shot", "Linear probe", "Fine-tuning")
BASELINES = ("Random", "Prevalence ranking")


def write_fake_run(folder: Path, label_names: tuple[str, ...] = LABELS, samples: int = 60) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    truth = (rng.random((samples, len(label_names))) < 0.2).astype(np.int8)
    values = np.stack([truth * strength + rng.normal(size=truth.shape) for strength in (0.4, 1.2, 1.6)])
    scores = Scores(np.array([f"s{i}" for i in range(samples)]), truth, SETTINGS, ("sound",) * 3, values, values > 0.8)
    write_scores(folder / "scores.npz", scores)
    rows: list[dict] = []
    for setting in SETTINGS + BASELINES:
        base = {
            "kind": "metric",
            "protocol": "sound",
            "setting": setting,
            "baseline": setting in BASELINES,
            "split": "test",
        }
        for metric in ("f1_macro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro"):
            value = float(rng.random())
            rows.append(
                {**base, "metric": metric, "value": value, "low": value * 0.9, "high": value * 1.1, "n": samples}
            )
        for column, label in enumerate(label_names):
            rate = float(truth[:, column].mean())
            for metric, value in (
                ("f1", 0.5),
                ("auroc", 0.7),
                ("ap", 0.3),
                ("precision", 0.4),
                ("recall", 0.6),
                ("prevalence", rate),
                ("predicted_rate", 2 * rate),
                ("positives", float(truth[:, column].sum())),
            ):
                rows.append({**base, "metric": metric, "label": label, "value": value})
    for setting in SETTINGS:
        for metric in ("inter", "intra", "ratio", "ratio_null"):
            rows.append(
                {
                    "kind": "distance",
                    "protocol": "sound",
                    "setting": setting,
                    "baseline": False,
                    "metric": metric,
                    "value": 1.25,
                    "low": 1.0,
                    "high": 1.5,
                }
            )
    rows += _answers(label_names)
    for setting, baseline in (("Linear probe", False), ("Centre prior", True)):
        for label in (None, label_names[0]):
            rows.append(
                {
                    "kind": "localization",
                    "protocol": "sound",
                    "setting": setting,
                    "baseline": baseline,
                    "label": label,
                    "metric": "pointing_game",
                    "value": 0.5,
                    "low": 0.3,
                    "high": 0.7,
                    "n": 20,
                }
            )
    rows.append(
        {
            "kind": "cost",
            "step": "embed images",
            "seconds": 12.5,
            "items": samples,
            "rate": 4.8,
            "bytes": 1e6,
            "reused": 0,
            "peak_memory": 1e9,
        }
    )
    rows.append(
        {"kind": "sentence", "section": "classification", "text": "The probe's LRAP is 0.10 < 0.20 of the ranking."}
    )
    (folder / "results.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "config.yaml").write_text("model: phantom-clip\n")
    (folder / "provenance.json").write_text(
        json.dumps(
            {
                "title": "A fake <run>",
                "subtitle": "made up",
                "label_names": list(label_names),
                "seconds": 61.0,
                "dataset": {"n": samples, "groups": samples, "imbalance": "9 : 1"},
                "split": {"how": "grouped", "counts": {"train": 30, "val": 10, "test": 20}},
                "versions": {"fluoroscope": "0"},
                "encoders": [{"id": "fake-fp32-0123"}],
                "command": "fluoro study fake.yaml",
            }
        )
    )
    points = "\n".join(
        f"s{i},Zero-shot,{rng.normal():.3f},{rng.normal():.3f},{label_names[i % 3]},test" for i in range(samples)
    )
    (folder / "embedding_map.csv").write_text("id,setting,x,y,label,split\n" + points + "\n")
    (folder / "thumbnails").mkdir(exist_ok=True)
    (folder / "heatmaps").mkdir(exist_ok=True)
    picture = rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "thumbnails" / "s1.jpg"), picture)
    cv2.imwrite(str(folder / "heatmaps" / "s1.png"), picture)
    (folder / "retrieval.json").write_text(
        json.dumps(
            [
                {
                    "query": {"text": "pneumonia"},
                    "hits": [
                        {
                            "id": "s1",
                            "score": 0.91,
                            "labels": ["Pneumonia"],
                            "match": True,
                            "thumbnail": "thumbnails/s1.jpg",
                        },
                        {"id": "s2", "score": 0.41, "labels": [], "match": False, "thumbnail": "../outside.jpg"},
                    ],
                }
            ]
        )
    )
    (folder / "heatmaps.json").write_text(
        json.dumps(
            [
                {
                    "id": "s1",
                    "label": label_names[0],
                    "image": "heatmaps/s1.png",
                    "panels": [
                        {
                            "setting": "Linear probe",
                            "file": "heatmaps/s1.png",
                            "pointing": 1.0,
                            "energy": 0.4,
                            "iou": 0.3,
                            "empty": False,
                        },
                        {
                            "setting": "Zero-shot",
                            "file": "heatmaps/s1.png",
                            "pointing": 0.0,
                            "energy": 0.0,
                            "iou": 0.0,
                            "empty": True,
                            "note": "zero gradient at blocks[-1].attn.proj",
                        },
                    ],
                }
            ]
        )
    )
    (folder / "failures.csv").write_text("id,uri,what,reason\ns9,a.png,image,truncated file\n")
    return folder


def _answers(label_names: tuple[str, ...]) -> list[dict]:
    """One line of each kind that stands beside the metrics: made up, some of it undefined."""
    base = {"protocol": "sound", "split": "test", "setting": "Linear probe", "value": 0.2, "low": 0.1, "high": 0.3}
    pair = {"other": "Zero-shot", "metric": "lrap", "p": 0.01, "p_holm": 0.02, "better": "Linear probe"}
    some = {"column": "sex", "subgroup": "F", "metric": "lrap", "n": 30, "groups": 20, "compared": True}
    none = {"value": None, "low": None, "high": None, "note": "needs two classes"}
    nulls = {"null": 0.1, "null_low": 0.05, "null_high": 0.15, "p": 0.005}
    return [
        {"kind": "difference", **base, **pair},
        {"kind": "difference", **base, **pair, "metric": "map", "p": None, "p_holm": None, "better": ""},
        {"kind": "threshold", **base, "family": "minmax", "metric": "f1_macro", "rank": 1.0, "probabilities": True},
        {"kind": "subgroup", **base, **some},
        {"kind": "subgroup", **base, **some, "subgroup": "M", "compared": False, "value": None},
        {"kind": "gap", **base, "column": "sex", "metric": "lrap", "best": "F", "worst": "M", "p": 0.2, "p_holm": 0.9},
        {"kind": "space", **base, **nulls, "metric": "silhouette", "note": ""},
        {"kind": "space", **base, **none, "metric": "knn_purity"},
        {"kind": "retrieval", **base, "metric": "image to image, precision@5", "null": 0.15, "n": 20},
        *({"kind": "split", "split": part, "label": label, "metric": "prevalence", "value": 0.25, "n": 20}
          for part in ("train", "val", "test") for label in label_names),
    ]  # fmt: skip
