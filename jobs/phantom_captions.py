"""What is said about a phantom in training: label names, short sentences made of them, and parts of its report.

In come labels and reports; out go captions, and for each caption the labels that it asserts. Bare names are kept as
they are most of the time, since they are what zero-shot prompts start from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.labels import NO_FINDING, STUDY_LABELS

SYNONYMS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": ("widened mediastinum", "enlarged cardiomediastinal silhouette"),
    "Cardiomegaly": ("enlarged heart", "enlarged cardiac silhouette"),
    "Lung Opacity": ("pulmonary opacity", "airspace opacity"),
    "Lung Lesion": ("pulmonary nodule", "lung mass", "lung nodule"),
    "Edema": ("pulmonary edema", "interstitial edema"),
    "Consolidation": ("lobar consolidation", "airspace consolidation"),
    "Pneumonia": ("pneumonia infiltrate", "infectious infiltrate"),
    "Atelectasis": ("bibasilar atelectasis", "subsegmental atelectasis"),
    "Pneumothorax": ("collapsed lung with pneumothorax", "apical pneumothorax"),
    "Pleural Effusion": ("effusion", "pleural fluid"),
    "Pleural Other": ("pleural thickening", "pleural plaque"),
    "Fracture": ("rib fracture", "bone fracture"),
    "Support Devices": ("medical devices", "tubes and lines"),
    "No Finding": ("normal chest", "no acute cardiopulmonary abnormality"),
}
TEMPLATES = (
    "{}",
    "a chest radiograph showing {}",
    "a chest x-ray showing {}",
    "chest x-ray with {}",
    "there is {}",
    "findings suggesting {}",
    "{} is present",
    "an image of {}",
)
# Kinds of caption and how often a batch has them: one label's name, all labels' names, the impression, the report.
KINDS = ("name", "names", "impression", "report")
SHARES = (0.3, 0.3, 0.3, 0.1)


def phrase(label: str, rng: np.random.Generator) -> str:
    """Return the label's name (six times in ten), or another wording."""
    if rng.random() < 0.6:
        return label.lower()
    return str(rng.choice(SYNONYMS[label]))


def name_phrases(rng: np.random.Generator) -> list[str]:
    """Return a phrase for each of the 14 labels: bare names half of the time, else worded anew in one template."""
    if rng.random() < 0.5:
        return [label.lower() for label in STUDY_LABELS]
    template = str(rng.choice(TEMPLATES))
    return [template.format(phrase(label, rng)) for label in STUDY_LABELS]


def join(phrases: Sequence[str]) -> str:
    """Join phrases as one does in writing: "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


class CaptionWriter:
    """Writes one caption an image, of one kind a batch.

    Parameters
    ----------
    rng : Generator
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def write(
        self, labels: np.ndarray, impressions: Sequence[str], reports: Sequence[str]
    ) -> tuple[list[str], np.ndarray]:
        """Return captions and the labels that each asserts.

        Parameters
        ----------
        labels : ndarray of int8, (b, 14)
        impressions, reports : sequence of str, length b

        Returns
        -------
        captions : list of str, length b
        asserted : ndarray of int8, (b, 14)
        """
        kind = str(self.rng.choice(KINDS, p=SHARES))
        texts = {"impression": impressions, "report": reports}.get(kind)
        if texts is not None and all(texts):
            return list(texts), labels.copy()
        captions, asserted = [], np.zeros_like(labels)
        template = str(self.rng.choice(TEMPLATES)) if self.rng.random() < 0.4 else "{}"
        for row, present in enumerate(labels):
            chosen = np.flatnonzero(present)
            if kind == "name" and len(chosen):
                chosen = self.rng.choice(chosen, 1)
            asserted[row, chosen] = 1
            words = [phrase(STUDY_LABELS[column], self.rng) for column in self.rng.permutation(chosen)]
            captions.append(template.format(join(words)) if words else NO_FINDING.lower())
        return captions, asserted
