"""`fluoro finetune`: train the image tower with a head, and make the result an encoder of its own.

Comes in: a data set and a model. Goes out: a run folder with ``model/`` (a `local-dir:` model with its own encoder id:
the new tower, the parent's text tower, preprocessing and tokenizer), ``model/head.npz``, ``start.npz`` (the head that
training started from), ``history.csv``, and the test of both. The pixels that the model sees, or with ``from_block``
the tokens, are cached once; the new encoder's embeddings go through the same cache. ``checkpoints/`` holds the last and
the best state; a run that was stopped or killed goes on from there with ``--resume``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import finetuning
from analysis.heads import LinearHead
from engine.encoder import Encoder
from engine.errors import DataError, UsageError
from jobs import heads, measuring, model_card, opening, probe_section, study_scores, study_settings, tuning_rows
from jobs.progress import Progress
from jobs.runs import Run, open_run

MODEL_FOLDER, HEAD_FILE, START_FILE, CHECKPOINTS = "model", "head.npz", "start.npz", "checkpoints"


class Config(measuring.MeasureOptions):
    """What `fluoro finetune` needs."""

    # Training changes weights, and figures are compared between machines: float32 unless asked for otherwise.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="numbers the model computes in")
    finetune: study_settings.FinetuneSection = Field(
        default_factory=study_settings.FinetuneSection, description="recipe of the sound protocol"
    )
    start: str = Field(
        "probe",
        description="where the head starts (sound protocol): probe, text, random, a head's .npz file or its run",
    )
    probe: probe_section.StudyProbeSection = Field(
        default_factory=probe_section.StudyProbeSection, description="the probe that the head starts from"
    )
    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts, where the head starts from text"
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="a checkpoint at least so often, and after each epoch")


def run(
    config: Config,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> measuring.Measured:
    """Train, save, embed with the new encoder, and test.

    Parameters
    ----------
    config : Config
    out : Path, optional
        Run folder; a new one in the cache unless given.
    overwrite, resume : bool
        What to do where it exists: begin anew, or go on from its last checkpoint.
    progress : Progress, optional

    Raises
    ------
    UsageError
        An output that exists, a head for other labels or another encoder, choices that exclude each other.
    DataError
        No labels, an empty split, images that cannot be embedded, no positive in training.
    TrainingError
        The loss is no number any more; the message names the step and the last good checkpoint.
    """
    progress = progress or Progress()
    if resume and out is None:
        raise UsageError("--resume goes on with a run: name its folder with --out")
    recipe = config.finetune.recipe(config.seed)  # refused before anything is computed
    with open_run("finetune", config, out=out, cache=config.cache, overwrite=overwrite, resume=resume) as record:
        material = measuring.prepare(config, record, progress)
        if material.encoder.precision != "fp32":
            raise UsageError(
                f"fine-tuning starts from float32 weights, and {material.encoder.id} holds rounded ones; leave "
                "--precision out, and say --autocast bf16 to compute in bfloat16"
            )
        if config.protocol == "paper":
            recipe = finetuning.study_recipe(config.seed)
        _embed(material, material.encoder, tuning_rows.what_of(recipe, material.encoder), config, record, progress)
        head = _kept_start(config, material, record) if config.protocol == "sound" else None

        def embed(child: Encoder) -> np.ndarray:
            _embed(material, child, "image", config, record, progress)
            return material.cache.features(material.dataset, child, "image").values

        folder = record.path(MODEL_FOLDER)
        checkpoints = finetuning.Checkpoints(record.path(CHECKPOINTS), seconds=config.checkpoint_seconds)
        with record.step("fine-tuning") as step:
            setting = study_settings.fine_tuning(
                material,
                config.finetune,
                config.protocol,
                config.seed,
                folder,
                head,
                embed,
                progress,
                checkpoints=checkpoints,
            )
            step.items = setting.details["images"]
        pd.DataFrame(setting.details["history"]).to_csv(record.path("history.csv"), index=False)
        child = setting.explained.encoder
        known = record.provenance["encoders"]
        record.note(encoders=[*known, opening.encoder_row(child)])
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
    found = measuring.measured(record, setting.name, head=folder / HEAD_FILE)
    model_card.add_test_metrics(folder, _overall(found))
    return found


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
    head = heads.open_head(Path(config.start).expanduser(), material.encoder)
    if head.label_names != material.dataset.label_names:
        raise DataError(
            f"the head {config.start} is for {', '.join(head.label_names)}; the data set has "
            f"{', '.join(material.dataset.label_names)}"
        )
    return head


def _kept_start(config: Config, material: study_settings.Material, record: Run) -> LinearHead | None:
    """Return the head to start from; a run that goes on has kept it, to the bit."""
    path = record.path(START_FILE)
    if path.is_file():
        return LinearHead.load(path)
    head = starting_head(config, material)
    if head is not None:
        head.save(path)
    return head


def _overall(found: measuring.Measured) -> dict[str, float]:
    """Return the setting's own metrics over all labels."""
    rows: Any = found.metrics[(found.metrics["setting"] == found.setting) & found.metrics["label"].isna()]
    return {str(row["metric"]): float(row["value"]) for _, row in rows.iterrows() if pd.notna(row["value"])}


def _embed(
    material: study_settings.Material, encoder: Encoder, what: str, config: Config, record: Run, progress: Progress
) -> None:
    """Bring one kind of rows of all samples into the cache."""
    with record.step(f"cache {what} of {encoder.name}") as step:
        done = measuring.embed(config, record, material.cache, material.dataset, encoder, what, progress, step)
    if len(done.failures):
        raise DataError(
            f"{len(done.failures)} images that were embedded before failed as {what} of {encoder.id}; see "
            f"{record.folder / 'failures.csv'}"
        )
