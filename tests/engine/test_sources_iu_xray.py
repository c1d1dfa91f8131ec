"""IU-Xray in its layouts: the same samples whichever way it lies on disk."""

import json
import tarfile
import time
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from engine.errors import DataError, ImageError, UsageError
from engine.labels import STUDY_LABELS
from engine.sources import open_dataset
from engine.sources.iu_labels import read_labels
from engine.sources.iu_xray import VIEW_OF_NUMBER
from engine.sources.openi import image_id_of, kaggle_file_of, natural_order, uid_of
from engine.splits import apply_split
from tests.conftest import shared_data
from tests.engine.open_i_files import write_kaggle, write_official, write_png, write_projections

LAYOUTS = {
    "official": lambda folder: write_official(folder),
    "flat": lambda folder: write_official(folder, xml=""),
    "archive": lambda folder: write_official(folder, xml="NLMCXR_reports.tgz"),
    "kaggle": write_kaggle,
}
FRONTAL = ["CXR1_1_IM-0001-4001", "CXR2_IM-0652-1001", "CXR11_IM-0067-1001"]


def positives(dataset):
    return [[label for label, value in zip(STUDY_LABELS, row, strict=True) if value] for row in dataset.labels]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(tmp_path, layout):
    dataset = open_dataset(f"iu-xray:{LAYOUTS[layout](tmp_path)}")
    assert dataset.ids.tolist() == FRONTAL
    assert dataset.groups.tolist() == ["CXR1", "CXR2", "CXR11"]
    assert dataset.samples["text"].tolist() == ["Clear lungs. No acute disease.", "Large heart.", "Effusion."]
    assert set(dataset.samples["view"]) == {"frontal"}
    assert dataset.samples["image_present"].all()
    assert positives(dataset) == [["No Finding"], ["Cardiomegaly", "Lung Opacity"], ["Pleural Effusion"]]
    contents = [dataset.reader.read(uri) for uri in dataset.samples["uri"]]
    assert len(set(contents)) == 3 and all(content.startswith(b"\x89PNG") for content in contents)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(tmp_path, layout):
    schema = f"iu-xray:{LAYOUTS[layout](tmp_path)}"
    lateral = open_dataset(schema, view="lateral")
    assert lateral.ids.tolist() == ["CXR1_1_IM-0001-3001", "CXR11_IM-0067-2001"]
    everything = open_dataset(schema, view="all")
    texts_alone = [] if layout == "kaggle" else ["CXR10"]
    assert set(everything.ids) == {*FRONTAL, *lateral.ids, *texts_alone}
    assert list(dict.fromkeys(everything.groups)) == ["CXR1", "CXR2", *texts_alone, "CXR11"]


def test_views__are_unknown_without_a_table(tmp_path):
    schema = f"iu-xray:{write_official(tmp_path, projections=False)}"
    with pytest.raises(
        DataError, match=r"no frontal image is known; of 5 images the view of 5 is unknown. Put indiana_pr"
    ):
        open_dataset(schema)
    assert set(open_dataset(schema, view="all").samples["view"]) == {""}
    guessed = open_dataset(schema + "?guess_views=true")
    assert guessed.ids.tolist() == ["CXR2_IM-0652-1001", "CXR11_IM-0067-1001"]
    assert any("guessed" in note for note in guessed.notes)


def test_both_layouts_in_one_folder(tmp_path):
    write_official(tmp_path)
    write_kaggle(tmp_path)
    assert len(open_dataset(f"iu-xray:{tmp_path}", images="ignore")) == 4
    assert len(open_dataset(f"iu-xray:{tmp_path}", images="ignore", layout="kaggle")) == 3


def test_images__absent_ones_never_vanish_silently(tmp_path):
    folder = write_official(tmp_path)
    (folder / "CXR2_IM-0652-1001.png").unlink()
    dataset = open_dataset(f"iu-xray:{folder}")
    assert dataset.samples["image_present"].tolist() == [True, False, True]
    assert any("1 of 3 images are absent" in note for note in dataset.notes)
    with pytest.raises(ImageError, match=r"CXR2_IM-0652-1001.png: no such file"):
        dataset.reader.read(dataset.samples["uri"][1])
    required = open_dataset(f"iu-xray:{folder}", images="required")
    assert required.ids.tolist() == [FRONTAL[0], FRONTAL[2]]
    assert any("1 of 3 images are absent and were left out" in note for note in required.notes)


def test_images__when_none_is_there(tmp_path):
    folder = write_official(tmp_path, images=False)
    (folder / "NLMCXR_png.tgz").touch()
    with pytest.raises(
        DataError, match=r"not one of the 3 images is there, .*unpack NLMCXR_png.tgz, or say images=ignore"
    ):
        open_dataset(f"iu-xray:{folder}", images="required")
    assert not open_dataset(f"iu-xray:{folder}").samples["image_present"].any()
    reports = open_dataset(f"iu-xray:{folder}", images="ignore")
    assert reports.ids.tolist() == ["CXR1", "CXR2", "CXR10", "CXR11"] and set(reports.samples["uri"]) == {""}


def test_text__sections(tmp_path):
    schema = f"iu-xray:{write_official(tmp_path)}"
    assert open_dataset(schema, text="impression").samples["text"].tolist() == ["No acute disease.", "", "Effusion."]
    with pytest.raises(UsageError, match=r"text='finding' is not known; nearest: findings"):
        open_dataset(schema, text="finding+impression")


LABEL_FILES = {
    "csv by uid": ("l.csv", "uid,Edema,Fracture,{rest}\n2,1,-1,{zeros}\nCXR11,0,,{zeros}\n1,0,0,{zeros}\n"),
    "csv by image": (
        "l.csv",
        "image,edema,Fracture,{rest}\n2_IM-0652-1001.dcm.png,1,0,{zeros}\nCXR11_IM-0067-1001.png,0,0,{zeros}\n"
        "CXR1_1_IM-0001-4001,0,0,{zeros}\n",
    ),
    "json of label to number": (
        "l.json",
        {"2": {label: int(label == "Edema") for label in STUDY_LABELS}, "1": {}, "11": {}},
    ),
    "json of names": ("l.json", {"CXR2": ["Edema"], "1": [], "11": []}),
    "json of 14 numbers": (
        "l.json",
        {
            f"ecgen-radiology/{uid}.xml": [int(label == "Edema" and uid == 2) for label in sorted(STUDY_LABELS)]
            for uid in (1, 2, 11)
        },
    ),
}


def write_labels(folder, name, content):
    rest = [label for label in STUDY_LABELS[:-1] if label not in ("Edema", "Fracture")]
    if isinstance(content, str):
        content = content.replace("{rest}", ",".join(rest)).replace("{zeros}", ",".join("0" * len(rest)))
    elif name.endswith(".json"):
        blank = dict.fromkeys(STUDY_LABELS[:-1], 0)
        content = json.dumps(
            {key: blank | value if isinstance(value, dict) else value for key, value in content.items()}
        )
    (folder / name).write_text(content)
    return name


@pytest.mark.parametrize("case", LABEL_FILES)
def test_labels_files(tmp_path, case):
    folder = write_official(tmp_path)
    dataset = open_dataset(f"iu-xray:{folder}", labels=write_labels(folder, *LABEL_FILES[case]))
    assert positives(dataset) == [["No Finding"], ["Edema"], ["No Finding"]]
    assert dataset.samples["labelled"].all()


def test_labels__reports_that_the_file_does_not_know(tmp_path):
    folder = write_official(tmp_path)
    labels = write_labels(folder, "labels.json", {"2": ["Edema"]})
    dropped = open_dataset(f"iu-xray:{folder}")
    assert dropped.ids.tolist() == ["CXR2_IM-0652-1001"]
    assert any("2 samples are not in the labels file and were left out" in note for note in dropped.notes)
    kept = open_dataset(f"iu-xray:{folder}", labels=labels, unlabelled="no-finding")
    assert positives(kept) == [["No Finding"], ["Edema"], ["No Finding"]]
    assert kept.samples["labelled"].tolist() == [False, True, False]


BAD_LABELS = {
    "other reports": (
        "l.json",
        {"77": ["Edema"]},
        r"no report or image .* like 'CXR77', those of the data set like 'CXR1'",
    ),
    "unknown name": ("l.json", {"2": ["Oedema"]}, r"l.json, '2': unknown label 'Oedema'; nearest: Edema"),
    "13 numbers": ("l.json", {"2": [0] * 13}, r"give 14 numbers in alphabetical order"),
    "a word": (
        "l.csv",
        "uid,Edema,Fracture,{rest}\n2,yes,0,{zeros}\n",
        r"line 2, column 'Edema': 'yes' is not a finite",
    ),
    "a count": ("l.csv", "uid,Edema,Fracture,{rest}\n2,3,0,{zeros}\n", r"line 2, column 'Edema': 3 is no label"),
    "twice": (
        "l.csv",
        "uid,Edema,Fracture,{rest}\n2,1,0,{zeros}\nCXR2,1,0,{zeros}\n",
        r"line 3: 'CXR2' has labels more",
    ),
    "missing": ("l.csv", "uid,Edma,Fracture,{rest}\n2,1,0,{zeros}\n", r"have no column 'Edema'; nearest: Edma"),
    "no key": ("l.csv", "who,Edema,Fracture,{rest}\n2,1,0,{zeros}\n", r"have no column 'image' or .* to say whose"),
    "no json": ("l.json", "uid,Edema", r"is not JSON"),
    "a number": ("l.json", "3", r"must map reports or images"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels__say_what_is_wrong(tmp_path, case):
    folder = write_official(tmp_path)
    name, content, message = BAD_LABELS[case]
    with pytest.raises(DataError, match=message):
        open_dataset(f"iu-xray:{folder}", labels=write_labels(folder, name, content))


def test_boxes__lie_beside_or_are_named(tmp_path):
    folder = write_official(tmp_path)
    (folder / "boxes.csv").write_text(
        "image,label,x,y,width,height\n2_IM-0652-1001.dcm.png,Cardiomegaly,1,2,3,4\nCXR11_IM-0067-1001.png,Edema,1,2,3,4\n"
    )
    dataset = open_dataset(f"iu-xray:{folder}", label_map="Edema:Pleural Effusion")
    assert dataset.annotations.boxes[["sample_id", "label"]].to_numpy().tolist() == [
        ["CXR2_IM-0652-1001", "Cardiomegaly"],
        ["CXR11_IM-0067-1001", "Pleural Effusion"],
    ]
    with pytest.raises(UsageError, match="no table"):
        open_dataset(f"iu-xray:{folder}", boxes="absent.csv")


ENTITIES = '<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><eCitation><uId id="CXR3"/>&b;</eCitation>'
OUTSIDE = '<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation><uId id="CXR3"/>&a;</eCitation>'
BAD_XML = {
    "entities": (ENTITIES, r"3.xml' declares a document type or entities"),
    "a file outside": (OUTSIDE, r"3.xml' declares a document type or entities"),
    "a document type": ("<!DOCTYPE eCitation><eCitation/>", r"declares a document type"),
    "cut short": ('<eCitation><uId id="CXR3"/>', r"3.xml' is not readable XML"),
    "empty": ("", r"3.xml' is not readable XML"),
    "uid twice": ('<eCitation><uId id="CXR2"/></eCitation>', r"the uid 'CXR2' is in both .*; remove one"),
    "far too long": ("<eCitation>" + " " * (5 * 2**20) + "</eCitation>", r"longer than 4194304 bytes"),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_xml__says_what_is_wrong(tmp_path, case):
    content, message = BAD_XML[case]
    folder = write_official(tmp_path)
    (folder / "ecgen-radiology" / "3.xml").write_text(content)
    with pytest.raises(DataError, match=message):
        open_dataset(f"iu-xray:{folder}")


def test_xml__of_something_else_is_counted(tmp_path):
    folder = write_official(tmp_path)
    (folder / "settings.xml").write_text("<settings/>")
    assert "1 XML files are no Open-i reports and were left out" in open_dataset(f"iu-xray:{folder}").notes
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "settings.xml").write_text("<settings/>")
    with pytest.raises(DataError, match=r"none of the 1 XML files .* is an Open-i report"):
        open_dataset(f"iu-xray:{tmp_path}/only")


def test_archive__members_never_leave_it(tmp_path):
    folder = write_official(tmp_path / "data", xml="NLMCXR_reports.tgz")
    content = b'<eCitation><uId id="CXR5"/></eCitation>'
    with tarfile.open(folder / "NLMCXR_reports.tgz", "w:gz") as archive:
        for name in ("../../escaped.xml", "/tmp/escaped-absolutely.xml"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content.replace(b"CXR5", b"CXR5" if ".." in name else b"CXR6")))
        link = tarfile.TarInfo("ecgen-radiology/9.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert len(open_dataset(f"iu-xray:{folder}", images="ignore")) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_archive__broken(tmp_path):
    folder = write_official(tmp_path, xml="NLMCXR_reports.tgz")
    content = (folder / "NLMCXR_reports.tgz").read_bytes()
    for broken in (b"", b"not an archive", content[: len(content) // 2]):
        (folder / "NLMCXR_reports.tgz").write_bytes(broken)
        with pytest.raises(DataError, match="cannot read the archive"):
            open_dataset(f"iu-xray:{folder}")


def test_kaggle__tables_that_do_not_fit(tmp_path):
    folder = write_kaggle(tmp_path)
    projections, reports = folder / "indiana_projections.csv", folder / "indiana_reports.csv"
    projections.write_text(projections.read_text().replace("Lateral", "Oblique"))
    with pytest.raises(DataError, match=r"indiana_projections.csv line 2, column 'projection': unknown view 'oblique'"):
        open_dataset(f"iu-xray:{folder}")
    projections.write_text("uid,filename,projection\n99,99_IM-1-1.dcm.png,Frontal\n")
    with pytest.raises(DataError, match=r"no uid of 'indiana_projections.csv' is in 'indiana_reports.csv'"):
        open_dataset(f"iu-xray:{folder}")
    projections.unlink()
    with pytest.raises(DataError, match=r"lacks 'indiana_projections.csv'"):
        open_dataset(f"iu-xray:{folder}")
    write_projections(folder)
    reports.write_text(reports.read_text() + reports.read_text().splitlines()[-1] + "\n")
    with pytest.raises(DataError, match=r"line 5: the uid 'CXR11' occurs more than once"):
        open_dataset(f"iu-xray:{folder}")


def test_folders_that_are_something_else(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(f"iu-xray:{tmp_path}/absent")
    with pytest.raises(DataError, match=r"neither layout .* it is empty"):
        open_dataset(f"iu-xray:{tmp_path}")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"it holds 1 \.png files. Expected XML reports"):
        open_dataset(f"iu-xray:{tmp_path}")
    with pytest.raises(DataError, match="layout=official"):
        open_dataset(f"iu-xray:{tmp_path}", layout="official")
    with pytest.raises(UsageError, match=r"view='front' is not known; nearest: frontal"):
        open_dataset(f"iu-xray:{tmp_path}", view="front")


def test_names():
    assert [uid_of(name) for name in ("12", "CXR12", "ecgen-radiology/12.xml")] == ["CXR12"] * 3
    assert (
        image_id_of("images/12_IM-0140-1001.dcm.png") == "CXR12_IM-0140-1001" == image_id_of("CXR12_IM-0140-1001.png")
    )
    assert kaggle_file_of("CXR12_IM-0140-1001") == "12_IM-0140-1001.dcm.png"
    assert kaggle_file_of("CXR1_1_IM-0001-4001") == "1_IM-0001-4001.dcm.png"
    assert image_id_of("1_IM-0001-4001.dcm.png") == "CXR1_1_IM-0001-4001" == image_id_of("CXR1_1_IM-0001-4001")
    assert sorted(["CXR10", "CXR9", "CXR2"], key=natural_order) == ["CXR2", "CXR9", "CXR10"]


def test_all_real_reports_are_read_quickly():
    folder = shared_data("data/iu-xray-reports")
    # The processor's time, so that other work on the machine does not count.
    start = time.process_time()
    dataset = open_dataset(f"iu-xray:{folder}", view="all")
    seconds = time.process_time() - start
    reports = dataset.samples.drop_duplicates("group")
    assert len(reports) == 3955 and seconds < 10
    assert (reports["findings"] != "").sum() == 3425 and (reports["impression"] != "").sum() == 3921
    assert len(dataset) == 7470 + 104 and (dataset.samples["uri"] == "").sum() == 104
    assert dataset.samples["image_present"].sum() == 8


def test_real_reports__are_the_same_in_both_layouts_and_split_as_in_the_study():
    folder = shared_data("data/iu-xray-reports")
    official, kaggle = (open_dataset(f"iu-xray:{folder}", layout=layout) for layout in ("official", "kaggle"))
    assert len(official) == 3818
    columns = ["id", "text", "group", "view", "mesh"]
    tables = [dataset.samples[columns].sort_values("id", ignore_index=True) for dataset in (official, kaggle)]
    pd.testing.assert_frame_equal(*tables)
    for dataset in (official, kaggle):
        split = apply_split(dataset, "study").samples["split"]
        assert split.value_counts().to_dict() == {"train": 2670, "val": 575, "test": 573}


def test_real_labels__by_a_chexpert_labeller():
    path = shared_data("data/iu-xray-reports/file2label.json")
    labels, values = read_labels(path), json.loads(path.read_text())
    assert len(labels) == len(values) == 3337
    for column, label in enumerate(sorted(STUDY_LABELS)):
        given = pd.Series({uid_of(key): row[column] for key, row in values.items()}).loc[labels.index]
        if label != "No Finding":
            assert (labels[label] == given).all()
    assert ((labels["No Finding"] == 1) | (labels.iloc[:, :13].sum(axis=1) > 0)).all()


def test_guessed_views__are_right_as_often_as_the_documentation_says():
    table = pd.read_csv(shared_data("data/iu-xray-reports/indiana_projections.csv"), dtype=str)
    numbers = table["filename"].str.removesuffix(".dcm.png").str.rpartition("-")[2]
    guessed = numbers.map(VIEW_OF_NUMBER)
    assert guessed.notna().mean() == pytest.approx(0.90, abs=0.01)
    right = (guessed == table["projection"].str.lower())[guessed.notna()].mean()
    assert right == pytest.approx(0.92, abs=0.01)


def test_views__from_captions_that_are_nothing_else(tmp_path):
    image = "CXR1_IM-0001-1001"
    folder = write_official(
        tmp_path, images=False, projections=False, reports=[("CXR1", "normal", "Clear.", "", (image,))]
    )
    path = folder / "ecgen-radiology" / "1.xml"
    path.write_text(path.read_text().replace("Chest PA and lateral", "Frontal"))
    write_png(folder / f"{image}.png")
    dataset = open_dataset(f"iu-xray:{folder}", images="required")
    assert dataset.ids.tolist() == [image] and dataset.samples["view"].tolist() == ["frontal"]


def test_masks__lie_beside_boxes(tmp_path):
    folder = write_official(tmp_path)
    header = "image,label,x,y,width,height\n"
    (folder / "boxes.csv").write_text(
        header + "".join(f"{FRONTAL[1]},{label},0,0,5,5\n" for label in ("Edema", "Lung Opacity"))
    )
    mask = np.zeros((12, 10), dtype=np.uint8)
    mask[3:5, 2:9] = 255
    path = folder / "masks" / f"{FRONTAL[1]}.Lung_Opacity.png"
    path.parent.mkdir()
    Image.fromarray(mask).save(path)
    annotations = open_dataset(f"iu-xray:{folder}").annotations
    np.testing.assert_array_equal(annotations.region(FRONTAL[1], "Lung Opacity", 12, 10), mask > 0)
    assert annotations.region(FRONTAL[1], "Edema", 12, 10).sum() == 25
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the mask 'masks/CXR2_IM-0652-1001.Lung_Opacity.png'"):
        annotations.region(FRONTAL[1], "Lung Opacity", 12, 10)
