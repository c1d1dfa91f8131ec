"""Layouts of public sets by their header, annotators, points, boxes over the edge, and several files at once."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from engine.errors import DataError
from engine.sources import open_dataset
from engine.sources.box_tables import read_box_table

RSNA = """patientId,x,y,width,height,Target
0004cfab,,,,,0
00436515,264.0,152.0,213.0,379.0,1
00436515,562.0,152.0,256.0,453.0,1
"""
VINDR = """image_id,rad_id,class_name,x_min,y_min,x_max,y_max
50a418,R11,No finding,,,,
9a5094,R8,Cardiomegaly,691.0,1375.0,1653.0,1831.0
9a5094,R10,Cardiomegaly,700.5,1400.0,1600.0,1800.0
"""
NIH = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,
00014716_007.png,Infiltrate,686.1016949152542,131.5433498919999,185.4915254237289,313.491525423729,,,
"""


def write(tmp_path, content, name="boxes.csv"):
    path = tmp_path / name
    path.write_text(content)
    return path


def test_rsna__is_known_by_its_header(tmp_path):
    annotations = read_box_table(write(tmp_path, RSNA))
    assert annotations.labels == ("Lung Opacity",)
    assert annotations.sample_ids() == ["00436515"]
    assert annotations.boxes_of("00436515").tolist() == [[264, 152, 213, 379], [562, 152, 256, 453]]
    assert annotations.boxes["place"].tolist() == ["boxes.csv line 3", "boxes.csv line 4"]


def test_vindr__keeps_its_radiologists_apart(tmp_path):
    annotations = read_box_table(write(tmp_path, VINDR))
    assert annotations.annotators("9a5094", "Cardiomegaly") == ("R8", "R10")
    assert annotations.by_annotator("R8").boxes_of("9a5094").tolist() == [[691, 1375, 962, 456]]
    assert annotations.by_annotator("R10").boxes_of("9a5094").tolist() == [[700.5, 1400, 899.5, 400]]
    assert annotations.sample_ids() == ["9a5094"]


def test_nih__is_known_by_its_odd_header(tmp_path):
    annotations = read_box_table(write(tmp_path, NIH))
    np.testing.assert_allclose(
        annotations.boxes_of("00013118_008.png"),
        [[225.084745762712, 547.019216763771, 86.7796610169491, 79.186440677966]],
    )
    assert annotations.labels == ("Atelectasis", "Infiltration")


BAD = {
    "a box beside target 0": (RSNA.replace("453.0,1", "453.0,0"), r"line 4, column 'Target': 0 beside a box"),
    "target 1 without a box": (RSNA.replace(",,,,,0", ",,,,,1"), r"line 2, column 'x': the cell is empty"),
    "half a box": (VINDR.replace("1831.0", ""), r"line 3, column 'y_max': the cell is empty"),
    "corners in the wrong order": (VINDR.replace("1653.0", "600.0"), r"line 3: .*width and height must be positive"),
    "a word": (NIH.replace("686.1016949152542", "wide"), r"line 3, column 'Bbox \[x': 'wide' is not a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_layouts__say_what_is_wrong(tmp_path, case):
    content, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_box_table(write(tmp_path, content))


def test_points__are_rows_without_width_and_height(tmp_path):
    annotations = read_box_table(write(tmp_path, "image,label,x,y,reader\na,Nodule,4.9,2.1,R1\na,Mass,1,1,R1\n"))
    assert np.argwhere(annotations.region("a", "Nodule", 8, 8)).tolist() == [[2, 4]]
    assert annotations.only_points("a", "Nodule")
    assert annotations.annotators("a", "Nodule") == ("R1",)


def test_boxes_over_the_edge__are_refused_or_cut_and_counted(tmp_path, caplog):
    path = write(tmp_path, "image,label,x,y,width,height\na,Edema,-3,2,10,4\na,Edema,60,2,50,4\na,Edema,1,1,2,2\n")
    sizes = {"a": (80, 100)}
    with pytest.raises(DataError, match="begins outside"):
        read_box_table(path, sizes=sizes)
    with caplog.at_level(logging.WARNING):
        annotations = read_box_table(path, sizes=sizes, outside="clip")
    assert "2 of 3 boxes reach outside their image" in caplog.text
    expected = np.zeros((80, 100), dtype=bool)
    expected[2:6, 0:7] = expected[2:6, 60:] = expected[1:3, 1:3] = True
    np.testing.assert_array_equal(annotations.region("a", "Edema", 80, 100), expected)
    wholly = write(tmp_path, "image,label,x,y,width,height\na,Edema,100,2,10,4\n", "wholly.csv")
    with pytest.raises(DataError, match=r"lies wholly outside the image, which is 100 x 80"):
        read_box_table(wholly, sizes=sizes, outside="clip")


@pytest.fixture
def table(tmp_path):
    Image.fromarray(np.zeros((24, 30), dtype=np.uint8)).save(tmp_path / "a.png")
    pd.DataFrame({"image": ["a.png"], "Edema": [1], "Mass": [1]}).to_csv(tmp_path / "labels.csv", index=False)
    return f"table:{tmp_path / 'labels.csv'}"


def test_data_sets__take_any_kind_of_file_and_several_annotators(tmp_path, table):
    write(tmp_path, "image,label,x,y,width,height\na.png,Edema,1,1,4,4\na.png,Mass,9,9,2,2\n", "first.csv")
    outline = {"image_id": 1, "category_id": 1, "segmentation": [[4, 4, 8, 4, 8, 8, 4, 8]]}
    image = {"id": 1, "file_name": "a.png", "width": 30, "height": 24}
    coco = {"images": [image], "categories": [{"id": 1, "name": "Edema"}], "annotations": [outline]}
    write(tmp_path, json.dumps(coco), "second.json")
    shape = '<polygon label="oedema" points="0,0;2,0;2,2;0,2"/>'
    xml = f'<annotations><image name="a.png" width="30" height="24">{shape}</image></annotations>'
    write(tmp_path, xml, "third.xml")
    annotations = open_dataset(
        table, boxes="first.csv,second.json,third.xml", label_map={"oedema": "Edema"}, labels=["Edema", "Mass"]
    ).annotations
    assert annotations.annotators("a.png", "Edema") == ("first.csv", "second.json", "third.xml")
    regions = [
        annotations.by_annotator(name).region("a.png", "Edema", 24, 30)
        for name in annotations.annotators("a.png", "Edema")
    ]
    assert [int(region.sum()) for region in regions] == [16, 16, 4]
    np.testing.assert_array_equal(annotations.region("a.png", "Edema", 24, 30), np.logical_or.reduce(regions))
    assert annotations.region("a.png", "Mass", 24, 30).sum() == 4


def test_data_sets__cut_boxes_where_told_to(tmp_path, table):
    write(tmp_path, "image,label,x,y,width,height\na.png,Edema,20,1,40,4\n", "first.csv")
    dataset = open_dataset(table, boxes="first.csv", labels=["Edema", "Mass"])
    with pytest.raises(DataError, match="boxes_outside=clip"):
        dataset.annotations.region("a.png", "Edema", 24, 30)
    cut = open_dataset(f"{table}?boxes_outside=clip", boxes="first.csv", labels=["Edema", "Mass"])
    assert cut.annotations.region("a.png", "Edema", 24, 30).sum() == 40
