"""The three settings of a study: zero-shot, linear probe, fine-tuning, each by the sound or by the published protocol.

Comes in: the samples that have an embedding, their cached embeddings, a loaded encoder. Goes out: one `Setting` each,
with scores and decisions for every sample, its time, and what a heatmap of it aims at. Truth of the test split is never
read here: heads and thresholds come from the train and val rows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from analysis import cam, finetuning, paper, probes, prompts, thresholds, zeroshot
from analysis.finetuning import KeptResults
from analysis.heads import LinearHead
from analysis.metrics import Prediction
from analysis.probes import sweeping
from engine import cache as caches
from engine import encoder as encoders
from engine import model_folder
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.keys import short_hash
from jobs import config as configs
from jobs import heads, model_card, tuning_rows
from jobs.probe_section import LINEAR_PROBE, ProbeSection, StudyProbeSection

ProgressCall = Callable[[str, int, int | None], None]

ZERO_SHOT, FINE_TUNING = "Zero-shot", "Fine-tuning"


class ZeroShotSection(configs.JobConfig):
    """Prompts of the sound protocol; the published one uses bare label names."""

    templates: str | list[str] = Field("ensemble", description="a named set, or templates that hold {label}")
    negatives: str | list[str] | None = Field(None, description="templates of absence, or none")
    phrases: dict[str, str] = Field(
        default_factory=dict, description="words for labels that are not said by their name"
    )


class FinetuneSection(configs.JobConfig):
    """Fine-tuning of the sound protocol; starts from the probe's head (probe first, then fine-tune).

    Each value is one of `analysis.finetuning.FinetuneConfig`, which says more.
    """

    enabled: bool = True
    trainable: Literal["all", "lora", "projection", "none"] | int = Field(
        "all", description="all, lora (adapters), projection, none (the head alone), or so many last blocks"
    )
    from_block: int | None = Field(None, description="train from this block on, from its cached tokens; -1 is the last")
    objective: Literal["bce", "weighted_bce", "focal", "asymmetric", "contrastive"] = "bce"
    contrastive_weight: float = Field(0.0, ge=0, description="add the contrast of images and texts with this factor")
    text_trainable: bool = Field(False, description="train the text tower in the contrast")
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(32, ge=1, description="samples an optimiser step")
    micro_batch: int | None = Field(
        None, ge=1, description="samples at once, their gradients accumulated; by memory if empty"
    )
    learning_rate: float = Field(1e-4, gt=0)
    head_rate: float | None = Field(None, ge=0, description="of the head; the same if empty")
    text_rate: float | None = Field(None, ge=0, description="of the text tower; the same if empty")
    layer_decay: float = Field(1.0, gt=0, le=1, description="rate of a block over that of the block above")
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    schedule: Literal["cosine", "constant"] = "cosine"
    monitor: Literal["bce", "map", "auroc_macro", "lrap", "contrastive"] | None = Field(
        None, description="validation metric that chooses and stops; map, or contrastive for that objective"
    )
    patience: int = Field(5, ge=1)
    min_improvement: float = Field(0.0, ge=0)
    autocast: Literal["none", "bf16", "fp16", "fp16-on-cuda"] = Field("none", description="mixed precision")
    gradient_clip: float | None = Field(1.0, gt=0)
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    ema_decay: float | None = Field(None, ge=0, lt=1, description="keep a running average of the weights")
    shift: int = Field(0, ge=0, description="augmentation: pixels")
    crop: float = Field(0.0, ge=0, lt=1, description="augmentation: largest share of the sides cut away")
    rotation: float = Field(0.0, ge=0, le=180, description="augmentation: degrees")
    contrast: float = Field(0.0, ge=0, lt=1, description="augmentation: share")
    flip: bool = Field(False, description="augmentation: mirror half of the images (hearts have a side)")
    lora_rank: int = Field(8, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    focal_gamma: float = Field(2.0, ge=0)
    positive_gamma: float = Field(1.0, ge=0, description="of the asymmetric objective")
    negative_gamma: float = Field(4.0, ge=0, description="of the asymmetric objective")
    margin: float = Field(0.05, ge=0, lt=1, description="of the asymmetric objective")
    largest_weight: float = Field(20.0, ge=1, description="of weighted_bce")
    token_memory: int = Field(4 << 30, ge=0, description="bytes that kept results of the frozen part may take")
    deterministic: bool = Field(False, description="only operations that give the same bits each time")

    def recipe(self, seed: int) -> finetuning.FinetuneConfig:
        """Return the recipe; UsageError where choices exclude each other."""
        values = self.model_dump(exclude={"enabled"})
        values["monitor"] = self.monitor or ("contrastive" if self.objective == "contrastive" else "map")
        return finetuning.FinetuneConfig(**values, seed=seed)


@dataclass(frozen=True)
class Material:
    """What every setting works on.

    Parameters
    ----------
    dataset : Dataset
        Only samples whose image was embedded, with their split.
    encoder : Encoder
    features : ndarray of float32, (n, d)
        Un-normalised image embeddings; in `jobs.distances` also `engine.features.StoredRows`, read when asked for.
    keys : ndarray of uint8, (n, 16)
        Of the images, as the index names them.
    cache : Cache
    """

    dataset: Dataset
    encoder: Encoder
    features: np.ndarray
    keys: np.ndarray
    cache: caches.Cache

    @property
    def device(self) -> str:
        """Where cached arrays are analysed: the encoder's CUDA device; the processor where it is on any other."""
        place = self.encoder.device
        return str(place) if place.type == "cuda" else "cpu"  # float64 is wanted, which Apple's devices lack

    @property
    def y(self) -> np.ndarray:
        """Truth, (n, L) int8."""
        return self.dataset.labels

    @property
    def split(self) -> np.ndarray:
        """Split of each sample, (n,)."""
        return self.dataset.samples["split"].to_numpy(dtype=object)

    @property
    def split_digest(self) -> str:
        """Hash of which sample is in which split: equal digests, equal splits."""
        parts = (f"{sample}\t{part}" for sample, part in zip(self.dataset.ids, self.split, strict=True))
        return short_hash("\n".join(parts))

    def rows(self, split: str) -> np.ndarray:
        """Positions of one split's samples."""
        return np.flatnonzero(self.split == split)


@dataclass(frozen=True)
class Explained:
    """What a heatmap of a setting needs: an image tower, and a head or one text vector a label.

    Parameters
    ----------
    name, protocol : str
    encoder : Encoder
        The parent, or the fine-tuned one.
    label_names : tuple of str, length L
    head : LinearHead or None
    text : ndarray, (L, d), or None
        Zero-shot's text vectors.
    """

    name: str
    protocol: str
    encoder: Encoder
    label_names: tuple[str, ...]
    head: LinearHead | None = None
    text: np.ndarray | None = None

    def can_explain(self, label: str) -> bool:
        """Tell whether a label has a direction in the embedding; one that was never trained has weights of zero."""
        if label not in self.label_names:
            return False
        return self.head is None or bool(np.any(self.head.of_label(label)[0]))

    def target(self, label: str) -> cam.Target:
        """Return what a heatmap of a label explains in this setting."""
        if self.head is not None:
            weight, bias = self.head.of_label(label)
            return cam.HeadTarget(weight, bias, label, self.head.normalised)
        assert self.text is not None  # a setting has a head or a text
        return cam.TextTarget(self.text[self.label_names.index(label)], label, self.protocol == "sound")


@dataclass(frozen=True)
class Setting:
    """One way to get scores from images.

    Parameters
    ----------
    explained : Explained
    features : ndarray of float32, (n, d)
        Of its encoder, un-normalised.
    prediction : Prediction
        For all n samples.
    thresholds : ndarray of float, (L,), or None where the cut is relative to each image
    seconds : float
        Its own training and scoring, without the embedding of the parent that all settings share.
    details : dict
        How it came about.
    """

    explained: Explained
    features: np.ndarray
    prediction: Prediction
    thresholds: np.ndarray | None
    seconds: float
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The setting's name in tables and figures."""
        return self.explained.name


def prompts_of(
    section: ZeroShotSection, protocol: str, names: Sequence[str], *, negatives: bool = True
) -> prompts.Prompts:
    """Return a protocol's prompts for some labels: the section's (those of absence where wanted), or the study's."""
    if protocol == "paper":
        return paper.prompts(names)
    absent = section.negatives if negatives else None
    return prompts.build_prompts(names, section.templates, absent, phrases=section.phrases)


def label_texts(
    section: ZeroShotSection, protocol: str, names: Sequence[str], encoder: Encoder, cache: caches.Cache
) -> np.ndarray:
    """Return the embedding of each label's prompts, (L, d): of length one, or under the study's protocol as it is."""
    wanted = prompts_of(section, protocol, names, negatives=False)
    return wanted.combine(cache.text_features(wanted.texts, encoder), normalize=protocol == "sound")[0]


def zero_shot(material: Material, section: ZeroShotSection, protocol: str) -> Setting:
    """Score every image against the labels' prompts."""
    start = time.perf_counter()
    names = material.dataset.label_names
    sound = protocol == "sound"
    wanted = prompts_of(section, protocol, names)
    embedded = material.cache.text_features(wanted.texts, material.encoder)
    text, negative = wanted.combine(embedded, normalize=sound)
    if sound:
        scores = zeroshot.zero_shot_scores(
            material.features,
            text,
            logit_scale=material.encoder.logit_scale,
            logit_bias=material.encoder.logit_bias or 0.0,
            negative=negative,
        )
        cut = thresholds.choose_on_validation("f1", material.y, scores, material.split)
        prediction = Prediction(scores, thresholds.decide(scores, cut))
    else:
        scores = paper.zero_shot_scores(material.features, text)
        cut, prediction = None, Prediction(scores, paper.decisions(scores))
    explained = Explained(ZERO_SHOT, protocol, material.encoder, names, text=text)
    details = {"texts": wanted.texts}
    return Setting(explained, material.features, prediction, cut, time.perf_counter() - start, details)


def linear_probe(
    material: Material, section: ProbeSection, protocol: str, seed: int, zero_shot: ZeroShotSection | None = None
) -> Setting:
    """Train a linear head on the cached embeddings; see `probe_head`."""
    start = time.perf_counter()
    head, details = probe_head(material, section, protocol, seed, zero_shot)
    cut, prediction = _head_prediction(head, material.features, material, protocol)
    explained = Explained(probe_name(section, protocol), protocol, material.encoder, head.label_names, head=head)
    return Setting(explained, material.features, prediction, cut, time.perf_counter() - start, details)


def probe_name(section: ProbeSection, protocol: str) -> str:
    """Return what the probe's setting is called; the published protocol has one probe of its own."""
    return section.setting if isinstance(section, StudyProbeSection) and protocol == "sound" else LINEAR_PROBE


def probe_head(
    material: Material, section: ProbeSection, protocol: str, seed: int, zero_shot: ZeroShotSection | None = None
) -> tuple[LinearHead, dict[str, Any]]:
    """Return the linear head of the train rows, tuned on the val rows, and how it was chosen; or one trained before.

    Parameters
    ----------
    zero_shot : ZeroShotSection, optional
        The prompts that a text-prior probe is drawn to; the usual ones if left out.
    """
    train, val = material.rows("train"), material.rows("val")
    x, y, names, encoder_id = material.features, material.y, material.dataset.label_names, material.encoder.id
    kind = section.kind if isinstance(section, StudyProbeSection) else "logistic"
    device = str(material.encoder.device)
    if protocol == "sound" and isinstance(section, StudyProbeSection) and section.head is not None:
        head = heads.for_labels(heads.open_head(section.head, material.encoder), names, section.head)
        return head, {**head.provenance, "trained_before": str(section.head)}
    if protocol == "sound" and kind != "logistic":
        options: dict[str, Any] = {
            "kind": kind, "c_grid": section.C, "seed": seed, "encoder_id": encoder_id, "device": device
        }  # fmt: skip
        if kind == "text-prior":
            asked = zero_shot or ZeroShotSection()
            options["text"] = label_texts(asked, protocol, names, material.encoder, material.cache)
            options["scale"] = float(material.encoder.logit_scale)
        found = sweeping.sweep_on_validation(x[train], y[train], x[val], y[val], label_names=names, **options)
        assert isinstance(found.probe, LinearHead)  # the section takes linear kinds only
        return found.probe, {**found.probe.provenance, "kind": kind}
    if protocol == "sound":
        fitted = probes.fit_probe(
            x[train], y[train], x[val], y[val], label_names=names, c_grid=section.C, encoder_id=encoder_id,
            device=device,
        )  # fmt: skip
    else:
        fitted = paper.linear_probe(
            x[train], y[train], x[val], y[val], label_names=names, seed=seed, encoder_id=encoder_id
        )
    return fitted.head, dict(fitted.head.provenance)


def fine_tuning(
    material: Material,
    section: FinetuneSection,
    protocol: str,
    seed: int,
    folder: Path,
    start_head: LinearHead | None,
    embed: Callable[[Encoder], np.ndarray],
    progress: ProgressCall,
    kept: KeptResults | None = None,
    checkpoints: finetuning.Checkpoints | None = None,
) -> Setting:
    """Train the image tower and a head; the result is a new encoder that goes through the same cache.

    Parameters
    ----------
    folder : Path
        Where the new model folder is written.
    start_head : LinearHead, optional
        The probe's, under the sound protocol.
    embed : callable
        Embeds the data set with a new encoder through the cache and returns its features (n, d).
    kept : KeptResults, optional
        What the frozen part gives, shared with the trainings of folds.
    checkpoints : Checkpoints, optional
        Where training keeps its state, and goes on from.
    """
    start = time.perf_counter()
    explained, details = tuned_tower(material, section, protocol, seed, folder, start_head, progress, kept, checkpoints)
    assert explained.head is not None  # fine-tuning ends in a head
    features = embed(explained.encoder)
    cut, prediction = _head_prediction(explained.head, features, material, protocol)
    seconds = time.perf_counter() - start + details["earlier_seconds"]
    return Setting(explained, features, prediction, cut, seconds, details)


def tuned_tower(
    material: Material,
    section: FinetuneSection,
    protocol: str,
    seed: int,
    folder: Path,
    start_head: LinearHead | None,
    progress: ProgressCall,
    kept: KeptResults | None = None,
    checkpoints: finetuning.Checkpoints | None = None,
) -> tuple[Explained, dict[str, Any]]:
    """Train a tower and a head, write them as a model folder, and return them loaded, with how training went."""
    names = material.dataset.label_names
    recipe = section.recipe(seed) if protocol == "sound" else finetuning.study_recipe(seed)
    result = finetuning.finetune(
        material.encoder,
        tuning_rows.source(material, recipe, progress),
        material.y,
        material.rows("train"),
        material.rows("val"),
        recipe,
        label_names=names,
        head=start_head,
        captions=tuning_rows.captions(material, recipe),
        progress=progress,
        kept=kept,
        checkpoints=checkpoints,
    )
    card = {
        "parent": material.encoder.id,
        "data": material.dataset.schema,
        "split": material.split_digest,
        "protocol": protocol,
        **result.card(),
    }
    name = f"{material.encoder.name}-finetuned"
    # A run that goes on may have been killed after its folder was written.
    saved = model_folder.save_model_folder(
        material.encoder, result.model_state, folder, model_card.text(name, card), name=name, overwrite=True
    )
    child = encoders.load_encoder(
        f"local-dir:{saved.resolve()}", device=str(material.encoder.device), precision=material.encoder.precision
    )
    head = dataclasses.replace(result.head, encoder_id=child.id, provenance={"card": card})
    if recipe.objective == "contrastive":
        head = _refitted(material, child, seed, card)
    head.save(folder / "head.npz")
    details = {
        "history": result.history.to_dict("records"),
        "epochs": int((result.history["epoch"] > 0).sum()),  # 0 is the start
        "said": kept_epoch(result, start_head is not None),
        "earlier_seconds": result.earlier_seconds,
    }
    return Explained(FINE_TUNING, protocol, child, names, head=head), details


def _refitted(material: Material, child: Encoder, seed: int, card: dict[str, Any]) -> LinearHead:
    """Return a probe on the new tower's embeddings: the contrast alone does not train the head."""
    rows = np.flatnonzero(material.split != "test")
    features = np.zeros((len(material.dataset), child.dim), np.float32)
    pixels = tuning_rows.pixels(material)
    for part in np.array_split(rows, -(-len(rows) // 64)):
        features[part] = child.encode_pixels(pixels[part]).cpu().numpy()
    seen = dataclasses.replace(material, encoder=child, features=features)
    head, _ = probe_head(seen, ProbeSection(), "sound", seed)
    return dataclasses.replace(head, provenance={**head.provenance, "card": card})


def kept_epoch(result: finetuning.FinetuneResult, from_probe: bool) -> str:
    """Return in a sentence what was free and which epoch was kept."""
    free = f"Fine-tuning freed {result.trained_weights:,} of the image tower's {result.all_weights:,} weights"
    shown = {"bce": "BCE", "map": "mAP", "auroc_macro": "macro-AUROC", "lrap": "LRAP", "contrastive": "contrast"}
    monitor = shown[result.config.monitor]
    if result.best_epoch == 0:
        start = "the probe's head on the parent's tower" if from_probe else "its random head on the parent's tower"
        return f"{free}; no epoch improved the validation {monitor} of its start, {start}, so the start is scored."
    return f"{free} and kept epoch {result.best_epoch} of {int(result.history['epoch'].max())} by validation {monitor}."


def _head_prediction(
    head: LinearHead, features: np.ndarray, material: Material, protocol: str
) -> tuple[np.ndarray | None, Prediction]:
    if protocol == "paper":
        scores = head.logits(features)
        return None, Prediction(scores, paper.decisions(scores))
    scores = head.probabilities(features)
    cut = thresholds.choose_on_validation("f1", material.y, scores, material.split)
    return cut, Prediction(scores, thresholds.decide(scores, cut))
