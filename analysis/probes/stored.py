"""Probes that are no weights on the embedding, kept as a plain NumPy archive: neighbours, Tip-Adapter, networks.

In comes a fitted probe; out go logits, probabilities, and a file that opens without pickle, so that one from elsewhere
can be read without running what it brings. `load_probe` opens either kind of file that `fluoro probe` writes; a linear
one is an `analysis.heads.LinearHead`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from analysis.heads import STORED_FORMAT, LinearHead, check_encoder, unreadable, write_archive
from analysis.probes.base import Probe, is_simple
from analysis.probes.candidates import prepared
from analysis.probes.neighbours import NeighbourProbe, TipAdapterProbe
from analysis.probes.trained import AttentionPoolingProbe, MLPProbe
from engine.errors import DataError, ModelError

FORMAT_VERSION = 1
_ARRAY = "array."
_NEEDED = (
    "format",
    "format_version",
    "kind",
    "label_names",
    "normalised",
    "encoder_id",
    "features",
    "settings",
    "provenance",
)
CLASSES: Mapping[str, type[Probe]] = {
    "neighbours": NeighbourProbe,
    "tip-adapter": TipAdapterProbe,
    "mlp": MLPProbe,
    "attention": AttentionPoolingProbe,
}


@dataclass(frozen=True)
class StoredProbe:
    """A fitted probe with the names of its labels and the encoder that it belongs to.

    Parameters
    ----------
    probe : Probe
        Fitted.
    kind : str
        Of `CLASSES`.
    label_names : tuple of str, length L
    normalised : bool
        Whether embeddings are brought to length 1 first.
    encoder_id : str
        The encoder whose embeddings or tokens it was trained on; "" if unknown.
    provenance : mapping
        How it came about, values that JSON can hold; of the kind "attention" also ``layer``, whose tokens it takes.
    """

    probe: Probe
    kind: str
    label_names: tuple[str, ...]
    normalised: bool
    encoder_id: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return logits (n, L) float64 of un-normalised embeddings (n, d), or of tokens (n, t, width)."""
        values = np.asarray(features)
        takes = self.probe.n_features_in_
        if values.ndim != (3 if self.kind == "attention" else 2) or values.shape[-1] != takes:
            what = "tokens (samples, tokens" if self.kind == "attention" else "embeddings (samples"
            raise DataError(
                f"the {self.kind} probe takes {what}, {takes}), got {values.shape}; it belongs to encoder "
                f"{self.encoder_id or 'unknown'!r}"
            )
        if self.kind != "attention":
            values = prepared(values.astype(np.float64), "unit" if self.normalised else "raw")
        return self.probe.decision_function(values).reshape(len(values), -1)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the sigmoid of the logits, (n, L) float64."""
        return expit(self.logits(features))

    def check_encoder(self, encoder_id: str) -> None:
        """Raise ModelError where the probe was trained on another encoder than `encoder_id`."""
        check_encoder(f"the {self.kind} probe", self.encoder_id, encoder_id)

    def save(self, path: str | Path) -> Path:
        """Write the probe as one .npz file, replaced whole; return its path."""
        settings = {name: value for name, value in self.probe.get_params().items() if is_simple(value)}
        texts = {
            "format": STORED_FORMAT,
            "kind": self.kind,
            "encoder_id": self.encoder_id,
            "settings": json.dumps(settings, sort_keys=True),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }
        arrays: dict[str, Any] = {name: np.array(text, dtype=np.str_) for name, text in texts.items()}
        arrays |= {_ARRAY + name: values for name, values in self.probe.fitted_arrays().items()}
        arrays |= {
            "format_version": np.array(FORMAT_VERSION),
            "label_names": np.array(self.label_names, dtype=np.str_),
            "normalised": np.array(self.normalised),
            "features": np.array(self.probe.n_features_in_),
        }
        return write_archive(Path(path), arrays)

    @classmethod
    def load(cls, path: str | Path) -> StoredProbe:
        """Read a probe that `save` wrote; ModelError names the file where it is absent or damaged."""
        source = Path(path)
        return cls._of(_archive(source), source)

    @classmethod
    def _of(cls, found: Mapping[str, np.ndarray], source: Path) -> StoredProbe:
        """Return the probe that an archive holds."""
        if str(found.get("format")) != STORED_FORMAT:
            raise ModelError(f"{source} says it is {str(found.get('format'))!r}, not a {STORED_FORMAT!r}")
        missing = [name for name in _NEEDED if name not in found]
        if missing:
            raise ModelError(f"{source} is damaged: it lacks {', '.join(missing)}")
        if int(found["format_version"]) > FORMAT_VERSION:
            raise ModelError(f"{source} was written by a newer fluoroscope; install the newer version")
        kind, names = str(found["kind"]), tuple(str(name) for name in found["label_names"])
        if kind not in CLASSES:
            raise ModelError(f"{source} holds a probe of the unknown kind {kind!r}; known: {', '.join(CLASSES)}")
        arrays = {name.removeprefix(_ARRAY): values for name, values in found.items() if name.startswith(_ARRAY)}
        try:
            settings = json.loads(str(found["settings"]))
            if "device" in settings:
                settings["device"] = None  # where it was trained need not be here
            probe = CLASSES[kind](**settings).take_arrays(arrays, len(names), int(found["features"]))
            provenance = json.loads(str(found["provenance"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{source} is damaged: {error}") from error
        return cls(probe, kind, names, bool(found["normalised"]), str(found["encoder_id"]), provenance)


def load_probe(path: str | Path) -> LinearHead | StoredProbe:
    """Read the ``probe.npz`` of any kind that `fluoro probe` left; ModelError where it is absent or damaged."""
    source = Path(path)
    if source.suffix != ".joblib" and source.is_file():
        found = _archive(source)
        if str(found.get("format")) == STORED_FORMAT:
            return StoredProbe._of(found, source)
    return LinearHead.load(source)


def _archive(source: Path) -> dict[str, np.ndarray]:
    if not source.is_file():
        raise ModelError(f"no probe at {source}; train one with `fluoro probe`")
    try:
        with np.load(source, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{source} cannot be read as a probe: {unreadable(error)}") from error
