"""Labels of IU-Xray by each source, and the columns that carry them all."""

from __future__ import annotations

import tarfile
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from engine.errors import DataError, UsageError
from engine.labels import STUDY_LABELS
from engine.sources import open_dataset
from engine.sources.label_sources import label_sources, source_column
from engine.sources.mesh import study_labels
from engine.sources.txrv import TXRV_LABELS, WITHOUT_COUNTERPART, txrv_labels, txrv_study_labels
from tests.conftest import shared_data
from tests.engine.open_i_files import write_kaggle, write_official, write_png


def test_sources__are_chosen_and_all_carried(tmp_path):
    folder = write_official(tmp_path)
    for path in folder.rglob("2.xml"):
        path.write_text(path.read_text().replace("</MeSH>", "<automatic>Infiltrates</automatic></MeSH>"))
    (folder / "labels.json").write_text('{"1": [], "2": ["Edema", "Fracture"]}')
    expected = {
        "file": [["No Finding"], ["Edema", "Fracture"]],
        "mesh": [["No Finding"], ["Cardiomegaly", "Lung Opacity"], ["Pleural Effusion"]],
        "torchxrayvision": [["No Finding"], ["Lung Opacity"], ["No Finding"]],
    }
    for name, positives in expected.items():
        dataset = open_dataset(f"iu-xray:{folder}", label_source=name)
        found = [[label for label, value in zip(STUDY_LABELS, row, strict=True) if value] for row in dataset.labels]
        assert found == positives
        sources = label_sources(dataset)
        assert list(sources) == ["file", "mesh", "torchxrayvision"]
        np.testing.assert_array_equal(sources[name].values, dataset.labels)
        count = len(dataset)
        assert sources["file"].known.tolist() == [True, True, False][:count]
    names = {open_dataset(f"iu-xray:{folder}", label_source=name).name for name in (*expected, "auto")}
    assert len(names) == 4
    assert (
        open_dataset(f"iu-xray:{folder}").labels.tolist()
        == open_dataset(f"iu-xray:{folder}", label_source="file").labels.tolist()
    )


def test_sources__that_are_not_there_are_named(tmp_path):
    kaggle = write_kaggle(tmp_path / "kaggle")
    with pytest.raises(DataError, match=r"label_source=torchxrayvision is not there; the Kaggle tables"):
        open_dataset(f"iu-xray:{kaggle}", label_source="torchxrayvision")
    with pytest.raises(DataError, match="label_source=file is not there; name one"):
        open_dataset(f"iu-xray:{kaggle}", label_source="file")
    with pytest.raises(UsageError, match="label_source"):
        open_dataset(f"iu-xray:{kaggle}", label_source="mash")
    assert list(label_sources(open_dataset(f"iu-xray:{kaggle}"))) == ["mesh"]


def test_columns__of_a_table_are_sources_too(tmp_path):
    table = tmp_path / "t.csv"
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name)
    table.write_text("image,Edema,No Finding,labels_from_second\na.png,1,0,Edema\nb.png,0,1,\n")
    dataset = open_dataset(f"table:{table}", labels=["Edema", "No Finding"])
    source = label_sources(dataset)["second"]
    assert source.values.tolist() == [[1, 0], [0, 1]] and source.known.tolist() == [True, False]
    table.write_text("image,Edema,labels_from_second\na.png,1,Edmea\n")
    with pytest.raises(DataError, match=r"sample 'a.png'.*unknown label 'Edmea'"):
        label_sources(open_dataset(f"table:{table}", labels=["Edema"]))
    with pytest.raises(DataError, match="sample 1 has no label"):
        source_column(np.array([[1], [0]]), np.array([True, True]), ["Edema"])


def test_torchxrayvision__is_its_substring_match_on_all_real_reports():
    terms: list[list[str]] = []
    with tarfile.open(shared_data("data/iu-xray-reports/NLMCXR_reports.tgz")) as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                tree = ElementTree.parse(archive.extractfile(member))
                terms.append([node.text for node in tree.getroot().findall(".//MeSH/automatic") if node.text])
    # As its Openi_Dataset does it: names and synonyms looked for in the joined terms.
    joined = pd.Series(["|".join(np.unique([term.lower() for term in each])) for each in terms])
    names = ["Atelectasis", "Calcified Granuloma", "Cardiomegaly", "Edema", "Effusion", "Emphysema", "Fibrosis",
             "Fracture", "Granuloma", "Hernia", "Infiltration", "Lesion", "Mass", "Nodule", "Opacity",
             "Pleural_Thickening", "Pneumonia", "Pneumothorax"]  # fmt: skip
    also = {"Pleural_Thickening": "pleural thickening", "Infiltration": "infiltrate", "Atelectasis": "atelectases"}
    expected = {}
    for name in names:
        mask = joined.str.contains(name.lower())
        if name in also:
            mask |= joined.str.contains(also[name])
        expected[{"Lesion": "Lung Lesion", "Opacity": "Lung Opacity"}.get(name, name)] = mask.to_numpy()
    found = np.array([txrv_labels(each) for each in terms])
    assert sorted(TXRV_LABELS) == sorted(expected) and len(TXRV_LABELS) == 18
    for place, name in enumerate(TXRV_LABELS):
        np.testing.assert_array_equal(found[:, place], expected[name], err_msg=name)
    ours = np.array([txrv_study_labels(each) for each in terms])
    lesion = expected["Lung Lesion"] | expected["Mass"] | expected["Nodule"]
    np.testing.assert_array_equal(ours[:, STUDY_LABELS.index("Lung Lesion")], lesion)
    assert (ours.sum(axis=1) > 0).all() and not ours[
        :, [STUDY_LABELS.index(name) for name in WITHOUT_COUNTERPART]
    ].any()


def test_terms__of_one_report_under_both_mappings():
    assert STUDY_LABELS[int(np.argmax(study_labels(["Pleural Effusion/left"])))] == "Pleural Effusion"
    assert txrv_study_labels(["Pleural Thickening", "Masses"]).sum() == 2
    assert txrv_study_labels([]).tolist() == [0] * 13 + [1]
