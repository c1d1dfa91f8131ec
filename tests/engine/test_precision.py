"""Precision: what the cache holds, what device and model allow, and what is refused because it moves the embeddings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

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
    assert precision.load_for(name, tmp_path, device="cpu", dataset=phantoms).precision == default
    Cache(tmp_path).embed(phantoms, load_encoder(name, device="cpu", precision="bf16"))
    kept = precision.load_for(name, tmp_path, device="cpu")
    assert kept.precision == "bf16" and kept.precision_reason == "the cache holds it for this model"
    other = models.biomedclip_like(tmp_path / "other", seed=1)
    assert precision.load_for(f"local-dir:{other}", tmp_path, device="cpu").precision != "bf16"
    assert precision.load_for(name, tmp_path, device="cpu", precision="fp32").precision == "fp32"


def test_auto__of_several_in_the_cache_it_keeps_the_one_with_images(tmp_path, model, monkeypatch):
    name, phantoms = f"local-dir:{model}", open_dataset(PHANTOMS).take(np.arange(4))
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    low, full = (load_encoder(name, device="cpu", precision=each) for each in ("bf16", "fp32"))
    Cache(tmp_path).embed(phantoms, low, ("text",))
    assert precision.load_for(name, tmp_path, device="cpu", what=("text",)).precision == "bf16"
    Cache(tmp_path).embed(phantoms, full, ("tokens@-1",))
    for what in ("image", "text"):
        assert precision.load_for(name, tmp_path, device="cpu", dataset=phantoms, what=(what,)).precision == "fp32"
    Cache(tmp_path).embed(phantoms, low)
    assert precision.load_for(name, tmp_path, device="cpu", dataset=phantoms).precision == "bf16"


def test_auto__depends_on_model_and_device_alone(tmp_path, model, monkeypatch):
    phantoms = open_dataset(PHANTOMS).take(np.arange(4))
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda fast=fast: fast)
        assert precision.load_for(f"local-dir:{model}", tmp_path, device="cpu", dataset=phantoms).precision == expected


@pytest.mark.parametrize(
    ("vendor", "sets", "expected"),
    [
        ("GenuineIntel", ["avx512_bf16", "amx_bf16"], True),
        ("GenuineIntel", ["avx512_bf16"], False),
        ("AuthenticAMD", ["avx2", "avx512_bf16"], True),
        ("AuthenticAMD", ["avx2", "avx512f"], False),
        ("", ["asimd", "bf16"], False),
        ("", [], False),
    ],
    ids=["AMX", "Intel without AMX", "Zen 4", "Zen 3 and older", "Arm", "nobody knows"],
)
def test_bfloat16_is_tried_where_maker_and_instructions_say_that_it_gains(monkeypatch, vendor, sets, expected):
    """Nothing is timed: the answer, and with it the encoder's id, must be the same on a busy machine."""
    monkeypatch.setattr(precision, "instruction_sets", lambda: sets)
    monkeypatch.setattr(precision, "processor_vendor", lambda: vendor)
    assert precision.has_fast_bfloat16() is expected


@pytest.fixture
def compared(monkeypatch):
    """The towers that were compared so far, one set a comparison, on a processor that is said to be fast in bf16."""
    real, towers = precision.moved_by, []

    def counted(encoder, reference, samples):
        towers.append(set(samples))
        return real(encoder, reference, samples)

    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "moved_by", counted)
    return towers


def nearest(values: torch.Tensor) -> list[int]:
    similar = torch.nn.functional.normalize(values.double(), dim=1)
    similar = similar @ similar.T
    return similar.fill_diagonal_(-2).argmax(dim=1).tolist()


@pytest.fixture(scope="module")
def phantoms():
    return open_dataset(PHANTOMS)


def test_trained_phantom_clip__images_move_in_bfloat16_and_texts_do_not(phantoms):
    """What the tests below rest on, found without the code that they test."""
    low, full = (load_encoder("phantom-clip", device="cpu", precision=each) for each in ("bf16", "fp32"))
    seen = np.stack([low.preprocess(Image.fromarray(phantoms.reader.read(uri)))[0] for uri in phantoms.samples["uri"]])
    assert nearest(low.encode_pixels(seen)) != nearest(full.encode_pixels(seen))
    texts = list(dict.fromkeys(phantoms.samples["text"]))
    cosines = torch.cosine_similarity(low.encode_text(texts), full.encode_text(texts))
    assert cosines.min() > 0.9999


@pytest.mark.parametrize("first", ["image", "text"])
def test_trained_phantom_clip__the_first_use_decides_for_both_towers(tmp_path, phantoms, compared, caplog, first):
    cache, then = Cache(tmp_path), "text" if first == "image" else "image"
    encoder = precision.load_for("phantom-clip", tmp_path, device="cpu", dataset=phantoms, what=(first,))
    assert encoder.precision == "fp32" and encoder.precision_reason == "bf16 moves its embeddings"
    assert compared == [{"image", "text"}] and "precision bf16 is not used for phantom-clip: of 64 image" in caplog.text
    cache.embed(phantoms, encoder, (first,))
    for what in (then, first):
        assert (
            precision.load_for("phantom-clip", tmp_path, device="cpu", dataset=phantoms, what=(what,)).id == encoder.id
        )
    assert len(compared) == 1


def test_trained_phantom_clip__texts_in_bfloat16_do_not_let_its_images_in(tmp_path, phantoms, compared, caplog):
    """Texts alone pass; where images come after them, both towers go on in float32."""
    blank = phantoms.with_columns(uri=[""] * len(phantoms))
    load = partial(precision.load_for, "phantom-clip", tmp_path, device="cpu")
    texts = load(dataset=blank, what=("text",))
    assert texts.precision == "bf16" and compared == [{"text"}]
    Cache(tmp_path).embed(blank, texts, ("text",))
    assert load(dataset=blank, what=("text",)).id == texts.id and len(compared) == 1
    images = load(dataset=phantoms, what=("image",))
    assert images.precision == "fp32" and compared[1:] == [{"image"}]
    assert f"the cache holds {len(Cache(tmp_path).array('text', texts.id))} rows of it" in caplog.text
    Cache(tmp_path).embed(phantoms, images)
    assert load(dataset=phantoms, what=("text",)).id == images.id and len(compared) == 2


def test_a_text_tower_is_compared_where_images_are_there_already(
    tmp_path, model, phantoms, compared, monkeypatch, caplog
):
    """With the data set's texts, else the labels' names, else what is asked."""
    name, seen = f"local-dir:{model}", []
    few = phantoms.take(np.arange(4))
    Cache(tmp_path).embed(few, load_encoder(name, device="cpu", precision="bf16"))
    wordless = few.with_columns(text=[""] * 4)
    nameless = replace(wordless, label_names=(), labels=np.zeros((4, 0), np.int8))

    def moved(encoder, reference, samples):
        seen.append(samples)
        return "they moved"

    monkeypatch.setattr(precision, "moved_by", moved)
    for dataset in (few, wordless, nameless):
        found = precision.load_for(
            name, tmp_path, device="cpu", dataset=dataset, what=("image", "text"), texts=["is it a nodule"]
        )
        assert found.precision == "fp32"
    expected = [list(few.samples["text"]), list(few.label_names), ["is it a nodule"]]
    assert seen == [{"text": texts} for texts in expected]
    # Nothing of it can be embedded from a data set without texts, so there is nothing to refuse.
    silent = precision.load_for(name, tmp_path, device="cpu", dataset=nameless, what=("image", "text"))
    assert silent.precision == "bf16" and len(seen) == 3
    caplog.clear()
    unseen = precision.load_for(name, tmp_path, device="cpu", what=("text",))
    assert unseen.precision == "fp32" and "nothing is at hand to compare bf16 with" in caplog.text


def test_without_samples_float32_is_taken_and_said(tmp_path, model, compared, caplog):
    name = f"local-dir:{model}"
    found = precision.load_for(name, tmp_path, device="cpu")
    assert found.precision == "fp32" and "nothing is at hand to compare bf16 with" in found.precision_reason
    assert "nothing is at hand" in caplog.text and not compared
    unreadable = open_dataset(PHANTOMS).take(np.arange(4)).with_columns(uri=["gone"] * 4)
    assert precision.load_for(name, tmp_path, device="cpu", dataset=unreadable).precision == "fp32"
    assert precision.load_for(name, tmp_path, device="cpu", precision="bf16").precision == "bf16"


def test_pixels_alone_are_no_use_of_a_tower(tmp_path, model, compared):
    found = precision.load_for(f"local-dir:{model}", tmp_path, device="cpu", what=("pixels",))
    assert found.precision == "bf16" and not compared


def test_by_name__only_what_is_to_be_embedded_is_compared(tmp_path, phantoms, compared):
    load = partial(precision.load_for, "phantom-clip", tmp_path, device="cpu", dataset=phantoms, precision="bf16")
    assert load(what=("text",)).precision == "bf16" and compared == [{"text"}]
    with pytest.raises(UsageError, match=r"precision bf16 moves the embeddings of phantom-clip: of 64 images"):
        load(what=("tokens@-1",))


def test_trained_efficientnet__bfloat16_moves_its_radiographs_and_is_refused(tmp_path, monkeypatch, caplog):
    """Real weights and radiographs: random weights would hide it."""
    monkeypatch.setattr(precision, "SAMPLES", 8)  # bfloat16 is slow on most machines that run this
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    name = f"local-dir:{shared_data('models/efflite0-minilm')}"
    images = open_dataset(f"folder:{shared_data('data/nih-cxr-subset')}/images")
    images = images.with_columns(text=[f"finding {number}" for number in range(len(images))])
    chosen = precision.load_for(name, tmp_path, device="cpu", dataset=images, what=("text",))
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
