"""Blocks side by side against Grad-CAM by autograd at each of them, from one forward and one backward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import cam
from analysis.map_grid import Band, Cell, bands_of, map_grid
from engine.errors import DataError, UsageError
from tests.analysis.test_cam import by_hand
from tests.analysis.tiny_encoder import KINDS, some_pixels, tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("kind", KINDS)
def test_strip_is_grad_cam_at_each_block_from_one_pass(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, vector = some_pixels(encoder), np.random.default_rng(1).standard_normal(32).astype(np.float32)
    forward: list[int] = []
    backward: list[int] = []
    differentiate = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or differentiate(*a, **k))
    handle = encoder.trunk.blocks[0].register_forward_hook(lambda *_: forward.append(1))
    strip = cam.layer_strip(encoder, pixels[None], cam.HeadTarget(vector, name="edema"))
    handle.remove()
    assert len(forward) == len(backward) == 1
    blocks = len(encoder.trunk.blocks)
    assert [each.block for each in strip] == list(range(blocks + (kind != "cnn")))

    def logit(embedding: torch.Tensor) -> torch.Tensor:
        return embedding @ torch.from_numpy(vector)

    for each in strip:
        assert each.leaving == (each.block == blocks)
        if each.leaving and kind.endswith("token_vit"):
            assert not each.reached and each.gradcam.empty and "no gradient reaches the output" in each.gradcam.note
            continue
        module = encoder.model.visual.get_submodule(each.layer)
        expected = by_hand(encoder, pixels, logit, module)
        np.testing.assert_allclose(each.gradcam.raw, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())
        assert each.reached and each.gradcam.target == "edema"
    if kind == "cnn":
        assert all(each.rollout is None for each in strip)
    else:
        whole = cam.heatmap(encoder, pixels, cam.HeadTarget(vector), method="rollout")
        np.testing.assert_allclose(strip[blocks - 1].rollout.raw, whole.raw, rtol=1e-4)
        assert strip[0].rollout is not None and strip[-1].rollout is None


def test_strip_from_the_tokens_that_enter_block_0(folder: Path) -> None:
    encoder = tiny_encoder("timm_token_vit", folder)
    pixels, target = some_pixels(encoder)[None], cam.TextTarget(np.random.default_rng(2).standard_normal(32))
    with torch.no_grad():
        tokens = encoder.trunk.tokens(encoder.preprocess.normalise(pixels), 0).numpy()
    strips = [cam.layer_strip(encoder, seen, target) for seen in (pixels, cam.Tokens(tokens, 0))]
    for one, other in zip(*strips, strict=True):
        np.testing.assert_allclose(one.gradcam.raw, other.gradcam.raw, rtol=1e-4, atol=1e-8)
    for wrong in (cam.Tokens(tokens, 1), np.concatenate([pixels, pixels])):
        with pytest.raises(UsageError, match="one image"):
            cam.layer_strip(encoder, wrong, target)


def test_grid_places_its_cells_and_refuses_holes() -> None:
    image = np.full((40, 60), 128, np.uint8)
    hot = np.zeros((40, 60), np.float32)
    hot[:, :30] = 1
    rows = [("A", [Cell(hot), Cell(hot[:, ::-1])] * 4)]
    bands = bands_of([f"column {number}" for number in range(8)], rows, 7)
    assert [len(band.columns) for band in bands] == [4, 4]
    picture = map_grid(image, bands, title="t", side=120)
    assert picture.dtype == np.uint8 and picture.shape[0] > 2 * 80 and picture.shape[1] > 4 * 120
    grey = np.ptp(picture.astype(int), axis=2) < 12
    assert not grey.all(), "heat is coloured"
    noted = map_grid(image, [Band(["c"], [("A", [Cell(note="nothing here")])])], side=120)
    assert np.ptp(noted.astype(int), axis=2).max() < 12, "no heat, no colour"
    with pytest.raises(DataError, match="one cell a column"):
        map_grid(image, [Band(["a", "b"], [("A", [Cell()])])])
    with pytest.raises(DataError, match="at least one"):
        map_grid(image, [])
