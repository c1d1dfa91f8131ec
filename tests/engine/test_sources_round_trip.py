"""Phantoms written to disk in Open-i's form come back equal through `iu-xray:`."""

import io

import numpy as np
import pytest
from PIL import Image

from engine.sources import open_dataset

phantom_files = pytest.importorskip("engine.phantom_files", reason="needs the writer of phantoms")


def test_written_phantoms_are_read_back_equal(tmp_path):
    drawn = open_dataset("phantom:24?seed=5&size=64&enrich=0.1")
    phantom_files.write_phantoms(drawn, tmp_path / "written")
    read = open_dataset(f"iu-xray:{tmp_path}/written", images="required")
    assert len(read) == len(drawn)
    for column in ("id", "text", "group", "view", "indication", "findings", "impression", "mesh"):
        assert read.samples[column].tolist() == drawn.samples[column].tolist(), column
    assert read.label_names == drawn.label_names
    np.testing.assert_array_equal(read.labels, drawn.labels)
    for ours, theirs in zip(drawn.samples["uri"], read.samples["uri"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(read.reader.read(theirs))))
        np.testing.assert_array_equal(pixels, drawn.reader.read(ours))
    assert set(read.annotations.labels) == set(drawn.annotations.labels)
    for sample_id, label in drawn.annotations.pairs.drop_duplicates().to_numpy():
        ours, theirs = (np.sort(source.annotations.boxes_of(sample_id, label), axis=0) for source in (drawn, read))
        np.testing.assert_array_equal(theirs, ours)
        ours, theirs = (source.annotations.region(sample_id, label, 64, 64) for source in (drawn, read))
        np.testing.assert_array_equal(theirs, ours)
    assert len(read.annotations.boxes) == len(drawn.annotations.boxes)
