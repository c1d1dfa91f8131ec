"""What a run says of the published study: figures beside figures, and what was not the same."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import fidelity, paper
from engine.labels import STUDY_LABELS

BIOMEDCLIP = {
    "model": {"embed_dim": 512, "vision_cfg": {"timm_model_name": "vit_base_patch16_224"}},
    "text_tower": {"vocab_size": 30522},
}


def facts(**changed) -> fidelity.RunFacts:
    same = fidelity.RunFacts(
        encoder="BiomedCLIP-PubMedBERT_256-vit_base_patch16_224-fp16-0123",
        structure=BIOMEDCLIP,
        precision="fp16",
        schema="iu-xray:openi",
        images=3818,
        groups=3689,
        positives=dict(paper.POSITIVE_IMAGES),
        label_source="labels.csv",
        split_how="study",
        split={"train": 2670, "val": 575, "test": 573},
        finetuned=True,
        annotated=0,
        machine="a processor",
    )
    return same._replace(**changed)


def test_published_counts__are_those_of_the_table():
    counts = paper.POSITIVE_IMAGES
    assert tuple(counts) == STUDY_LABELS and counts["No Finding"] == 2400 and counts["Pneumothorax"] == 20
    assert sum(counts.values()) / paper.FRONTAL_IMAGES == pytest.approx(1.159, abs=5e-4)
    assert max(counts.values()) / min(counts.values()) == 120
    assert sum(paper.SPLIT_IMAGES.values()) == paper.FRONTAL_IMAGES and paper.UIDS == 2582 + 553 + 554


def test_comparison__has_every_published_figure_and_our_difference():
    ours = pd.DataFrame(
        [
            {"setting": "Linear probe", "metric": "lrap", "value": 0.75, "low": 0.72, "high": 0.78, "null": 0.6},
            {"setting": "Linear probe", "metric": "f1_macro", "value": 0.3, "low": 0.25, "high": 0.35, "null": None},
            {"setting": "Linear probe", "metric": "minutes", "value": 1.0, "low": np.nan, "high": np.nan, "null": None},
            {"setting": "Random scores", "metric": "lrap", "value": 0.25, "low": 0.2, "high": 0.3, "null": None},
        ]
    )
    table = fidelity.reference_comparison(ours)
    assert len(table) == len(paper.reference_table()) == 23
    rows = table.set_index(["setting", "metric"])
    lrap = rows.loc[("linear probe", "lrap")]
    assert lrap["published"] == 0.741 and lrap["difference"] == pytest.approx(0.009)
    assert lrap["within"] == "yes" and lrap["null"] == 0.6
    assert rows.loc[("linear probe", "f1_macro"), "within"] == "no"
    assert rows.loc[("linear probe", "minutes"), "within"] == ""
    assert np.isnan(rows.loc[("zero-shot", "lrap"), "ours"])
    said = fidelity.fidelity_sentences(table, fidelity.conditions(facts()))
    assert (
        "Linear probe: the published figure lies in our 95 % interval for LRAP; outside it: macro-F1 0.300 " in said[-1]
    )


def test_conditions__of_the_study_itself_leave_open_what_is_not_public():
    same = fidelity.conditions(facts()).set_index("condition")["same"]
    assert same[["model", "data", "split", "linear probe", "fine-tuning"]].eq("yes").all()
    assert same["labels"] == "cannot be told" and same["heatmap annotations"] == "no"


@pytest.mark.parametrize(
    "changed, condition, verdict, told",
    [
        ({"encoder": "folder-fp16-0123"}, "model", "cannot be told", "structure under another name"),
        ({"encoder": "phantom-clip", "structure": {}}, "model", "no", "another tower"),
        ({"schema": "phantom:3818"}, "data", "no", "phantom, 3,818 images"),
        ({"images": 3817}, "data", "no", "3,817 images"),
        ({"positives": dict(paper.POSITIVE_IMAGES) | {"Edema": 48}}, "labels", "no", "13 of 14 labels as often"),
        ({"split_how": "grouped"}, "split", "no", "grouped: 2,670 / 575 / 573"),
        ({"split": {"train": 1}}, "split", "no", "1 / 0 / 0"),
        ({"precision": "fp32"}, "linear probe", "no", "tower in fp32"),
        ({"finetuned": False}, "fine-tuning", "no", "not run"),
    ],
)
def test_conditions__that_are_not_met_are_said(changed, condition, verdict, told):
    table = fidelity.conditions(facts(**changed))
    row = table.set_index("condition").loc[condition]
    assert row["same"] == verdict and told in row["here"]
    empty = fidelity.reference_comparison(pd.DataFrame(columns=["setting", "metric", "value", "low", "high", "null"]))
    said = " ".join(fidelity.fidelity_sentences(empty, table))
    if verdict == "no":
        assert f"{condition} (here: " in said
    if condition in ("model", "data", "labels"):
        assert f"no replication: {condition}" in said or "no replication" in said
