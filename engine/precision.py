"""Which precision an encoder computes in, and whether that moves its embeddings.

Comes in: a model's name, a device, a cache, and some samples. Goes out: a loaded encoder. ``auto`` keeps the precision
that the cache already holds for this model; else it depends on model and device alone: the fastest that the device
computes natively and that does not move the embeddings. Whether it moves them is a property of the model: one tower
gives the same neighbours in bfloat16, another one others for a quarter of its images.

- A tower, of images or of texts, is compared with float32 where the cache has no row of it yet. An encoder's very first
  use compares both, whatever it is to embed, so that one precision is found for both.
- An encoder has one precision. Where one of its towers moves, ``auto`` leaves that precision to both: rows of the other
  tower stay in the cache, and are computed anew in the next precision.
- Where several precisions have rows, the one that has images is kept, for those cost most to compute.
- Where nothing is at hand to compare, ``auto`` takes float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine import pixels
from engine.arrays import array_folder
from engine.arrays.array_format import METADATA, parse_group
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.storage import storage_of
from engine.batches import as_array
from engine.dataset import Dataset
from engine.encoder import Encoder, choose_device, load_encoder
from engine.errors import ImageError, UsageError
from engine.features import normalized
from engine.machine import instruction_sets, processor_vendor
from engine.model_files import ModelFiles, resolve_model

log = logging.getLogger(__name__)

SAMPLES = 64
LEAST_COSINE = 0.999
# Neighbours whose cosines differ by less than this are equally near: which one comes first says nothing.
TIE = 1e-4
TOWERS = ("image", "text")
# The tower that computes an array of a kind.
TOWER_OF = {"image": "image", "tokens": "image", "text": "text"}


def precisions_for(device: torch.device) -> tuple[str, ...]:
    """Return the precisions to try on a device, the fastest first; the last one is float32."""
    if device.type == "cuda":
        return ("bf16", "fp16", "fp32") if torch.cuda.is_bf16_supported() else ("fp16", "fp32")
    return ("bf16", "fp32") if device.type == "cpu" and has_fast_bfloat16() else ("fp32",)


def has_fast_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 so much faster than float32 that its rounding may be worth it.

    By maker and instruction sets alone, so that a busy machine chooses as an idle one does: AMX (Intel's Xeons from
    Sapphire Rapids on), and AVX512-BF16 of AMD (from Zen 4 on). Intel's AVX512-BF16 without AMX was measured at
    float32's rate or below it, and Arm's BF16 not at all; there bfloat16 is for those who ask for it by name.
    """
    sets = instruction_sets()
    return "amx_bf16" in sets or ("avx512_bf16" in sets and processor_vendor() == "AuthenticAMD")


def load_for(
    name: str | ModelFiles,
    cache: Any,
    *,
    device: str = "auto",
    precision: str = "auto",
    decoder: str = "exact",
    dataset: Dataset | None = None,
    what: Sequence[str] = ("image",),
    texts: Sequence[str] = (),
    check: bool = True,
) -> Encoder:
    """Load a model in a precision that fits cache, device and model.

    Parameters
    ----------
    name : str or ModelFiles
        See `engine.encoder.load_encoder`.
    cache : path or Storage
    device, decoder : str
    precision : "auto", "fp32", "bf16" or "fp16"
    dataset : Dataset, optional
        Samples for the comparison with float32.
    what : sequence of str
        What is to be embedded: products of `engine.products`.
    texts : sequence of str
        What is embedded besides, such as queries; compared where the data set has neither texts nor labels.
    check : bool
        Whether to compare.

    Returns
    -------
    Encoder
        Its `precision_reason` says why.

    Raises
    ------
    UsageError
        The precision that was asked for by name moves the embeddings.
    """
    place, files = choose_device(device), resolve_model(name) if isinstance(name, str) else name

    def load(candidate: str, reason: str) -> Encoder:
        encoder = load_encoder(files, device=device, precision=candidate, decoder=decoder)
        encoder.precision_reason = reason
        return encoder

    if precision == "fp32":
        return load("fp32", "as asked for")
    rows = list(_rows_of(cache, files)) if check or precision == "auto" else []
    samples, reference, refused = _Samples(dataset, texts), None, ""
    for candidate, reason in _candidates(precision, place, rows):
        if candidate == "fp32" and reference is not None:
            reference.precision_reason = refused or reason
            return reference
        encoder = load(candidate, refused or reason)
        if candidate == "fp32" or not check:
            return encoder
        comparison = _comparison(encoder, rows, what, samples, only_asked=precision != "auto")
        if comparison.samples:
            reference = reference or load("fp32", "to compare with")
            moved = moved_by(encoder, reference, comparison.samples)
            if moved and precision != "auto":
                raise UsageError(
                    f"precision {candidate} moves the embeddings of {files.name}: {moved}; use --precision fp32, "
                    "or auto"
                )
            if moved:
                refused = f"{candidate} moves its embeddings"
                log.warning("precision %s is not used for %s: %s", candidate, files.name, moved)
                held = sum(each.rows for each in rows if each.precision == candidate)
                if held:
                    log.warning("the cache holds %d rows of it; what of them is needed is computed anew", held)
                continue
        if comparison.enough or precision != "auto":
            return encoder
        refused = f"nothing is at hand to compare {candidate} with it"
        log.warning("precision %s is not used for %s: %s", candidate, files.name, refused)
    raise AssertionError("the last candidate is float32, which is not compared")


class _Rows(NamedTuple):
    """What a cache holds of a model: rows of one tower, by one encoder."""

    tower: str
    encoder: str
    precision: str
    rows: int


def _rows_of(cache: Any, files: ModelFiles) -> Iterator[_Rows]:
    storage = storage_of(cache)
    for kind, name in array_folder.list_arrays(storage):
        if kind not in TOWER_OF:
            continue
        place = Path(storage.place(f"{array_folder.array_name(kind, name)}/{METADATA}"))
        # Other models' keys are not read to see whose they are.
        described = parse_group(array_folder.read_group(storage, kind, name), place).description
        if all(described.get(part) == value for part, value in files.description.items()):
            count = len(KeyedArray.open(storage, kind, name))
            if count:
                encoder = name.rpartition("@")[0] if kind == "tokens" else name
                yield _Rows(TOWER_OF[kind], encoder, str(described.get("precision")), count)


def _candidates(precision: str, device: torch.device, rows: Sequence[_Rows]) -> list[tuple[str, str]]:
    """Return the precisions to try and why each, in this order; of several float32 is the last."""
    if precision != "auto":
        return [(precision, "as asked for")]
    fitting = precisions_for(device)
    why = "the fastest that does not move its embeddings" if len(fitting) > 1 else "nothing faster pays on this device"
    held = _held_precision(rows, fitting)
    first = [(held, "the cache holds it for this model")] if held is not None else []
    return first + [(each, why) for each in fitting if each != held]


def _held_precision(rows: Sequence[_Rows], preferred: Sequence[str]) -> str | None:
    """Return the precision in which a cache holds a model: that with images; then the preferred; then the most used."""
    held = {each.precision for each in rows}

    def rank(precision: str) -> tuple[bool, int, int]:
        own = [each for each in rows if each.precision == precision]
        place = preferred.index(precision) if precision in preferred else len(preferred)
        return any(each.tower == "image" for each in own), -place, sum(each.rows for each in own)

    return max(held, key=rank, default=None)


class _Comparison(NamedTuple):
    """What to compare by tower, and whether that vouches for all that is to be embedded."""

    samples: dict[str, Any]
    enough: bool


def _comparison(
    encoder: Encoder, rows: Sequence[_Rows], what: Sequence[str], samples: _Samples, *, only_asked: bool
) -> _Comparison:
    asked = {TOWER_OF[kind] for product in what if (kind := product.partition("@")[0]) in TOWER_OF}
    held = {each.tower for each in rows if each.encoder == encoder.id}
    # The first use decides for both towers; cached pixels are no use of either.
    due = asked - held if held or only_asked or not asked else set(TOWERS)
    found = {tower: values for tower in TOWERS if tower in due and len(values := samples.of(tower, encoder))}
    unknown = {tower for tower in (asked & due) - set(found) if samples.may_have(tower)}
    return _Comparison(found, not unknown and bool(found or held or not asked))


def moved_by(encoder: Encoder, reference: Encoder, samples: Mapping[str, Any]) -> str:
    """Compare an encoder with itself in float32; return how it differs, "" where it does not.

    Parameters
    ----------
    encoder, reference : Encoder
    samples : mapping
        "image": model inputs, (m, h, w, 3) uint8; "text": list of str.
    """
    for tower, values in samples.items():
        low, exact = (
            as_array(each.encode_pixels(values) if tower == "image" else each.encode_text(values))
            for each in (encoder, reference)
        )
        difference = difference_of(low, exact)
        if difference:
            return f"of {len(low)} {tower}s, {difference}"
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


class _Samples:
    """Up to 64 images and texts for the comparison, spread evenly over a data set and read once."""

    def __init__(self, dataset: Dataset | None, texts: Sequence[str]) -> None:
        self._dataset, self._texts = dataset, texts
        self._found: dict[str, Any] = {}

    def of(self, tower: str, encoder: Encoder) -> Any:
        """Return a tower's samples: model inputs, (m, h, w, 3) uint8, or a list of texts."""
        if tower not in self._found:
            self._found[tower] = (
                _some_texts(self._dataset, self._texts) if tower == "text" else _some_pixels(encoder, self._dataset)
            )
        return self._found[tower]

    def may_have(self, tower: str) -> bool:
        """Tell of a tower without samples whether it may have something to embed: without a data set nobody knows."""
        if self._dataset is None:
            return True
        return tower == "image" and bool((self._dataset.samples["uri"] != "").any())


def _some_pixels(encoder: Encoder, dataset: Dataset | None) -> np.ndarray:
    """Return model inputs of up to 64 images, (m, h, w, 3) uint8; those that cannot be had are left to the job."""
    found: list[np.ndarray] = []
    if dataset is None:
        return np.empty(0, np.uint8)
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


def _some_texts(dataset: Dataset | None, others: Sequence[str]) -> list[str]:
    """Return up to 64 different texts: a data set's own, else the names of its labels, else other texts."""
    if dataset is not None:
        texts = dataset.samples["text"]
        named = np.flatnonzero((texts != "").to_numpy())
        if len(named):
            return list(dict.fromkeys(texts.iloc[position] for position in named[_spread(len(named), SAMPLES)]))
    names = dataset.label_names if dataset is not None else ()
    return [text for text in dict.fromkeys(names or others) if text][:SAMPLES]


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.empty(0, int)
