"""What is configured of probes: strengths and other values to try and, in a study, its kind or a trained head.

Comes in: the section of a config. Goes out: the checked section, and what the setting is called. A study draws heatmaps
of its probe and starts fine-tuning from it, so that only kinds that end in weights on the embedding will do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from analysis.heads import LinearHead
from analysis.probes import candidates
from jobs import config as configs

LINEAR_PROBE = "Linear probe"
LinearKind = Literal["logistic", "text-prior", "ridge", "nearest-mean"]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Strength = Annotated[float, Field(gt=0)]


class ProbeSection(configs.JobConfig):
    """Linear probe of the sound protocol."""

    C: list[float] = Field([0.1, 1.0, 10.0, 100.0], description="inverse strengths of L2; chosen on validation")


class FamilySection(ProbeSection):
    """What `fluoro probe` tries of each kind."""

    features: list[Literal["unit", "raw"]] = Field(
        ["unit"], min_length=1, description="embeddings of length 1, or as the model gives them; chosen on validation"
    )
    ridge: list[Strength] = Field(
        list(candidates.RIDGE), min_length=1, description="strengths of ridge, chosen by its leave-one-out error"
    )
    k: list[Count] = Field(
        [int(k) for k in candidates.GRID["k"]], min_length=1, description="neighbours; chosen on validation"
    )
    alpha: list[Weight] = Field(
        list(candidates.GRID["alpha"]), min_length=1, description="weights of Tip-Adapter's affinities"
    )
    beta: list[Weight] = Field(list(candidates.GRID["beta"]), min_length=1, description="their sharpness")
    hidden: list[Count] = Field(
        [int(units) for units in candidates.GRID["hidden"]], min_length=1, description="hidden units of the MLP"
    )
    epochs: list[Count] = Field(
        [int(epochs) for epochs in candidates.GRID["epochs"]],
        min_length=1,
        description="epochs of the MLP and of attention",
    )


class StudyProbeSection(ProbeSection):
    """Linear probe of the sound protocol, and its kind."""

    kind: LinearKind = Field(
        "logistic", description="logistic, text-prior (drawn to the zero-shot prompts), ridge or nearest-mean"
    )
    head: Path | None = Field(
        None, description="a trained head, or run folder of fluoro probe, instead of training one here"
    )

    @field_validator("kind", mode="before")
    @classmethod
    def _ends_in_weights(cls, kind: Any) -> Any:
        if kind in candidates.KINDS and kind not in get_args(LinearKind):
            raise ValueError(
                f"{kind!r} has no weights on the embedding, which heatmaps and fine-tuning need; choose "
                f"{', '.join(get_args(LinearKind))}, or try it alone: fluoro probe --kind {kind}"
            )
        return kind

    @model_validator(mode="after")
    def _trained_or_to_train(self) -> StudyProbeSection:
        fields = type(self).model_fields
        if self.head is not None:
            chosen = [name for name in ("C", "kind") if getattr(self, name) != fields[name].default]
            if chosen:
                named = " and ".join(map(repr, chosen))
                raise ValueError(f"'head' is trained already, so {named} would change nothing; leave it out")
        return self

    @property
    def setting(self) -> str:
        """What the setting is called: the kind stands behind the name unless it is the usual one."""
        if self.head is not None:
            return f"{LINEAR_PROBE} (trained before)"
        return LINEAR_PROBE if self.kind == "logistic" else f"{LINEAR_PROBE} ({self.kind})"


def is_probe(setting: str) -> bool:
    """Tell whether a setting of that name is the study's probe, of whatever kind."""
    return setting.partition(" (")[0] == LINEAR_PROBE


def kind_of(head: LinearHead) -> str:
    """Return what kind of probe a head is; "" for the usual one and where it does not say."""
    kind = str(head.provenance.get("kind", ""))
    return "" if kind == "logistic" else kind
