"""Metrics, distances, sentences and score arrays of a study's settings, written as results.

Comes in: settings with predictions for all samples. Goes out: result lines, ``scores.npz`` and ``distances.csv``. Only
test rows are scored; trivial baselines are trained on the train rows and stand beside the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import (
    baselines,
    comparison,
    distances,
    figures_beside,
    nulls,
    paper,
    run_record,
    sentences,
    verdicts,
)
from analysis.bootstrap import bootstrap_metrics
from analysis.metrics import Prediction
from jobs import runs
from jobs.run_tables import write_table
from jobs.study_records import (
    difference_rows,
    margin_rows,
    metric_rows,
    minutes_row,
    number,
    reference_rows,
    sentence_rows,
)
from jobs.study_settings import Material, Setting

PERMUTATIONS = 200
PAIRS_FILE = "distances.csv"
BESIDE = (
    "f1_macro",
    "f1_micro",
    "exact_match",
    "lrap",
    "coverage_error",
    "map",
    "auroc_macro",
    "auroc_micro",
    "hamming",
    "ranking_loss",
    "brier",
    "ece",
)
MARGINS = ("lrap", "f1_macro", "exact_match", "coverage_error", "map", "auroc_macro")
COMPARED = ("f1_macro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro")


def write_metrics(
    material: Material,
    settings: Sequence[Setting],
    protocol: str,
    run: runs.Run,
    replicates: int,
    seed: int,
    permutations: int = 0,
) -> int:
    """Score the settings and the trivial baselines on the test split; return how many samples that were.

    Every figure of a setting has its interval by patient and, with permutations, its null (truth dealt to other
    patients) in its own line; ``tables/figures-<protocol>.csv`` has the best trivial baseline beside them.
    """
    test = material.rows("test")
    truth = material.y[test]
    trivial = baselines.trivial_baselines(material.y[material.rows("train")], len(test), seed)
    predictions = {setting.name: _rows_of(setting.prediction, test) for setting in settings} | trivial
    names = material.dataset.label_names
    bootstrap = bootstrap_metrics(
        truth, predictions, material.dataset.groups[test], label_names=names, replicates=replicates, seed=seed,
        device=material.device,
    )  # fmt: skip
    learnt = {setting.name: predictions[setting.name] for setting in settings}
    found = (
        nulls.permuted_metrics(
            truth,
            learnt,
            material.dataset.groups[test],
            label_names=names,
            permutations=permutations,
            seed=seed,
        )
        if permutations
        else None
    )
    run.record_all(metric_rows(bootstrap, protocol, set(trivial), found))
    if found is not None:
        write_table(
            run,
            f"figures-{protocol}",
            figures_beside.beside_baselines(bootstrap, found, tuple(trivial), BESIDE),
            title="Every figure beside its baseline and its null",
            text="Each figure with its interval by patient; the best trivial baseline in that metric and the paired "
            "difference to it; what truth dealt to other patients gives (null) and the share of permutations that are "
            "as good (p).",
            section="settings",
            protocol=protocol,
        )
    names_of = [setting.name for setting in settings]
    run.record_all(margin_rows(bootstrap, names_of, tuple(trivial), MARGINS, protocol))
    run.record_all([minutes_row(protocol, setting.name, setting.seconds) for setting in settings])
    pairs = [(later.name, setting.name) for place, setting in enumerate(settings) for later in settings[place + 1 :]]
    differences = comparison.paired_differences(bootstrap, COMPARED, pairs=pairs) if pairs else pd.DataFrame()
    run.record_all(difference_rows(differences, protocol))
    run.record_all(sentence_rows("differences", verdicts.difference_sentences(differences), protocol))
    if protocol == "paper":
        run.record_all(_cut_rows(truth, settings, test))
    drawn = sentences.classification_sentences(bootstrap, [setting.name for setting in settings], tuple(trivial))
    run.record_all(sentence_rows("classification", drawn, protocol))
    return len(test)


def write_distances(
    material: Material, settings: Sequence[Setting], protocol: str, run: runs.Run, replicates: int, seed: int
) -> pd.DataFrame:
    """Measure distances between and within classes on the test split, beside what permuted labels give.

    Returns
    -------
    DataFrame
        Distances between the classes' centroids: protocol, setting, label_a, label_b, distance.
    """
    test = material.rows("test")
    names = material.dataset.label_names
    labels = distances.first_positive(material.y[test])
    groups = material.dataset.groups[test]
    sound = protocol == "sound"
    pairs: list[pd.DataFrame] = []
    for place, setting in enumerate(settings):
        features = setting.features[test]
        measured = distances.class_distances(features, labels, classes=len(names), normalize=sound)
        intervals = distances.bootstrap_distances(
            features, labels, groups, replicates=min(replicates, 200), seed=seed, normalize=sound,
            device=material.device,
        )  # fmt: skip
        null = distances.permuted_null(
            features, labels, permutations=PERMUTATIONS, seed=seed, normalize=sound, device=material.device
        )
        base = {"kind": "distance", "protocol": protocol, "setting": setting.name, "baseline": False}
        for metric, found in intervals.items():
            low, high = number(found.low), number(found.high)
            run.record_all([{**base, "metric": metric, "value": number(found.value), "low": low, "high": high}])
        run.record_all([{**base, "metric": "ratio_null", "value": null.value, "low": null.low, "high": null.high}])
        if any(setting.features is earlier.features for earlier in settings[:place]):
            continue  # the probe's embeddings are zero-shot's: the same numbers once
        text = sentences.null_sentence(f"{setting.name}'s inter/intra ratio", measured.ratio, null, measured.singletons)
        run.record_all(sentence_rows("distances", [text], protocol))
        pairs += [
            pd.DataFrame(
                {
                    "protocol": protocol,
                    "setting": setting.name,
                    "label_a": name,
                    "label_b": list(names),
                    "distance": measured.between[column],
                }
            )
            for column, name in enumerate(names)
        ]
    return pd.concat(pairs).dropna()


def write_pairs(pairs: Sequence[pd.DataFrame], run: runs.Run) -> None:
    """Write what `write_distances` returned of each protocol as ``distances.csv``."""
    pd.concat(pairs).to_csv(run.path(PAIRS_FILE), index=False, float_format="%.6g")


def write_score_arrays(material: Material, compared: Mapping[str, Sequence[Setting]], run: runs.Run) -> None:
    """Write the test scores and decisions of every setting and protocol as ``scores.npz``."""
    test = material.rows("test")
    flat = [(protocol, setting) for protocol, settings in compared.items() for setting in settings]
    run_record.write_scores(
        run.path("scores.npz"),
        run_record.Scores(
            ids=material.dataset.ids[test],
            truth=material.y[test],
            settings=tuple(setting.name for _, setting in flat),
            protocols=tuple(protocol for protocol, _ in flat),
            values=np.stack([setting.prediction.scores[test] for _, setting in flat]),
            decisions=np.stack([setting.prediction.decisions[test] for _, setting in flat]),
            groups=material.dataset.groups[test],
        ),
    )


def write_references(run: runs.Run) -> None:
    """Write the published table beside ours."""
    run.record_all(reference_rows(paper.reference_table(), paper.SOURCE))


def summary(folder: Path) -> dict[str, Any]:
    """Return the overall test metrics of each protocol and setting, for the end of the job."""
    record = run_record.read_run(folder)
    rows = record.rows("metric")
    overall = rows[rows["label"].isna()]
    table: dict[str, Any] = {}
    for (protocol, setting), part in overall.groupby(["protocol", "setting"], sort=False):
        table.setdefault(str(protocol), {})[str(setting)] = dict(zip(part["metric"], part["value"], strict=True))
    return table


def _rows_of(prediction: Prediction, rows: np.ndarray) -> Prediction:
    return Prediction(prediction.scores[rows], prediction.decisions[rows])


def _cut_rows(truth: np.ndarray, settings: Sequence[Setting], test: np.ndarray) -> list[dict[str, Any]]:
    """Return macro-F1 and exact match at every cut that the study tried, for the sensitivity to that choice."""
    rows = []
    for setting in settings:
        for cut, scores in paper.threshold_sweep(truth, setting.prediction.scores[test]).items():
            for metric, value in scores.items():
                rows.append(
                    {"kind": "cut", "protocol": "paper", "setting": setting.name, "metric": metric, "label": None,
                     "text": f"{cut:.2f}", "value": number(value)}
                )  # fmt: skip
    return rows
