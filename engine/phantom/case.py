"""What a phantom is before it is drawn: patient, labels, and where each finding lies.

All of it is known without a pixel, so that a table of thousands opens at once. Images 2k and 2k+1 share a patient now
and then (the study has 129 images more than patients): then labels, findings, anatomy and report are the same, and only
the acquisition differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import UsageError
from engine.labels import NO_FINDING, STUDY_LABELS
from engine.phantom.cooccurrence import draw_labels

SHARED_PATIENT = 0.07
# Streams of random numbers: a change of wording must not move a pixel, and two images of a patient share three of them.
CASE_STREAM, REPORT_STREAM, ANATOMY_STREAM, ACQUISITION_STREAM, PAIR_STREAM = range(5)

LEFT, RIGHT = 1, -1
UPPER, MIDDLE, LOWER = 0, 1, 2
SMALL, MODERATE, LARGE = 0, 1, 2

KINDS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": ("widened", "aorta"),
    "Cardiomegaly": ("enlarged",),
    "Lung Opacity": ("hazy",),
    "Lung Lesion": ("nodule", "nodules", "mass", "calcified"),
    "Edema": ("alveolar", "interstitial"),
    "Consolidation": ("lobar",),
    "Pneumonia": ("patchy",),
    "Atelectasis": ("bands",),
    "Pneumothorax": ("rim",),
    "Pleural Effusion": ("fluid",),
    "Pleural Other": ("thickening", "plaques"),
    "Fracture": ("ribs", "healed ribs", "clavicle"),
    "Support Devices": ("pacemaker", "port", "chest tube", "intubation", "sternotomy", "electrodes"),
}
# Share of cases with the finding on both sides.
BILATERAL: dict[str, float] = {
    "Lung Opacity": 0.2,
    "Pneumonia": 0.15,
    "Atelectasis": 0.3,
    "Pleural Effusion": 0.35,
    "Pleural Other": 0.3,
    "Edema": 1.0,
    "Cardiomegaly": 1.0,
    "Enlarged Cardiomediastinum": 1.0,
}
# Likelihood of the upper, middle and lower zone.
ZONES: dict[str, tuple[float, float, float]] = {
    "Lung Opacity": (0.25, 0.3, 0.45),
    "Lung Lesion": (0.4, 0.3, 0.3),
    "Consolidation": (0.35, 0.25, 0.4),
    "Pneumonia": (0.2, 0.35, 0.45),
    "Atelectasis": (0.05, 0.25, 0.7),
    "Fracture": (0.25, 0.5, 0.25),
}


@dataclass(frozen=True)
class Finding:
    """One label's place and form: `sides` holds LEFT and/or RIGHT of the patient, `zone` and `extent` run 0 to 2."""

    label: str
    kind: str
    sides: tuple[int, ...]
    zone: int
    extent: int


@dataclass(frozen=True)
class Case:
    """A phantom without its pixels.

    Parameters
    ----------
    seed, index : int
    patient : str
        ``CXR<n>``, as the uids of Open-i; n - 1 is the index of the patient's first image.
    patient_index : int
        Index of the patient's first image.
    view, projection : str
        Always ``Frontal``; ``PA`` or ``AP``.
    labels : ndarray of int8, (14,)
    findings : tuple of Finding
        One for each positive label but No Finding, in the order of the labels.
    """

    seed: int
    index: int
    patient: str
    patient_index: int
    view: str
    projection: str
    labels: np.ndarray
    findings: tuple[Finding, ...]


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Return the generator of random numbers of one image (or patient) for one purpose."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, purpose])))


def patient_index(seed: int, index: int) -> int:
    """Return the index of the first image of the patient whom image `index` shows, without a look at any other."""
    if index % 2 == 0:
        return index
    return index - 1 if stream(seed, index // 2, PAIR_STREAM).random() < SHARED_PATIENT else index


def _place(rng: np.random.Generator, label: str) -> Finding:
    """Draw where and how a finding shows; always the same count of random numbers, so that labels do not interfere."""
    kind_at, both_at, side_at, zone_at, extent_at = rng.random(5)
    kinds = KINDS[label]
    kind = kinds[int(kind_at * len(kinds))]
    sides = (RIGHT, LEFT) if both_at < BILATERAL.get(label, 0.0) else (RIGHT if side_at < 0.5 else LEFT,)
    upper, middle, _ = ZONES.get(label, (1 / 3, 1 / 3, 1 / 3))
    zone = UPPER if zone_at < upper else MIDDLE if zone_at < upper + middle else LOWER
    return Finding(label, kind, sides, zone, int(extent_at * 3))


def draw_case(seed: int, index: int, enrich: float = 0.0) -> Case:
    """Return patient, labels and findings of phantom `index` of `seed`.

    Raises
    ------
    UsageError
        If seed or index is negative, or enrich out of range.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"phantom seed={seed}, index={index}: both must be 0 or more")
    first = patient_index(seed, index)
    rng = stream(seed, first, CASE_STREAM)
    labels = draw_labels(rng.random(), enrich)
    projection = "AP" if rng.random() < 0.2 else "PA"
    present = [STUDY_LABELS[column] for column in np.flatnonzero(labels)]
    findings = tuple(_place(rng, label) for label in present if label != NO_FINDING)
    return Case(seed, index, f"CXR{first + 1}", first, "Frontal", projection, labels, findings)
