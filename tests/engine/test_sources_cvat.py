"""CVAT files: what is drawn against loops over pixels, files written by the test and read back, and broken ones."""

import math

import numpy as np
import pytest

from engine.errors import DataError, UsageError
from engine.sources.cvat import read_cvat


def write(tmp_path, shapes, image='name="a.png" width="30" height="24"', name="annotations.xml"):
    path = tmp_path / name
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f'<meta><task><name>reads</name></task></meta><image id="0" {image}>{shapes}</image></annotations>'
    )
    return path


def row_runs(mask):
    """CVAT's run lengths of a mask's tight rectangle, with the attributes that hold them."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    part = mask[top : rows.max() + 1, left : columns.max() + 1]
    runs, value = [0], False
    for pixel in part.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    told = ", ".join(map(str, runs))
    return f'rle="{told}" left="{left}" top="{top}" width="{part.shape[1]}" height="{part.shape[0]}"'


def centres(height=24, width=30):
    rows, columns = np.indices((height, width))
    return columns + 0.5, rows + 0.5


@pytest.mark.parametrize("seed", range(4))
def test_masks__come_back_as_they_were_written(tmp_path, seed):
    mask = np.random.default_rng(seed).random((24, 30)) > 0.6
    path = write(tmp_path, f'<mask label="Edema" source="manual" occluded="0" {row_runs(mask)} z_order="0"></mask>')
    np.testing.assert_array_equal(read_cvat(path).region("a.png", "Edema", 24, 30), mask)


def test_shapes__cover_the_pixels_whose_centres_lie_in_them(tmp_path):
    path = write(
        tmp_path,
        '<box label="Box" xtl="3.2" ytl="4.0" xbr="9.8" ybr="11.4"/>'
        '<polygon label="Triangle" points="2.0,3.0;20.0,5.0;8.0,19.0"/>'
        '<ellipse label="Ellipse" cx="15.0" cy="12.0" rx="9.0" ry="5.0"/>'
        '<box label="Turned" xtl="8.0" ytl="10.0" xbr="22.0" ybr="14.0" rotation="30.0"/>'
        '<points label="Point" points="4.7,5.2;10.0,6.0"/>'
        '<tag label="Whole"/>',
    )
    annotations = read_cvat(path, ids={"a.png": "a"})
    x, y = centres()

    def region(label):
        return annotations.region("a", label, 24, 30)

    np.testing.assert_array_equal(region("Box"), (x >= 3.2) & (x < 9.8) & (y >= 4) & (y < 11.4))
    corners = [(2, 3), (20, 5), (8, 19)]
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        sides.append((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0)
    np.testing.assert_array_equal(region("Triangle"), np.logical_and.reduce(sides))
    distance = ((x - 15) / 9) ** 2 + ((y - 12) / 5) ** 2
    assert not region("Ellipse")[distance > 1].any() and region("Ellipse")[distance < 0.97].all()
    # Turned by 30 degrees clockwise on the screen: back by as much, it is the box that was drawn.
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    along, across = (x - 15) * cos + (y - 12) * sin, -(x - 15) * sin + (y - 12) * cos
    np.testing.assert_array_equal(region("Turned"), (abs(along) < 7) & (abs(across) < 2))
    assert np.argwhere(region("Point")).tolist() == [[5, 4], [6, 10]]
    assert annotations.only_points("a", "Point") and not annotations.only_points("a", "Box")
    assert "Whole" not in annotations.labels


def test_annotators__are_kept_apart_and_joined(tmp_path):
    reader = '<attribute name="annotator">{}</attribute>'
    first, second = reader.format("first"), reader.format("second")
    path = write(
        tmp_path,
        f'<polygon label="Edema" points="1,1;5,1;5,5;1,5">{first}</polygon>'
        f'<box label="Edema" xtl="4" ytl="4" xbr="8" ybr="8">{second}</box>',
    )
    annotations = read_cvat(path)
    assert annotations.annotators("a.png", "Edema") == ("first", "second")
    one, two = (annotations.by_annotator(name).region("a.png", "Edema", 24, 30) for name in ("first", "second"))
    assert (one.sum(), two.sum(), (one & two).sum()) == (16, 16, 1)
    np.testing.assert_array_equal(annotations.region("a.png", "Edema", 24, 30), one | two)
    with pytest.raises(DataError, match=r"nobody is named 'third'.*first, second"):
        annotations.by_annotator("third")


BAD = {
    "polyline": ('<polyline label="Edema" points="1,1;2,2"/>', r"shape 1: a polyline is no region"),
    "two points": ('<polygon label="Edema" points="1,1;2,2"/>', r"at least 3 points, this one has 2"),
    "no label": ('<box xtl="1" ytl="1" xbr="2" ybr="2"/>', r"the box has no 'label'"),
    "no corner": ('<box label="Edema" xtl="1" ytl="1" xbr="2"/>', r"the box has no 'ybr'"),
    "a word": ('<box label="Edema" xtl="one" ytl="1" xbr="2" ybr="2"/>', r"xtl='one' is not a finite number"),
    "not a point": ('<points label="Edema" points="1;2"/>', r"'1' is not a point"),
    "not finite": ('<points label="Edema" points="1,nan"/>', r"'1,nan' is not finite"),
    "box outside": ('<box label="Edema" xtl="1" ytl="1" xbr="39" ybr="2"/>', r"reaches outside.* 30 x 24 pixels"),
    "mask outside": ('<mask label="E" rle="0,4" left="29" top="0" width="2" height="2"/>', r"reaches outside"),
    "mask too short": ('<mask label="E" rle="0,3" left="1" top="0" width="2" height="2"/>', r"cover 3 pixels of 2 x 2"),
    "mask of words": ('<mask label="E" rle="0,x" left="1" top="0" width="2" height="2"/>', r"'x' among its run"),
    "empty mask": ('<mask label="E" rle="4" left="1" top="0" width="2" height="2"/>', r"marks no pixel"),
}


@pytest.mark.parametrize("case", BAD)
def test_read_cvat__says_what_is_wrong(tmp_path, case):
    shapes, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_cvat(write(tmp_path, shapes))


def test_read_cvat__of_another_file(tmp_path):
    with pytest.raises(UsageError, match="no CVAT file"):
        read_cvat(tmp_path / "absent.xml")
    path = tmp_path / "other.xml"
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>'
    for content, message in {
        "not xml": "no XML that can be read",
        "<other/>": "begins with 'other'",
        "<annotations><track/></annotations>": "tracks of a video",
        bomb: "EntitiesForbidden",
        '<annotations><image name="a" width="1e9" height="2"/></annotations>': "sides go from 1 to",
    }.items():
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_cvat(path)
