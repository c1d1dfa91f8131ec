"""From Open-i's machine-coded ``MeSH/automatic`` terms to labels as torchxrayvision has them, and to the study's 14.

torchxrayvision's ``Openi_Dataset`` calls a label positive where its name in lower case, or a synonym, stands anywhere
in the report's automatic terms (Cohen et al., TorchXRayVision, MIDL 2022). That is taken over as it is, with what
follows from it: "granulomatous disease" makes Granuloma positive, a term that says where something is normal counts
too, and reports without terms are negative throughout.

Of its 18 labels 13 belong to one of the 14: Lesion, Mass and Nodule to Lung Lesion; Opacity and Infiltration to
Lung Opacity; Pleural_Thickening to Pleural Other; Effusion to Pleural Effusion; Atelectasis, Cardiomegaly, Edema,
Fracture, Pneumonia and Pneumothorax to those of their names. Calcified Granuloma, Granuloma, Emphysema, Fibrosis and
Hernia belong to none. Enlarged Cardiomediastinum, Consolidation and Support Devices have no counterpart and are
negative throughout (`WITHOUT_COUNTERPART`): do not read their agreement with other sources as one of readers. No
Finding is what has none of the others, as with the other sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.labels import NO_FINDING, STUDY_LABELS

# The 18 labels, and what stands for each in the terms.
TERMS: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("atelectasis", "atelectases"),
    "Calcified Granuloma": ("calcified granuloma",),
    "Cardiomegaly": ("cardiomegaly",),
    "Edema": ("edema",),
    "Effusion": ("effusion",),
    "Emphysema": ("emphysema",),
    "Fibrosis": ("fibrosis",),
    "Fracture": ("fracture",),
    "Granuloma": ("granuloma",),
    "Hernia": ("hernia",),
    "Infiltration": ("infiltration", "infiltrate"),
    "Lung Lesion": ("lesion",),
    "Lung Opacity": ("opacity",),
    "Mass": ("mass",),
    "Nodule": ("nodule",),
    "Pleural_Thickening": ("pleural_thickening", "pleural thickening"),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothorax",),
}
TXRV_LABELS = tuple(TERMS)
STUDY_LABEL_OF: dict[str, str] = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Fracture": "Fracture",
    "Infiltration": "Lung Opacity",
    "Lung Lesion": "Lung Lesion",
    "Lung Opacity": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}
WITHOUT_COUNTERPART = tuple(
    label for label in STUDY_LABELS if label != NO_FINDING and label not in STUDY_LABEL_OF.values()
)


def txrv_labels(terms: Sequence[str]) -> np.ndarray:
    """Return torchxrayvision's 18 labels of a report from its automatic terms, (18,) int8 in the order of `TERMS`."""
    spoken = [term.lower() for term in terms]
    return np.array([any(word in term for word in words for term in spoken) for words in TERMS.values()], dtype=np.int8)


def txrv_study_labels(terms: Sequence[str]) -> np.ndarray:
    """Return the study's 14 labels of a report from its automatic terms, (14,) int8 in the order of `STUDY_LABELS`."""
    found = {
        STUDY_LABEL_OF[name]
        for name, value in zip(TXRV_LABELS, txrv_labels(terms), strict=True)
        if value and name in STUDY_LABEL_OF
    }
    return np.array([label in (found or {NO_FINDING}) for label in STUDY_LABELS], dtype=np.int8)
