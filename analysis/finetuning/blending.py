"""What can be made of finished trainings without training: between parent and child, and the mean of several.

In come weights by name, of one architecture; out go weights. WiSE-FT (Wortsman et al., CVPR 2022) goes along the line
from parent to child; model soups (Wortsman et al., ICML 2022) average children of one parent, all of them or those that
a validation score agrees to. A `TowerScorer` runs such weights without making an encoder of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from analysis.finetuning.inputs import RowSource, read_pixels, slices
from analysis.finetuning.validation import validation_scores
from analysis.heads import LinearHead
from engine.errors import ModelError

if TYPE_CHECKING:
    from engine.encoder import Encoder

Weights = Mapping[str, torch.Tensor]


def mean_weights(states: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """Return the weighted mean of models' weights.

    Parameters
    ----------
    states : sequence of mapping of name to Tensor
        Of one architecture: the same names and shapes.
    shares : sequence of float, optional
        Of each model, adding up to 1; equal by default.

    Returns
    -------
    dict of str to Tensor
        Computed in float64, in each weight's own type; whole numbers (counters) are those of the last model.

    Raises
    ------
    ModelError
        Other names or shapes.
    """
    parts = [1 / len(states)] * len(states) if shares is None else list(shares)
    first = states[0]
    for state in states[1:]:
        _check_alike(first, state)
    found = {}
    for name, value in first.items():
        if not value.is_floating_point():
            found[name] = states[-1][name].clone()
        else:
            total = sum(part * state[name].double() for part, state in zip(parts, states, strict=True))
            assert isinstance(total, torch.Tensor)
            found[name] = total.to(value.dtype)
    return found


def mean_head(heads: Sequence[LinearHead], shares: Sequence[float] | None = None) -> LinearHead:
    """Return the weighted mean of heads for the same labels; ModelError where they differ in what they are for."""
    parts = [1 / len(heads)] * len(heads) if shares is None else list(shares)
    first = heads[0]
    for head in heads[1:]:
        if head.label_names != first.label_names or head.weight.shape != first.weight.shape:
            raise ModelError(
                f"heads for {', '.join(first.label_names)} and for {', '.join(head.label_names)} have no mean"
            )
        if head.normalised != first.normalised:
            raise ModelError("a head on normalised embeddings and one on plain ones have no mean")
    return LinearHead(
        weight=sum(part * head.weight for part, head in zip(parts, heads, strict=True)),  # type: ignore[arg-type]
        bias=sum(part * head.bias for part, head in zip(parts, heads, strict=True)),  # type: ignore[arg-type]
        label_names=first.label_names,
        normalised=first.normalised,
    )


def greedy_soup(scores: Sequence[float], score_of: Callable[[Sequence[int]], float]) -> list[int]:
    """Return which models a greedy soup is made of, best first.

    Parameters
    ----------
    scores : sequence of float
        Each model's validation score, more is better.
    score_of : callable
        The validation score of the mean of some models, by number.
    """
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
    chosen, best = [order[0]], scores[order[0]]
    for number in order[1:]:
        score = score_of([*chosen, number])
        if score >= best:
            chosen, best = [*chosen, number], score
    return chosen


class TowerScorer:
    """Scores weights of an encoder's architecture on some rows.

    Parameters
    ----------
    encoder : Encoder
        Gives architecture, preprocessing and device; left as it is.
    pixels : RowSource
        uint8 (n, h, w, 3).
    y : ndarray of 0/1, (n, L)
    batch_size : int
    """

    def __init__(self, encoder: Encoder, pixels: RowSource, y: np.ndarray, batch_size: int = 32) -> None:
        self._visual = copy.deepcopy(encoder.model.visual).eval()
        self._encoder, self._pixels, self._y, self._batch_size = encoder, pixels, y, batch_size

    def features(self, state: Weights, rows: np.ndarray) -> np.ndarray:
        """Return raw embeddings (m, d) of some rows, under weights of the whole model or of ``visual.*`` alone."""
        own = {name.removeprefix("visual."): v for name, v in state.items() if name.startswith("visual.")}
        self._visual.load_state_dict(own)
        parts = []
        with torch.no_grad():
            for places in slices(len(rows), self._batch_size):
                images = self._encoder.input_of(read_pixels(self._pixels, rows[places]))
                found = self._visual(images)
                parts.append((found[0] if isinstance(found, tuple) else found).float().cpu().numpy())
        return np.concatenate(parts)

    def scores(self, state: Weights, head: LinearHead, rows: np.ndarray) -> dict[str, float]:
        """Return bce, map, auroc_macro and lrap of some rows."""
        logits = head.logits(self.features(state, rows))
        return validation_scores(self._y[rows], torch.from_numpy(logits).float())


def _check_alike(one: Weights, other: Weights) -> None:
    if one.keys() != other.keys():
        strange = sorted(one.keys() ^ other.keys())
        raise ModelError(
            f"models of different architectures have no mean: {len(strange)} weights, first {strange[0]!r}, are in one "
            "alone"
        )
    for name, value in one.items():
        if value.shape != other[name].shape:
            raise ModelError(
                f"models of different architectures have no mean: {name} is {tuple(value.shape)} in one and "
                f"{tuple(other[name].shape)} in another"
            )
