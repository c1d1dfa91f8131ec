"""What training makes small: losses of logits against labels, and of images against their texts.

- **bce**: mean binary cross-entropy over samples and labels; **weighted_bce**: its positives weighted by label.
- **focal** (Lin et al., ICCV 2017): each term times (1 - p of the truth)^gamma, so that what is settled counts little.
- **asymmetric** (Ridnik et al., ICCV 2021): other exponents for positives and negatives, and negatives whose
  probability lies below a margin count nothing. All three as means, so that their rates compare.
- **contrastive** (CLIP, arXiv 2103.00020; several positives as in UniCL, CVPR 2022): images against the distinct texts
  of their batch. A text that several images share, the rule in radiology and not the exception, stands there once and
  is the positive of each of them; it is nobody's negative who has it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from analysis.finetuning.recipe import FinetuneConfig

LabelLoss = Callable[[Tensor, Tensor], Tensor]


def label_loss(config: FinetuneConfig, truth: np.ndarray, device: torch.device) -> LabelLoss:
    """Return the loss of logits (b, L) against labels (b, L), a mean over both.

    Parameters
    ----------
    config : FinetuneConfig
    truth : ndarray of 0/1, (n, L)
        Of the training rows; class weights come from it.
    """
    if config.objective == "focal":
        return lambda logits, labels: focal_loss(logits, labels, config.focal_gamma)
    if config.objective == "asymmetric":
        return lambda logits, labels: asymmetric_loss(
            logits, labels, config.positive_gamma, config.negative_gamma, config.margin
        )
    weights = None
    if config.objective == "weighted_bce":
        weights = torch.from_numpy(positive_weights(truth, config.largest_weight)).to(device, torch.float32)
    return lambda logits, labels: functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)


def positive_weights(truth: np.ndarray, largest: float) -> np.ndarray:
    """Return the weight of each label's positives, (L,): negatives over positives, at least 1 and at most `largest`."""
    positive = truth.sum(axis=0)
    return np.clip((len(truth) - positive) / np.maximum(positive, 1), 1.0, largest)


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Return the mean focal loss of logits (b, L) against labels (b, L); gamma 0 is BCE."""
    signed = torch.where(labels > 0.5, logits, -logits)
    return -(_power(torch.sigmoid(-signed), gamma) * functional.logsigmoid(signed)).mean()


def asymmetric_loss(
    logits: Tensor, labels: Tensor, positive_gamma: float, negative_gamma: float, margin: float
) -> Tensor:
    """Return the mean asymmetric loss of logits (b, L) against labels (b, L); gammas and margin 0 is BCE."""
    chance = torch.sigmoid(logits)
    of_positive = _power(1 - chance, positive_gamma) * functional.logsigmoid(logits)
    if margin > 0:
        shifted = (chance - margin).clamp(min=0)
        of_negative = _power(shifted, negative_gamma) * torch.log1p(-shifted)
    else:
        of_negative = _power(chance, negative_gamma) * functional.logsigmoid(-logits)
    return -torch.where(labels > 0.5, of_positive, of_negative).mean()


def _power(chance: Tensor, gamma: float) -> Tensor:
    """Return a power whose gradient is finite at zero too."""
    return chance.clamp(min=1e-8) ** gamma


def contrastive_loss(image: Tensor, text: Tensor, text_of: Tensor, scale: Tensor) -> Tensor:
    """Return the contrast between images and their texts, the mean of both directions.

    Parameters
    ----------
    image : float tensor (b, d)
        Need not be normalised.
    text : float tensor (t, d)
        The batch's distinct texts, each with an image at least.
    text_of : int64 tensor (b,)
        Each image's text.
    scale : scalar tensor
        Factor of the cosines.

    Returns
    -------
    scalar tensor
        Image to text: cross-entropy over the distinct texts. Text to image: cross-entropy over the images, the target
        shared evenly among those with the text; each image's text counts once an image. Where all texts differ, CLIP's.
    """
    logits = scale * functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    to_text = functional.cross_entropy(logits, text_of)
    has = torch.zeros_like(logits).scatter_(1, text_of[:, None], 1.0)
    to_image = -(functional.log_softmax(logits, dim=0) * has).sum() / len(image)
    return (to_text + to_image) / 2
