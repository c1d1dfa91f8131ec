"""A linear head: one weight vector and bias a label, on embeddings of one encoder; kept as a plain NumPy archive.

In come weights from any trainer (`analysis.probes`, fine-tuning); out go logits, probabilities, and a file that opens
without pickle and refuses what does not fit. A head remembers whether it was trained on normalised embeddings and on
which encoder, because on any other its numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from analysis.vectors import normalise_rows
from engine.errors import DataError, ModelError, UsageError

FORMAT = "fluoroscope linear head"
FORMAT_VERSION = 1
# Probes without weights on the embedding, see `analysis.probes.stored`.
STORED_FORMAT = "fluoroscope probe"
_ARRAYS = ("format", "format_version", "weight", "bias", "label_names", "normalised", "encoder_id", "provenance")


@dataclass(frozen=True)
class LinearHead:
    """Logits = embeddings @ weight.T + bias.

    Parameters
    ----------
    weight : ndarray of float64, (L, d)
    bias : ndarray of float64, (L,)
    label_names : tuple of str, length L
    normalised : bool
        Whether embeddings are brought to length 1 before the product.
    encoder_id : str
        The encoder whose embeddings it was trained on; "" if unknown.
    provenance : mapping
        How it came about (recipe, C, seed, counts of positives ...), values that JSON can hold.
    """

    weight: np.ndarray
    bias: np.ndarray
    label_names: tuple[str, ...]
    normalised: bool
    encoder_id: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weight, bias = np.asarray(self.weight, dtype=np.float64), np.asarray(self.bias, dtype=np.float64)
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(self.label_names) != len(weight):
            raise ModelError(
                f"a linear head needs weight (labels, dimensions), bias (labels,) and as many names; got "
                f"{weight.shape}, {bias.shape} and {len(self.label_names)} names"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ModelError("a linear head's weight and bias must be finite; its training has diverged")
        if len(set(self.label_names)) != len(self.label_names):
            raise ModelError(f"a linear head's label names must differ, got {', '.join(self.label_names)}")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "label_names", tuple(self.label_names))

    @property
    def dimensions(self) -> int:
        """Length d of the embeddings it takes."""
        return self.weight.shape[1]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits (n, L) float64 of un-normalised embeddings (n, d), normalised here where the head wants it."""
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.dimensions:
            raise DataError(
                f"the head takes embeddings (samples, {self.dimensions}), got {values.shape}; it belongs to encoder "
                f"{self.encoder_id or 'unknown'!r}"
            )
        return (normalise_rows(values) if self.normalised else values) @ self.weight.T + self.bias

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the sigmoid of the logits, (n, L) float64."""
        return expit(self.logits(features))

    def of_label(self, label: str) -> tuple[np.ndarray, float]:
        """Return weight (d,) and bias of one label, the target of a heatmap; UsageError for an unknown label."""
        if label not in self.label_names:
            raise UsageError(f"the head has no label {label!r}; it knows {', '.join(self.label_names)}")
        row = self.label_names.index(label)
        return self.weight[row], float(self.bias[row])

    def check_encoder(self, encoder_id: str) -> None:
        """Raise ModelError where the head was trained on another encoder than `encoder_id`."""
        check_encoder("the head", self.encoder_id, encoder_id)

    def save(self, path: str | Path) -> Path:
        """Write the head as one .npz file, replaced whole so that a reader never sees half of it; return its path."""
        return write_archive(
            Path(path),
            {
                "format": np.array(FORMAT),
                "format_version": np.array(FORMAT_VERSION),
                "weight": self.weight,
                "bias": self.bias,
                "label_names": np.array(self.label_names, dtype=np.str_),
                "normalised": np.array(self.normalised),
                "encoder_id": np.array(self.encoder_id, dtype=np.str_),
                "provenance": np.array(json.dumps(dict(self.provenance), sort_keys=True), dtype=np.str_),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> LinearHead:
        """Read a head that `save` wrote; ModelError names the file where it is absent or damaged."""
        source = Path(path)
        if not source.is_file():
            raise ModelError(f"no head at {source}; train one with `fluoro probe`")
        if source.suffix == ".joblib":
            raise ModelError(_no_weights(source, "a pickled probe of an older version"))
        try:
            with np.load(source, allow_pickle=False) as archive:
                missing = [name for name in _ARRAYS if name not in archive]
                found = {name: archive[name] for name in _ARRAYS if name not in missing}
                other = str(archive["kind"]) if str(found.get("format", "")) == STORED_FORMAT else ""
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ModelError(f"{source} cannot be read as a linear head: {unreadable(error)}") from error
        if other:
            raise ModelError(_no_weights(source, f"a probe of the kind {other!r}"))
        if missing:
            raise ModelError(f"{source} is not a linear head of fluoroscope: it lacks {', '.join(missing)}")
        if str(found["format"]) != FORMAT:
            raise ModelError(f"{source} says it is {str(found['format'])!r}, not a {FORMAT!r}")
        if int(found["format_version"]) > FORMAT_VERSION:
            raise ModelError(
                f"{source} was written by a newer fluoroscope (head format {int(found['format_version'])}, this one "
                f"reads up to {FORMAT_VERSION}); install the newer version"
            )
        try:
            return cls(
                weight=found["weight"],
                bias=found["bias"],
                label_names=tuple(str(name) for name in found["label_names"]),
                normalised=bool(found["normalised"]),
                encoder_id=str(found["encoder_id"]),
                provenance=json.loads(str(found["provenance"])),
            )
        except (ModelError, TypeError, ValueError) as error:
            raise ModelError(f"{source} is damaged: {error}") from error


def write_archive(target: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays as one .npz file, replaced whole; return its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with open(partial, "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    os.replace(partial, target)
    return target


def check_encoder(what: str, trained_on: str, encoder_id: str) -> None:
    """Raise ModelError where something was trained on another encoder than `encoder_id`; "" is not known."""
    if trained_on and trained_on != encoder_id:
        raise ModelError(
            f"{what} was trained on embeddings of {trained_on!r}, not of {encoder_id!r}; load that encoder or train a "
            "head for this one"
        )


def _no_weights(source: Path, what: str) -> str:
    return (
        f"{source} holds {what}, which has no weights on the embedding for heatmaps, search or a study to use; train "
        "one of --kind logistic, text-prior, ridge or nearest-mean"
    )


def unreadable(error: Exception) -> str:
    """Return why a file is no archive of arrays, without NumPy's advice to unpickle what may come from anywhere."""
    return "it is no .npz of plain arrays" if "pickle" in str(error) else str(error)
