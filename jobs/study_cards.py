"""What the model card needs beside the metrics, and the two cards themselves.

Comes in: the settings of every protocol. Goes out: two tables in the section "model", ``data-card.md`` and
``model-card.md`` in the run folder.

- ``tables/model-settings.csv``: one row a protocol and setting: encoder, head (its file), how (recipe in words),
  own_seconds.
- ``tables/model-thresholds.csv``: one row a protocol, setting and label: threshold, chosen (how). Settings that cut
  each image by its own scores have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis import cards, run_record
from jobs import runs
from jobs.probe_section import LINEAR_PROBE, is_probe
from jobs.run_tables import write_table
from jobs.study_settings import FINE_TUNING, ZERO_SHOT, Material, Setting

SECTION = "model"
HEADS = {LINEAR_PROBE: "heads/probe-{protocol}.npz", FINE_TUNING: "models/finetuned-{protocol}/head.npz"}
DATA_CARD, MODEL_CARD = "data-card.md", "model-card.md"


def write_model(material: Material, settings: Mapping[str, Sequence[Setting]], run: runs.Run) -> None:
    """Write the two tables."""
    flat = [(protocol, setting) for protocol, made in settings.items() for setting in made]
    rows = [
        {
            "protocol": protocol,
            "setting": setting.name,
            "encoder": setting.explained.encoder.id,
            "head": HEADS.get(LINEAR_PROBE if is_probe(setting.name) else setting.name, "").format(protocol=protocol),
            "how": how(setting, protocol),
            "own_seconds": setting.seconds,
        }
        for protocol, setting in flat
    ]  # fmt: skip
    write_table(
        run, "model-settings", pd.DataFrame(rows), title="Settings",
        text="What each setting is made of, and the seconds of its own training and scoring.", section=SECTION,
    )  # fmt: skip
    cuts = [
        {"protocol": protocol, "setting": setting.name, "label": label, "threshold": value,
         "chosen": "best F1 on validation"}
        for protocol, setting in flat
        if setting.thresholds is not None
        for label, value in zip(material.dataset.label_names, np.asarray(setting.thresholds).tolist(), strict=True)
    ]  # fmt: skip
    write_table(
        run, "model-thresholds", pd.DataFrame(cuts), title="Thresholds",
        text="Above it a label is said; inf: the label is never said, because nothing on validation speaks for it.",
        section=SECTION,
    )  # fmt: skip


def how(setting: Setting, protocol: str) -> str:
    """Return a setting's recipe in words."""
    details = setting.details
    if setting.name == ZERO_SHOT:
        texts = details.get("texts", [])
        scored = "cosines" if protocol == "sound" else "dot products"
        return f"{scored} with {len(texts)} prompts such as {texts[0]!r}" if texts else scored
    if is_probe(setting.name):
        kind = details.get("kind", "")
        if "trained_before" in details:
            return f"trained before: {details['trained_before']}" + (f" ({kind})" if kind else "")
        if "C" in details:
            return f"{kind}, C = {details['C']:g}" if kind else f"C = {details['C']:g}"
        return kind or f"epoch {details.get('best_epoch', '?')} of the study's loop"
    return str(details.get("said", ""))


def write_cards(run: runs.Run) -> None:
    """Write both cards from what the run has recorded."""
    record = run_record.read_run(run.folder)
    run.path(DATA_CARD).write_text(cards.data_card(record), encoding="utf-8")
    run.path(MODEL_CARD).write_text(cards.model_card(record), encoding="utf-8")
