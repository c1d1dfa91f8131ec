"""Zero-shot scores: how near an image's embedding lies to each label's text.

In come image embeddings (n, d) and one text vector a label (L, d); out go scores (n, L). ``protocol: sound`` takes
cosines times the model's logit scale, as the model was trained; ``protocol: paper`` takes the dot product of
un-normalised embeddings, as the study did, where an image's length scales all its scores and a text's length favours
its label.
"""

from __future__ import annotations

import numpy as np

from analysis.vectors import normalise_rows
from engine.errors import DataError


def zero_shot_scores(
    image: np.ndarray,
    text: np.ndarray,
    *,
    normalize: bool = True,
    logit_scale: float = 1.0,
    logit_bias: float = 0.0,
    negative: np.ndarray | None = None,
) -> np.ndarray:
    """Return a score for every image and label.

    Parameters
    ----------
    image : ndarray of float, (n, d)
        Image embeddings, un-normalised.
    text : ndarray of float, (L, d)
        One vector a label (`analysis.prompts.Prompts.combine`).
    normalize : bool
        Cosine (True) or raw dot product (False, the study's).
    logit_scale, logit_bias : float
        The model's own, applied as scale * similarity + bias. Neither changes a ranking.
    negative : ndarray of float, (L, d), optional
        Vectors of absence; the score is then scale * (similarity to presence - similarity to absence), the log-odds
        of CheXzero's softmax over the two (Tiu et al. 2022). The bias cancels.

    Returns
    -------
    ndarray of float64, (n, L)
    """
    images, labels = _vectors(image, normalize), _vectors(text, normalize)
    if images.shape[1] != labels.shape[1]:
        raise DataError(
            f"image embeddings have {images.shape[1]} dimensions, text embeddings {labels.shape[1]}; "
            "both must come from the same encoder"
        )
    if negative is None:
        return logit_scale * (images @ labels.T) + logit_bias
    absent = _vectors(negative, normalize)
    if absent.shape != labels.shape:
        raise DataError(f"negative prompts of shape {absent.shape} for text vectors of shape {labels.shape}")
    return logit_scale * (images @ (labels - absent).T)


def _vectors(values: np.ndarray, normalize: bool) -> np.ndarray:
    return normalise_rows(values) if normalize else np.asarray(values, dtype=np.float64)
