"""What the numbers mean: each metric's question, its ends, what needs no model, and how it misleads.

Comes in: a run's metric rows. Goes out: one table whose words are fixed and whose figures are this run's own.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from analysis import run_record
from analysis.metrics import LOWER_IS_BETTER
from analysis.report.blocks import Note, Section
from analysis.report.tables import Cell, Row, Table, number

READING = (
    "An interval says where the figure would fall had other patients of the same kind been drawn; it does not cover "
    "another hospital, another scanner or another way of labelling. It resamples patients, because images of one "
    "patient are not independent.",
    "A trivial baseline never looks at an image. A figure that does not beat it says nothing about the model, however "
    "large it is; a figure that beats it says that the images were used, not that the use is right.",
    "A null is what the same computation gives when labels are dealt at random. Many figures of imbalanced labels are "
    "large under their null, because class sizes alone make them.",
    "Of many comparisons some look like differences by chance; p-values here are corrected for how many were made "
    "(Holm).",
)


class Meaning(NamedTuple):
    """What to know of one metric."""

    metric: str
    title: str
    asks: str
    best: str
    beware: str


MEANINGS = (
    Meaning(
        "lrap",
        "LRAP",
        "Reading each image's labels from the surest to the least sure: of those read down to a true one, how many are "
        "true?",
        "1",
        "Ranking every image by how frequent the labels are comes far when one label dominates.",
    ),
    Meaning(
        "coverage_error",
        "Coverage error",
        "How far down that list must one read to have every true label?",
        "the mean number of true labels an image",
        "Its best value is not 0, and frequent labels drive it.",
    ),
    Meaning(
        "f1_macro",
        "Macro F1",
        "Precision and recall of the decisions in one figure, each label counting alike.",
        "1",
        "It moves with the threshold more than with the model; a label with three positives weighs as much as one with "
        "a thousand.",
    ),
    Meaning(
        "f1_micro",
        "Micro F1",
        "The same over all decisions together.",
        "1",
        "The most frequent label decides it.",
    ),
    Meaning(
        "exact_match",
        "Exact match",
        "For how many images is every label right?",
        "1",
        "Saying the most frequent set for everyone gets its share right.",
    ),
    Meaning(
        "map",
        "mAP",
        "Ranking the images of each label: how pure is the list down to each true one?",
        "1",
        "Chance is the label's prevalence, so values of labels of different prevalence do not compare.",
    ),
    Meaning(
        "auroc_macro",
        "Macro AUROC",
        "Of an image with and one without the label, how often is the one with it ranked higher?",
        "1",
        "At 1 % prevalence an AUROC of 0.9 still means that most alarms are false: look at precision and recall.",
    ),
    Meaning(
        "hamming",
        "Hamming loss",
        "Which share of all (image, label) decisions is wrong?",
        "0",
        "Saying nothing at all is nearly right when labels are rare.",
    ),
    Meaning(
        "brier",
        "Brier score",
        "How far are the probabilities from what was true, squared?",
        "0",
        "Rare labels make it small whatever is said.",
    ),
    Meaning(
        "over_prediction",
        "Over-prediction",
        "Labels said over labels true.",
        "1",
        "1 overall can hide one label said too often and another never.",
    ),
)


def meaning_section(record: run_record.RunRecord) -> Section:
    """Return the section, with what a trivial baseline reaches in this run beside each metric."""
    rows = record.rows("metric")
    rows = rows[rows["label"].isna()]
    # One protocol's baselines serve: they never look at an image, and neither at how scores are cut.
    rows = rows[rows["protocol"] == (record.protocols or [""])[0]]
    lines = []
    frame = []
    for meaning in MEANINGS:
        part = rows[(rows["metric"] == meaning.metric) & rows["value"].notna()]
        if part.empty:
            continue
        best = _best_trivial(part)
        told = "–" if best is None else number(float(best["value"]))
        small = "" if best is None else str(best["setting"]).lower()
        lines.append(
            Row(
                [
                    Cell(meaning.title),
                    Cell(meaning.asks),
                    Cell(meaning.best),
                    Cell(told, small, None if best is None else float(best["value"])),
                    Cell(meaning.beware),
                ]
            )
        )
        frame.append({**meaning._asdict(), "trivial": None if best is None else best["value"], "by": small})
    table = Table(
        ["metric", "what it asks", "best", "without a model, here", "beware"],
        lines,
        "The fourth column is the best of this run's trivial baselines on the same test images.",
        "tables/meaning.csv",
        pd.DataFrame(frame),
        prose=True,
    )
    return Section("meaning", "What the numbers mean", "", "", [*(Note(text) for text in READING), table])


def _best_trivial(rows: pd.DataFrame) -> pd.Series | None:
    trivial = rows[rows["baseline"] == True]  # noqa: E712 - a column of objects
    if trivial.empty:
        return None
    values = trivial["value"].astype(float)
    lowest = str(trivial["metric"].iloc[0]) in LOWER_IS_BETTER
    if trivial["metric"].iloc[0] == "over_prediction":
        return trivial.loc[(values - 1).abs().idxmin()]
    return trivial.loc[values.idxmin() if lowest else values.idxmax()]
