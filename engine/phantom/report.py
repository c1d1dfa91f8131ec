"""The phantom's report and its coded terms, in the manner of Open-i's: indication, findings, impression, `MeSH/major`.

Every positive label is named in words that say where and how much, as far as the drawing shows it; what is absent is
now and then denied. Some words are "XXXX", as Open-i's de-identification left them. The words come from a stream of
random numbers of their own: a new sentence moves no pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.phantom import wording
from engine.phantom.case import LEFT, LOWER, MIDDLE, REPORT_STREAM, RIGHT, UPPER, Case, Finding, stream

# Random numbers set aside for one report.
MOST_WORDS = 80


def _side(finding: Finding) -> str:
    return "bilateral" if len(finding.sides) > 1 else "left" if finding.sides[0] == LEFT else "right"


def _zone(finding: Finding) -> str:
    """Return the place as a coder writes it; the left lung's middle is the lingula."""
    if finding.zone == UPPER:
        return "upper lobe"
    if finding.zone == LOWER:
        return "base" if len(finding.sides) > 1 else "lower lobe"
    return {RIGHT: "middle lobe", LEFT: "lingula"}[finding.sides[0]] if len(finding.sides) == 1 else "hilum"


def _where(finding: Finding, pick: _Picker) -> str:
    """Return the place as a radiologist dictates it."""
    if len(finding.sides) > 1:
        return {UPPER: "both upper lobes", MIDDLE: "both mid lungs", LOWER: "both lung bases"}[finding.zone]
    side = _side(finding)
    names = {
        UPPER: ("upper lobe", "upper lung", "upper lobe"),
        MIDDLE: ("middle lobe" if side == "right" else "lingula", "mid lung", "mid lung zone"),
        LOWER: ("lower lobe", "lung base", "base"),
    }[finding.zone]
    name = pick(names)
    return name if name == "lingula" else f"{side} {name}"


class _Picker:
    """Chooses among words; one random number a choice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._numbers = iter(rng.random(MOST_WORDS).tolist())

    def chance(self, share: float) -> bool:
        return next(self._numbers) < share

    def __call__(self, choices: Sequence[str]) -> str:
        return choices[int(next(self._numbers) * len(choices))]


def _sentence(pattern: str, finding: Finding, where: str, pick: _Picker) -> str:
    side = _side(finding)
    # As an adjective, both sides have words of their own.
    place = (
        {UPPER: "biapical", MIDDLE: "bilateral mid lung", LOWER: "bibasilar"}[finding.zone]
        if side == "bilateral"
        else where
    )
    text = pattern.format(
        side=side,
        where=where,
        place=place,
        amount=pick(wording.AMOUNT[finding.extent]),
        degree=pick(wording.DEGREE[finding.extent]),
    )
    if side == "bilateral":
        for wrong, right in wording.BOTH_SIDES:
            text = text.replace(wrong, right)
    text = text.replace("minimally enlarged", "mildly enlarged")
    return text[0].upper() + text[1:]


def _indication(case: Case, pick: _Picker) -> str:
    labels = {finding.label for finding in case.findings}
    choices: Sequence[str] = wording.INDICATIONS
    special = pick.chance(0.4)
    if special and "Fracture" in labels:
        choices = wording.TRAUMA_INDICATIONS
    elif special and "Support Devices" in labels:
        choices = wording.DEVICE_INDICATIONS
    text = pick(choices).format(who=pick(wording.PERSONS))
    return text[0].upper() + text[1:]


def write_report(case: Case) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the report and the coded terms of a case; equal for two images of one patient.

    Returns
    -------
    report : dict
        ``indication``, ``findings``, ``impression``; findings may be empty, as 530 of Open-i's 3,955 are.
    mesh : tuple of str
        ``normal``, or one term a finding.
    """
    pick = _Picker(stream(case.seed, case.patient_index, REPORT_STREAM))
    indication = _indication(case, pick)
    by_label = {finding.label: finding for finding in case.findings}
    positive: list[tuple[str, str]] = []
    for finding in case.findings:
        where = _where(finding, pick)
        sentences, phrases = wording.WORDS[finding.kind]
        positive.append(
            (_sentence(pick(sentences), finding, where, pick), _sentence(pick(phrases), finding, where, pick))
        )

    absent: list[str] = []
    if "Cardiomegaly" not in by_label and pick.chance(0.75):
        absent.append(pick(wording.NORMAL_HEART))
    if "Enlarged Cardiomediastinum" not in by_label and pick.chance(0.6):
        absent.append(pick(wording.NORMAL_MEDIASTINUM))
    lungs = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
    if not lungs & by_label.keys() and pick.chance(0.9):
        absent.append(pick(wording.NORMAL_LUNGS))
    fluid, gas = "Pleural Effusion" in by_label, "Pneumothorax" in by_label
    if not (fluid and gas) and pick.chance(0.8):
        absent.append(pick(wording.NO_PNEUMOTHORAX if fluid else wording.NO_EFFUSION if gas else wording.NO_PLEURA))
    if "Fracture" not in by_label and pick.chance(0.5):
        absent.append(pick(wording.NORMAL_BONES))

    # What is there is usually said first, sometimes last.
    said = [sentence for sentence, _ in positive]
    parts = said + absent if pick.chance(0.7) else absent + said
    if pick.chance(0.12):
        parts.append(pick(wording.COMPARISON))
    findings = " ".join(parts)
    phrases_said = [phrase for _, phrase in positive]
    if not phrases_said or all(finding.label == "Support Devices" for finding in case.findings):
        phrases_said.append(pick(wording.NORMAL_IMPRESSION))
    elif pick.chance(0.3):
        phrases_said.append(pick(wording.OTHERWISE))
    if len(phrases_said) > 1 and pick.chance(0.4):
        phrases_said = [
            f"{number}. {phrase.removeprefix('1. ')}" for number, phrase in enumerate(phrases_said, start=1)
        ]
    impression = " ".join(phrases_said)
    if pick.chance(0.1):
        findings = ""
    return {"indication": indication, "findings": findings, "impression": impression}, mesh_terms(case)


def mesh_terms(case: Case) -> tuple[str, ...]:
    """Return the case's terms as Open-i's coders would write them."""
    terms = []
    for finding in case.findings:
        amount, degree = wording.AMOUNT[finding.extent][0], wording.DEGREE[finding.extent][0]
        pattern = wording.MESH[finding.kind]
        terms.append(pattern.format(side=_side(finding), zone=_zone(finding), amount=amount, degree=degree))
    return tuple(terms) or ("normal",)
