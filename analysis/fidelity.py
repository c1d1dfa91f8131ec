"""A run of the published protocol beside what was published: figure by figure, and condition by condition.

In come the figures of the run and facts about its model, data, labels and split; out go two tables and sentences. What
is not the same is said to be so by a rule, never left to the reader: the study's label table and its radiologist's
annotations are not public, so no run can be "the same" in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from analysis import paper
from analysis.sentences import TITLES, figure

YES, NO, OPEN = "yes", "no", "cannot be told"
SPOKEN = ("f1_macro", "exact_match", "lrap", "coverage_error", "ratio")


class RunFacts(NamedTuple):
    """What a run used.

    Parameters
    ----------
    encoder : str
        Its id.
    structure : mapping
        The encoder's description (`model` with vision_cfg and text_cfg, `text_tower`, `weights`).
    precision : str
    schema : str
        Of the data set.
    images, groups : int
    positives : mapping of label to int
        Over all images.
    label_source : str
        Such as "labels.csv" or "MeSH/major".
    split_how : str
    split : mapping of part to int
    finetuned : bool
    annotated : int
        Findings with a box or mask in the test split.
    machine : str
    """

    encoder: str
    structure: Mapping[str, Any]
    precision: str
    schema: str
    images: int
    groups: int
    positives: Mapping[str, int]
    label_source: str
    split_how: str
    split: Mapping[str, int]
    finetuned: bool
    annotated: int
    machine: str


def reference_comparison(ours: pd.DataFrame) -> pd.DataFrame:
    """Return every published figure beside the run's own.

    Parameters
    ----------
    ours : DataFrame
        setting, metric, value, low, high (NaN where there is no interval), null: overall figures of the run under the
        published protocol, distances and minutes among them. Settings are matched whatever their case.

    Returns
    -------
    DataFrame
        setting, metric, published, ours, difference (ours - published), low, high, within ("yes" where the published
        figure lies in our interval, "no" where not, "" without an interval or figure of ours), null. A figure that the
        study gives and the run does not has empty cells.
    """
    own = {(str(row["setting"]).lower(), str(row["metric"])): row for row in ours.to_dict("records")}
    rows = []
    for line in paper.reference_table().itertuples():
        mine = own.get((str(line.setting), str(line.metric)), {})
        value, low, high, null = (_number(mine.get(name)) for name in ("value", "low", "high", "null"))
        within = ""
        if math.isfinite(low) and math.isfinite(high):
            within = YES if low <= line.value <= high else NO
        rows.append(
            {
                "setting": line.setting,
                "metric": line.metric,
                "published": line.value,
                "ours": value,
                "difference": value - line.value,
                "low": low,
                "high": high,
                "within": within,
                "null": null,
            }
        )
    return pd.DataFrame(rows)


def conditions(facts: RunFacts) -> pd.DataFrame:
    """Return what the study did and what this run did, step by step.

    Returns
    -------
    DataFrame
        condition, study, here, same ("yes", "no", "cannot be told").
    """
    rows = [_model(facts), _data(facts), _labels(facts), _split(facts)]
    rows += [
        ("prompts and scores", "bare label names; dot products of un-normalised embeddings", "the same", YES),
        ("decisions", "per-image min-max, > 0.5", "the same; every cut from 0.20 to 0.90 in its own table", YES),
        ("cut of the zero-shot row", "not recorded", "0.50", OPEN),
        ("figures", "macro-F1, exact match, LRAP, coverage error; distances by first positive label", "the same", YES),
        (
            "linear probe",
            "BCE, AdamW 1e-4, batches of 24, at most 10 epochs, patience 5; tower in fp16 autocast",
            f"the same on cached embeddings; tower in {facts.precision}",
            YES if facts.precision == "fp16" else NO,
        ),
        (
            "fine-tuning",
            "whole tower at 1e-5, AdamW made anew every epoch, batches of 24, fp16 autocast",
            "the same; fp16 autocast where there is CUDA" if facts.finetuned else "not run",
            YES if facts.finetuned else NO,
        ),
        (
            "heatmap annotations",
            "15 test images by a radiologist, not public",
            f"{facts.annotated} annotated findings of the data at hand" if facts.annotated else "none",
            NO,
        ),
        ("machine", "not recorded with its minutes", facts.machine or "not recorded", OPEN),
    ]
    return pd.DataFrame(rows, columns=["condition", "study", "here", "same"])


def fidelity_sentences(comparison: pd.DataFrame, told: pd.DataFrame) -> list[str]:
    """Return what was and was not as in the study, and how our figures stand to the published ones."""
    other = told[told["same"] == NO]
    sentences = [
        f"Of {len(told)} conditions of the published study {int((told['same'] == YES).sum())} are met here"
        + (
            f"; not met: {'; '.join(f'{row.condition} (here: {row.here})' for row in other.itertuples())}."
            if len(other)
            else "."
        )
    ]
    essential = told[told["condition"].isin(["model", "data", "labels"]) & (told["same"] != YES)]
    if len(essential):
        names = " and ".join(essential["condition"])
        sentences.append(
            f"Published figures beside ours are no replication: {names} {'is' if len(essential) == 1 else 'are'} not "
            "the study's."
        )
    for setting, part in comparison.groupby("setting", sort=False):
        compared = part[part["metric"].isin(list(SPOKEN)) & (part["within"] != "")]
        if compared.empty:
            continue
        inside = [TITLES.get(row.metric, row.metric) for row in compared.itertuples() if row.within == YES]
        outside = [
            f"{TITLES.get(row.metric, row.metric)} {figure(row.ours, 3)} (published {figure(row.published, 3)})"
            for row in compared.itertuples()
            if row.within == NO
        ]
        sentences.append(
            f"{setting.capitalize()}: the published figure lies in our 95 % interval for "
            f"{', '.join(inside) or 'no metric'}; outside it: {', '.join(outside) or 'none'}."
        )
    return sentences


def _model(facts: RunFacts) -> tuple[str, str, str, str]:
    model = facts.structure.get("model", {})
    vision = model.get("vision_cfg", {}).get("timm_model_name", "another tower")
    words = facts.structure.get("text_tower", {}).get("vocab_size", "?")
    here = f"{facts.encoder} ({vision}, {model.get('embed_dim', '?')} dimensions, {words} words)"
    shaped = vision == "vit_base_patch16_224" and model.get("embed_dim") == 512 and words == 30522
    # Weights can be told by name alone: the study names no digest of them.
    named = paper.MODEL.lower() in facts.encoder.lower()
    same = YES if named and shaped else NO
    if shaped and not named:
        here += "; BiomedCLIP's structure under another name"
        same = OPEN
    return "model", f"{paper.MODEL} (vit_base_patch16_224, 512 dimensions, 30522 words)", here, same


def _data(facts: RunFacts) -> tuple[str, str, str, str]:
    study = f"IU-Xray, {paper.FRONTAL_IMAGES:,} frontal images of {paper.UIDS:,} uids"
    here = f"{facts.schema.partition(':')[0]}, {facts.images:,} images of {facts.groups:,} groups"
    same = facts.schema.startswith("iu-xray:") and (facts.images, facts.groups) == (paper.FRONTAL_IMAGES, paper.UIDS)
    return "data", study, here, YES if same else NO


def _labels(facts: RunFacts) -> tuple[str, str, str, str]:
    known = {label: facts.positives.get(label) for label in paper.POSITIVE_IMAGES}
    equal = sum(count == paper.POSITIVE_IMAGES[label] for label, count in known.items())
    apart = sum(abs((count or 0) - paper.POSITIVE_IMAGES[label]) for label, count in known.items())
    here = f"{facts.label_source}; {equal} of {len(known)} labels as often as in the study, {apart:,} counts apart"
    return "labels", "its own table, not public", here, OPEN if equal == len(known) else NO


def _split(facts: RunFacts) -> tuple[str, str, str, str]:
    study = "70/15/15 % of the uids by train_test_split, seed 42: " + _parts(paper.SPLIT_IMAGES)
    same = facts.split_how == "study" and dict(facts.split) == paper.SPLIT_IMAGES
    return "split", study, f"{facts.split_how}: {_parts(facts.split)}", YES if same else NO


def _parts(counts: Mapping[str, int]) -> str:
    return " / ".join(f"{counts.get(name, 0):,}" for name in ("train", "val", "test"))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else float("nan")
