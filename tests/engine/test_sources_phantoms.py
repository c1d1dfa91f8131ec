"""Phantoms as a data set: drawn on demand, and the same as when drawn directly."""

import pickle

import numpy as np
import pytest

from engine.errors import ImageError, UsageError
from engine.labels import NO_FINDING, STUDY_LABELS
from engine.phantom import draw_phantom
from engine.sources import open_dataset
from engine.sources.phantoms import index_of, sample_id_of
from engine.splits import apply_split, check_split

SCHEMA = "phantom:40?seed=3&size=64&enrich=0.1"


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(SCHEMA)


def test_samples_are_those_that_are_drawn(dataset):
    carried = pickle.loads(pickle.dumps(dataset.reader))
    for row in range(6):
        phantom = draw_phantom(3, row, 64, 0.1)
        sample = dataset.samples.iloc[row]
        np.testing.assert_array_equal(carried.read(sample["uri"]), phantom.pixels)
        np.testing.assert_array_equal(dataset.labels[row], phantom.labels)
        assert sample["text"] == f"{phantom.report['findings']} {phantom.report['impression']}".strip()
        assert (sample["group"], sample["view"]) == (phantom.patient, "frontal")
        assert index_of(sample["id"]) == row


def test_annotations_are_those_that_are_drawn(dataset):
    annotations = dataset.annotations
    assert len(annotations.pairs) == (dataset.labels.sum() - dataset.labels[:, STUDY_LABELS.index(NO_FINDING)].sum())
    for sample_id, label in annotations.pairs.to_numpy()[:6]:
        phantom = draw_phantom(3, index_of(sample_id), 64, 0.1)
        np.testing.assert_array_equal(annotations.region(sample_id, label, 64, 64), phantom.masks[label])
        assert annotations.boxes_of(sample_id, label).tolist() == [list(box) for box in phantom.boxes[label]]
    assert pickle.loads(pickle.dumps(annotations)).labels == annotations.labels
    annotations.check_inside(dict.fromkeys(annotations.sample_ids(), (64, 64)))


def test_opening_draws_nothing(monkeypatch):
    monkeypatch.setattr("engine.sources.phantoms.draw_phantom", lambda *_: pytest.fail("drew a phantom"))
    dataset = open_dataset("phantom:50?seed=3&size=64")
    assert len(dataset.annotations.labels) > 0 and dataset.annotations.has(*dataset.annotations.pairs.iloc[0])


def test_fingerprints_tell_every_change(dataset):
    others = [
        open_dataset(f"phantom:1?{options}") for options in ("seed=3&size=128", "seed=4&size=64", "seed=3&size=64")
    ]
    prints = [other.reader.fingerprint(other.samples["uri"][0]) for other in [dataset, *others]]
    assert len(set(prints)) == 4
    assert dataset.reader.fingerprint(dataset.samples["uri"][1]) != prints[0]
    assert open_dataset(SCHEMA).reader.fingerprint(dataset.samples["uri"][0]) == prints[0]
    with pytest.raises(ImageError, match="is no phantom of this data set, whose uris are like 'phantom:seed=3"):
        dataset.reader.read(others[0].samples["uri"][0])


def test_a_longer_data_set_begins_with_the_shorter_one(dataset):
    longer = open_dataset("phantom:50?seed=3&size=64&enrich=0.1")
    assert longer.ids[:40].tolist() == dataset.ids.tolist() and longer.name != dataset.name
    assert longer.samples["uri"][:40].tolist() == dataset.samples["uri"].tolist()


def test_patients_are_groups():
    dataset = open_dataset("phantom:400?seed=1&size=64")
    assert 360 < len(set(dataset.groups)) < 400
    split = apply_split(dataset, "grouped", seed=1)
    check_split(split.groups, split.samples["split"])


def test_ids():
    assert index_of(sample_id_of("CXR13", 12345)) == 12345
    with pytest.raises(UsageError, match="is not the id of a phantom"):
        index_of("CXR2_IM-0652-2001")
