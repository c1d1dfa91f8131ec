"""Boxes and masks: which pixels they cover, and what is said of those that cannot be right."""

import pickle

import numpy as np
import pandas as pd
import pytest

from engine.annotations import Annotations
from engine.errors import DataError, UsageError
from engine.sources.box_tables import read_box_table
from tests.conftest import shared_data


def boxes(*rows):
    return pd.DataFrame(rows, columns=["sample_id", "label", "x", "y", "width", "height"])


def brute_force_region(rows, height, width):
    """A pixel belongs to a box when its centre does."""
    region = np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            for x, y, w, h in rows:
                region[row, column] |= x <= column + 0.5 < x + w and y <= row + 0.5 < y + h
    return region


def test_region__covers_the_pixels_whose_centres_lie_in_a_box():
    rng = np.random.default_rng(3)
    for _ in range(50):
        corner, side = rng.uniform(0, 12, (3, 2)), rng.uniform(1, 8, (3, 2))
        rows = np.hstack([corner, side])
        annotations = Annotations(boxes(*(("a", "Edema", *row) for row in rows)))
        np.testing.assert_array_equal(annotations.region("a", "Edema", 20, 21), brute_force_region(rows, 20, 21))


def test_region__of_a_box_thinner_than_a_pixel_is_the_pixel_it_lies_in():
    region = Annotations(boxes(("a", "Edema", 3.6, 4.6, 0.2, 0.2))).region("a", "Edema", 10, 10)
    assert np.argwhere(region).tolist() == [[4, 3]]


def test_region__keeps_to_the_image_where_a_box_reaches_over_the_edge_by_rounding():
    region = Annotations(boxes(("a", "Edema", -0.5, 5.0, 4.0, 5.6))).region("a", "Edema", 10, 10)
    assert np.argwhere(region).min(axis=0).tolist() == [5, 0]
    assert np.argwhere(region).max(axis=0).tolist() == [9, 2]


def test_region__is_empty_where_nothing_is_annotated():
    annotations = Annotations(boxes(("a", "Edema", 1, 1, 2, 2)))
    assert not annotations.region("a", "Fracture", 5, 5).any()
    assert not annotations.region("b", "Edema", 5, 5).any()
    assert not Annotations.empty().region("b", "Edema", 5, 5).any()


def test_region__prefers_the_mask():
    mask = np.eye(5, dtype=bool)
    annotations = Annotations(boxes(("a", "Edema", 0, 0, 5, 5)), lambda _, label: mask if label == "Edema" else None)
    np.testing.assert_array_equal(annotations.region("a", "Edema", 5, 5), mask)
    with pytest.raises(DataError, match=r"mask of 'Edema' in sample 'a' is 5 x 5 pixels but its image is 6 x 7"):
        annotations.region("a", "Edema", 7, 6)


def test_queries():
    annotations = Annotations(
        boxes(("b", "Edema", 0, 0, 1, 1), ("a", "Fracture", 0, 0, 2, 1), ("b", "Edema", 3, 3, 1, 1))
    )
    assert annotations.labels == ("Edema", "Fracture")
    assert annotations.sample_ids() == ["b", "a"]
    assert annotations.sample_ids("Fracture") == ["a"]
    assert annotations.has("a", "Fracture") and not annotations.has("a", "Edema") and not annotations.has("c", "Edema")
    assert annotations.boxes_of("b").tolist() == [[0, 0, 1, 1], [3, 3, 1, 1]]
    assert annotations.boxes_of("b", "Fracture").shape == (0, 4)
    assert annotations.of_samples(["a"]).sample_ids() == ["a"]


def test_renamed__joins_labels_in_boxes_and_masks():
    masks = Masks({"Pneumonia": np.eye(4, dtype=bool), "Lung_Opacity": np.fliplr(np.eye(4, dtype=bool))})
    rows = boxes(("a", "Pneumonia", 0, 0, 1, 1), ("a", "Lung_Opacity", 1, 1, 1, 1))
    renamed = Annotations(rows, masks).renamed({"Lung_Opacity": "Pneumonia"})
    assert renamed.labels == ("Pneumonia",)
    assert len(renamed.boxes_of("a", "Pneumonia")) == 2
    assert renamed.region("a", "Pneumonia", 4, 4).sum() == 8
    pickle.loads(pickle.dumps(renamed))
    with pytest.raises(DataError, match=r"'Lung_Opacityy'.*nearest: Lung_Opacity"):
        Annotations(rows).renamed({"Lung_Opacityy": "Pneumonia"})


class Masks:
    def __init__(self, of_label):
        self.of_label = of_label

    def __call__(self, sample_id, label):
        return self.of_label.get(label)


class CountedBoxes:
    """Boxes made on demand, which counts how often."""

    def __init__(self):
        self.made = 0

    def pairs(self):
        return pd.DataFrame({"sample_id": ["a", "b"], "label": ["Edema", "Lung_Opacity"]})

    def boxes_of(self, sample_id):
        self.made += 1
        return boxes((sample_id, "Edema" if sample_id == "a" else "Lung_Opacity", 1, 2, 3, 4)).assign(
            source="", place=""
        )


def test_box_source__is_asked_only_for_what_is_needed():
    source = CountedBoxes()
    annotations = Annotations(box_source=source).renamed({"Lung_Opacity": "Pneumonia"})
    assert annotations.labels == ("Edema", "Pneumonia")
    assert annotations.has("b", "Pneumonia") and annotations.sample_ids("Edema") == ["a"]
    assert annotations.boxes_of("c").shape == (0, 4)
    assert source.made == 0
    assert annotations.boxes_of("b", "Pneumonia").tolist() == [[1, 2, 3, 4]]
    assert source.made == 1
    assert annotations.boxes["label"].tolist() == ["Edema", "Pneumonia"]


def write_boxes(tmp_path, *rows, header="image,label,x,y,width,height"):
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_read_box_table__maps_columns_and_ids(tmp_path):
    path = write_boxes(tmp_path, "p/1.png,Edema,1,2,3,4", "p/2.png,Edema,5,6,7,8", header="file,finding,x,y,w,h")
    columns = {"image": "file", "label": "finding", "width": "w", "height": "h"}
    annotations = read_box_table(path, columns, ids={"p/2.png": "two", "p/3.png": "three"})
    assert annotations.sample_ids() == ["two"]
    assert annotations.boxes.iloc[0][["x", "width", "source", "place"]].tolist() == [
        5,
        7,
        "boxes.csv",
        "boxes.csv line 3",
    ]


BAD_BOXES = {
    "no such column": (["a,Edema,1,2,3,4"], "image,finding,x,y,width,height", r"no column 'label'"),
    "misspelt column": (["a,Edema,1,2,3,4"], "image,label,x,y,widht,height", r"no column 'width'; nearest: widht"),
    "not a number": (
        ["a,Edema,1,2,three,4"],
        None,
        r"boxes.csv line 2, column 'width': 'three' is not a finite number",
    ),
    "empty cell": (["a,Edema,1,2,3,4", "a,Edema,1,,3,4"], None, r"boxes.csv line 3, column 'y': the cell is empty"),
    "no width": (["a,Edema,1,2,0,4"], None, r"boxes.csv line 2: the box .* must be positive"),
    "begins outside": (["a,Edema,-30,2,40,4"], None, r"boxes.csv line 2: .* begins outside the image"),
    "ends outside": (["a,Edema,60,2,50,4"], None, r"line 2: .*reaches outside the image, which is 100 x 80 pixels"),
    "other images": (["z,Edema,1,2,3,4"], None, r"none of the 1 annotations .* images like 'z', the data set like 'a'"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_read_box_table__says_what_is_wrong(tmp_path, case):
    rows, header, message = BAD_BOXES[case]
    path = write_boxes(tmp_path, *rows, **({"header": header} if header else {}))
    with pytest.raises(DataError, match=message):
        read_box_table(path, ids={"a": "a"}, sizes={"a": (80, 100)})


def test_read_box_table__without_a_file(tmp_path):
    write_boxes(tmp_path, "a,Edema,1,2,3,4")
    with pytest.raises(UsageError, match=r"boxen.csv.*nearest: boxes.csv"):
        read_box_table(tmp_path / "boxen.csv")


def test_region__refuses_a_box_outside_an_image_whose_size_only_shows_on_reading(tmp_path):
    annotations = read_box_table(write_boxes(tmp_path, "a,Edema,60,2,50,4"))
    with pytest.raises(
        DataError, match=r"boxes.csv line 2: the box \(x 60, y 2, width 50, height 4\) of 'Edema' in 'a'"
    ):
        annotations.region("a", "Edema", 80, 100)


def test_read_box_table__of_real_radiographs():
    path = shared_data("data/nih-cxr-subset/boxes.csv")
    annotations = read_box_table(path, sizes={})
    annotations.check_inside(dict.fromkeys(annotations.sample_ids(), (768, 768)))
    assert len(annotations.boxes) == 169 and len(annotations.sample_ids()) == 106
    joined = annotations.renamed({"Lung_Opacity": "Pneumonia"})
    assert (joined.boxes["label"] == "Pneumonia").sum() == 29 + 136


def test_renamed__joins_a_mask_of_one_name_with_the_boxes_of_another():
    mask = np.zeros((6, 6), dtype=bool)
    mask[0, 0] = True
    rows = boxes(("a", "Pneumonia", 0, 0, 1, 1), ("a", "Lung_Opacity", 3, 3, 2, 2))
    renamed = Annotations(rows, Masks({"Pneumonia": mask})).renamed({"Lung_Opacity": "Pneumonia"})
    expected = mask.copy()
    expected[3:5, 3:5] = True
    np.testing.assert_array_equal(renamed.region("a", "Pneumonia", 6, 6), expected)
