"""The bootstrap of all metrics beside a scikit-learn loop and the bare matrix product, and the stratified split.

    python benchmarks/metrics.py [--samples 573 2000] [--replicates 10000] [--rounds 5] [--split-rows 300000] [--quick]
                                 [--write]

Ours resamples patients and takes every metric of three settings (14 labels at the study's prevalences) in every
replicate, intervals included. The peer is a plain loop that resamples rows and calls scikit-learn for the metrics that
it has (no ECE, no over-prediction); it is timed on `--loop` replicates and scaled to all, and its figure says so. The
limit is the product of the counts with all that is summed of the samples, in float32 with both operands ready: what no
way through sums can beat for means and F1; AUROC and average precision need more than that, namely sums down each
label's ranking. `--write` stores the figures in results/metrics.json, `--quick` is a smoke run on few.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from comparing import Way, in_turns, medians, write_record
from sklearn import metrics as sklearn_metrics

from analysis.bootstrap import Bootstrap, bootstrap_metrics, resample_counts
from analysis.metrics import LABEL_METRICS, OVERALL_METRICS, Prediction
from engine.splits import SPLITS, stratified_split
from engine.stratified_split import split_report

RESULTS = Path(__file__).parent / "results" / "metrics.json"
# Positives of the study's 14 labels among 3,818 frontal images.
POSITIVES = np.array([70, 415, 516, 165, 49, 31, 68, 216, 20, 129, 56, 127, 163, 2400])
PREVALENCE = POSITIVES / 3818
LABELS = tuple(f"label {number}" for number in range(len(POSITIVES)))
SETTINGS = {"zero-shot": 0.3, "probe": 1.5, "tuned": 2.0}
AT_MOST_SECONDS = 2.0


def study(samples: int, seed: int = 0) -> tuple[np.ndarray, dict[str, Prediction], np.ndarray]:
    """Return truth, predictions and patients as the study's test set has them: 573 images of 554 patients."""
    generator = np.random.default_rng(seed)
    y = generator.random((samples, len(PREVALENCE))) < PREVALENCE
    predictions = {}
    for name, strength in SETTINGS.items():
        logits = generator.normal(size=y.shape) + strength * y + np.log(PREVALENCE / (1 - PREVALENCE)) / 2 - 1
        scores = 1 / (1 + np.exp(-logits))
        predictions[name] = Prediction(scores, scores > 0.3)
    once = round(samples * 554 / 573)
    return y, predictions, np.concatenate([np.arange(once), generator.integers(0, once, samples - once)])


def ours(y: np.ndarray, predictions: dict[str, Prediction], patients: np.ndarray, replicates: int) -> Bootstrap:
    drawn = bootstrap_metrics(y, predictions, patients, label_names=LABELS, replicates=replicates)
    drawn.table()
    return drawn


def loop(y: np.ndarray, predictions: dict[str, Prediction], patients: np.ndarray, replicates: int) -> np.ndarray:
    """Return (replicates, settings, 10) metrics of a plain loop over resamples, for comparison with ours too."""
    codes, counts = resample_counts(patients, replicates, 0)
    results = []
    own = [of_labels(y, prediction.scores) for prediction in predictions.values()]
    for count in counts:
        rows = np.repeat(np.arange(len(y)), count[codes])
        for prediction, held in zip(predictions.values(), own, strict=True):
            results.append(scikit_learn(y[rows], prediction.scores[rows], prediction.decisions[rows], held))
    return np.array(results).reshape(replicates, len(predictions), -1)


def of_labels(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision of each label, NaN where they are undefined."""
    both = np.full((2, truth.shape[1]), np.nan)
    for label in np.flatnonzero(truth.any(axis=0)):
        both[1, label] = sklearn_metrics.average_precision_score(truth[:, label], scores[:, label])
        if not truth[:, label].all():
            both[0, label] = sklearn_metrics.roc_auc_score(truth[:, label], scores[:, label])
    return both[0], both[1]


def scikit_learn(
    truth: np.ndarray, scores: np.ndarray, decisions: np.ndarray, held: tuple[np.ndarray, np.ndarray]
) -> list[float]:
    """Return the metrics that `CHECKED` names, and take those of each label too.

    A label without positives here enters the macro means with its value of the sample, which `held` has.
    """
    found = sklearn_metrics
    aucs, precisions = (
        np.where(np.isnan(here), of_sample, here)
        for here, of_sample in zip(of_labels(truth, scores), held, strict=True)
    )
    found.precision_recall_fscore_support(truth, decisions, average=None, zero_division=0)
    for label in range(truth.shape[1]):
        found.brier_score_loss(truth[:, label], scores[:, label])
    return [
        found.f1_score(truth, decisions, average="macro", zero_division=0),
        found.f1_score(truth, decisions, average="micro", zero_division=0),
        found.accuracy_score(truth, decisions),
        found.label_ranking_average_precision_score(truth, scores),
        found.coverage_error(truth, scores),
        float(np.nanmean(precisions)),
        float(np.nanmean(aucs)),
        found.hamming_loss(truth, decisions),
        found.roc_auc_score(truth.ravel(), scores.ravel()),
        found.label_ranking_loss(truth, scores),
    ]


CHECKED = OVERALL_METRICS[:10]


def bootstrap_figures(samples: int, replicates: int, loops: int, rounds: int) -> dict[str, object]:
    """Return seconds of ours, of the loop (scaled) and of the bare product."""
    y, predictions, patients = study(samples)
    _, counts = resample_counts(patients, replicates, 0)
    columns = len(SETTINGS) * (4 + 4 * len(LABELS) + 15 * len(LABELS))
    weights = counts.astype(np.float32)
    statistics = np.random.default_rng(1).random((counts.shape[1], columns), dtype=np.float32)
    taken = in_turns(
        {
            "ours": Way(lambda: ours(y, predictions, patients, replicates)),
            "limit": Way(lambda: weights @ statistics),
        },
        rounds,
    )
    peer = in_turns({"loop": Way(lambda: loop(y, predictions, patients, loops))}, 1, warm=False)
    expected, drawn = loop(y, predictions, patients, loops), ours(y, predictions, patients, loops)
    for place, metric in enumerate(CHECKED):
        mine = drawn.replicates[:, :, drawn.columns.index((metric, None))].T
        if not np.allclose(mine, expected[:, :, place], rtol=0, atol=1e-12):
            raise SystemExit(f"{metric} is not scikit-learn's")
    seconds = medians(taken) | {"loop": peer["loop"][0] * replicates / loops}
    return {
        "task": f"bootstrap, {samples:,} samples",
        "seconds": seconds,
        "ratio": seconds["loop"] / seconds["ours"],
        "loop replicates timed": loops,
        "all": taken | peer,
    }


def split_figures(rows: int, rounds: int) -> dict[str, object]:
    """Return seconds of the stratified split, with the worst deviation of a label's prevalence in a part."""
    generator = np.random.default_rng(0)
    labels = (generator.random((rows, len(PREVALENCE))) < PREVALENCE).astype(np.int8)
    patients = np.array([f"p{number}" for number in generator.integers(0, max(4, rows * 3 // 5), rows)], dtype=object)
    taken = in_turns({"ours": Way(lambda: stratified_split(patients, labels))}, rounds)
    split = stratified_split(patients, labels)
    report = split_report(split, labels, LABELS, SPLITS)
    return {
        "task": f"stratified split, {rows:,} rows",
        "seconds": medians(taken),
        "deviation": float(report["deviation"].max()),
        "by chance": float(report["by_chance"].max()),
        "all": taken,
    }


def print_figure(figure: dict, target: bool) -> None:
    seconds = figure["seconds"]
    cells = [f"{seconds[name]:12.3f}" if name in seconds else " " * 12 for name in ("ours", "loop", "limit")]
    ratio = f"{figure['ratio']:10.0f}" if "ratio" in figure else " " * 10
    said = ""
    if target:
        said = f"  at most {AT_MOST_SECONDS:g} s: {'met' if seconds['ours'] <= AT_MOST_SECONDS else 'MISSED'}"
    if "deviation" in figure:
        said = (
            f"  no label's prevalence in a part is more than {figure['deviation']:.2%} off the whole's "
            f"(a random split: about {figure['by chance']:.2%} for the rarest)"
        )
    print(f"{figure['task']:32s}{''.join(cells)}{ratio}{said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[573, 2000])
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--loop", type=int, default=10, help="replicates that the loop is timed on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--split-rows", type=int, default=300_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.replicates, options.loop, options.rounds, options.split_rows = [80], 50, 1, 1, 3000
    metrics = len(OVERALL_METRICS) + len(LABEL_METRICS) * len(LABELS)
    print(f"{options.replicates:,} replicates of {metrics} metrics of {len(SETTINGS)} settings, seconds, medians of "
          f"{options.rounds} rounds; loop: scikit-learn, {options.loop} replicates timed and scaled")  # fmt: skip
    print(f"{'':32s}{'ours':>12s}{'loop':>12s}{'limit':>12s}{'loop/ours':>10s}")
    figures = []
    for samples in options.samples:
        figures.append(bootstrap_figures(samples, options.replicates, options.loop, options.rounds))
        print_figure(figures[-1], not options.quick)
    figures.append(split_figures(options.split_rows, options.rounds))
    print_figure(figures[-1], False)
    if options.write:
        write_record(RESULTS, vars(options), figures)


if __name__ == "__main__":
    sys.exit(main())
