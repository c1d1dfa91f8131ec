"""From Open-i's hand-coded ``MeSH/major`` terms to the study's 14 labels, where no labels file is given.

A term is a path such as ``Opacity/lung/base/left/streaky``: what, where, which way. Each label has rules over the
three. They follow the meaning of the label as CheXpert's labeller defines it (Irvin et al., arXiv 1901.07031), applied
to what the coder wrote instead of to the report's sentences:

- Enlarged Cardiomediastinum: mediastinum, aorta or mediastinal lymph nodes enlarged or prominent, aneurysm, a mass or
  density there. A tortuous aorta is not.
- Cardiomegaly: cardiomegaly of any degree, borderline included; an enlarged cardiac shadow or chamber.
- Lung Opacity: opacity, airspace disease, infiltrate, density in the lung. Markings and scars (cicatrix) are not.
- Lung Lesion: nodule, mass, cavitation; a round opacity or density in the lung. Granulomas and calcinosis are not.
- Edema: pulmonary edema, heart failure. Pulmonary congestion alone is not.
- Pneumothorax, Pleural Effusion: with hydropneumothorax and haemothorax. A blunted costophrenic angle is no effusion.
- Pleural Other: thickening, scar or calcification of the pleura.
- Fracture: fractures, and deformities of ribs, clavicle or sternum, which are healed fractures; not of vertebrae.
- Support Devices: catheters, tubes, implanted and other medical devices, but not in bones or breasts; clips, stents and
  sutures are not.
- Consolidation, Pneumonia, Atelectasis: the terms of these names.
- No Finding: none of the others, whatever else was coded (a scoliosis, a granuloma).

These are another reader's labels than the study's, whose table is not public. Positive images among the 3,818 frontal
ones, here and in the study: Enlarged Cardiomediastinum 55 and 70, Cardiomegaly 352 and 415, Lung Opacity 548 and 516,
Lung Lesion 167 and 165, Edema 48 and 49, Consolidation 28 and 31, Pneumonia 39 and 68, Atelectasis 308 and 216,
Pneumothorax 28 and 20, Pleural Effusion 147 and 129, Pleural Other 58 and 56, Fracture 117 and 127, Support Devices 161
and 163, No Finding 2600 and 2400.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.labels import NO_FINDING, STUDY_LABELS

# Reports that nobody coded; their terms say nothing about findings.
NOT_INDEXED = "no indexing"

LUNG = frozenset(("lung", "retrocardiac", "costophrenic angle"))
MEDIASTINUM = frozenset(("mediastinum", "paratracheal"))
BONES = frozenset(
    ("humerus", "shoulder", "clavicle", "ribs", "cervical vertebrae", "thoracic vertebrae", "lumbar vertebrae", "spine")
)
LARGER = frozenset(("enlarged", "prominent"))


@dataclass(frozen=True)
class Rule:
    """A label is positive where a term's head is one of `heads` and its other parts fit.

    `among`: at least one of these parts (or, with `or_bare`, no part at all). `without`: none of these parts.
    """

    label: str
    heads: frozenset[str]
    among: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    or_bare: bool = False

    def fits(self, head: str, parts: frozenset[str]) -> bool:
        """Tell whether a term, taken apart and in lower case, makes the label positive."""
        if head not in self.heads or parts & self.without:
            return False
        return not self.among or bool(parts & self.among) or (self.or_bare and not parts)


def _heads(*names: str) -> frozenset[str]:
    return frozenset(names)


RULES = (
    Rule("Enlarged Cardiomediastinum", _heads("mediastinum", "aorta", "aorta, thoracic", "lymph nodes"), among=LARGER),
    Rule("Enlarged Cardiomediastinum", _heads("aortic aneurysm")),
    Rule("Enlarged Cardiomediastinum", _heads("mass", "density", "opacity"), among=MEDIASTINUM),
    Rule("Cardiomegaly", _heads("cardiomegaly")),
    Rule("Cardiomegaly", _heads("cardiac shadow", "heart ventricles", "heart atria"), among=_heads("enlarged")),
    Rule("Lung Opacity", _heads("opacity", "airspace disease", "infiltrate", "density"), among=LUNG, or_bare=True),
    Rule("Lung Lesion", _heads("nodule", "mass", "cavitation"), without=MEDIASTINUM | _heads("breast")),
    Rule("Edema", _heads("pulmonary edema", "heart failure")),
    Rule("Consolidation", _heads("consolidation")),
    Rule("Pneumonia", _heads("pneumonia")),
    Rule("Atelectasis", _heads("pulmonary atelectasis")),
    Rule("Pneumothorax", _heads("pneumothorax", "hydropneumothorax", "hemopneumothorax")),
    Rule("Pleural Effusion", _heads("pleural effusion", "hydropneumothorax", "hemothorax", "hemopneumothorax")),
    Rule("Pleural Other", _heads("thickening", "cicatrix", "calcinosis"), among=_heads("pleura")),
    Rule("Pleural Other", _heads("pleura")),
    Rule("Fracture", _heads("fractures, bone")),
    Rule("Fracture", _heads("deformity"), among=_heads("ribs", "clavicle", "sternum")),
    Rule(
        "Support Devices",
        _heads("catheters, indwelling", "tube, inserted", "implanted medical device", "medical device"),
        without=BONES | _heads("breast"),
    ),
)


@lru_cache(maxsize=8192)
def labels_of_term(term: str) -> frozenset[str]:
    """Return the labels that one ``MeSH/major`` term makes positive.

    Examples
    --------
    >>> sorted(labels_of_term("Opacity/lung/upper lobe/left/round"))
    ['Lung Lesion', 'Lung Opacity']
    """
    head, *rest = (part.strip().lower() for part in term.split("/"))
    parts = frozenset(rest)
    found = {rule.label for rule in RULES if rule.fits(head, parts)}
    if head in ("opacity", "density") and "round" in parts and parts & LUNG:
        found.add("Lung Lesion")
    return frozenset(found)


def is_indexed(terms: Sequence[str]) -> bool:
    """Tell whether somebody coded the report at all."""
    return any(term.strip() and term.strip().lower() != NOT_INDEXED for term in terms)


def study_labels(terms: Sequence[str]) -> np.ndarray:
    """Return the 14 labels of a report from its terms.

    Returns
    -------
    ndarray of int8, (14,)
        In the order of `STUDY_LABELS`; No Finding where no other is positive.
    """
    found = frozenset().union(*(labels_of_term(term) for term in terms))
    return np.array([label in (found or (NO_FINDING,)) for label in STUDY_LABELS], dtype=np.int8)
