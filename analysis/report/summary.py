"""The first screen: what was asked, what came out beside what needs no model, and what to beware of.

Comes in: a `RunRecord`. Goes out: the question as a sentence, one line of answers a setting, and the run's own
sentences sorted into warnings and findings by `analysis.sentences.is_caution`; none of them is written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import run_record
from analysis.metrics import LOWER_IS_BETTER
from analysis.report.plain import told_beside_tables
from analysis.report.tables import css, number
from analysis.sentences import TITLES, is_caution, with_protocol

ANSWERED = ("lrap", "f1_macro", "exact_match", "map", "auroc_macro")
BESIDE_THEIR_TABLES = ("distances", "thresholds", "subgroups", "space")
# What a study was made to answer is told on the first screen, also where it has a table of its own.
FIRST = ("claims", "differences", "classification")
MOST_WARNINGS = 6
BAR_WIDTH, BAR_HEIGHT = 132, 16


@dataclass(frozen=True)
class Answer:
    """One setting's value of one metric beside the best trivial baseline.

    Parameters
    ----------
    metric, value, interval : str
    verdict : "above" | "not above" | "below" | ""
        Of the paired difference to the baseline; "" where the run did not record it.
    beside : str
        The baseline and its value.
    bar : str
        A small SVG of interval and baseline.
    """

    metric: str
    value: str
    interval: str
    verdict: str
    beside: str
    bar: str


@dataclass(frozen=True)
class AnswerLine:
    """A setting's answers."""

    setting: str
    colour: str
    answers: list[Answer]


def question(record: run_record.RunRecord) -> str:
    """Return what was asked, in one or two sentences, from the run's own facts."""
    provenance = record.provenance
    dataset, split = provenance.get("dataset", {}), provenance.get("split", {})
    counts = split.get("counts", {})
    encoders = provenance.get("encoders") or [{}]
    model = encoders[0].get("name") or encoders[0].get("id") or "the model"
    settings = _settings(record)
    named = ", ".join(settings[:-1]) + (" and " if len(settings) > 1 else "") + settings[-1] if settings else ""
    imbalance = dataset.get("imbalance", "–")
    text = (
        f"How well does {model} tell {len(record.label_names)} labels apart in {dataset.get('n', 0):,} images of "
        f"{dataset.get('groups', 0):,} patients"
    )
    text += f", where the most frequent label is to the rarest as {imbalance}?" if imbalance != "–" else "?"
    if counts.get("test"):
        text += f" Judged on the {counts['test']:,} test images"
        text += f", in {len(settings)} settings: {named}." if len(settings) > 1 else f": {named}." if named else "."
    return text


def answer_lines(record: run_record.RunRecord, protocol: str, colours: dict[str, str]) -> list[AnswerLine]:
    """Return one line a setting: its test metrics beside the best trivial baseline of each."""
    rows = record.rows("metric")
    rows = rows[(rows["protocol"] == protocol) & rows["label"].isna()]
    margins = record.rows("margin")
    margins = margins[margins["protocol"] == protocol]
    lines = []
    for setting in dict.fromkeys(rows.loc[rows["baseline"] != True, "setting"]):  # noqa: E712 - a column of objects
        answers = []
        for metric in ANSWERED:
            own = rows[(rows["setting"] == setting) & (rows["metric"] == metric)]
            if own.empty or not _finite(own["value"].iloc[0]):
                continue
            trivial = rows[(rows["baseline"] == True) & (rows["metric"] == metric)]  # noqa: E712
            margin = margins[(margins["setting"] == setting) & (margins["metric"] == metric)]
            answers.append(_answer(own.iloc[0], trivial, margin, colours[setting]))
        if answers:
            lines.append(AnswerLine(str(setting), css(colours[str(setting)]), answers))
    return lines


def warnings(record: run_record.RunRecord) -> list[str]:
    """Return what a reader must know before believing a figure, most general first."""
    found = []
    failed = len(record.failures)
    if failed:
        found.append(f"{failed:,} {'sample' if failed == 1 else 'samples'} could not be used and are in no figure.")
    status = record.provenance.get("status")
    if status and status not in ("done", "running"):
        found.append(f"The run ended as {status!r}; what follows is what it had written by then.")
    said = record.rows("sentence")
    for row in said.itertuples():
        # What was asked is answered among the findings, whichever way the answer goes.
        if row.text and row.section != FIRST[0] and is_caution(str(row.text)):
            found.append(with_protocol(str(row.text), row.protocol))
    return list(dict.fromkeys(found))


def findings(record: run_record.RunRecord) -> list[str]:
    """Return the run's other sentences, but for those that stand beside their own tables."""
    said = record.rows("sentence")
    beside = told_beside_tables(record).union(BESIDE_THEIR_TABLES)
    shown = [row for row in said.itertuples() if row.text and (row.section in FIRST or row.section not in beside)]
    shown.sort(key=lambda row: FIRST.index(row.section) if row.section in FIRST else len(FIRST))
    return list(
        dict.fromkeys(
            with_protocol(str(row.text), row.protocol)
            for row in shown
            if row.section == FIRST[0] or not is_caution(str(row.text))
        )
    )


def summary_view(record: run_record.RunRecord, colours: dict[str, str]) -> dict[str, Any]:
    """Return what the template shows on the first screen."""
    cautions = warnings(record)
    protocols = [
        {"name": protocol, "lines": answer_lines(record, protocol, colours)} for protocol in _sound_first(record)
    ]
    return {
        "question": question(record),
        "protocols": [part for part in protocols if part["lines"]],
        "warnings": cautions[:MOST_WARNINGS],
        "more_warnings": cautions[MOST_WARNINGS:],
        "findings": findings(record),
    }


def _sound_first(record: run_record.RunRecord) -> list[str]:
    return sorted(record.protocols, key=lambda name: name != "sound")


def _settings(record: run_record.RunRecord) -> list[str]:
    rows = record.rows("metric")
    return [str(name) for name in dict.fromkeys(rows.loc[rows["baseline"] != True, "setting"])]  # noqa: E712


def _answer(own: pd.Series, trivial: pd.DataFrame, margin: pd.DataFrame, colour: str) -> Answer:
    metric = str(own["metric"])
    trivial = trivial[trivial["value"].notna()]
    best = None
    if len(trivial):
        order = trivial["value"].astype(float)
        best = trivial.loc[order.idxmin() if metric in LOWER_IS_BETTER else order.idxmax()]
    bounded = _finite(own["low"]) and _finite(own["high"])
    verdict = ""
    if len(margin) and _finite(margin["low"].iloc[0]):
        low, high = float(margin["low"].iloc[0]), float(margin["high"].iloc[0])
        verdict = "above" if low > 0 else "below" if high < 0 else "not above"
    return Answer(
        metric=TITLES.get(metric, metric),
        value=number(float(own["value"])),
        interval=f"{number(own['low'])} – {number(own['high'])}" if bounded else "",
        verdict=verdict,
        beside=f"{str(best['setting']).lower()} {number(best['value'])}" if best is not None else "",
        bar=_bar(own, None if best is None else float(best["value"]), colour),
    )


def _bar(own: pd.Series, baseline: float | None, colour: str) -> str:
    """Return a small SVG from 0 to 1: the interval, the value as a dot, the best trivial baseline as a tick."""

    def place(value: float) -> float:
        return round(4 + min(1.0, max(0.0, value)) * (BAR_WIDTH - 8), 1)

    middle = BAR_HEIGHT / 2
    parts = [
        f'<svg class="bar" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" preserveAspectRatio="xMinYMid" aria-hidden="true">',
        f'<path d="M4 {middle}H{BAR_WIDTH - 4}" stroke="var(--rule)" stroke-width="2"/>',
    ]
    if baseline is not None and math.isfinite(baseline):
        parts.append(f'<path d="M{place(baseline)} 1V{BAR_HEIGHT - 1}" stroke="var(--muted)" stroke-width="2"/>')
    if _finite(own["low"]) and _finite(own["high"]):
        parts.append(
            f'<path d="M{place(own["low"])} {middle}H{place(own["high"])}" stroke="{css(colour)}" stroke-width="5" '
            'stroke-linecap="round" opacity=".5"/>'
        )
    parts.append(f'<circle cx="{place(own["value"])}" cy="{middle}" r="4" fill="{css(colour)}"/></svg>')
    return "".join(parts)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
