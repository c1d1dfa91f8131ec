"""Contrastive training of an image tower and a text tower: the objective, its schedule and its loop.

In come an open_clip model (anything with ``visual``, ``encode_text`` and ``logit_scale``) and batches of normalised
pixels with tokenised texts; out goes the running average of the model's weights. No files, no data set, no metrics.

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

import contextlib
import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.errors import UsageError

log = logging.getLogger(__name__)


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


class RunningAverage:
    """Exponential running average of a model's weights.

    The decay starts small and grows to its final value, so that the first steps' weights are soon forgotten.
    """

    def __init__(self, model: Any, decay: float):
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        values = [value for value in model.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(averages, values, 1 - decay)


def learning_rate(done: float, config: ContrastiveConfig) -> float:
    """Return the rate after a share `done` of the training: linear warm-up, then a cosine to its final value."""
    warm = config.warmup_steps / config.steps
    if done < warm:
        return config.learning_rate * (done + 1 / config.steps) / warm
    fall = min(1.0, (done - warm) / max(1e-9, 1 - warm))
    low = config.final_rate
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall)))


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those with weight decay (matrices) and those without (norms, biases, scales, positions)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                free = parameter.ndim < 2 or "embedding" in name
                (plain if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(
    model: Any,
    batches: Iterable[ContrastiveBatch],
    label_count: int,
    config: ContrastiveConfig,
    on_step: Callable[[int, dict[str, float], Any], None] | None = None,
) -> Any:
    """Train the model in place and return the running average of its weights.

    Parameters
    ----------
    model : open_clip model
        On its device, in float32.
    batches : iterable of ContrastiveBatch
        At least ``config.steps * config.parallel`` of them, on the model's device.
    label_count : int
        Number of label names, L.
    on_step : callable, optional
        Called after each step with its number, {"loss", "captions", "names", "regions", "rate", "seconds"} and the
        averaged model.

    Raises
    ------
    UsageError
        If the batches end before the steps do, or the loss is no longer a number.
    """
    device = model.logit_scale.device
    objective = ContrastiveObjective(label_count, config).to(device)
    groups = parameter_groups([model, objective], config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average = RunningAverage(model, config.average_decay)
    model.train()
    source = iter(batches)
    begun = time.perf_counter()
    limit = math.inf if config.limit_minutes is None else 60 * config.limit_minutes
    with _workers(config.parallel) as workers:
        for step in range(config.steps):
            started = time.perf_counter()
            done = max(step / config.steps, (started - begun) / limit)
            if done >= 1:
                log.warning("stopped after %d of %d steps: limit_minutes %s", step, config.steps, config.limit_minutes)
                break
            together = list(itertools.islice(source, config.parallel))
            if len(together) < config.parallel:
                raise UsageError(
                    f"the batches ended after {step} steps of {config.steps}: give more data or fewer steps"
                )
            rate = learning_rate(done, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = _set_gradients(objective, model, parameters, together, done, workers)
            if not math.isfinite(terms["loss"]):
                raise UsageError(
                    f"the loss is {terms['loss']} at step {step}: lower learning_rate {config.learning_rate}"
                )
            nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(config.max_logit_scale))
            average.update(model)
            if on_step is not None:
                on_step(step, {**terms, "rate": rate, "seconds": time.perf_counter() - started}, average.model)
    return average.model


@contextlib.contextmanager
def _workers(parallel: int) -> Iterator[ThreadPoolExecutor | None]:
    """Give threads for batches computed side by side, each with an equal share of the cores."""
    if parallel == 1:
        yield None
        return
    before = torch.get_num_threads()
    share = max(1, before // parallel)
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(parallel, initializer=torch.set_num_threads, initargs=(share,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


def _set_gradients(
    objective: ContrastiveObjective,
    model: Any,
    parameters: list[nn.Parameter],
    together: list[ContrastiveBatch],
    done: float,
    workers: ThreadPoolExecutor | None,
) -> dict[str, float]:
    """Set the parameters' gradients to the mean over the batches, added up in their order; return the mean terms."""

    def one(batch: ContrastiveBatch) -> tuple[tuple[torch.Tensor | None, ...], dict[str, float]]:
        loss, terms = objective(model, batch, done)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return gradients, {"loss": float(loss.detach()), **terms}

    results = list(map(one, together)) if workers is None else list(workers.map(one, together))
    for parameter, *gradients in zip(parameters, *(gradients for gradients, _ in results), strict=True):
        known = [gradient for gradient in gradients if gradient is not None]
        parameter.grad = sum(known[1:], known[0]) / len(together) if known else None
    return {name: sum(terms[name] for _, terms in results) / len(results) for name in results[0][1]}
