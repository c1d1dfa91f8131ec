"""The words of phantoms' reports and terms: sentences by finding and by absence, as Open-i's radiologists dictate."""

from __future__ import annotations

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

# One entry a finding's kind: sentences for the findings, phrases for the impression. {where} names side and zone (as a
# noun, {place} as an adjective), {side} the side, {amount} and {degree} how much.
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
