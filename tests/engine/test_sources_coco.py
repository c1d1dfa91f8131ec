"""COCO files, held against pycocotools' own encoding and matplotlib's point-in-polygon test."""

import json
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from engine.errors import DataError, UsageError
from engine.sources.coco import read_coco
from engine.sources.segments import decode_counts, polygon_mask

# pycocotools 2.0: mask.encode of this array.
ENCODED = "021O0010O141MNO011OO01011NO0021OOO00023"
MASK = np.array(
    [
        [1, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 0, 1, 0, 1, 0, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 0, 1],
        [1, 1, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 1, 0, 1, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
    ],
    dtype=bool,
)


def plain_counts(mask):
    """Run lengths in column order, starting with the zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes])).tolist()


def write(tmp_path, annotations, **changes):
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 9, "height": 7}],
        "categories": [{"id": 1, "name": "Edema"}, {"id": 2, "name": "Fracture"}],
        "annotations": annotations,
        **changes,
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_polygon_mask__agrees_with_a_point_in_polygon_test(seed):
    points = np.random.default_rng(seed).uniform(-2, 32, (3 + seed, 2))
    columns, rows = np.meshgrid(np.arange(31) + 0.5, np.arange(29) + 0.5)
    centres = np.column_stack([columns.ravel(), rows.ravel()])
    inside = np.zeros(len(centres), dtype=bool)
    # matplotlib fills self-crossing outlines by winding number; triangles leave no doubt, and parity joins them.
    for first, second in pairwise(points[1:]):
        inside ^= Outline(np.array([points[0], first, second, points[0]]), closed=True).contains_points(centres)
    np.testing.assert_array_equal(polygon_mask(points, 29, 31), inside.reshape(29, 31))


def test_polygon_mask__of_a_rectangle_is_its_area():
    mask = polygon_mask(np.array([[2, 3], [12, 3], [12, 9], [2, 9]]), 20, 20)
    assert mask.sum() == 60 and mask[3:9, 2:12].all()


def test_masks__run_lengths_plain_and_compressed(tmp_path):
    for counts in (ENCODED, plain_counts(MASK)):
        segment = {"size": [7, 9], "counts": counts}
        path = write(tmp_path, [{"id": 1, "image_id": 7, "category_id": 1, "segmentation": segment}])
        annotations = read_coco(path)
        np.testing.assert_array_equal(annotations.region("a.png", "Edema", 7, 9), MASK)
        assert annotations.boxes_of("a.png").tolist() == [[0, 0, 9, 7]]
    assert decode_counts(ENCODED) == plain_counts(MASK)


def test_masks__are_the_union_of_all_of_a_label(tmp_path):
    square = [[1, 1, 3, 1, 3, 3, 1, 3]]
    path = write(
        tmp_path,
        [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2], "segmentation": square},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [5, 2, 2, 3]},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 4.2, 4]},
        ],
    )
    annotations = read_coco(path, ids={"a.png": "sample-a"})
    expected = np.zeros((7, 9), dtype=bool)
    expected[1:3, 1:3] = expected[2:5, 5:7] = True
    np.testing.assert_array_equal(annotations.region("sample-a", "Edema", 7, 9), expected)
    assert annotations.mask_reader("sample-a", "Fracture") is None
    assert annotations.region("sample-a", "Fracture", 7, 9).sum() == 16


BAD = {
    "unknown category": ([{"image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1]}], r"annotation 0: category_id 5"),
    "unknown image": ([{"id": 4, "image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}], r"annotation 4: image_id 8"),
    "nothing": ([{"id": 4, "image_id": 7, "category_id": 1}], r"neither a bbox nor a segmentation"),
    "three numbers": ([{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1]}], r"not four numbers"),
    "outside": ([{"image_id": 7, "category_id": 1, "bbox": [5, 0, 9, 1]}], r"annotation 0: .*outside.* 9 x 7 pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_read_coco__says_what_is_wrong(tmp_path, case):
    annotations, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_coco(write(tmp_path, annotations))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([[1, 1, 2, 2]], "at least 3 points"),
        ({"size": [7, 9], "counts": [10, 20]}, "cover 30 pixels of 9 x 7"),
        ({"size": [7, 9], "counts": "02o"}, "readable size and counts"),
    ],
)
def test_masks__say_what_is_wrong_when_read(tmp_path, segment, message):
    path = write(tmp_path, [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": segment}])
    with pytest.raises(DataError, match=message):
        read_coco(path).region("a.png", "Edema", 7, 9)


def test_read_coco__of_another_file(tmp_path):
    with pytest.raises(UsageError, match="no COCO file"):
        read_coco(tmp_path / "absent.json")
    other = tmp_path / "other.json"
    for content in ("{}", "[]", "not json", '{"images": [{}], "categories": [], "annotations": []}'):
        other.write_text(content)
        with pytest.raises(DataError, match="is not COCO JSON"):
            read_coco(other)
