"""Folders of images."""

import os

import pytest

from engine.errors import DataError, UsageError
from engine.sources import open_dataset
from tests.conftest import shared_data
from tests.engine.open_i_files import write_png


def fill(folder, *names):
    for name in names:
        write_png(folder / name)
    return f"folder:{folder}"


def test_flat_folder(tmp_path):
    dataset = open_dataset(fill(tmp_path, "b.png", "a.PNG"))
    assert dataset.ids.tolist() == ["a.PNG", "b.png"] == dataset.groups.tolist()
    assert dataset.label_names == () and dataset.labels.shape == (2, 0)
    assert dataset.reader.read("b.png").startswith(b"\x89PNG")


def test_a_name_that_is_not_utf_8_is_an_error_that_shows_it(tmp_path):
    schema = fill(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xe4.png")
    with pytest.raises(DataError, match=r"names of 1 images are not UTF-8, first '\\udce4.png'; rename them"):
        open_dataset(schema)


def test_sub_folders_are_labels(tmp_path):
    dataset = open_dataset(fill(tmp_path, "Edema/1.png", "Fracture/deep/2.png", "loose.png"))
    assert dataset.label_names == ("Edema", "Fracture")
    assert dataset.labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert dataset.notes == ("1 images lie outside the 2 label folders and have no label",)


def test_split_folders_come_before_labels(tmp_path):
    dataset = open_dataset(fill(tmp_path, "x/train/Edema/1.png", "x/valid/Edema/2.png", "x/test/Fracture/3.png"))
    assert dict(zip(dataset.ids, dataset.samples["split"], strict=True)) == {
        "x/test/Fracture/3.png": "test",
        "x/train/Edema/1.png": "train",
        "x/valid/Edema/2.png": "val",
    }
    assert dataset.label_names == ("Edema", "Fracture")


def test_a_lone_folder_is_no_label(tmp_path):
    assert open_dataset(fill(tmp_path, "images/1.png", "images/2.png")).label_names == ()


def test_text_files_beside_images_are_their_texts(tmp_path):
    schema = fill(tmp_path, "1.png", "2.png")
    (tmp_path / "1.txt").write_text(" Clear lungs.\n")
    (tmp_path / "readme.txt").touch()
    dataset = open_dataset(schema)
    assert dataset.samples["text"].tolist() == ["Clear lungs.", ""]
    assert dataset.notes == ("1 files are no images and were left out: 1 .txt",)
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"2.txt.*save it as UTF-8"):
        open_dataset(schema)


def test_folder__holds_text_in_arrow_buffers(tmp_path):
    samples = open_dataset(fill(tmp_path, "train/Edema/1.png", "test/2.png")).samples
    assert {str(kind) for kind in samples.dtypes} == {"str"}
    assert samples["split"].tolist() == ["test", "train"]


def test_folder__without_images(tmp_path):
    with pytest.raises(DataError, match=r"no image below .*it is empty"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"it holds 1 \.csv files; images are known by suffixes"):
        open_dataset(f"folder:{tmp_path}")
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(f"folder:{tmp_path}/absent")


def test_folder__of_real_radiographs():
    dataset = open_dataset(f"folder:{shared_data('data/nih-cxr-subset')}")
    assert len(dataset) == 654 and dataset.label_names == ()
    assert dataset.notes == ("3 files are no images and were left out: 2 .csv, 1 .md",)
