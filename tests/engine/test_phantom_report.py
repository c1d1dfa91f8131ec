"""Reports of phantoms: what is there is said, what is denied is absent, and the coded terms mean the labels."""

import re

import numpy as np
import pytest

from engine.labels import NO_FINDING, STUDY_LABELS, SUPPORT_DEVICES
from engine.phantom import draw_case
from engine.phantom.case import KINDS
from engine.phantom.report import write_report
from engine.phantom.wording import MESH, WORDS
from engine.sources.mesh import study_labels

NAMED_BY = {
    "Enlarged Cardiomediastinum": r"mediast|aort",
    "Cardiomegaly": r"cardiomegaly|enlarged",
    "Lung Opacity": r"opacit",
    "Lung Lesion": r"nodul|mass|lesion",
    "Edema": r"edema",
    "Consolidation": r"consolidat",
    "Pneumonia": r"pneumonia",
    "Atelectasis": r"atelectasis",
    "Pneumothorax": r"pneumothorax",
    "Pleural Effusion": r"effusion",
    "Pleural Other": r"pleural",
    "Fracture": r"fracture",
}
# Words that no other finding's sentences use.
UNMISTAKABLE = ("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Fracture")
DENIED = re.compile(r"\bNo\b[^.]*\.|\bno\b[^.]*\.|without[^.]*\.")


@pytest.fixture(scope="module")
def reports():
    cases = [draw_case(31, index, 0.1) for index in range(1500)]
    return [(case, *write_report(case)) for case in cases]


def test_every_kind_has_words_and_a_term():
    kinds = {kind for names in KINDS.values() for kind in names}
    assert kinds == set(WORDS) == set(MESH)


def test_positive_labels_are_named_in_the_impression(reports):
    for case, report, _ in reports:
        said = DENIED.sub("", report["impression"]).lower()
        for finding in case.findings:
            if finding.label != SUPPORT_DEVICES:
                assert re.search(NAMED_BY[finding.label], said), (finding, report)


def test_absent_labels_are_only_named_in_denials(reports):
    for case, report, _ in reports:
        present = {finding.label for finding in case.findings}
        said = DENIED.sub("", f"{report['findings']} {report['impression']}").lower()
        for label in UNMISTAKABLE:
            if label not in present:
                assert not re.search(NAMED_BY[label], said), (label, report)


def test_terms_mean_the_labels(reports):
    for case, _, mesh in reports:
        expected = case.labels.copy()
        if expected[STUDY_LABELS.index(SUPPORT_DEVICES)]:
            # Terms of devices alone say nothing of the lungs; the labels file does.
            expected[STUDY_LABELS.index(NO_FINDING)] = 0
        np.testing.assert_array_equal(study_labels(mesh), expected, err_msg=str(mesh))


def test_wording_varies_and_is_whole(reports):
    texts = [" ".join(report.values()) for _, report, _ in reports]
    assert len(set(texts)) > 0.9 * len(texts)
    assert sum("XXXX" in text for text in texts) > 0.1 * len(texts)
    assert 0.05 < np.mean([report["findings"] == "" for _, report, _ in reports]) < 0.15
    for case, report, _ in reports:
        for section in report.values():
            assert section == section.strip() and "  " not in section
            assert not re.search(r"[{}]|the both|the bilateral|a bilateral", section), section
        assert report["impression"], case
