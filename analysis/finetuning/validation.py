"""What training is watched by: the model as it is, on the rows that choose.

In come the model and the validation rows; out go metrics by name, of which the recipe's `monitor` chooses the epoch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from analysis import metrics
from analysis.finetuning import inputs
from analysis.finetuning.gradients import Gradients
from analysis.finetuning.material import Material


def validate(
    gradients: Gradients, source: inputs.Inputs, material: Material, batch_size: int, micro_batch: int
) -> dict[str, float]:
    """Return the metrics of the weights as they are on the validation rows: those of `validation_scores`, and contrast.

    Parameters
    ----------
    gradients : Gradients
        Holds the model, the texts and the loss.
    source : Inputs
        Of the validation rows.
    material : Material
    batch_size : int
        Over which the contrast is taken.
    micro_batch : int
        Samples that go through at once.

    Raises
    ------
    FloatingPointError
        The weights give logits that are not finite.
    """
    model, texts = gradients.model, gradients.texts
    model.eval()
    if texts is not None:
        texts.eval()
    val, logits = material.val, []
    contrasts: list[tuple[float, int]] = []
    for places in inputs.slices(len(val), batch_size):
        stored = source.read(places)
        with torch.no_grad(), gradients.mixed():
            pieces = [
                model.embed(source.enter(stored[part[0] : part[-1] + 1]))
                for part in inputs.slices(len(places), micro_batch)
            ]
            embedding = torch.cat(pieces)
            logits.append(model.classify(embedding).float().cpu())
            if texts is not None:
                contrast = gradients.contrast_of(embedding, val[places])
                contrasts += [] if contrast is None else [(contrast, len(places))]
    whole = torch.cat(logits)
    if not torch.isfinite(whole).all():
        raise FloatingPointError("a validation logit is no finite number")
    scores = validation_scores(material.truth[val], whole)
    if texts is not None:
        counts = sum(count for _, count in contrasts)
        scores["contrastive"] = sum(value * count for value, count in contrasts) / counts if counts else math.nan
    return scores


def validation_scores(truth: np.ndarray, logits: torch.Tensor) -> dict[str, float]:
    """Return what training is watched by, of logits (n, L): bce, map, auroc_macro and lrap.

    The cross-entropy is the plain one also where training weighs its labels, so that it compares between objectives.
    """
    bce = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(truth).float())
    values = logits.double().numpy()
    return {
        "bce": float(bce),
        "map": float(metrics.mean_of_defined(metrics.average_precision(truth, values))),
        "auroc_macro": float(metrics.mean_of_defined(metrics.auroc(truth, values))),
        "lrap": float(metrics.lrap_samples(truth, values).mean()),
    }
