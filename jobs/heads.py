"""Trained heads that a verb is given: a file, or the run of `fluoro probe` that left one, checked against the encoder.

Comes in: a path and the loaded encoder. Goes out: a `LinearHead`, in the order of a data set's labels where they are
asked for. A head remembers by a hash which split it was trained in, so that a study can say whether that was its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from analysis.heads import LinearHead
from analysis.probes.stored import StoredProbe
from engine.encoder import Encoder
from engine.errors import DataError, ModelError, UsageError
from engine.tables import offer

HEAD_FILE = "probe.npz"
SPLIT = "split_digest"
Trained = TypeVar("Trained", LinearHead, StoredProbe)


def open_head(path: Path, encoder: Encoder) -> LinearHead:
    """Return a saved head, or that of a run folder.

    Raises
    ------
    UsageError
        A folder that is no run of `fluoro probe`.
    ModelError
        No such file, one that is damaged, a probe without weights on the embedding, or a head of another encoder.
    """
    file = path / HEAD_FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UsageError(f"{str(path)!r} is no run of fluoro probe with a head: it has no file {file.name!r}")
    return checked(LinearHead.load(file), encoder, file)


def checked(head: LinearHead, encoder: Encoder, file: Path) -> LinearHead:
    """Return a head, or raise ModelError where it was not trained on this encoder's embeddings."""
    head.check_encoder(encoder.id)
    if head.dimensions != encoder.dim:
        raise ModelError(
            f"the head {file} takes embeddings of {head.dimensions} numbers, those of {encoder.id} have {encoder.dim}; "
            "it was trained for another encoder"
        )
    return head


def weights_of(head: LinearHead, label: str, file: Path) -> np.ndarray:
    """Return a label's weights (d,); UsageError where the head has no such label, or never learnt it."""
    if label not in head.label_names:
        raise UsageError(f"the head {str(file)!r} has no label {label!r}; {offer(label, head.label_names)}")
    weight = head.of_label(label)[0]
    if not weight.any():
        raise UsageError(f"the head {str(file)!r} has only zeros for {label!r}: it had one value in training")
    return weight


def for_labels(head: LinearHead, names: Sequence[str], file: Path) -> LinearHead:
    """Return a head's rows of some labels, in their order; DataError naming those that it does not know."""
    lacking = [name for name in names if name not in head.label_names]
    if lacking:
        raise DataError(
            f"the head {str(file)!r} does not know {', '.join(lacking)}; it knows {', '.join(head.label_names)}. Name "
            "those labels for the data set, or train a head for these"
        )
    rows = [head.label_names.index(name) for name in names]
    return dataclasses.replace(head, weight=head.weight[rows], bias=head.bias[rows], label_names=tuple(names))


def trained_in(head: Trained, split_digest: str, **more: Any) -> Trained:
    """Return a head or probe that remembers in which split it was trained, and what else it is told."""
    return dataclasses.replace(head, provenance={**head.provenance, SPLIT: split_digest, **more})


def origin_sentence(head: LinearHead, file: Path, split_digest: str) -> str:
    """Say whether a head that was trained before may have seen the test samples of a split."""
    known = head.provenance.get(SPLIT)
    if known == split_digest:
        return f"The probe is the head {file.name}, trained before on the training samples of this very split."
    where = "does not say on which samples" if known is None else "comes from another split or another data set"
    return (
        f"The probe is the head {file.name}, trained before; it {where}. Where test samples of this study were among "
        "its training samples, the probe's figures are too good."
    )
