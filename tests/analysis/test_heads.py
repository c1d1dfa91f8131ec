"""Linear heads: numbers against the formula, and files that come back equal or are refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy.special import expit

from analysis.heads import LinearHead
from engine.errors import DataError, ModelError, UsageError


def a_head(**changes) -> LinearHead:
    generator = np.random.default_rng(0)
    values = {
        "weight": generator.normal(size=(3, 8)),
        "bias": generator.normal(size=3),
        "label_names": ("Edema", "Übergang", "No Finding"),
        "normalised": True,
        "encoder_id": "tiny-fp32-0123456789ab",
        "provenance": {"recipe": "sound", "C": 10.0, "positives": [3, 4, 5]},
    }
    return LinearHead(**(values | changes))


@pytest.mark.parametrize("normalised", [True, False])
def test_logits__follow_the_formula(normalised):
    head = a_head(normalised=normalised)
    features = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float16) * 4
    values = features.astype(float)
    if normalised:
        values = values / np.sqrt((values**2).sum(axis=1, keepdims=True))
    expected = np.einsum("nd,ld->nl", values, head.weight) + head.bias
    np.testing.assert_allclose(head.logits(features), expected, rtol=1e-12)
    np.testing.assert_allclose(head.probabilities(features), expit(expected), rtol=1e-12)
    weight, bias = head.of_label("Übergang")
    np.testing.assert_allclose(values @ weight + bias, expected[:, 1], rtol=1e-12)


def test_save_and_load__give_the_same_head(tmp_path):
    head = a_head()
    path = head.save(tmp_path / "new" / "head.npz")
    assert [file.name for file in path.parent.iterdir()] == ["head.npz"]
    again = LinearHead.load(path)
    np.testing.assert_array_equal(again.weight, head.weight)
    np.testing.assert_array_equal(again.bias, head.bias)
    for name in ("label_names", "normalised", "encoder_id", "provenance"):
        assert getattr(again, name) == getattr(head, name), name
    assert path.read_bytes() == head.save(tmp_path / "head.npz").read_bytes()


def test_check_encoder__refuses_another_one():
    a_head().check_encoder("tiny-fp32-0123456789ab")
    a_head(encoder_id="").check_encoder("anything")
    with pytest.raises(ModelError, match=r"tiny-fp32-0123456789ab.*not of 'other'"):
        a_head().check_encoder("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(2)}, r"\(3, 8\), \(2,\) and 3 names"),
        ({"weight": np.zeros(8)}, "needs weight"),
        ({"label_names": ("a", "b")}, "2 names"),
        ({"label_names": ("a", "b", "a")}, "must differ"),
        ({"bias": np.array([0, np.nan, 0])}, "finite"),
    ],
)
def test_head__refuses_parts_that_do_not_fit(change, message):
    with pytest.raises(ModelError, match=message):
        a_head(**change)


def archive_of(head: LinearHead, path, **changes):
    head.save(path)
    with np.load(path) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def write_truncated(path):
    a_head().save(path)
    path.write_bytes(path.read_bytes()[:300])


def write_pickle(path):
    archive_of(a_head(), path, label_names=np.array(["a", "b", object()], dtype=object))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no head at"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"not an archive"), "cannot be read"),
        (lambda path: path.write_bytes(pickle.dumps({"weight": 1})), "cannot be read"),
        (write_truncated, "cannot be read"),
        (write_pickle, "cannot be read"),
        (lambda path: np.savez(path, weight=np.zeros(3)), r"not a linear head of fluoroscope: it lacks format"),
        (lambda path: archive_of(a_head(), path, bias=None), "lacks bias"),
        (lambda path: archive_of(a_head(), path, format=np.array("a tower")), "says it is 'a tower'"),
        (lambda path: archive_of(a_head(), path, format_version=np.array(9)), r"newer fluoroscope \(head format 9"),
        (lambda path: archive_of(a_head(), path, bias=np.zeros(5)), r"damaged: .*\(5,\)"),
        (lambda path: archive_of(a_head(), path, provenance=np.array("{")), "damaged"),
        (lambda path: archive_of(a_head(), path, weight=np.array([["x"] * 8] * 3)), "damaged"),
    ],
)
def test_load__refuses_other_files_and_names_them(tmp_path, write, message):
    path = tmp_path / "head.npz"
    write(path)
    with pytest.raises(ModelError, match=message) as caught:
        LinearHead.load(path)
    assert str(path) in str(caught.value)


def test_wrong_use__is_refused_with_what_would_be_right():
    with pytest.raises(DataError, match=r"embeddings \(samples, 8\), got \(5, 9\).*tiny"):
        a_head().logits(np.ones((5, 9)))
    with pytest.raises(UsageError, match=r"no label 'Fracture'; it knows Edema"):
        a_head().of_label("Fracture")
