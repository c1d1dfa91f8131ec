"""Phantoms as files: the folder's own form; that `iu-xray:` reads it back equal is tested with the sources."""

import cv2
import numpy as np
import pandas as pd
import pytest
from defusedxml import ElementTree

from engine import phantom_files
from engine.errors import DataError, UsageError
from engine.phantom.case import patient_index
from engine.sources import open_dataset

SEED = next(seed for seed in range(50) if any(patient_index(seed, index) != index for index in range(8)))


@pytest.fixture(scope="module")
def phantoms():
    return open_dataset(f"phantom:10?seed={SEED}&size=64&enrich=0.15")


@pytest.fixture(scope="module")
def folder(phantoms, tmp_path_factory):
    return phantom_files.write_phantoms(phantoms, tmp_path_factory.mktemp("phantoms") / "written")


def test_reports_have_open_is_form(phantoms, folder):
    files = sorted(folder.glob("ecgen-radiology/*.xml"))
    assert len(files) == len(set(phantoms.groups)) < len(phantoms)
    images = []
    for path in files:
        tree = ElementTree.parse(path).getroot()
        assert tree.tag == "eCitation" and tree.find("uId").get("id") == f"CXR{path.stem}"
        sections = [part.get("Label") for part in tree.iterfind("MedlineCitation/Article/Abstract/AbstractText")]
        assert sections == ["COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION"]
        assert tree.findall("MeSH/major")
        images += [image.get("id") for image in tree.iterfind("parentImage")]
    assert sorted(images) == sorted(phantoms.ids)


def test_masks_are_those_of_the_phantoms(phantoms, folder):
    pairs = phantoms.annotations.pairs.drop_duplicates()
    assert len(list(folder.glob("masks/*.png"))) == len(pairs)
    for sample_id, label in pairs.to_numpy():
        stored = cv2.imread(str(folder / "masks" / f"{sample_id}.{label.replace(' ', '_')}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored, phantoms.annotations.mask_reader(sample_id, label) * 255)


def test_labels_table_names_images_and_patients(phantoms, folder):
    table = pd.read_csv(folder / "labels.csv")
    assert table["image"].tolist() == list(phantoms.ids) and table["uid"].tolist() == list(phantoms.groups)
    np.testing.assert_array_equal(table[list(phantoms.label_names)].to_numpy(), phantoms.labels)


def test_readme_says_that_nobody_was_radiographed(phantoms, folder):
    text = (folder / "README.txt").read_text()
    assert phantoms.schema in text and "not taken of patients" in text


def test_an_empty_folder_is_filled_and_progress_told(phantoms, tmp_path):
    told: list[int] = []
    phantom_files.write_phantoms(phantoms.take([0, 1]), tmp_path, told.append)
    assert told == [1, 2] and len(list(tmp_path.glob("images/*.png"))) == 2


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_place_that_is_taken_is_refused(phantoms, tmp_path, taken):
    target = tmp_path / "taken"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="taken' exists and is not an empty folder"):
        phantom_files.write_phantoms(phantoms, target)
    assert (target if taken == "file" else target / "mine.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(phantoms, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantom_files, "_write_reports", full_disk)
    with pytest.raises(DataError, match="No space left on device; nothing was left"):
        phantom_files.write_phantoms(phantoms.take([0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_phantoms_are_written(phantoms, tmp_path):
    plain = phantoms.take([0, 1])
    plain = type(plain)(**{**vars(plain), "samples": plain.samples.drop(columns="mesh")})
    with pytest.raises(UsageError, match="only phantoms can be written"):
        phantom_files.write_phantoms(plain, tmp_path / "out")
