"""Where a head may start from: the linear probe (`analysis.probes`), or the embeddings of the labels' prompts."""

from __future__ import annotations

import numpy as np

from analysis.heads import LinearHead


def head_from_text(
    text: np.ndarray, label_names: tuple[str, ...], *, scale: float, prevalence: np.ndarray | None = None
) -> LinearHead:
    """Return the head that classifies as zero-shot does, for a start from the prompts.

    Parameters
    ----------
    text : ndarray of float, (L, d)
        Embeddings of the labels' prompts.
    scale : float
        Factor of the cosine in the logit; the encoder's own `logit_scale` is the sharpest sensible one.
    prevalence : ndarray of float, (L,), optional
        Share of positives in training, whose log-odds become the bias, so that training does not begin by unlearning
        an even guess; the embeddings of all labels are then centred, since what they share says nothing.
    """
    weight = np.asarray(text, dtype=np.float64)
    weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    bias = np.zeros(len(weight))
    if prevalence is not None:
        weight = weight - weight.mean(axis=0)
        share = np.clip(np.asarray(prevalence, dtype=np.float64), 1e-4, 1 - 1e-4)
        bias = np.log(share / (1 - share))
    return LinearHead(
        weight=(scale * weight).astype(np.float32),
        bias=bias.astype(np.float32),
        label_names=tuple(label_names),
        normalised=True,
    )
