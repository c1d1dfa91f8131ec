"""Precision: what the cache holds, what device and model allow, and what is refused because it moves the embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import precision
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import UsageError
from engine.sources import open_dataset
from tests import models
from tests.conftest import shared_data

PHANTOMS = "phantom:70?seed=5&size=64"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.biomedclip_like(tmp_path_factory.mktemp("model"))


def test_auto__keeps_what_the_cache_holds_for_this_model(tmp_path, model):
    name, phantoms = f"local-dir:{model}", open_dataset(PHANTOMS).take(np.arange(4))
    default = precision.precisions_for(torch.device("cpu"))[0]
    assert precision.load_for(name, tmp_path, device="cpu").precision == default
    Cache(tmp_path).embed(phantoms, load_encoder(name, device="cpu", precision="bf16"))
    assert precision.load_for(name, tmp_path, device="cpu").precision == "bf16"
    other = models.biomedclip_like(tmp_path / "other", seed=1)
    assert precision.load_for(f"local-dir:{other}", tmp_path, device="cpu").precision != "bf16"
    assert precision.load_for(name, tmp_path, device="cpu", precision="fp32").precision == "fp32"


def test_auto__depends_on_model_and_device_alone(tmp_path, model, monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    assert precision.load_for(f"local-dir:{model}", tmp_path, device="cpu").precision == "bf16"
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    assert precision.load_for(f"local-dir:{model}", tmp_path, device="cpu").precision == "fp32"


@pytest.mark.parametrize(
    ("sets", "seconds", "expected"),
    [(["avx512_bf16"], 0.5, True), (["avx512_bf16"], 1.6, False), (["amx_bf16"], 0.2, True), (["avx2"], 0.2, False)],
    ids=["units that gain", "units that do not", "AMX", "no units"],
)
def test_bfloat16_is_tried_where_it_has_units_and_gains(monkeypatch, sets, seconds, expected):
    """Some processors have the instructions and run them slower than float32's."""
    monkeypatch.setattr(precision, "instruction_sets", lambda: sets)
    monkeypatch.setattr(precision, "_seconds_of_product", {torch.bfloat16: seconds, torch.float32: 1.0}.get)
    assert precision.has_fast_bfloat16.__wrapped__() is expected


@pytest.mark.parametrize("what", [("image",), ("text",)])
def test_trained_phantom_clip__is_compared_at_its_first_use_only(tmp_path, monkeypatch, what):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    phantoms, compared = open_dataset(PHANTOMS), []
    real = precision.moved_by

    def counted(*arguments):
        compared.append(real(*arguments))
        return compared[-1]

    monkeypatch.setattr(precision, "moved_by", counted)
    first = precision.load_for("phantom-clip", tmp_path, device="cpu", dataset=phantoms, what=what)
    assert len(compared) == 1 and (first.precision == "bf16") == (compared[0] == "")
    Cache(tmp_path).embed(phantoms, first, what)
    assert precision.load_for("phantom-clip", tmp_path, device="cpu", dataset=phantoms).id == first.id
    assert len(compared) == 1


def test_trained_efficientnet__bfloat16_moves_its_radiographs_and_is_refused(tmp_path, monkeypatch, caplog):
    """Real weights and radiographs: random weights would hide it."""
    monkeypatch.setattr(precision, "SAMPLES", 8)  # bfloat16 is slow on most machines that run this
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    name = f"local-dir:{shared_data('models/efflite0-minilm')}"
    images = open_dataset(f"folder:{shared_data('data/nih-cxr-subset')}/images")
    chosen = precision.load_for(name, tmp_path, device="cpu", dataset=images)
    assert chosen.precision == "fp32" and "precision bf16 is not used" in caplog.text
    with pytest.raises(UsageError, match=r"precision bf16 moves the embeddings .* of 8 images, the least cosine"):
        precision.load_for(name, tmp_path, device="cpu", precision="bf16", dataset=images)
    unchecked = precision.load_for(name, tmp_path, device="cpu", precision="bf16", dataset=images, check=False)
    assert unchecked.precision == "bf16"


def test_difference__cosines_neighbours_and_ties():
    rng = np.random.default_rng(3)
    exact = rng.standard_normal((20, 8)).astype(np.float32)
    assert precision.difference_of(exact * 3, exact) == ""
    turned = exact.copy()
    turned[4] = exact[4] + 0.1 * rng.standard_normal(8)
    assert "the least cosine to float32" in precision.difference_of(turned, exact)
    # Three on a line, the middle one a little nearer to one end: a tiny step makes the other end its neighbour.
    angles = np.array([0.0, 0.0300, 0.0605, 2.0, 4.0])
    line = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    angles[1] += 0.004
    moved = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert precision.difference_of(moved, line) == ""  # the cosines differ by less than a tie
    angles = np.array([0.0, 0.30, 0.605, 2.0, 4.0])
    line = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    angles[1] += 0.02
    moved = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert "another nearest neighbour" in precision.difference_of(moved, line)
    exact[2] = np.nan
    assert "1 are not finite" in precision.difference_of(exact, exact)
