"""Runners: one shape, one forward pass for all products, batches that do not fit, and compiled towers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batches import make_runner
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.sources import open_dataset
from tests import models
from tests.engine.fakes import ArrayReader, FakeEncoder, dataset_of


def drawn(count: int):
    return dataset_of([str(number) for number in range(count)], ArrayReader())


class SmallDevice(FakeEncoder):
    """Has room for a few rows only."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def encode_pixels(self, pixels):
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode_pixels(pixels)


def test_a_batch_that_does_not_fit_is_halved_and_the_job_goes_on(tmp_path, caplog):
    encoder = SmallDevice(room=5)
    report = Cache(tmp_path / "small").embed(drawn(50), encoder, batch_size=16)
    Cache(tmp_path / "large").embed(drawn(50), FakeEncoder(), batch_size=16)
    assert report.computed == {"image": 50} and max(encoder.image_batches) == 4
    assert caplog.text.count("did not fit into the device's memory") == 2  # 16 -> 8 -> 4, said once each
    values = [Cache(tmp_path / name).array("image", encoder.id).read_all() for name in ("small", "large")]
    np.testing.assert_array_equal(*values)


def test_a_device_without_room_for_one_row_is_an_error(tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        Cache(tmp_path).embed(drawn(5), SmallDevice(room=0), batch_size=4)


@pytest.mark.parametrize("build", [models.biomedclip_like, models.open_clip_pair])
def test_one_forward_pass_gives_the_numbers_of_two(tmp_path, build):
    encoder = load_encoder(f"local-dir:{build(tmp_path)}", device="cpu")
    height, width = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    both = encoder.encode_batch(pixels, layers=[1, 0])
    assert torch.equal(both["image"], encoder.encode_pixels(pixels))
    for layer in (0, 1):
        assert torch.equal(both[layer], encoder.tokens(pixels, layer))
    assert set(encoder.encode_batch(pixels, image=False, layers=[1])) == {1}
    assert not any(block._forward_pre_hooks for block in encoder.trunk.blocks)


def test_a_compiled_tower_gives_the_same_embeddings_to_rounding(tmp_path):
    encoder = load_encoder(f"local-dir:{models.biomedclip_like(tmp_path / 'model')}", device="cpu")
    phantoms = open_dataset("phantom:5?size=64")
    plans = []
    Cache(tmp_path / "plain").embed(phantoms, encoder, batch_size=4)
    Cache(tmp_path / "compiled").embed(phantoms, encoder, batch_size=4, compiled=True, settled=plans.append)
    assert plans[0].compiled is True
    values = [Cache(tmp_path / name).features(phantoms, encoder).values for name in ("plain", "compiled")]
    np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-3)


def test_runner__a_new_batch_is_zeros(tmp_path):
    encoder = FakeEncoder()
    runner = make_runner(encoder, 3)
    batch = runner.new_batch()
    batch.add(b"k" * 16, np.full((8, 8, 3), 7, np.uint8), ("image",))
    runner.start(batch, True, [])
    assert runner.result(batch)["image"].shape == (3, 12) and not batch.pixels[1:].any() and len(batch) == 1
