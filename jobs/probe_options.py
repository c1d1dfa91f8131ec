"""What `fluoro probe` may be told, and which of it each kind of probe takes: nothing that is given is ignored.

Comes in: the config. Goes out: it, or a UsageError that names the option, the kind and what to do.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from analysis.probes import candidates
from engine.errors import UsageError
from jobs import measuring, probe_section

Kind = Literal["logistic", "text-prior", "ridge", "nearest-mean", "neighbours", "tip-adapter", "mlp", "attention"]


class Config(measuring.MeasureOptions):
    """What `fluoro probe` needs."""

    probe: probe_section.FamilySection = Field(
        default_factory=probe_section.FamilySection, description="what is tried; chosen on validation or by folds"
    )
    kind: Kind = Field("logistic", description="the probe; text-prior and tip-adapter start from the labels' prompts")
    class_weight: list[Literal["none", "balanced"]] = Field(
        ["none"], min_length=1, description="class weightings to try"
    )
    folds: int = Field(0, ge=0, description="choose on so many folds of train and val by group; 0: choose on val")
    seeds: list[int] = Field(
        [0], min_length=1, description="seeds that deal out the folds anew; held-out logits are averaged"
    )
    select: Literal["log_loss", "average_precision"] | None = Field(
        None, description="what the choice is made by; log_loss if empty, average_precision for tip-adapter"
    )
    templates: str | list[str] = Field("ensemble", description="prompts of the kinds that start from text")
    by: list[str] = Field([], description="sample columns by whose values the metrics are shown apart, gaps tested")
    layer: int = Field(-1, description="block whose entering tokens attention pools; -1 is the last")


# Config key -> how it is written, and the kinds that take it.
TAKEN_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "probe.C": ("-C", candidates.CONVEX),
    "class_weight": ("--class-weight", candidates.CONVEX),
    "probe.features": ("--features", candidates.TAKES_RAW),
    "templates": ("--set templates", candidates.FROM_TEXT),
    "layer": ("--layer", ("attention",)),
    "probe.ridge": ("--set probe.ridge", ("ridge",)),
    **{
        f"probe.{name}": (
            f"--set probe.{name}",
            tuple(kind for kind, names in candidates.PARAMETERS.items() if name in names),
        )
        for name in candidates.GRID
    },
}
FAMILY = ("kind", "folds", "seeds", "select", *TAKEN_BY)


def check(config: Config) -> None:
    """Raise UsageError for an option that would change nothing.

    Options that stand in a config with their default value, as in a run's own ``config.yaml``, are let pass.
    """
    if config.protocol == "paper":
        own = sorted(key for key in FAMILY if _is_given(config, key))
        if own:
            raise UsageError(f"the paper's protocol has one probe of its own; leave out {', '.join(own)}")
        return
    kind = config.kind
    for key, (written, kinds) in TAKEN_BY.items():
        if kind not in kinds and _is_given(config, key):
            takes = [option for option, takers in TAKEN_BY.values() if kind in takers]
            mine = f"; it takes {', '.join(takes)}" if takes else ""
            raise UsageError(
                f"{written} does nothing for --kind {kind}: it is for {', '.join(kinds)}{mine}. Leave it out, or take "
                "another --kind"
            )
    if not config.folds and _is_given(config, "seeds"):
        raise UsageError(
            f"seeds {config.seeds} deal out folds, and there are none; add --folds K, or leave --seeds out (--set "
            "seed=S seeds networks, resampling and baselines)"
        )
    if kind in candidates.PARAMETERS or kind in candidates.CONVEX or len(config.probe.features) > 1:
        return
    if _is_given(config, "select"):
        raise UsageError(
            f"--select does nothing for --kind {kind} on one feature set: there is one candidate; leave it out"
        )


def _is_given(config: Config, key: str) -> bool:
    """Tell whether a value was given that is not the default."""
    section, _, name = key.rpartition(".")
    holder: BaseModel = getattr(config, section) if section else config
    if name not in holder.model_fields_set or (section and section not in config.model_fields_set):
        return False
    default: Any = type(holder).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(holder, name) != default)
