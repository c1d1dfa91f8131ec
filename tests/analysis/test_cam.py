"""Grad-CAM against one written by hand, against the library's own call, and against what must hold for any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from torch import nn

from analysis import cam
from analysis.heads import LinearHead
from engine.errors import DataError, UsageError
from engine.pixels import Preprocess
from engine.trunks import CamLayer
from tests.analysis.tiny_encoder import KINDS, VITS, some_pixels, tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def a_vector(seed: int, length: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


def by_hand(
    encoder: Any, pixels: np.ndarray, score: Callable[[torch.Tensor], torch.Tensor], module: nn.Module
) -> np.ndarray:
    """Grad-CAM with two hooks and autograd, and the tokens' order written out."""
    kept: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept["values"] = output

    handle = module.register_forward_hook(keep)
    inputs = encoder.preprocess.normalise(torch.from_numpy(pixels[None])).requires_grad_()
    score(encoder.model.visual(inputs)[0]).backward()
    handle.remove()
    values, gradient = kept["values"].detach()[0], kept["values"].grad[0]
    trunk = encoder.trunk
    if trunk.kind != "cnn":
        rows, columns = trunk.grid
        weights = gradient[trunk.prefix_tokens :].mean(dim=0)
        tokens = values[trunk.prefix_tokens :]
        return np.array(
            [[float(tokens[row * columns + column] @ weights) for column in range(columns)] for row in range(rows)]
        )
    weights = gradient.mean(dim=(1, 2))
    return (values * weights[:, None, None]).sum(dim=0).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["default", 1, -2])
def test_equals_grad_cam_written_by_hand(kind: str, layer: cam.Layer, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, vector = some_pixels(encoder), a_vector(1)
    module = encoder.trunk.cam_layer(layer).module

    def cosine(embedding: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(embedding, torch.from_numpy(vector), dim=0)

    def logit(embedding: torch.Tensor) -> torch.Tensor:
        return (embedding * torch.from_numpy(vector)).sum() - 3

    for target, score in ((cam.TextTarget(vector), cosine), (cam.HeadTarget(vector, -3.0), logit)):
        expected = by_hand(encoder, pixels, score, module)
        found = cam.heatmap(encoder, pixels, target, layer)
        np.testing.assert_allclose(found.raw, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())
        with torch.no_grad():
            embedding = encoder.model.visual(encoder.preprocess.normalise(pixels[None]))[0]
            assert found.score == pytest.approx(float(score(embedding)), rel=1e-4)
        if found.empty:
            continue
        shares = torch.from_numpy(np.maximum(found.raw, 0) / found.raw.max())[None, None]
        enlarged = nn.functional.interpolate(shares, size=pixels.shape[:2], mode="bilinear", align_corners=False)
        np.testing.assert_allclose(found.map, enlarged[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_librarys_own_call_up_to_its_scaling(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels = some_pixels(encoder)
    target = cam.HeadTarget(a_vector(2))
    found = cam.heatmap(encoder, pixels, target)
    if found.empty:
        target = cam.HeadTarget(-a_vector(2))
        found = cam.heatmap(encoder, pixels, target)
    module, reshape, _ = encoder.trunk.cam_layer("default")
    inputs = encoder.preprocess.normalise(pixels[None]).requires_grad_()
    with GradCAM(encoder.model.visual, [module], reshape_transform=reshape) as library:
        theirs = library(inputs, [target.score])[0]
    ours = (found.map - found.map.min()) / (found.map.max() - found.map.min())
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit"])
def test_zero_gradient_is_an_error_where_the_class_token_is_pooled(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, target = some_pixels(encoder), cam.TextTarget(a_vector(3), "edema")
    last = f"{encoder.trunk.block_path}.{len(encoder.trunk.blocks) - 1}"
    behind = ["", ".mlp"] + [".norm2", ".attn"] * (kind == "timm_token_vit") + [".ln_2"] * (kind != "timm_token_vit")
    for name in behind:
        explainer = cam.Explainer(encoder, last + name)
        with pytest.raises(cam.ZeroGradientError, match=rf"edema.*{last}{name}.*{last}\.(norm|ln_)1"):
            explainer.heatmaps(pixels, [target])
    assert np.abs(cam.heatmap(encoder, pixels, target).raw).max() > 0


@pytest.mark.parametrize("kind", VITS)
def test_studys_own_layer_gives_the_named_empty_map_where_a_token_is_pooled(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    found = cam.heatmap(encoder, some_pixels(encoder), cam.TextTarget(a_vector(3), normalize=False), layer="paper")
    if kind.endswith("token_vit"):
        assert found.empty and not found.map.any() and not found.raw.any()
        assert found.layer in found.note and "no gradient" in found.note
        assert found.layer == ("trunk.blocks.5.attn.proj" if "timm" in kind else "transformer.resblocks.2.ls_1")
    else:
        assert found.raw.any()


def test_head_without_weights_is_an_error_too(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    with pytest.raises(cam.ZeroGradientError, match="weights are zero"):
        cam.heatmap(encoder, some_pixels(encoder), cam.HeadTarget(np.zeros(32)))


def test_map_without_positive_evidence_is_empty_and_says_so(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    pixels = some_pixels(encoder)
    for vector in (a_vector(4), -a_vector(4)):
        found = cam.heatmap(encoder, pixels, cam.HeadTarget(vector, name="edema"))
        assert found.empty == (found.raw.max() <= 0) == (not found.map.any())
        assert found.empty == ("speaks for" in found.note)
    tower = _PatchTower()
    found = cam.heatmap(_fake(tower), np.full((64, 64, 3), 100, np.uint8), cam.HeadTarget(np.array([-1.0, 0.0])))
    assert found.empty and found.raw.max() <= 0 and found.raw.min() < 0 and "no position speaks" in found.note


@pytest.mark.parametrize("kind", ["timm_token_vit", "cnn"])
def test_map_does_not_depend_on_the_targets_scale_or_bias(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, vector = some_pixels(encoder), a_vector(5)
    for make in (
        lambda scale, bias: cam.HeadTarget(scale * vector, bias),
        lambda scale, bias: cam.HeadTarget(scale * vector, bias, normalized=True),
        lambda scale, bias: cam.TextTarget(scale * vector),
        lambda scale, bias: cam.TextTarget(scale * vector, normalize=False),
    ):
        one, other = cam.heatmap(encoder, pixels, make(1.0, 0.0)), cam.heatmap(encoder, pixels, make(1e-4, 7.0))
        np.testing.assert_allclose(one.map, other.map, atol=1e-3)
        assert one.empty == other.empty


def test_cosine_and_dot_product_are_other_questions(folder: Path) -> None:
    encoder = tiny_encoder("timm_token_vit", folder)
    pixels, vector = some_pixels(encoder), a_vector(6)
    cosine = cam.heatmap(encoder, pixels, cam.TextTarget(vector))
    product = cam.heatmap(encoder, pixels, cam.TextTarget(vector, normalize=False))
    assert np.abs(cosine.raw / np.abs(cosine.raw).max() - product.raw / np.abs(product.raw).max()).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_share_a_forward_pass_get_what_they_get_alone(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels = some_pixels(encoder)
    targets = [cam.TextTarget(a_vector(7)), cam.HeadTarget(a_vector(8)), cam.TextTarget(a_vector(9), normalize=False)]
    explainer = cam.Explainer(encoder)
    calls: list[int] = []
    handle = encoder.trunk.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    together = explainer.heatmaps(pixels, targets)
    handle.remove()
    assert len(calls) == 1
    for target, found in zip(targets, together, strict=True):
        np.testing.assert_allclose(found.raw, cam.heatmap(encoder, pixels, target).raw, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["timm_token_vit", "cnn"])
def test_encoder_is_left_as_it_was(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    visual, pixels = encoder.model.visual, some_pixels(encoder)
    inputs = encoder.preprocess.normalise(pixels[None])
    with torch.inference_mode():
        before = visual(inputs)
        cam.heatmap(encoder, pixels, cam.TextTarget(a_vector(1)))
        assert torch.equal(visual(inputs), before)
    assert not any(module._forward_hooks for module in visual.modules())
    assert all(weights.grad is None and not weights.requires_grad for weights in visual.parameters())
    with pytest.raises(DataError):
        cam.heatmap(encoder, pixels, cam.TextTarget(a_vector(1, length=5)))
    assert not any(module._forward_hooks for module in visual.modules())


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_lower_precision_is_explained_in_float32(precision: torch.dtype, folder: Path) -> None:
    whole, rounded = tiny_encoder("timm_token_vit", folder), tiny_encoder("timm_token_vit", folder)
    rounded.model.visual.to(precision)
    pixels, target = some_pixels(whole), cam.TextTarget(a_vector(1))
    found, expected = cam.heatmap(rounded, pixels, target), cam.heatmap(whole, pixels, target)
    assert found.map.dtype == found.raw.dtype == np.float32
    assert np.corrcoef(found.raw.ravel(), expected.raw.ravel())[0, 1] > 0.99
    assert next(rounded.model.visual.parameters()).dtype == precision


@pytest.mark.parametrize("method", cam.METHODS)
def test_every_method_gives_a_map_or_says_that_it_is_empty(method: str, folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    if method not in cam.methods_for(encoder.trunk):
        pytest.skip("not for this tower")
    pixels = some_pixels(encoder)
    found = [cam.heatmap(encoder, pixels, cam.HeadTarget(sign * a_vector(1)), method=method) for sign in (1, -1)]
    assert any(not each.empty for each in found)
    for each in found:
        assert each.method == method and each.empty == bool(each.note.startswith("empty"))
        assert each.map.shape == pixels.shape[:2] and each.map.min() >= 0 and each.map.max() <= 1


def test_wrong_requests_are_named(folder: Path) -> None:
    encoder = tiny_encoder("timm_token_vit", folder)
    pixels, target = some_pixels(encoder), cam.TextTarget(a_vector(1))
    with pytest.raises(UsageError, match="gradcam\\+\\+"):
        cam.heatmap(encoder, pixels, target, method="grad-cam")
    with pytest.raises(UsageError, match="6 blocks"):
        cam.heatmap(encoder, pixels, target, layer=6)
    with pytest.raises(UsageError, match="needs a target"):
        cam.Explainer(encoder).heatmaps(pixels, [])
    with pytest.raises(DataError, match="uint8"):
        cam.heatmap(encoder, pixels.astype(np.float32), target)
    with pytest.raises(DataError, match="another model"):
        cam.heatmap(encoder, pixels, cam.TextTarget(a_vector(1, length=31)))


def test_head_target_takes_a_label_of_a_linear_head() -> None:
    head = LinearHead(np.eye(3, 4), np.arange(3.0), ("a", "b", "c"), normalised=True)
    target = cam.HeadTarget.of(head, "c")
    embedding = np.array([1.0, 2.0, 3.0, 4.0])
    score = target.score(torch.from_numpy(embedding).float())
    assert target.name == "c"
    assert float(score) == pytest.approx(head.logits(embedding[None])[0, 2])


# -- From a patch in the original image to the peak in the same pixels -------------------------------------------------


class _PatchTower(nn.Module):
    """A tower that can be read: the mean brightness of each 16 x 16 patch, then the mean over patches."""

    image_size = (64, 64)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 2, 16, stride=16)
        with torch.no_grad():
            self.patches.weight.fill_(1 / (3 * 16 * 16))
            self.patches.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # In place, as the activation behind a convolution often is.
        return self.patches(images).relu_().mean(dim=(2, 3))


def _fake(tower: _PatchTower) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(visual=tower),
        preprocess=Preprocess(size=(64, 64), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        trunk=SimpleNamespace(
            kind="cnn",
            has_tokens=False,
            has_open_blocks=False,
            visual=tower,
            cam_layer=lambda which: CamLayer(tower.patches, None, "patches"),
        ),
    )


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (700, 512), (480, 901), (33, 40)])
@pytest.mark.parametrize("place", [(0.3, 0.4), (0.5, 0.7)])
def test_planted_patch_is_found_in_the_pixels_of_the_original(
    size: tuple[int, int], place: tuple[float, float]
) -> None:
    height, width = size
    image = np.zeros(size, dtype=np.uint8)
    middle_y, middle_x = round(place[0] * height), round(place[1] * width)
    reach = max(2, min(size) // 10)
    image[middle_y - reach : middle_y + reach, middle_x - reach : middle_x + reach] = 255
    encoder = _fake(_PatchTower())
    pixels, geometry = encoder.preprocess(Image.fromarray(image))
    found = cam.heatmap(encoder, pixels, cam.HeadTarget(np.array([1.0, 0.0])))
    carried = found.on_original(geometry)
    assert carried.shape == size and carried.dtype == np.float32
    rows, columns = geometry.visible_pixels()
    seen = np.zeros(size, dtype=bool)
    seen[rows, columns] = True
    np.testing.assert_array_equal(np.isnan(carried), ~seen)
    mass = np.where(seen, carried, 0)
    centre = (mass.sum(axis=1) @ np.arange(height) / mass.sum(), mass.sum(axis=0) @ np.arange(width) / mass.sum())
    patch = min(size) / 4
    assert abs(centre[0] - middle_y) < patch / 2 and abs(centre[1] - middle_x) < patch / 2
    peak = np.unravel_index(np.nanargmax(carried), size)
    assert abs(peak[0] - middle_y) < patch and abs(peak[1] - middle_x) < patch


def test_flat_map_is_called_flat_and_not_stretched() -> None:
    found = cam.heatmap(_fake(_PatchTower()), np.full((64, 64, 3), 100, np.uint8), cam.HeadTarget(np.array([1.0, 0.0])))
    assert found.flat and not found.empty and "flat" in found.note
    np.testing.assert_allclose(found.map, 1.0, atol=1e-6)


def test_values_changed_in_place_behind_the_layer_are_not_what_is_weighted() -> None:
    tower = _PatchTower()
    with torch.no_grad():
        tower.patches.bias.fill_(-0.5)
    image = np.zeros((64, 64, 3), np.uint8)
    image[:16, :16] = 255
    found = cam.heatmap(_fake(tower), image, cam.HeadTarget(np.array([1.0, 0.0])))
    weight = 1 / 16 / 16  # mean over 16 patches, of which one is not cut off by the activation
    np.testing.assert_allclose(found.raw[0, 0], 0.5 * weight, rtol=1e-4)
    np.testing.assert_allclose(found.raw[1:, 1:], -0.5 * weight, rtol=1e-4)


def test_callers_autocast_does_not_reach_the_map(folder: Path) -> None:
    encoder = tiny_encoder("timm_token_vit", folder)
    pixels, target = some_pixels(encoder), cam.TextTarget(a_vector(1))
    expected = cam.heatmap(encoder, pixels, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(cam.heatmap(encoder, pixels, target).raw, expected.raw)
