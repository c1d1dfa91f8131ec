"""How often labels stand together: a table of label sets whose marginals are the study's prevalences.

Every set of up to four findings, with and without devices, gets a weight from each label's odds and from how much two
findings attract one another; raking (iterative proportional fitting) then moves the weights until each label has its
share. A phantom's labels are one draw from that table, so prevalence is right by construction and `enrich` is nothing
but other target shares.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np

from engine.errors import UsageError
from engine.labels import NO_FINDING, STUDY_LABELS, SUPPORT_DEVICES

# Positives among the study's 3,818 frontal images (arXiv 2506.14136).
STUDY_IMAGES = 3818
STUDY_COUNTS: dict[str, int] = {
    "Enlarged Cardiomediastinum": 70,
    "Cardiomegaly": 415,
    "Lung Opacity": 516,
    "Lung Lesion": 165,
    "Edema": 49,
    "Consolidation": 31,
    "Pneumonia": 68,
    "Atelectasis": 216,
    "Pneumothorax": 20,
    "Pleural Effusion": 129,
    "Pleural Other": 56,
    "Fracture": 127,
    SUPPORT_DEVICES: 163,
    NO_FINDING: 2400,
}
MOST_FINDINGS = 4
MOST_ENRICHMENT = 0.2

# How many times likelier two labels are together than by chance, from what causes what in the clinic.
ATTRACTION: dict[tuple[str, str], float] = {
    ("Edema", "Cardiomegaly"): 6.0,
    ("Edema", "Pleural Effusion"): 6.0,
    ("Edema", "Lung Opacity"): 3.0,
    ("Edema", SUPPORT_DEVICES): 3.0,
    ("Cardiomegaly", "Pleural Effusion"): 2.0,
    ("Cardiomegaly", SUPPORT_DEVICES): 2.0,
    ("Cardiomegaly", "Enlarged Cardiomediastinum"): 1.5,
    ("Pneumonia", "Lung Opacity"): 8.0,
    ("Pneumonia", "Consolidation"): 6.0,
    ("Pneumonia", "Pleural Effusion"): 2.0,
    ("Consolidation", "Lung Opacity"): 6.0,
    ("Consolidation", "Pleural Effusion"): 2.0,
    ("Atelectasis", "Pleural Effusion"): 3.0,
    ("Atelectasis", "Lung Opacity"): 1.3,
    ("Lung Lesion", "Lung Opacity"): 1.3,
    ("Pneumothorax", "Fracture"): 3.0,
    ("Pneumothorax", SUPPORT_DEVICES): 4.0,
    ("Pleural Effusion", SUPPORT_DEVICES): 2.0,
    ("Pleural Other", "Pleural Effusion"): 2.0,
    ("Pleural Other", "Fracture"): 2.0,
}


def _target_shares(enrich: float) -> np.ndarray:
    """Return the wanted share of each label, (14,) float64; nan where it follows from the others."""
    shares = np.array([STUDY_COUNTS[label] / STUDY_IMAGES for label in STUDY_LABELS])
    if enrich <= 0:
        return shares
    raised = np.maximum(shares, enrich)
    # With rarer labels raised, No Finding gives way by itself: it is what is left.
    raised[STUDY_LABELS.index(NO_FINDING)] = np.nan
    return raised


@lru_cache(maxsize=16)
def label_table(enrich: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return all label sets and their cumulative probability.

    Parameters
    ----------
    enrich : float
        Least share of each label, 0 (the study's own prevalences) to 0.2. No Finding takes what is left.

    Returns
    -------
    sets : ndarray of int8, (k, 14)
    cumulative : ndarray of float64, (k,), ending at 1
    """
    if not 0.0 <= enrich <= MOST_ENRICHMENT:
        raise UsageError(
            f"enrich={enrich!r} is not a share between 0 and {MOST_ENRICHMENT}; 0.1 makes no label rarer than 10 %"
        )
    position = {label: column for column, label in enumerate(STUDY_LABELS)}
    devices, nothing = position[SUPPORT_DEVICES], position[NO_FINDING]
    findings = [column for column in range(len(STUDY_LABELS)) if column not in (devices, nothing)]
    rows = []
    for count in range(MOST_FINDINGS + 1):
        for chosen in combinations(findings, count):
            for with_devices in (0, 1):
                row = np.zeros(len(STUDY_LABELS), np.int8)
                row[list(chosen)] = 1
                row[devices] = with_devices
                row[nothing] = not chosen
                rows.append(row)
    sets = np.array(rows)
    positive = sets.astype(bool)
    shares = _target_shares(enrich)
    weights = np.ones(len(sets))
    for column in [*findings, devices]:
        weights[positive[:, column]] *= shares[column] / (1.0 - shares[column])
    for (one, other), factor in ATTRACTION.items():
        weights[positive[:, position[one]] & positive[:, position[other]]] *= factor
    weights /= weights.sum()
    for _ in range(200):
        for column, share in enumerate(shares):
            if share == share:
                has = positive[:, column]
                now = weights[has].sum()
                weights[has] *= share / now
                weights[~has] *= (1.0 - share) / (1.0 - now)
    cumulative = np.cumsum(weights)
    return sets, cumulative / cumulative[-1]


def draw_labels(uniform: float, enrich: float = 0.0) -> np.ndarray:
    """Return the labels, (14,) int8, that a number in [0, 1) picks from the table."""
    sets, cumulative = label_table(enrich)
    return sets[min(int(np.searchsorted(cumulative, uniform, side="right")), len(sets) - 1)].copy()
