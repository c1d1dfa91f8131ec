"""The data card and the model card of a run, in Markdown, written from what the run recorded.

Comes in: a `RunRecord`. Goes out: text. Every number is one of the run's; what the run does not know (licence, consent,
who the patients are) is left as a line to fill in, not made up. Forms follow Gebru et al., Datasheets for Datasets
(2021) and Mitchell et al., Model Cards (2019), in short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.run_record import RunRecord
from analysis.sentences import FEW_POSITIVES, TITLES, with_protocol

OVERALL = ("f1_macro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro", "brier", "ece")
NOT_FOR_DIAGNOSIS = (
    "**Not for diagnosis.** A research instrument; no figure here says that a patient may be treated by it."
)
TO_FILL_IN = "(not known to the run; fill in)"
MOST_PAIRS = 12


def data_card(record: RunRecord) -> str:
    """Return the data card: parts, prevalences, labels that come together, texts, duplicates, leaks, label sources."""
    provenance = record.provenance
    data, split = provenance.get("dataset", {}), provenance.get("split", {})
    lines = [
        f"# Data card: {data.get('schema', '')}",
        "",
        f"{data.get('n', 0):,} images of {data.get('groups', 0):,} patients or studies, {len(record.label_names)} "
        f"labels, {data.get('imbalance', '?')} between the most and the least frequent. Split: "
        f"{split.get('how', '?')}, digest `{split.get('digest', '?')}`.",
        "",
        *(f"- {note}" for note in provenance.get("data_notes", [])),
        f"- {len(record.failures)} samples could not be used (failures.csv)" if len(record.failures) else "",
        "",
        "Licence, consent and how patients were chosen: " + TO_FILL_IN + ".",
        "",
        "## Parts",
        "",
        *_table(announced(record, "data-parts")),
        "",
        "## Labels",
        "",
        *_table(_prevalences(record)),
        "",
        *_sentences(record, ("label sources",)),
        "",
        "## Labels that come together",
        "",
        *_table(announced(record, "data-cooccurrence").head(MOST_PAIRS)),
        "",
        "## Texts",
        "",
        *(_table(announced(record, "data-texts")) or ["No texts."]),
        "",
        "## Duplicates and leaks",
        "",
        *_table(announced(record, "data-duplicates")),
        "",
        *_table(_leaks(record)),
        "",
        *(_sentences(record, ("data",)) or ["Images and texts in two parts of the split were not looked for."]),
        "",
        NOT_FOR_DIAGNOSIS,
    ]
    return _joined(lines)


def model_card(record: RunRecord) -> str:
    """Return the model card: encoders, settings, figures with intervals and baselines, label by label, limits."""
    provenance = record.provenance
    encoders = [str(encoder.get("id")) for encoder in provenance.get("encoders", [])]
    lines = [
        f"# Model card: {provenance.get('title') or 'a study'}",
        "",
        NOT_FOR_DIAGNOSIS,
        "",
        f"Encoders: {', '.join(f'`{name}`' for name in encoders)}. Labels: {', '.join(record.label_names)}. Written "
        f"from the run of {provenance.get('started', '?')}; settings in config.yaml, every figure in results.jsonl.",
        "",
        "Intended use: to study image-text models on data like these (data-card.md). Licence of the weights: "
        + TO_FILL_IN
        + ".",
    ]
    for protocol in record.protocols:
        lines += ["", f"## Protocol {protocol}", "", "### Settings", ""]
        made = announced(record, "model-settings")
        lines += _table(made[made["protocol"] == protocol].drop(columns="protocol") if len(made) else made)
        lines += [
            "",
            "### Test figures",
            "",
            "Value with its 95 % interval by patient; trivial baselines in italics.",
            "",
        ]
        lines += _table(_figures(record, protocol))
        for setting in _learnt(record, protocol):
            lines += ["", f"### {setting}, label by label", "", *_table(_labels(record, protocol, setting))]
    lines += ["", "## Limits", "", *_limits(record), "", NOT_FOR_DIAGNOSIS]
    return _joined(lines)


def announced(record: RunRecord, name: str) -> pd.DataFrame:
    """Return a table that the run announces, by its name; an empty one where it has none."""
    found = record.rows("table")
    found = found[found["name"] == name]
    return record.table(str(found["source"].iloc[-1])) if len(found) else pd.DataFrame()


def _prevalences(record: RunRecord) -> pd.DataFrame:
    rows = record.rows("split")
    if rows.empty:
        return rows
    shown = pd.DataFrame({"label": rows["label"], "split": rows["split"]})
    counts = (rows["value"] * rows["n"]).round().astype(int)
    shown["text"] = [f"{count} ({100 * value:.1f} %)" for count, value in zip(counts, rows["value"], strict=True)]
    wide = shown.pivot_table(index="label", columns="split", values="text", aggfunc="first", sort=False)
    return wide.reindex(columns=list(dict.fromkeys(rows["split"]))).reset_index()


def _leaks(record: RunRecord) -> pd.DataFrame:
    rows = record.rows("leak")
    return pd.DataFrame({"across the split": rows["metric"], "pairs": rows["value"].astype(int)})


def _learnt(record: RunRecord, protocol: str) -> list[str]:
    rows = record.rows("metric")
    rows = rows[(rows["protocol"] == protocol) & (rows["baseline"] == False)]  # noqa: E712
    return list(dict.fromkeys(rows["setting"]))


def _figures(record: RunRecord, protocol: str) -> pd.DataFrame:
    rows = record.rows("metric")
    rows = rows[(rows["protocol"] == protocol) & rows["label"].isna() & rows["metric"].isin(OVERALL)]
    lines = []
    for setting, part in rows.groupby("setting", sort=False):
        values = part.drop_duplicates("metric").set_index("metric")
        name = f"*{setting}*" if bool(part["baseline"].iloc[0]) else str(setting)
        cells = {
            TITLES.get(metric, metric): _interval(values.loc[metric]) for metric in OVERALL if metric in values.index
        }
        lines.append({"setting": name, **cells})
    return pd.DataFrame(lines)


def _labels(record: RunRecord, protocol: str, setting: str) -> pd.DataFrame:
    rows = record.rows("metric")
    rows = rows[(rows["protocol"] == protocol) & (rows["setting"] == setting) & rows["label"].notna()]
    cuts = announced(record, "model-thresholds")
    cuts = cuts[(cuts["protocol"] == protocol) & (cuts["setting"] == setting)] if len(cuts) else cuts
    cut_of = dict(zip(cuts["label"], cuts["threshold"], strict=True)) if len(cuts) else {}
    lines = []
    for label in record.label_names:
        part = rows[rows["label"] == label].drop_duplicates("metric").set_index("metric")
        if part.empty:
            continue
        line: dict[str, Any] = {"label": label, "test positives": int(part["value"].get("positives", 0))}
        for metric, title in (("auroc", "AUROC"), ("ap", "AP"), ("f1", "F1"), ("precision", "P"), ("recall", "R")):
            line[title] = _interval(part.loc[metric]) if metric in part.index else "–"
        line["threshold"] = _number(cut_of[label]) if label in cut_of else "per image"
        lines.append(line)
    return pd.DataFrame(lines)


def _limits(record: RunRecord) -> list[str]:
    """Return what holds a reader back from these figures, from the numbers themselves."""
    rows = record.rows("metric")
    positives = rows[rows["metric"] == "positives"].drop_duplicates("label").set_index("label")["value"]
    rare = [f"{label} ({int(count)})" for label, count in positives.items() if count < FEW_POSITIVES]
    limits = []
    if rare:
        limits.append(f"- Fewer than {FEW_POSITIVES} test positives, so no stable figure: {', '.join(rare)}.")
    below = []
    for protocol in record.protocols:
        table = announced(record, f"figures-{protocol}")
        for row in table[table["verdict"] != "better"].itertuples() if len(table) else ():
            if row.metric in ("lrap", "f1_macro", "exact_match"):
                below.append(f"{row.setting}'s {TITLES[row.metric]} ({protocol}; {row.baseline})")
    if below:
        limits.append(f"- Not shown to be better than the best trivial baseline: {'; '.join(below)}.")
    if len(record.rows("leak")):
        limits += _sentences(record, ("data",))
    limits.append(
        "- One data set, one way of labelling it; nothing is known of other hospitals, devices or populations."
    )
    limits.append("- Thresholds were chosen on validation images of the same source; elsewhere they do not carry over.")
    return limits + _sentences(record, ("subgroups",))


def _sentences(record: RunRecord, sections: Sequence[str]) -> list[str]:
    rows = record.rows("sentence")
    rows = rows[rows["section"].isin(list(sections))]
    return [f"- {text}" for text in dict.fromkeys(map(with_protocol, rows["text"], rows["protocol"]))]


def _interval(row: Any) -> str:
    if row["value"] is None or not math.isfinite(row["value"]):
        return "–"
    text = _number(row["value"])
    known = (
        row["low"] is not None and row["high"] is not None and math.isfinite(row["low"]) and math.isfinite(row["high"])
    )
    return f"{text} ({_number(row['low'])} to {_number(row['high'])})" if known else text


def _number(value: float) -> str:
    if math.isinf(value):
        return "never said" if value > 0 else "always said"
    return f"{value:.3g}" if abs(value) < 1e-2 and value else f"{value:.3f}"


def _table(frame: pd.DataFrame) -> list[str]:
    """Return a frame as a Markdown table; [] where it has no rows."""
    if frame.empty:
        return []
    columns = [str(column).replace("_", " ") for column in frame.columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    return lines


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() else _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _joined(lines: Sequence[str]) -> str:
    """Return lines as text, never with two empty ones together."""
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).rstrip() + "\n"
