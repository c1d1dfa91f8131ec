"""What the report shows of one protocol: settings beside baselines, labels, distances, heatmap scores.

Comes in: a `RunRecord` and a protocol's name. Goes out: the protocol's sections in reading order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis import curves, figures, run_record
from analysis.metrics.calibration import are_probabilities
from analysis.report import plain, questions
from analysis.report.blocks import Details, Drawing, Heading, Matrix, Section, Sentences
from analysis.report.setting_tables import label_table, localization_by_label, settings_table
from analysis.report.tables import setting_by_metric

CHART_METRICS = (
    ("f1_macro", "macro F1 ↑"),
    ("lrap", "LRAP ↑"),
    ("map", "mAP ↑"),
    ("coverage_error", "coverage error ↓"),
)
LOCALIZATION_METRICS = (
    ("pointing_game", "pointing game ↑"),
    ("energy", "energy in region ↑"),
    ("iou", "best IoU ↑"),
    ("dice", "best Dice ↑"),
    ("pixel_ap", "pixel AP ↑"),
    ("peak_f1", "finding F1 by peak ↑"),
    ("region_f1", "finding F1 by region ↑"),
)
DISTANCE_METRICS = (
    ("inter", "inter ↑"),
    ("intra", "intra ↓"),
    ("ratio", "ratio ↑"),
    ("ratio_null", "ratio, labels permuted"),
)
EXPLANATIONS = {
    "sound": "Embeddings normalised, thresholds tuned on validation only, 95 % bootstrap intervals over patients. The "
    "grey rows are trivial baselines: a setting that does not beat them has learnt nothing that prevalences do "
    "not already tell.",
    "paper": "The published study's own steps: un-normalised dot products, per-image min-max scores cut at 0.5, no "
    "tuning. Italic rows are the published figures, on data and labels that are not public: beside, not equal.",
}
MOST_CLASSES = 30


@dataclasses.dataclass(frozen=True)
class Part:
    """A run seen by one protocol.

    Parameters
    ----------
    record : RunRecord
    protocol : str
    colours : dict
        Of each setting.
    announced : sequence of dict
        The run's announced tables (`analysis.report.plain.plain_tables`).
    first : bool
        Whether it is the page's first protocol, which shows what belongs to none.
    """

    record: run_record.RunRecord
    protocol: str
    colours: dict[str, str]
    announced: Sequence[dict[str, Any]]
    first: bool

    def rows(self, kind: str) -> pd.DataFrame:
        """Return the protocol's result rows of one kind."""
        rows = self.record.rows(kind)
        return rows[rows["protocol"] == self.protocol]

    def said(self, section: str) -> Sentences:
        """Return the sentences of a section: the protocol's own, and those that belong to none."""
        rows = self.record.rows("sentence")
        rows = rows[(rows["section"] == section) & (rows["protocol"].isna() | (rows["protocol"] == self.protocol))]
        return Sentences(list(dict.fromkeys(rows["text"])))

    def csv(self, name: str) -> str:
        """Return where a table of the protocol is written."""
        return f"tables/{name}-{self.protocol}.csv"

    def section(self, anchor: str, title: str, lead: str, blocks: Sequence[object]) -> Section:
        """Return a section of the protocol."""
        group = f"Protocol: {self.protocol}"
        announced = plain.blocks_of(self.announced, anchor, self.protocol, self.first)
        return Section(f"{anchor}-{self.protocol}", title, group, lead, [*blocks, *announced])

    @property
    def learnt(self) -> list[str]:
        """Settings that are no trivial baselines, in the run's order."""
        settings = dict.fromkeys(self.rows("metric").pipe(lambda rows: rows[rows["label"].isna()])["setting"])
        return [setting for setting in settings if self.colours[setting] != figures.FAINT]


def protocol_sections(
    record: run_record.RunRecord,
    protocol: str,
    colours: dict[str, str],
    announced: Sequence[dict[str, Any]],
    first: bool,
) -> list[Section]:
    """Return what the page shows of one protocol, in reading order; see `Part`."""
    part = Part(record, protocol, colours, announced, first)
    return [
        settings_section(part),
        labels_section(part),
        part.section(
            "thresholds",
            "What the threshold does to the conclusion",
            "LRAP, coverage error, AP and AUROC are the same whatever the cut; F1, exact match and over-prediction are "
            "not.",
            [questions.thresholds_table(part.rows("threshold"), colours, protocol), part.said("thresholds")],
        ),
        part.section(
            "subgroups",
            "Subgroups",
            "A gap can come from the model serving a subgroup worse, and from another mix of findings in it: read it "
            "beside the counts.",
            [
                questions.subgroup_table(part.rows("subgroup"), part.rows("gap"), colours, protocol),
                part.said("subgroups"),
            ],
        ),
        distances_section(part),
        part.section(
            "space",
            "Shape of the space",
            "Measures that class sizes alone cannot make; a value within its null is no sign of separation.",
            [questions.space_table(part.rows("space"), colours, protocol), part.said("space")],
        ),
        part.section(
            "search",
            "Search",
            "A hit is right when it has the query's label, or is the query's own report or image.",
            [questions.retrieval_table(part.rows("retrieval"), protocol), part.said("search")],
        ),
        heatmap_section(part),
    ]


def settings_section(part: Part) -> Section:
    """Return settings, baselines and published figures beside one another, and the settings' paired differences."""
    overall = part.rows("metric")
    overall = overall[overall["label"].isna()]
    references = part.record.rows("reference")
    references = references if part.protocol == "paper" else references.iloc[:0]
    return part.section(
        "settings",
        "Settings and baselines",
        EXPLANATIONS.get(part.protocol, ""),
        [
            Drawing(figures.interval_chart(overall, CHART_METRICS, part.colours)),
            settings_table(overall, part.rows("distance"), references, part.colours, part.protocol),
            Heading("Settings against one another"),
            questions.differences_table(part.rows("difference"), part.protocol),
            part.said("differences"),
        ],
    )


def labels_section(part: Part) -> Section:
    """Return small multiples by label: metrics with intervals, curves, reliability, and what is said too often."""
    labels = part.record.label_names
    by_label = part.rows("metric")
    by_label = by_label[by_label["label"].notna()]
    learnt = part.learnt
    rates = by_label[by_label["metric"].isin(["predicted_rate", "prevalence"]) & by_label["setting"].isin(learnt)]
    shown = _frequent(by_label, labels)
    more = f" The {len(shown)} most frequent of {len(labels)} labels are drawn." if len(shown) < len(labels) else ""
    strips = curves.label_strips(by_label, shown, learnt, part.colours) if learnt and len(by_label) else ""
    bars = figures.prediction_bars(rates, shown, learnt, part.colours) if len(rates) else ""
    return part.section(
        "labels",
        "Label by label",
        "",
        [
            Drawing(
                strips,
                "Most frequent label first, test positives in brackets. Grey ticks: what a random ranking reaches."
                + more,
            )
            if strips
            else None,
            Details("The figures of every label", [label_table(by_label, labels, learnt, part.colours, part.protocol)]),
            *_curve_blocks(part, learnt, more),
            Heading("Over-prediction") if bars else None,
            Drawing(
                bars,
                "How often a label is predicted, over how often it is true. 1 is right; an open triangle is a label "
                "never predicted." + more,
            )
            if bars
            else None,
        ],
    )


def _curve_blocks(part: Part, learnt: Sequence[str], more: str) -> list[object]:
    """Return precision-recall curves, reliability and, on demand, ROC curves of the protocol's settings."""
    scores = part.record.scores
    if scores is None:
        return []
    chosen = [
        place
        for place, (setting, made) in enumerate(zip(scores.settings, scores.protocols, strict=True))
        if made == part.protocol and setting in learnt
    ]
    if not chosen or not scores.truth.any():
        return []
    labels, names = part.record.label_names, [scores.settings[place] for place in chosen]
    values = scores.values[chosen]
    blocks: list[object] = [
        Heading("Precision and recall"),
        Drawing(
            curves.precision_recall_grid(scores.truth, values, names, labels, part.colours),
            "The dotted line is the label's prevalence: what a random ranking reaches. Curves of labels with few "
            "positives are steps, not evidence." + more,
        ),
        Details(
            "ROC curves (at low prevalence they flatter: a curve near the corner can still mean mostly false alarms)",
            [Drawing(curves.roc_grid(scores.truth, values, names, labels, part.colours))],
        ),
    ]
    # Cosines and logits say nothing of frequencies.
    sure = [place for place in chosen if are_probabilities(scores.values[place])]
    if sure:
        drawing = figures.reliability_panels(
            scores.truth, scores.values[sure], [scores.settings[place] for place in sure], part.colours
        )
        blocks += [
            Heading("Reliability"),
            Drawing(
                drawing,
                "On the dotted line a probability means what it says. All labels together, in bins of equal size; an "
                "open triangle is a bin without a positive.",
            ),
        ]
    return blocks


def distances_section(part: Part) -> Section:
    """Return distances within and between classes beside their null, and the matrix of class pairs."""
    distances = part.rows("distance")
    table = None
    if len(distances):
        table = setting_by_metric(
            distances,
            DISTANCE_METRICS,
            part.colours,
            part.csv("distances"),
            "Distances between and within classes on the test split.",
        )
    return part.section(
        "distances",
        "Distances",
        "Intra: mean distance to the own class centre. Inter: mean distance between class centres. The null is the "
        "ratio with labels permuted: class sizes alone produce it.",
        [table, part.said("distances"), *_matrices(part)],
    )


def _matrices(part: Part) -> list[object]:
    """Return the distances of class pairs, a matrix an encoder; of the most frequent classes where there are many."""
    pairs = part.record.distances
    if pairs.empty or "protocol" not in pairs:
        return []
    pairs = pairs[pairs["protocol"] == part.protocol]
    by_label = part.rows("metric")
    labels = _frequent(by_label[by_label["label"].notna()], part.record.label_names, MOST_CLASSES)
    blocks: list[object] = []
    for setting, rows in pairs.groupby("setting", sort=False):
        wide = rows.pivot_table(index="label_a", columns="label_b", values="distance", aggfunc="first")
        present = [label for label in labels if label in wide.index]
        if len(present) < 2:
            continue
        values = wide.reindex(index=present, columns=present).to_numpy(dtype=float)
        caption = f"{setting}: distance between the centres of two classes; darker is farther."
        if len(labels) < len(part.record.label_names):
            caption += f" The {len(labels)} most frequent labels."
        blocks.append(Matrix(present, values, caption, "distances.csv"))
    if not blocks:
        return []
    heading = Heading("Class pairs")
    return [heading, blocks[0], Details("Other encoders", blocks[1:])] if len(blocks) > 1 else [heading, *blocks]


def heatmap_section(part: Part) -> Section:
    """Return heatmap scores beside the nulls, over all findings and by label."""
    rows = part.rows("localization")
    table = None
    if len(rows):
        table = setting_by_metric(
            rows[rows["label"].isna()],
            LOCALIZATION_METRICS,
            part.colours,
            part.csv("heatmaps"),
            "Mean over annotated findings, with 95 % bootstrap intervals over patients.",
        )
    return part.section(
        "heatmaps",
        "Heatmaps against the truth",
        "Maps are computed in float32, carried back to the original image, and compared with boxes or masks. A map "
        "earns trust only above the centre prior, the label's own location prior, the mean map of other patients, the "
        "map of a label that the image does not have, and a tower of random weights.",
        [table, part.said("heatmaps"), Details("By label", [localization_by_label(rows, part.colours, part.protocol)])],
    )


def _frequent(by_label: pd.DataFrame, labels: Sequence[str], most: int = curves.MOST_LABELS) -> list[str]:
    """Return the labels with most test positives, at most so many, in their own order."""
    if len(labels) <= most:
        return list(labels)
    counts = by_label[by_label["metric"] == "positives"].drop_duplicates("label").set_index("label")["value"]
    ranked = sorted(labels, key=lambda label: -float(counts.get(label, 0) or 0))[:most]
    return [label for label in labels if label in set(ranked)]
