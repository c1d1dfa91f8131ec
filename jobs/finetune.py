"""`fluoro finetune`: train the image tower with a head, and make the result an encoder of its own.

Comes in: a data set and a model. Goes out: a run folder with ``model/`` (a `local-dir:` model with its own encoder id:
the new tower, the parent's text tower, preprocessing and tokenizer), ``model/head.npz``, ``history.csv``, and the test
of both. The pixels that the model sees are cached once; the new encoder's embeddings go through the same cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import finetuning
from analysis.heads import LinearHead
from engine.encoder import Encoder
from engine.errors import DataError
from jobs import measuring, study_scores, study_settings
from jobs.progress import Progress
from jobs.runs import Run, open_run

MODEL_FOLDER, HEAD_FILE = "model", "head.npz"


class Config(measuring.MeasureOptions):
    """What `fluoro finetune` needs."""

    # Training changes weights, and figures are compared between machines: float32 unless asked for otherwise.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="numbers the model computes in")
    finetune: study_settings.FinetuneSection = Field(
        default_factory=study_settings.FinetuneSection, description="recipe of the sound protocol"
    )
    start: str = Field(
        "probe", description="where the head starts (sound protocol): probe, text, random, or a head's .npz file"
    )
    probe: study_settings.ProbeSection = Field(
        default_factory=study_settings.ProbeSection, description="the probe that the head starts from"
    )
    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts, where the head starts from text"
    )


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> measuring.Measured:
    """Train, save, embed with the new encoder, and test.

    Raises
    ------
    UsageError
        An output that exists, a head for other labels or another encoder.
    DataError
        No labels, an empty split, images that cannot be embedded.
    """
    progress = progress or Progress()
    with open_run("finetune", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        material = measuring.prepare(config, record, progress)
        _embed(material, material.encoder, "pixels", config, record, progress)
        head = starting_head(config, material) if config.protocol == "sound" else None

        def embed(child: Encoder) -> np.ndarray:
            _embed(material, child, "image", config, record, progress)
            return material.cache.features(material.dataset, child, "image").values

        folder = record.path(MODEL_FOLDER)
        with record.step("fine-tuning") as step:
            setting = study_settings.fine_tuning(
                material, config.finetune, config.protocol, config.seed, folder, head, embed, progress
            )
            step.items = len(material.rows("train")) * len(setting.details["history"])
        pd.DataFrame(setting.details["history"]).to_csv(record.path("history.csv"), index=False)
        child = setting.explained.encoder
        known = record.provenance["encoders"]
        record.note(encoders=[*known, {"id": child.id, "name": child.name, "description": child.description}])
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
    return measuring.measured(record, setting.name, head=folder / HEAD_FILE)


def starting_head(config: Config, material: study_settings.Material) -> LinearHead | None:
    """Return the head that training starts from; None: at random."""
    if config.start == "random":
        return None
    if config.start == "probe":
        return study_settings.probe_head(material, config.probe, "sound", config.seed)[0]
    if config.start == "text":
        zero_shot = study_settings.zero_shot(material, config.zero_shot, "sound").explained
        assert zero_shot.text is not None  # zero-shot is its text
        prevalence = material.y[material.rows("train")].mean(axis=0)
        return finetuning.head_from_text(
            zero_shot.text, material.dataset.label_names, scale=material.encoder.logit_scale, prevalence=prevalence
        )
    head = LinearHead.load(Path(config.start).expanduser())
    head.check_encoder(material.encoder.id)
    if head.label_names != material.dataset.label_names:
        raise DataError(
            f"the head {config.start} is for {', '.join(head.label_names)}; the data set has "
            f"{', '.join(material.dataset.label_names)}"
        )
    return head


def _embed(
    material: study_settings.Material, encoder: Encoder, what: str, config: Config, record: Run, progress: Progress
) -> None:
    """Bring one kind of rows of all samples into the cache."""
    with record.step(f"cache {what} of {encoder.name}") as step:
        done = material.cache.embed(
            material.dataset, encoder, (what,), batch_size=config.batch_size, threads=config.threads, progress=progress
        )
        step.items, step.reused, step.bytes = done.computed[what], done.reused[what], done.bytes
    if len(done.failures):
        record.fail(done.failures)
        raise DataError(
            f"{len(done.failures)} images that were embedded before failed as {what} of {encoder.id}; see "
            f"{record.folder / 'failures.csv'}"
        )
