"""The study's 14 labels in its own order, and the domains it groups them by.

Source: Sadman, Zulkernine, Kwan, "Interpreting Biomedical VLMs on High-Imbalance Out-of-Distributions" (arXiv
2506.14136). The order matters: where one label an image is needed, the first positive one wins.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

STUDY_LABELS: tuple[str, ...] = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    SUPPORT_DEVICES,
    NO_FINDING,
)

DOMAINS: dict[str, tuple[str, ...]] = {
    "Cardiovascular": ("Enlarged Cardiomediastinum", "Cardiomegaly"),
    "Skeletal": ("Fracture",),
    "Device": (SUPPORT_DEVICES,),
    "Pulmonary": (
        "Lung Opacity",
        "Lung Lesion",
        "Edema",
        "Consolidation",
        "Pneumonia",
        "Atelectasis",
        "Pneumothorax",
        "Pleural Effusion",
        "Pleural Other",
    ),
}


def nothing_label(label_names: Sequence[str]) -> str | None:
    """Return the label that says that there is no finding, however it is spelled; None where there is none."""
    return next((name for name in label_names if name.replace("_", " ").lower() == NO_FINDING.lower()), None)
