"""What is configured of a linear probe: its strengths and, in a study, its kind.

Comes in: the section of a config. Goes out: the checked section, and what the setting is called. A study draws heatmaps
of its probe and starts fine-tuning from it, so that only kinds that end in weights on the embedding will do.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from analysis.probes import sweeping
from jobs import config as configs

LINEAR_PROBE = "Linear probe"
LinearKind = Literal["logistic", "text-prior", "ridge", "nearest-mean"]


class ProbeSection(configs.JobConfig):
    """Linear probe of the sound protocol."""

    C: list[float] = Field([0.1, 1.0, 10.0, 100.0], description="inverse strengths of L2; chosen on validation")


class StudyProbeSection(ProbeSection):
    """Linear probe of the sound protocol, and its kind."""

    kind: LinearKind = Field(
        "logistic", description="logistic, text-prior (drawn to the zero-shot prompts), ridge or nearest-mean"
    )

    @field_validator("kind", mode="before")
    @classmethod
    def _ends_in_weights(cls, kind: Any) -> Any:
        if kind in sweeping.KINDS and kind not in get_args(LinearKind):
            raise ValueError(
                f"{kind!r} has no weights on the embedding, which heatmaps and fine-tuning need; choose "
                f"{', '.join(get_args(LinearKind))}, or try it alone: fluoro probe --kind {kind}"
            )
        return kind

    @property
    def setting(self) -> str:
        """What the setting is called: the kind stands behind the name unless it is the usual one."""
        return LINEAR_PROBE if self.kind == "logistic" else f"{LINEAR_PROBE} ({self.kind})"


def is_probe(setting: str) -> bool:
    """Tell whether a setting of that name is the study's probe, of whatever kind."""
    return setting.partition(" (")[0] == LINEAR_PROBE
