"""Which precision an encoder computes in, and whether that moves its embeddings.

Comes in: a model's name, a device, a cache, and some samples. Goes out: a loaded encoder. ``auto`` keeps the precision
that the cache already holds for this model; else it depends on model and device alone: the fastest that the device
computes natively and that does not move the embeddings. Whether it moves them is a property of the model: one tower
gives the same neighbours in bfloat16, another one others for a quarter of its images. So at an encoder's first use some
samples are computed in float32 too, and a precision whose embeddings lie elsewhere is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from engine import pixels
from engine.arrays import array_folder
from engine.arrays.keyed_array import KeyedArray
from engine.batches import as_array
from engine.dataset import Dataset
from engine.encoder import Encoder, choose_device, load_encoder
from engine.errors import ImageError, UsageError
from engine.features import normalized
from engine.machine import best_seconds, instruction_sets
from engine.model_files import ModelFiles, resolve_model

log = logging.getLogger(__name__)

SAMPLES = 64
LEAST_COSINE = 0.999
# Neighbours whose cosines differ by less than this are equally near: which one comes first says nothing.
TIE = 1e-4
# How much faster bfloat16's products must be before it is worth its rounding.
BFLOAT16_GAIN = 1.25


def precisions_for(device: torch.device) -> tuple[str, ...]:
    """Return the precisions to try on a device, the fastest first; the last one is float32."""
    if device.type == "cuda":
        return ("bf16", "fp16", "fp32") if torch.cuda.is_bf16_supported() else ("fp16", "fp32")
    return ("bf16", "fp32") if device.type == "cpu" and has_fast_bfloat16() else ("fp32",)


@cache
def has_fast_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 natively (AMX, AVX512-BF16 or Arm's BF16), and faster for it.

    Having the instructions is not enough: without AMX, some processors run them at float32's rate or below it. So a
    product of a tower's size is timed in both, once a process; where bfloat16 gains, it gains several times the margin.
    """
    if not {"amx_bf16", "avx512_bf16", "bf16"} & set(instruction_sets()):
        return False
    return _seconds_of_product(torch.bfloat16) * BFLOAT16_GAIN < _seconds_of_product(torch.float32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Return the least of some times that a layer of 1,600 tokens takes, a batch of 32 in a ViT-B/32."""
    tokens, weights = torch.ones(1600, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    return best_seconds(lambda: torch.nn.functional.linear(tokens, weights), 0.02)


def cached_precision(cache: Any, files: ModelFiles, preferred: Sequence[str]) -> str | None:
    """Return the precision in which a cache holds embeddings of a model; the preferred, else the most used one.

    Parameters
    ----------
    cache : path or Storage
    files : ModelFiles
    preferred : sequence of str
        In this order, where it holds several.
    """
    rows: dict[str, int] = {}
    for kind, name in array_folder.list_arrays(cache):
        if kind not in ("image", "text"):
            continue
        array = KeyedArray.open(cache, kind, name)
        described = array.form.description
        if all(described.get(part) == value for part, value in files.description.items()):
            precision = str(described.get("precision"))
            rows[precision] = rows.get(precision, 0) + len(array)
    for precision in preferred:
        if rows.get(precision):
            return precision
    return max(rows, key=lambda precision: rows[precision]) if rows else None


def load_for(
    name: str,
    cache: Any,
    *,
    device: str = "auto",
    precision: str = "auto",
    decoder: str = "exact",
    dataset: Dataset | None = None,
    what: Sequence[str] = ("image",),
    check: bool = True,
) -> Encoder:
    """Load a model in a precision that fits cache, device and model.

    Parameters
    ----------
    name : str
        See `engine.encoder.load_encoder`.
    cache : path or Storage
    device, decoder : str
    precision : "auto", "fp32", "bf16" or "fp16"
    dataset : Dataset, optional
        Samples for the comparison with float32 at the encoder's first use; without one there is none.
    what : sequence of str
        What is to be embedded: images, texts or both are compared.
    check : bool
        Whether to compare.

    Raises
    ------
    UsageError
        The precision that was asked for by name moves the embeddings.
    """
    place, files = choose_device(device), resolve_model(name)
    candidates = precisions_for(place)
    if precision == "auto":
        held = cached_precision(cache, files, candidates)
        if held is not None:
            return load_encoder(files, device=device, precision=held, decoder=decoder)
    else:
        candidates = (precision, "fp32") if precision != "fp32" else ("fp32",)
    reference: Encoder | None = None
    for candidate in candidates:
        encoder = load_encoder(files, device=device, precision=candidate, decoder=decoder)
        if candidate == "fp32" or not check or dataset is None or _was_used(cache, encoder):
            return encoder
        if reference is None:
            reference = load_encoder(files, device=device, precision="fp32", decoder=decoder)
        moved = moved_by(encoder, reference, dataset, what)
        if not moved:
            return encoder
        if precision != "auto":
            raise UsageError(
                f"precision {candidate} moves the embeddings of {files.name}: {moved}; use --precision fp32, or auto"
            )
        log.warning("precision %s is not used for %s: %s", candidate, files.name, moved)
    raise AssertionError("the last candidate is float32, which is not compared")


def moved_by(encoder: Encoder, reference: Encoder, dataset: Dataset, what: Sequence[str]) -> str:
    """Compare an encoder with itself in float32 on a data set's samples; return how it differs, "" where it does not.

    Parameters
    ----------
    encoder, reference : Encoder
    dataset : Dataset
        Up to 64 of its images and texts, spread evenly, are embedded by both.
    what : sequence of str
        "text" stands for the texts, anything else for the images.
    """
    checks = []
    if any(product != "text" for product in what):
        images = _some_pixels(encoder, dataset)
        if len(images):
            checks.append(("images", encoder.encode_pixels(images), reference.encode_pixels(images)))
    if "text" in what:
        texts = _some_texts(dataset)
        if texts:
            checks.append(("texts", encoder.encode_text(texts), reference.encode_text(texts)))
    for kind, low, exact in checks:
        difference = difference_of(as_array(low), as_array(exact))
        if difference:
            return f"of {len(low)} {kind}, {difference}"
    return ""


def difference_of(values: np.ndarray, reference: np.ndarray) -> str:
    """Say how embeddings (n, dim) differ from a reference in direction and neighbours, "" where they do not."""
    if not np.isfinite(values).all():
        return f"{int((~np.isfinite(values).all(axis=1)).sum())} are not finite"
    unit, exact = normalized(values.astype(np.float64)), normalized(reference.astype(np.float64))
    cosines = (unit * exact).sum(axis=1)
    if cosines.min() < LEAST_COSINE:
        return f"the least cosine to float32 is {cosines.min():.4f} (at least {LEAST_COSINE})"
    if len(values) < 3:
        return ""
    similar, exact_similar = unit @ unit.T, exact @ exact.T
    for matrix in (similar, exact_similar):
        np.fill_diagonal(matrix, -np.inf)
    rows = np.arange(len(values))
    lost = exact_similar.max(axis=1) - exact_similar[rows, similar.argmax(axis=1)]
    if (lost > TIE).any():
        return f"{int((lost > TIE).sum())} have another nearest neighbour than in float32"
    return ""


def _was_used(cache: Any, encoder: Encoder) -> bool:
    return any(kind in ("image", "text") and name == encoder.id for kind, name in array_folder.list_arrays(cache))


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.empty(0, int)


def _some_pixels(encoder: Encoder, dataset: Dataset) -> np.ndarray:
    """Return model inputs of up to 64 images, (m, h, w, 3) uint8; those that cannot be had are left to the job."""
    found: list[np.ndarray] = []
    uris = dataset.samples["uri"]
    named = np.flatnonzero((uris != "").to_numpy())
    for position in named[_spread(len(named), 2 * SAMPLES)]:
        if len(found) == SAMPLES:
            break
        try:
            content = dataset.reader.read(uris.iloc[position])
            image = pixels.decode(content, at_least=encoder.preprocess.at_least)
        except ImageError:
            continue
        found.append(encoder.preprocess(image)[0])
    return np.stack(found) if found else np.empty(0, np.uint8)


def _some_texts(dataset: Dataset) -> list[str]:
    texts = dataset.samples["text"]
    named = np.flatnonzero((texts != "").to_numpy())
    return list(dict.fromkeys(texts.iloc[position] for position in named[_spread(len(named), SAMPLES)]))
