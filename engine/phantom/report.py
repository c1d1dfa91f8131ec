"""The phantom's report and its coded terms, in the manner of Open-i's: indication, findings, impression, `MeSH/major`.

Every positive label is named in words that say where and how much, as far as the drawing shows it; what is absent is now and
then denied. Some words are "XXXX", as Open-i's de-identification left them. The words come from a stream of random numbers
of their own: a new sentence moves no pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.phantom.case import LEFT, LOWER, MIDDLE, REPORT_STREAM, RIGHT, UPPER, Case, Finding, stream

INDICATIONS = (
    "Chest pain",
    "Chest pain.",
    "Shortness of breath",
    "Dyspnea.",
    "Cough and fever.",
    "Preoperative evaluation.",
    "Positive PPD",
    "XXXX",
    "XXXX-year-old {who} with chest pain.",
    "XXXX-year-old {who} with dyspnea.",
    "XXXX-year-old {who}, cough",
    "XXXX-year-old {who} with XXXX.",
    "{who}, pain after fall",
    "Weakness and XXXX.",
    "Evaluate for infiltrate",
    "History of smoking, short of breath.",
)
PERSONS = ("male", "female", "man", "woman", "XXXX")
DEVICE_INDICATIONS = ("Line placement.", "XXXX-year-old {who}, status post XXXX placement.", "Evaluate support devices")
TRAUMA_INDICATIONS = ("Motor vehicle collision.", "XXXX-year-old {who} with fall.", "Chest wall pain after trauma")
MOST_WORDS = 60

NORMAL_HEART = (
    "Heart size is normal.",
    "The heart is normal in size.",
    "Cardiac silhouette within normal limits.",
    "Normal heart size.",
    "The cardiac contours are normal.",
    "No cardiomegaly.",
)
NORMAL_MEDIASTINUM = (
    "The mediastinum is unremarkable.",
    "Mediastinal contours are normal.",
    "No mediastinal widening.",
    "The mediastinal silhouette is within normal limits.",
    "Aortic contour is normal.",
)
NORMAL_LUNGS = (
    "The lungs are clear.",
    "Lungs are clear bilaterally.",
    "No focal airspace disease.",
    "The lungs are well expanded and clear.",
    "No acute infiltrate.",
    "No focal consolidation.",
    "The lungs are clear without evidence of focal airspace disease.",
    "XXXX are clear.",
)
NO_PLEURA = (
    "No pleural effusion or pneumothorax.",
    "There is no pneumothorax or pleural effusion.",
    "No effusion.",
    "No pneumothorax.",
    "There are no pleural effusions.",
    "No visible pneumothorax.",
)
NO_PNEUMOTHORAX = ("No pneumothorax.", "There is no pneumothorax.", "No visible pneumothorax.")
NO_EFFUSION = ("No pleural effusion.", "There is no pleural effusion.", "No large effusions.")
NORMAL_BONES = (
    "No acute bony abnormality.",
    "Bony structures are intact.",
    "The osseous structures are unremarkable.",
    "No displaced rib fractures.",
    "No acute osseous findings.",
    "Visualized bones are within normal limits.",
)
NORMAL_IMPRESSION = (
    "No acute cardiopulmonary abnormality.",
    "No acute disease.",
    "Normal chest.",
    "No acute cardiopulmonary findings.",
    "Normal chest radiograph.",
    "No evidence of active disease.",
    "1. No acute cardiopulmonary process.",
    "Negative chest.",
)
OTHERWISE = ("No other acute abnormality.", "Otherwise no acute disease.", "Remainder of the exam is unremarkable.")
COMPARISON = (
    "Comparison with XXXX.",
    "In the interval since XXXX there is little change.",
    "Compared to XXXX, stable.",
)

# What the patterns say wrong of both sides, in the order of repair.
BOTH_SIDES = (
    ("on the bilateral", "on both sides"),
    ("the bilateral", "both"),
    ("a bilateral", "bilateral"),
    ("There is a small", "There are small"),
    ("There is a minimal", "There are minimal"),
    ("There is a mild", "There are mild"),
    ("There is a moderate", "There are moderate"),
    ("There is a large", "There are large"),
    ("There is a marked", "There are marked"),
    ("pleural effusion", "pleural effusions"),
    ("Pleural effusion", "Pleural effusions"),
    ("costophrenic angle", "costophrenic angles"),
    ("chest wall", "chest walls"),
    ("the both", "both"),
)

AMOUNT = {0: ("small", "mild", "minimal"), 1: ("moderate", "moderate-sized"), 2: ("large", "marked")}
DEGREE = {0: ("mild", "minimal"), 1: ("moderate",), 2: ("severe", "marked")}

# One entry a finding's kind: sentences for the findings, phrases for the impression. {where} names side and zone, {side}
# the side, {amount} and {degree} how much.
WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "widened": (
        (
            "The mediastinum is widened.",
            "There is widening of the superior mediastinum.",
            "Enlarged cardiomediastinal contour.",
            "Prominent mediastinal silhouette.",
        ),
        ("Enlarged cardiomediastinum.", "Widened mediastinum.", "Mediastinal widening."),
    ),
    "aorta": (
        (
            "The aortic knob is enlarged.",
            "Enlarged cardiomediastinum with a prominent aorta.",
            "There is enlargement of the thoracic aorta.",
            "Prominent aortic arch widens the mediastinum.",
        ),
        ("Enlarged cardiomediastinum.", "Prominent thoracic aorta.", "Enlarged aortic contour."),
    ),
    "enlarged": (
        (
            "The heart is enlarged.",
            "{degree} cardiomegaly.",
            "There is {degree} cardiomegaly.",
            "The cardiac silhouette is enlarged.",
            "Heart size is {degree}ly enlarged.",
        ),
        ("Cardiomegaly.", "{degree} cardiomegaly.", "Enlarged heart.", "Enlarged cardiac silhouette."),
    ),
    "hazy": (
        (
            "There is a hazy opacity in the {where}.",
            "Ill-defined lung opacity in the {where}.",
            "Hazy {place} opacity is present.",
            "Airspace opacity is seen in the {where}.",
        ),
        ("{place} opacity.", "Lung opacity in the {where}.", "Airspace opacity, {where}."),
    ),
    "nodule": (
        (
            "There is a nodule in the {where}.",
            "Well-defined pulmonary nodule in the {where}.",
            "A round nodule projects over the {where}.",
        ),
        ("{place} nodule.", "Lung lesion in the {where}.", "Pulmonary nodule, recommend CT."),
    ),
    "nodules": (
        (
            "Multiple pulmonary nodules are seen.",
            "There are several round nodules in both lungs.",
            "Scattered bilateral lung nodules.",
        ),
        ("Multiple lung nodules.", "Multiple lung lesions.", "Bilateral pulmonary nodules."),
    ),
    "mass": (
        (
            "There is a mass in the {where}.",
            "Large round mass in the {where}.",
            "A lung mass is present in the {where}.",
        ),
        ("{place} mass.", "Lung lesion, {place} mass suspicious for neoplasm.", "Lung mass."),
    ),
    "calcified": (
        (
            "Dense calcified nodule in the {where}.",
            "There is a calcified lung nodule in the {where}.",
            "Round calcified nodule, {where}.",
        ),
        ("Calcified nodule in the {where}.", "Lung lesion, calcified nodule.", "Calcified lung nodule."),
    ),
    "alveolar": (
        (
            "Bilateral perihilar airspace opacities in keeping with pulmonary edema.",
            "There is {degree} pulmonary edema.",
            "Perihilar edema with vascular congestion.",
        ),
        ("Pulmonary edema.", "{degree} pulmonary edema.", "Alveolar edema."),
    ),
    "interstitial": (
        (
            "There is interstitial edema with Kerley lines.",
            "{degree} interstitial pulmonary edema.",
            "Prominent interstitial markings and engorged vessels consistent with edema.",
        ),
        ("Interstitial edema.", "Pulmonary edema.", "{degree} interstitial pulmonary edema."),
    ),
    "lobar": (
        (
            "There is dense consolidation of the {where}.",
            "Consolidation in the {where} with air bronchograms.",
            "The {where} is consolidated.",
        ),
        ("{place} consolidation.", "Consolidation, {where}.", "Lobar consolidation."),
    ),
    "patchy": (
        (
            "Patchy infiltrate in the {where} consistent with pneumonia.",
            "Patchy {place} airspace disease, pneumonia.",
            "There is {place} pneumonia.",
            "Multifocal patchy densities in the {where} compatible with pneumonia.",
        ),
        ("{place} pneumonia.", "Pneumonia.", "Findings consistent with pneumonia."),
    ),
    "bands": (
        (
            "Bandlike {place} atelectasis.",
            "There is linear atelectasis in the {where}.",
            "Platelike atelectasis of the {where} with volume loss.",
            "Streaky opacities in the {where}, atelectasis.",
        ),
        ("{place} atelectasis.", "Atelectasis.", "Subsegmental atelectasis, {where}."),
    ),
    "rim": (
        (
            "There is a {amount} {side} pneumothorax.",
            "{side} pneumothorax with visible pleural line.",
            "{amount} pneumothorax on the {side}.",
        ),
        ("{side} pneumothorax.", "{amount} {side} pneumothorax.", "Pneumothorax."),
    ),
    "fluid": (
        (
            "There is a {amount} {side} pleural effusion.",
            "{amount} {side} pleural effusion.",
            "Blunting of the {side} costophrenic angle, pleural effusion.",
            "{side} pleural fluid is present.",
        ),
        ("{side} pleural effusion.", "{amount} {side} pleural effusion.", "Pleural effusion."),
    ),
    "thickening": (
        (
            "There is {side} pleural thickening.",
            "Pleural thickening along the {side} chest wall.",
            "{side} apical and lateral pleural scarring.",
        ),
        ("{side} pleural thickening.", "Pleural scarring.", "Pleural thickening."),
    ),
    "plaques": (
        (
            "Calcified pleural plaques on the {side}.",
            "{side} pleural plaques.",
            "There are {side} calcified pleural plaques.",
        ),
        ("Pleural plaques.", "{side} pleural plaques.", "Calcified pleural plaques."),
    ),
    "ribs": (
        (
            "There are displaced {side} rib fractures.",
            "Multiple {side} rib fractures.",
            "Acute fractures of the {side} ribs.",
        ),
        ("{side} rib fractures.", "Rib fractures.", "Multiple displaced rib fractures."),
    ),
    "healed ribs": (
        (
            "Old healed {side} rib fractures.",
            "There are {side} rib fractures with callus.",
            "Multiple healing fractures of the {side} ribs.",
        ),
        ("Healed {side} rib fractures.", "Old rib fractures.", "Rib fractures."),
    ),
    "clavicle": (
        (
            "There is a displaced {side} clavicle fracture.",
            "Fracture of the {side} clavicle.",
            "{side} clavicular fracture with displacement.",
        ),
        ("{side} clavicle fracture.", "Clavicle fracture.", "Displaced fracture of the {side} clavicle."),
    ),
    "pacemaker": (
        (
            "{side} pacemaker with leads in place.",
            "There is a {side} chest pacemaker.",
            "Cardiac pacemaker, leads intact.",
        ),
        ("Pacemaker in place.", "Support devices as described.", "{side} pacemaker."),
    ),
    "port": (
        (
            "{side} port catheter with tip in the SVC.",
            "There is a {side} chest port.",
            "{side}-sided central venous catheter XXXX.",
        ),
        ("{side} chest port.", "Central line in place.", "Support devices in place."),
    ),
    "chest tube": (
        (
            "{side} chest tube is in place.",
            "There is a {side} thoracostomy tube.",
            "A chest tube projects over the {side} hemithorax.",
        ),
        ("{side} chest tube.", "Chest tube in place.", "Support devices in place."),
    ),
    "intubation": (
        (
            "Endotracheal tube tip above the carina. Enteric tube courses below the diaphragm.",
            "There is an endotracheal tube and a nasogastric tube.",
            "ET tube and NG tube are in place.",
        ),
        ("Endotracheal tube in place.", "Support devices in place.", "Tubes in good position."),
    ),
    "sternotomy": (
        (
            "Sternotomy XXXX and mediastinal clips.",
            "Status post median sternotomy, wires intact.",
            "There are sternotomy wires and surgical clips.",
        ),
        (
            "Postsurgical changes, sternotomy wires.",
            "Median sternotomy wires.",
            "Support devices and sternotomy wires.",
        ),
    ),
    "electrodes": (
        (
            "Monitoring leads overlie the chest.",
            "ECG leads project over the thorax.",
            "There are overlying monitor electrodes and wires.",
        ),
        ("Monitoring leads in place.", "Overlying ECG leads.", "Support devices."),
    ),
}

MESH: dict[str, str] = {
    "widened": "Mediastinum/enlarged",
    "aorta": "Aorta, Thoracic/enlarged",
    "enlarged": "Cardiomegaly/{degree}",
    "hazy": "Opacity/lung/{zone}/{side}",
    "nodule": "Nodule/lung/{zone}/{side}",
    "nodules": "Nodule/lung/multiple",
    "mass": "Mass/lung/{zone}/{side}",
    "calcified": "Nodule/lung/{zone}/{side}/calcified",
    "alveolar": "Pulmonary Edema/{degree}",
    "interstitial": "Pulmonary Edema/interstitial/{degree}",
    "lobar": "Consolidation/lung/{zone}/{side}",
    "patchy": "Pneumonia/{zone}/{side}",
    "bands": "Pulmonary Atelectasis/{zone}/{side}",
    "rim": "Pneumothorax/{side}/{amount}",
    "fluid": "Pleural Effusion/{side}/{amount}",
    "thickening": "Thickening/pleura/{side}",
    "plaques": "Calcinosis/pleura/{side}",
    "ribs": "Fractures, Bone/ribs/{side}/multiple",
    "healed ribs": "Fractures, Bone/ribs/{side}/healed",
    "clavicle": "Fractures, Bone/clavicle/{side}",
    "pacemaker": "Implanted Medical Device/{side}",
    "port": "Catheters, Indwelling/{side}",
    "chest tube": "Tube, Inserted/thorax/{side}",
    "intubation": "Tube, Inserted/trachea",
    "sternotomy": "Medical Device/sternum",
    "electrodes": "Medical Device/thorax",
}


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
        side=side, where=where, place=place, amount=pick(AMOUNT[finding.extent]), degree=pick(DEGREE[finding.extent])
    )
    if side == "bilateral":
        for wrong, right in BOTH_SIDES:
            text = text.replace(wrong, right)
    text = text.replace("minimally enlarged", "mildly enlarged")
    return text[0].upper() + text[1:]


def _indication(case: Case, pick: _Picker) -> str:
    labels = {finding.label for finding in case.findings}
    choices = INDICATIONS
    special = pick.chance(0.4)
    if special and "Fracture" in labels:
        choices = TRAUMA_INDICATIONS
    elif special and "Support Devices" in labels:
        choices = DEVICE_INDICATIONS
    text = pick(choices).format(who=pick(PERSONS))
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
        sentences, phrases = WORDS[finding.kind]
        positive.append(
            (_sentence(pick(sentences), finding, where, pick), _sentence(pick(phrases), finding, where, pick))
        )

    absent: list[str] = []
    if "Cardiomegaly" not in by_label and pick.chance(0.75):
        absent.append(pick(NORMAL_HEART))
    if "Enlarged Cardiomediastinum" not in by_label and pick.chance(0.6):
        absent.append(pick(NORMAL_MEDIASTINUM))
    lungs = {"Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"}
    if not lungs & by_label.keys() and pick.chance(0.9):
        absent.append(pick(NORMAL_LUNGS))
    fluid, gas = "Pleural Effusion" in by_label, "Pneumothorax" in by_label
    if not (fluid and gas) and pick.chance(0.8):
        absent.append(pick(NO_PNEUMOTHORAX if fluid else NO_EFFUSION if gas else NO_PLEURA))
    if "Fracture" not in by_label and pick.chance(0.5):
        absent.append(pick(NORMAL_BONES))

    # What is there is usually said first, sometimes last.
    said = [sentence for sentence, _ in positive]
    parts = said + absent if pick.chance(0.7) else absent + said
    if pick.chance(0.12):
        parts.append(pick(COMPARISON))
    findings = " ".join(parts)
    phrases_said = [phrase for _, phrase in positive]
    if not phrases_said or all(finding.label == "Support Devices" for finding in case.findings):
        phrases_said.append(pick(NORMAL_IMPRESSION))
    elif pick.chance(0.3):
        phrases_said.append(pick(OTHERWISE))
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
    terms = [
        MESH[finding.kind].format(
            side=_side(finding), zone=_zone(finding), amount=AMOUNT[finding.extent][0], degree=DEGREE[finding.extent][0]
        )
        for finding in case.findings
    ]
    return tuple(terms) or ("normal",)
