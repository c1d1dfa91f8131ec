"""What a sweep of probes tries: kinds, what each can be tried with, and one candidate for every combination.

Comes in: `Options`, checked when they are made. Goes out: candidates in the order in which equals are preferred, the
simpler one first. Test rows are never an argument here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from analysis.vectors import normalise_rows
from engine.errors import UsageError

CONVEX = ("logistic", "text-prior")
KINDS = (*CONVEX, "ridge", "nearest-mean", "neighbours", "tip-adapter", "mlp", "attention")
FROM_TEXT = ("text-prior", "tip-adapter")
# "unit": embeddings of length 1; "raw": as the model gives them.
FEATURES = ("unit", "raw")
# The others compare directions, or start from texts of length 1.
TAKES_RAW = ("logistic", "ridge", "nearest-mean", "mlp")
# What each kind is tried with besides; of equals the first is kept, so the simpler one stands in front.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "neighbours": ("k",),
    "tip-adapter": ("alpha", "beta"),
    "mlp": ("hidden", "epochs"),
    "attention": ("epochs",),
}
GRID: Mapping[str, tuple[float, ...]] = {
    "k": (100, 50, 20, 10, 5),
    "alpha": (1.0, 10.0, 100.0, 1000.0),
    "beta": (1.0, 5.5, 30.0),
    "hidden": (32, 128),
    "epochs": (20, 60),
}
_LARGER_IS_SIMPLER = ("k",)
_WHOLE = ("k", "hidden", "epochs")
RIDGE = tuple(np.logspace(-4, 4, 17).tolist())


@dataclass(frozen=True)
class Candidate:
    """What a probe is fitted with; C is None for kinds that have none.

    Parameters
    ----------
    class_weight : "none" | "balanced"
    C : float or None
    features : "unit" | "raw"
    parameters : tuple of (name, value)
        Of `PARAMETERS`.
    """

    class_weight: str = "none"
    C: float | None = None
    features: str = "unit"
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """A short name, such as "C = 10, balanced" or "k = 20"."""
        values = [] if self.C is None else [("C", self.C)]
        parts = [f"{name} = {value:g}" for name, value in [*values, *self.parameters]]
        parts += [self.class_weight] if self.class_weight != "none" else []
        parts += [self.features] if self.features != "unit" else []
        return ", ".join(parts) or "as it is"

    def value(self, name: str) -> float:
        """Return a parameter's value."""
        return dict(self.parameters)[name]


@dataclass(frozen=True)
class Options:
    """What is swept.

    Parameters
    ----------
    kind : str
        Of `KINDS`.
    c_grid : sequence of float
    class_weights : sequence of "none" | "balanced"
    features : sequence of "unit" | "raw"
        Raw embeddings for the kinds of `TAKES_RAW`.
    grid : mapping of str to sequence of float
        Values of the kind's own `PARAMETERS`; those of `GRID` where left out.
    ridge : sequence of float
        Strengths of the kind "ridge", chosen by its own leave-one-out error on the rows it learns from.
    select : "log_loss" | "average_precision" or None
        What the choice is made by; None: log-loss, but average precision for Tip-Adapter, whose logits are no chances.
    text : ndarray of float, (L, d), or None
        Normalised text vectors for "text-prior" and "tip-adapter".
    scale : float
        The model's logit scale, for these two.
    encoder_id : str
    seed : int
        Of the kinds that are trained from random weights.
    device : str
        Where problems are solved and networks trained.

    Raises
    ------
    UsageError
        An unknown kind or value, or one that the kind does not take.
    """

    kind: str = "logistic"
    c_grid: Sequence[float] = (1.0,)
    class_weights: Sequence[str] = ("none",)
    features: Sequence[str] = ("unit",)
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    ridge: Sequence[float] = RIDGE
    select: str | None = None
    text: np.ndarray | None = None
    scale: float = 1.0
    encoder_id: str = ""
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown kind of probe {self.kind!r}; known: {', '.join(KINDS)}")
        if self.kind in FROM_TEXT and self.text is None:
            raise UsageError(f"a probe of kind {self.kind!r} needs the labels' text vectors")
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown or not self.features:
            raise UsageError(f"unknown feature set {unknown}; known: {', '.join(FEATURES)}")
        if "raw" in self.features and self.kind not in TAKES_RAW:
            raise UsageError(
                f"a probe of kind {self.kind!r} is always on embeddings of length 1; raw ones are for "
                f"{', '.join(TAKES_RAW)}"
            )
        foreign = [name for name in self.grid if name not in PARAMETERS.get(self.kind, ())]
        if foreign:
            raise UsageError(f"a probe of kind {self.kind!r} has no {', '.join(foreign)}")
        for name, values in self.grid.items():
            least = 1 if name in _WHOLE else 0
            if not len(values) or not all(least <= value < np.inf for value in values):
                raise UsageError(f"values of {name} must be at least {least}, finite, and one or more, got {values!r}")

    @property
    def selection(self) -> str:
        """What the choice is made by."""
        return self.select or ("average_precision" if self.kind == "tip-adapter" else "log_loss")

    def candidates(self) -> tuple[Candidate, ...]:
        """Return all combinations; of equals the first is kept."""
        sets = tuple(dict.fromkeys(self.features))
        if self.kind in CONVEX:
            # Smaller C first: among equals the stronger ridge is kept.
            grid, hows = sorted({float(c) for c in self.c_grid}), dict.fromkeys(self.class_weights)
            return tuple(Candidate(how, c, name) for name, c, how in product(sets, grid, hows))
        names = PARAMETERS.get(self.kind, ())
        axes = []
        for name in names:
            values = {int(value) if name in _WHOLE else float(value) for value in self.grid.get(name, GRID[name])}
            axes.append(sorted(values, reverse=name in _LARGER_IS_SIMPLER))
        return tuple(
            Candidate(features=features, parameters=tuple(zip(names, values, strict=True)))
            for features in sets
            for values in product(*axes)
        )


def prepared(x: np.ndarray, features: str) -> np.ndarray:
    """Return embeddings (n, d) as a feature set has them; tokens (n, t, width) as they are."""
    return normalise_rows(x) if features == "unit" and x.ndim == 2 else x
