"""Finished runs of `fluoro finetune` as material: their parent, children and heads, and the data they were trained on.

In come run folders; out goes what `jobs.finetune_wise` and `jobs.finetune_average` blend, checked to belong together.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from analysis import finetuning
from analysis.finetuning import blending
from analysis.heads import LinearHead
from engine import model_folder
from engine.cache import Cache
from engine.encoder import Encoder, load_encoder
from engine.errors import ModelError, UsageError
from jobs import finetune, measuring, model_card, study_settings, tuning_rows
from jobs.config import JobConfig, load_config, path_or_url
from jobs.plain import plain
from jobs.progress import Progress
from jobs.runs import CONFIG_FILE, Run

HIGHER_IS_BETTER = finetuning.MONITORS


class BlendOptions(JobConfig):
    """Fields shared by the verbs that blend finished runs."""

    by: str | None = Field(None, description="validation metric that chooses; the (first) run's own if empty")
    cache: Path | str | None = Field(None, description="folder of the embedding cache; the (first) run's own if empty")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @field_validator("cache", mode="before")
    @classmethod
    def _url_or_path(cls, value: Any) -> Any:
        return path_or_url(value) if isinstance(value, str) else value


class Scored(NamedTuple):
    """What some weights score on validation and on test, by metric."""

    validation: dict[str, float]
    test: dict[str, float]

    def row(self) -> dict[str, float]:
        """Return all scores under the names of their split and metric, for a table."""
        return {f"{split}_{name}": value for split, scores in (("val", self.validation), ("test", self.test))
                for name, value in scores.items()}  # fmt: skip


@dataclass(frozen=True)
class TunedRun:
    """One finished run.

    Parameters
    ----------
    folder : Path
    config : jobs.finetune.Config
    head : LinearHead
        The child's.
    start : LinearHead or None
        Where that began, on the parent's embeddings.
    """

    folder: Path
    config: finetune.Config
    head: LinearHead
    start: LinearHead | None

    @property
    def model(self) -> str:
        """The child's name for `load_encoder`."""
        return f"local-dir:{(self.folder / finetune.MODEL_FOLDER).resolve()}"


def open_tuned(folder: Path) -> TunedRun:
    """Return a finished run of `fluoro finetune`; UsageError where the folder is none."""
    head = folder / finetune.MODEL_FOLDER / finetune.HEAD_FILE
    if not (folder / CONFIG_FILE).is_file() or not head.is_file():
        raise UsageError(
            f"{str(folder)!r} is no finished run of fluoro finetune (it lacks {CONFIG_FILE} or "
            f"{finetune.MODEL_FOLDER}/{finetune.HEAD_FILE}); name a run folder, or finish this one with --resume"
        )
    start = folder / finetune.START_FILE
    config = load_config(finetune.Config, folder / CONFIG_FILE)
    return TunedRun(folder, config, LinearHead.load(head), LinearHead.load(start) if start.is_file() else None)


@dataclass(frozen=True)
class Blend:
    """What weights are scored on: data, parent, and a scorer.

    Parameters
    ----------
    material : Material
        Of the runs' data, with the parent as its encoder.
    scorer : TowerScorer
    metric : str
        What chooses, on validation.
    """

    material: study_settings.Material
    scorer: blending.TowerScorer
    metric: str

    def validation(self, state: blending.Weights, head: LinearHead) -> dict[str, float]:
        """Return scores on the val split."""
        return self.scorer.scores(state, head, self.material.rows("val"))

    def scored(self, state: blending.Weights, head: LinearHead, validation: dict[str, float] | None = None) -> Scored:
        """Return scores on both splits; those on validation are taken over where they are known."""
        known = self.validation(state, head) if validation is None else validation
        return Scored(known, self.scorer.scores(state, head, self.material.rows("test")))

    def goodness(self, scores: dict[str, float]) -> float:
        """Return the choosing metric, signed so that more is better."""
        value = scores[self.metric]
        return value if HIGHER_IS_BETTER[self.metric] else -value


def prepare(
    tuned: TunedRun, metric: str | None, cache: Path | str, device: str, record: Run, progress: Progress
) -> Blend:
    """Open a run's data and parent, with pixels at hand.

    Raises
    ------
    UsageError
        A metric that cannot choose here.
    """
    asked = metric or tuned.config.finetune.monitor or "map"
    if asked not in HIGHER_IS_BETTER or asked == "contrastive":
        known = ", ".join(name for name in HIGHER_IS_BETTER if name != "contrastive")
        raise UsageError(f"--by {asked!r}: weights are chosen by one of {known}")
    config = tuned.config.model_copy(update={"cache": cache, "device": device})
    material = measuring.prepare(config, record, progress)
    pixels = tuning_rows.pixels(material, progress)
    return Blend(material, blending.TowerScorer(material.encoder, pixels, material.y), asked)


def child_state(tuned: TunedRun, parent: Encoder) -> dict[str, Any]:
    """Return a child's weights in float32; ModelError where it is of another parent."""
    provenance = json.loads((tuned.folder / "provenance.json").read_text(encoding="utf-8"))
    known = [encoder["id"] for encoder in provenance.get("encoders", [])]
    if parent.id not in known[:1]:
        raise ModelError(
            f"{tuned.folder} was fine-tuned from {known[0] if known else 'an unknown encoder'}, not from {parent.id}: "
            "only children of one parent have weights in common"
        )
    return dict(load_encoder(tuned.model, device="cpu").model.state_dict())


def save(
    blend: Blend, state: blending.Weights, head: LinearHead, folder: Path, kind: str, card: dict[str, Any]
) -> LinearHead:
    """Write blended weights as a model folder with its head and card, and return the head, bound to its encoder."""
    encoder = blend.material.encoder
    name = f"{encoder.name}-{card['made']}"
    whole = {
        "parent": encoder.id,
        "data": blend.material.dataset.schema,
        "split": blend.material.split_digest,
        **card,
    }
    text = model_card.text(name, whole, kind)
    saved = model_folder.save_model_folder(encoder, dict(state), folder, text, name=name, overwrite=True)
    child = load_encoder(f"local-dir:{saved.resolve()}", device="cpu")
    bound = dataclasses.replace(head, encoder_id=child.id, provenance={"card": plain(whole)})
    bound.save(folder / finetune.HEAD_FILE)
    model_card.add_test_metrics(folder, card["test"])
    return bound


def cache_of(tuned: TunedRun, asked: Path | str | None) -> Path | str:
    """Return the cache to use: the one that is asked for, or the run's own."""
    return tuned.config.cache if asked is None else Cache(asked).address
