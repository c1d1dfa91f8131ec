"""The contrastive objective that an image tower and a text tower are trained with together.

In come an open_clip model (anything with ``visual``, ``encode_text`` and ``logit_scale``) and a batch of normalised
pixels with tokenised texts; out goes the loss. `analysis.contrastive_training` holds the loop.

The objective is a sum of three image-text contrasts:

- **images against captions** (InfoNCE, CLIP, arXiv 2103.00020). Two images with the same caption, or a caption all of
  whose labels the other image has too, are not each other's negatives: such pairs are masked. In radiology that is the
  rule, not the exception (a quarter of Open-i's reports share their exact text with another one).
- **images against label names** (a sigmoid for each pair, SigLIP, arXiv 2303.15343): the positives are the names of the
  labels that an image has. It is what zero-shot classification asks, with any number of positives an image.
- **regions against label names** (optional; GLoRIA, ICCV 2021, and RegionCLIP, arXiv 2112.09106): patch tokens, carried
  through the tower's own final norm and projection, against the same names; positive where the finding lies under the
  patch. It teaches a small tower small findings in minutes instead of hours, and needs masks, which phantoms have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.errors import UsageError


@dataclass(frozen=True)
class ContrastiveConfig:
    """What the loop needs beside the model and the batches.

    Parameters
    ----------
    steps : int
        Optimiser steps in all; the schedule ends there.
    warmup_steps : int
        Steps over which the learning rate rises linearly from zero; a cosine carries it down to ``final_rate`` times
        its peak.
    average_decay : float
        Decay of the exponential running average of the weights, which is what training gives back.
    caption_weight, name_weight, region_weight : float
        Factors of the three terms; a term with factor 0 is not computed.
    region_weight_end : float
        The region term's factor at the last step; it goes there linearly.
    region_block : int
        Transformer block whose output the region term reads. -2 is what enters the last block: the tokens from which
        the class token gathers its answer.
    smoothing : float
        Share of the targets of the name term given to the other answer.
    parallel : int
        Batches a step, each computed whole in a thread of its own and their gradients averaged. On a few cores this is
        faster than splitting each operation over them, above all on a machine that does other work too.
    limit_minutes : float, optional
        Wall time for the loop. On a machine too slow for all steps the schedule runs by the clock instead, so that the
        rate has come down when the time is up; the result then depends on the machine.
    """

    steps: int
    warmup_steps: int = 200
    learning_rate: float = 1e-3
    final_rate: float = 0.01
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    gradient_clip: float = 1.0
    average_decay: float = 0.999
    caption_weight: float = 1.0
    name_weight: float = 1.0
    region_weight: float = 1.0
    region_weight_end: float = 1.0
    region_block: int = -2
    smoothing: float = 0.0
    max_logit_scale: float = 100.0
    parallel: int = 1
    limit_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise UsageError(
                f"steps {self.steps} and warmup_steps {self.warmup_steps} do not fit: "
                "give at least one step and no more warm-up steps than steps"
            )
        if not 0.0 <= self.average_decay < 1.0:
            raise UsageError(f"average_decay {self.average_decay} must be at least 0 and below 1")


@dataclass(frozen=True)
class ContrastiveBatch:
    """One step's input: b images, t distinct texts, L label names, p patches.

    Parameters
    ----------
    pixels : float32 tensor (b, 3, h, w)
        Normalised as the model's preprocessing says.
    texts : int64 tensor (t, context)
        Tokens of the distinct captions.
    text_of : int64 tensor (b,)
        Each image's caption as a row of ``texts``.
    also_true : bool tensor (b, t)
        Captions that hold for the image as well, so that they are not its negatives (`subset_mask`).
    names : int64 tensor (L, context)
        Tokens of the label names.
    labels : float32 tensor (b, L)
        1 where the image has the label.
    coverage : float32 tensor (b, L, p), optional
        How much of a patch the label's finding covers, 0 to 1, patches row by row; NaN where that is not known.
    """

    pixels: torch.Tensor
    texts: torch.Tensor
    text_of: torch.Tensor
    also_true: torch.Tensor
    names: torch.Tensor
    labels: torch.Tensor
    coverage: torch.Tensor | None = None


def subset_mask(image_labels: torch.Tensor, text_labels: torch.Tensor) -> torch.Tensor:
    """Return where a text says nothing that the image does not have.

    Parameters
    ----------
    image_labels : bool tensor (b, L)
    text_labels : bool tensor (t, L)
        What each text asserts; a text without labels holds for no image but its own.

    Returns
    -------
    bool tensor (b, t)
    """
    said = text_labels.float()
    missing = said @ (~image_labels).float().T
    return ((missing == 0) & (said.sum(dim=1, keepdim=True) > 0)).T


def caption_loss(
    image: torch.Tensor, text: torch.Tensor, text_of: torch.Tensor, also_true: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """InfoNCE between images and their captions, in both directions, without false negatives.

    Parameters
    ----------
    image : float tensor (b, d)
    text : float tensor (t, d)
        Distinct texts. Neither side needs to be normalised.
    text_of : int64 tensor (b,)
        Each image's own text.
    also_true : bool tensor (b, t)
        Pairs that are left out because the text holds for the image too.
    scale : scalar tensor
        Factor of the cosines (the exponential of ``logit_scale``).

    Returns
    -------
    scalar tensor
        Mean of the two directions. With distinct texts and an empty ``also_true`` it is CLIP's loss.
    """
    logits = scale * functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    pairs = logits[:, text_of]  # (b, b): image i against the caption of image j
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    left_out = (also_true[:, text_of] | (text_of[:, None] == text_of[None, :])) & ~own
    pairs = pairs.masked_fill(left_out, -torch.inf)
    target = torch.arange(len(image), device=image.device)
    return (functional.cross_entropy(pairs, target) + functional.cross_entropy(pairs.T, target)) / 2


def name_loss(
    image: torch.Tensor,
    names: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sigmoid contrast between images and label names.

    Parameters
    ----------
    image : float tensor (b, d)
    names : float tensor (L, d)
    labels : float tensor (b, L)
    scale, bias : scalar tensor, (L,) tensor
        ``scale * cosine + bias`` is the logit; the bias carries the label's frequency.

    Returns
    -------
    scalar tensor
        Sum over labels, mean over images.
    """
    logits = scale * functional.normalize(image, dim=-1) @ functional.normalize(names, dim=-1).T + bias
    target = labels * (1 - 2 * smoothing) + smoothing
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(image)


def region_loss(
    patches: torch.Tensor,
    names: torch.Tensor,
    coverage: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    present: float = 0.08,
) -> torch.Tensor:
    """Sigmoid contrast between patches and label names.

    Parameters
    ----------
    patches : float tensor (b, p, d)
        Patch tokens in the common embedding space.
    names : float tensor (L, d)
    coverage : float tensor (b, L, p)
        Share of the patch under the finding; NaN where unknown (left out).
    present : float
        A patch covered at least so far is a positive; one that is touched less is left out.

    Returns
    -------
    scalar tensor
        Mean over the labels; for each the mean over its patches, with positives weighted up by the square root of the
        imbalance (a fracture covers one patch in thousands; full balancing would reward false alarms everywhere).
    """
    cosines = functional.normalize(patches, dim=-1) @ functional.normalize(names, dim=-1).T
    logits = (scale * cosines + bias).transpose(1, 2)
    positive = coverage >= present
    negative = coverage == 0
    count = positive.sum(dim=(0, 2)).float()
    ratio = negative.sum(dim=(0, 2)).float() / count.clamp(min=1.0)
    weight = torch.where(positive, ratio.sqrt()[None, :, None], negative.float())
    losses = functional.binary_cross_entropy_with_logits(logits, positive.float(), weight=weight, reduction="none")
    known = weight.sum(dim=(0, 2)) > 0
    by_label = losses.sum(dim=(0, 2)) / weight.sum(dim=(0, 2)).clamp(min=1.0)
    return by_label[known].mean() if bool(known.any()) else losses.sum()


def image_and_patches(visual: Any, pixels: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed images, and the patch tokens behind one block in the same space.

    Parameters
    ----------
    visual : open_clip.transformer.VisionTransformer
    pixels : float tensor (b, 3, h, w)
    block : int
        Number of the block, negative ones from the end.

    Returns
    -------
    image : tensor (b, d)
    patches : tensor (b, p, d)
        Patches row by row.

    Raises
    ------
    UsageError
        For a tower without the final norm and projection matrix of open_clip's own ViT.
    """
    if not isinstance(getattr(visual, "proj", None), nn.Parameter) or not hasattr(visual, "forward_intermediates"):
        raise UsageError(
            f"the region term needs open_clip's own ViT (a tower with ln_post and proj), not {type(visual).__name__}: "
            "set region_weight to 0"
        )
    blocks = len(visual.transformer.resblocks)
    output = visual.forward_intermediates(
        pixels, indices=[block % blocks], normalize_intermediates=True, output_fmt="NLC"
    )
    return output["image_features"], output["image_intermediates"][0] @ visual.proj


class ContrastiveObjective(nn.Module):
    """The sum of the three terms, with the scales and biases that only training needs.

    Parameters
    ----------
    label_count : int
    config : ContrastiveConfig
    """

    def __init__(self, label_count: int, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.name_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.name_bias = nn.Parameter(torch.full((label_count,), -2.0))
        self.region_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.region_bias = nn.Parameter(torch.full((label_count,), -3.0))

    def region_weight(self, done: float) -> float:
        """Return the region term's factor after a share of the training."""
        return self.config.region_weight + (self.config.region_weight_end - self.config.region_weight) * done

    def forward(self, model: Any, batch: ContrastiveBatch, done: float) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss and its terms by name (before their factors), after a share `done` of the training."""
        config = self.config
        region = self.region_weight(done) if batch.coverage is not None else 0.0
        if region > 0:
            image, patches = image_and_patches(model.visual, batch.pixels, config.region_block)
        else:
            image = model.encode_image(batch.pixels)
        names = model.encode_text(batch.names)
        terms: dict[str, torch.Tensor] = {}
        if config.caption_weight > 0:
            texts = model.encode_text(batch.texts)
            scale = model.logit_scale.exp()
            terms["captions"] = caption_loss(image, texts, batch.text_of, batch.also_true, scale)
        if config.name_weight > 0:
            scale = self.name_scale.exp()
            terms["names"] = name_loss(image, names, batch.labels, scale, self.name_bias, config.smoothing)
        if region > 0 and batch.coverage is not None:
            bias = self.region_bias[:, None].T
            terms["regions"] = region_loss(patches, names, batch.coverage, self.region_scale.exp(), bias)
        factors = {"captions": config.caption_weight, "names": config.name_weight, "regions": region}
        total = sum((factors[term] * value for term, value in terms.items()), torch.zeros((), device=image.device))
        return total, {term: float(value.detach()) for term, value in terms.items()}
