"""From MeSH/major to the 14 labels."""

import numpy as np
import pytest

from engine.labels import STUDY_LABELS
from engine.sources import open_dataset
from engine.sources.mesh import is_indexed, labels_of_term, study_labels
from tests.conftest import shared_data


@pytest.mark.parametrize(
    ("term", "labels"),
    [
        ("normal", set()),
        ("No Indexing", set()),
        ("Cardiomegaly/borderline", {"Cardiomegaly"}),
        ("Cardiac Shadow/enlarged/mild", {"Cardiomegaly"}),
        ("Cardiac Shadow/irregular", set()),
        ("Aorta/tortuous", set()),
        ("Aorta/enlarged/tortuous", {"Enlarged Cardiomediastinum"}),
        ("Mediastinum/prominent/mild", {"Enlarged Cardiomediastinum"}),
        ("Mass/mediastinum/right", {"Enlarged Cardiomediastinum"}),
        ("Mass/breast/large", set()),
        ("Opacity", {"Lung Opacity"}),
        ("Opacity/ribs/anterior", set()),
        ("Opacity/lung/upper lobe/left/round", {"Lung Opacity", "Lung Lesion"}),
        ("Density/lung/middle lobe/right/round", {"Lung Opacity", "Lung Lesion"}),
        ("Nodule/lung/lower lobe/right", {"Lung Lesion"}),
        ("Calcified Granuloma/lung/left", set()),
        ("Pulmonary Edema/interstitial/mild", {"Edema"}),
        ("Pulmonary Congestion", set()),
        ("Hydropneumothorax/left/large", {"Pneumothorax", "Pleural Effusion"}),
        ("Costophrenic Angle/left/blunted", set()),
        ("Thickening/pleura/apex/bilateral", {"Pleural Other"}),
        ("Thickening/bronchovascular", set()),
        ("Cicatrix/lung/base/left", set()),
        ("Fractures, Bone/ribs/left/healed", {"Fracture"}),
        ("Deformity/ribs/right", {"Fracture"}),
        ("Deformity/thoracic vertebrae", set()),
        ("Implanted Medical Device/left", {"Support Devices"}),
        ("Implanted Medical Device/humerus/right", set()),
        ("Catheters, Indwelling/right", {"Support Devices"}),
        ("Surgical Instruments/mediastinum", set()),
        ("PULMONARY ATELECTASIS / Base", {"Atelectasis"}),
    ],
)
def test_labels_of_term(term, labels):
    assert labels_of_term(term) == labels


def test_study_labels__no_finding_where_nothing_else_is():
    assert study_labels(["Scoliosis", "Calcified Granuloma/lung"]).tolist() == [0] * 13 + [1]
    values = study_labels(["Edema", "Pneumonia/left", "Pulmonary Edema"])
    assert [STUDY_LABELS[column] for column in np.flatnonzero(values)] == ["Edema", "Pneumonia"]
    assert study_labels([])[-1] == 1
    assert is_indexed(["normal"]) and not is_indexed(["No Indexing"]) and not is_indexed([""])


def test_prevalences__are_those_that_the_documentation_holds_against_the_study_s():
    dataset = open_dataset(f"iu-xray:{shared_data('data/iu-xray-reports')}", layout="kaggle")
    counts = dict(zip(STUDY_LABELS, dataset.labels.sum(axis=0).tolist(), strict=True))
    assert counts == {
        "Enlarged Cardiomediastinum": 55,
        "Cardiomegaly": 352,
        "Lung Opacity": 548,
        "Lung Lesion": 167,
        "Edema": 48,
        "Consolidation": 28,
        "Pneumonia": 39,
        "Atelectasis": 308,
        "Pneumothorax": 28,
        "Pleural Effusion": 147,
        "Pleural Other": 58,
        "Fracture": 117,
        "Support Devices": 161,
        "No Finding": 2600,
    }
