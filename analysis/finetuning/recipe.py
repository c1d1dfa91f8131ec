"""How a tower is fine-tuned: every choice in one place, with the published study's own among them.

`study_recipe` is the published study's own training (arXiv 2506.14136): the whole tower and a Xavier head at one rate
of 1e-5, AdamW made anew each epoch, no schedule, plain BCE, fp16 autocast where there is CUDA, stop by validation BCE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.finetuning.tower import Trainable
from engine.errors import UsageError

MONITORS = {"bce": False, "map": True, "auroc_macro": True}
"""Validation metrics that training can be stopped and chosen by, and whether more is better."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a tower is fine-tuned.

    Parameters
    ----------
    trainable : "all", "projection" or int
        The whole tower; only what follows its last block; or its last so many blocks and what follows them.
    objective : "bce" or "weighted_bce"
        Mean binary cross-entropy over labels; weighted: positives of a label count (negatives / positives) times, at
        most `largest_weight`.
    epochs, batch_size : int
    learning_rate : float
        Of the last block and what follows it, at its peak.
    head_rate : float, optional
        Of the head; by default the same.
    layer_decay : float
        Each block further down learns at this times the rate of the block above; 1: one rate for all.
    weight_decay : float
        AdamW's. Norms and biases are spared unless `decay_all`.
    decay_all : bool
    warmup : float
        Share of all steps over which the rate rises linearly; a cosine then carries it to zero.
    schedule : "cosine" or "constant"
    remake_optimizer : bool
        Make AdamW anew each epoch, which forgets its moments (the study did).
    normalize : bool
        Scale embeddings to length one before the head. A head that is handed in says this itself.
    monitor : "bce", "map" or "auroc_macro"
        On validation: which epoch's weights are kept, and when training stops.
    patience : int
        Epochs without improvement before it stops.
    min_improvement : float
        What counts as one.
    autocast : "none", "bf16", "fp16" or "fp16-on-cuda"
        Mixed precision; the last is fp16 on a CUDA device and float32 elsewhere. fp16 scales its loss.
    gradient_clip : float, optional
        Largest norm of the gradient.
    shift : int
        Augmentation: each training image moves by up to so many pixels, its edge repeated.
    contrast : float
        Augmentation: contrast and brightness vary by up to this share. There are no flips: the heart is on the left.
    token_memory : int
        Bytes that the frozen part's results may take in memory; beyond, they are computed again in every epoch.
    seed : int
    """

    trainable: Trainable = "all"
    objective: Literal["bce", "weighted_bce"] = "bce"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-4
    head_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    decay_all: bool = False
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    remake_optimizer: bool = False
    normalize: bool = False
    monitor: Literal["bce", "map", "auroc_macro"] = "bce"
    patience: int = 5
    min_improvement: float = 0.0
    autocast: Literal["none", "bf16", "fp16", "fp16-on-cuda"] = "none"
    gradient_clip: float | None = 1.0
    shift: int = 0
    contrast: float = 0.0
    largest_weight: float = 20.0
    token_memory: int = 4 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"fine-tuning: {name} must be at least {least}, not {getattr(self, name)}")
        if isinstance(self.trainable, int) and (isinstance(self.trainable, bool) or self.trainable < 1):
            raise UsageError(f"fine-tuning: trainable is all, projection or a number of blocks, not {self.trainable}")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.warmup < 1 or not 0 <= self.contrast < 1:
            raise UsageError("fine-tuning: layer_decay must lie in (0, 1], warmup and contrast in [0, 1)")
        if self.learning_rate <= 0 or self.monitor not in MONITORS:
            raise UsageError(f"fine-tuning: learning_rate > 0 and monitor one of {', '.join(MONITORS)} are needed")

    @property
    def augments(self) -> bool:
        """Whether images differ from epoch to epoch."""
        return self.shift > 0 or self.contrast > 0


def study_recipe(seed: int = 0) -> FinetuneConfig:
    """Return the study's own fine-tuning (see the module's text)."""
    return FinetuneConfig(
        trainable="all",
        objective="bce",
        epochs=10,
        batch_size=24,
        learning_rate=1e-5,
        weight_decay=1e-2,
        decay_all=True,
        warmup=0.0,
        schedule="constant",
        remake_optimizer=True,
        normalize=False,
        monitor="bce",
        patience=5,
        min_improvement=1e-4,
        autocast="fp16-on-cuda",
        gradient_clip=None,
        seed=seed,
    )
