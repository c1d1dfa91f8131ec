"""How a tower is fine-tuned: every choice in one place, checked before anything runs.

`study_recipe` is the published study's own training (arXiv 2506.14136): the whole tower and a Xavier head at one rate
of 1e-5, AdamW made anew each epoch, no schedule, plain BCE, fp16 autocast where there is CUDA, stop by validation BCE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.finetuning.augmentation import Augmentation
from engine.errors import UsageError

Trainable = Literal["all", "lora", "projection", "none"] | int
Objective = Literal["bce", "weighted_bce", "focal", "asymmetric", "contrastive"]
Monitor = Literal["bce", "map", "auroc_macro", "lrap", "contrastive"]

MONITORS = {"bce": False, "map": True, "auroc_macro": True, "lrap": True, "contrastive": False}
"""Validation metrics that training can be stopped and chosen by, and whether more is better."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a tower is fine-tuned.

    Parameters
    ----------
    trainable : "all", "lora", "projection", "none" or int
        The whole tower; low-rank adapters in its blocks (Hu et al., ICLR 2022), merged when training ends; only what
        follows its last block; nothing but the head; or the last so many blocks and what follows them.
    from_block : int, optional
        Start from the tokens that enter this block (from the end if negative), as the token cache holds them: all
        blocks from there on train (or get adapters), those before never run. Tokens are of images as they are, so
        augmentation is excluded.
    objective : "bce", "weighted_bce", "focal", "asymmetric" or "contrastive"
        See `analysis.finetuning.objectives`. Weighted: positives of a label count (negatives / positives) times, at
        most `largest_weight`. Contrastive: images against their texts; the head then stays as it is.
    contrastive_weight : float
        Factor of the contrast between images and texts that is added to another objective; 0: labels alone.
    text_trainable : bool
        Whether the text tower trains in the contrast, or stays as it is.
    epochs : int
    batch_size : int
        Samples an optimiser step.
    micro_batch : int, optional
        Samples that go through the tower at once; their gradients add up to the batch's (gradient accumulation). By
        default the batch, or what fits into memory.
    learning_rate : float
        Of the last block and what follows it, at its peak.
    head_rate, text_rate : float, optional
        Of the head and of the text tower; by default the same.
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
    monitor : "bce", "map", "auroc_macro", "lrap" or "contrastive"
        On validation: which epoch's weights are kept, and when training stops.
    patience : int
        Epochs without improvement before it stops.
    min_improvement : float
        What counts as one.
    autocast : "none", "bf16", "fp16" or "fp16-on-cuda"
        Mixed precision; the last is fp16 on a CUDA device and float32 elsewhere. fp16 scales its loss.
    gradient_clip : float, optional
        Largest norm of the gradient.
    gradient_checkpointing : bool
        Keep only what enters a block and compute its inside again on the way back: less memory, a third more time.
    ema_decay : float, optional
        Validate and keep a running average of the weights; the share of the old average at each step, such as 0.999.
    shift, crop, rotation, contrast, flip
        Augmentation, see `analysis.finetuning.augmentation.Augmentation`. No flips by default: hearts have a side.
    lora_rank : int
    lora_alpha : float, optional
        Scale of the adapters, over the rank; by default twice the rank.
    focal_gamma : float
        Of focal loss (Lin et al., ICCV 2017).
    positive_gamma, negative_gamma, margin : float
        Of asymmetric loss (Ridnik et al., ICCV 2021).
    largest_weight : float
        Of `weighted_bce`.
    token_memory : int
        Bytes that the frozen part's results may take in memory; beyond, they are computed again in every epoch.
    deterministic : bool
        Allow only operations that give the same bits each time; on a CPU they do anyway.
    seed : int
    """

    trainable: Trainable = "all"
    from_block: int | None = None
    objective: Objective = "bce"
    contrastive_weight: float = 0.0
    text_trainable: bool = False
    epochs: int = 10
    batch_size: int = 32
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    head_rate: float | None = None
    text_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    decay_all: bool = False
    warmup: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    remake_optimizer: bool = False
    normalize: bool = False
    monitor: Monitor = "bce"
    patience: int = 5
    min_improvement: float = 0.0
    autocast: Literal["none", "bf16", "fp16", "fp16-on-cuda"] = "none"
    gradient_clip: float | None = 1.0
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    shift: int = 0
    crop: float = 0.0
    rotation: float = 0.0
    contrast: float = 0.0
    flip: bool = False
    lora_rank: int = 8
    lora_alpha: float | None = None
    focal_gamma: float = 2.0
    positive_gamma: float = 1.0
    negative_gamma: float = 4.0
    margin: float = 0.05
    largest_weight: float = 20.0
    token_memory: int = 4 << 30
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"fine-tuning: {name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(f"fine-tuning: micro_batch must be at least 1, not {self.micro_batch}")
        known = ("all", "lora", "projection", "none")
        number = isinstance(self.trainable, int) and not isinstance(self.trainable, bool)
        if not (self.trainable in known or (number and int(self.trainable) >= 1)):
            raise UsageError(
                f"fine-tuning: trainable is {', '.join(known)} or a number of last blocks, not {self.trainable!r}"
            )
        if not 0 < self.layer_decay <= 1 or not 0 <= self.warmup < 1:
            raise UsageError("fine-tuning: layer_decay must lie in (0, 1] and warmup in [0, 1)")
        if self.learning_rate <= 0 or self.monitor not in MONITORS:
            raise UsageError(f"fine-tuning: learning_rate > 0 and monitor one of {', '.join(MONITORS)} are needed")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError(f"fine-tuning: ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if min(self.contrastive_weight, self.focal_gamma, self.positive_gamma, self.negative_gamma) < 0:
            raise UsageError("fine-tuning: contrastive_weight and the gammas must be at least 0")
        if not 0 <= self.margin < 1:
            raise UsageError(f"fine-tuning: margin must be at least 0 and below 1, not {self.margin}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse choices that exclude one another."""
        if self.from_block is not None:
            if self.augmentation.any:
                raise UsageError(
                    "fine-tuning: from_block starts from cached tokens, which are of the images as they are, so it "
                    f"excludes augmentation ({self.augmentation.described}); leave one of them out"
                )
            if self.trainable not in ("all", "lora"):
                raise UsageError(
                    f"fine-tuning: from_block {self.from_block} trains all blocks from there on, so leave trainable "
                    f"{self.trainable!r} out (or say lora)"
                )
        if self.monitor == "contrastive" and not self.contrasts:
            raise UsageError(
                "fine-tuning: monitor contrastive needs the contrast: objective contrastive or contrastive_weight > 0"
            )
        if self.text_trainable and not self.contrasts:
            raise UsageError(
                "fine-tuning: the text tower trains by the contrast alone, so text_trainable needs objective "
                "contrastive or contrastive_weight > 0"
            )
        if self.objective == "contrastive" and self.trainable == "none" and not self.text_trainable:
            raise UsageError("fine-tuning: with both towers locked the contrast has nothing to train")

    @property
    def augmentation(self) -> Augmentation:
        """What changes the images from epoch to epoch."""
        return Augmentation(self.shift, self.crop, self.rotation, self.contrast, self.flip)

    @property
    def contrasts(self) -> bool:
        """Whether images are held against texts."""
        return self.objective == "contrastive" or self.contrastive_weight > 0


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
