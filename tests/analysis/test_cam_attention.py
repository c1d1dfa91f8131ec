"""Grad-ECLIP, LeGrad and rollout: against their formulas with attention as a leaf, and what their papers promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from analysis import cam
from analysis.cam.class_token import class_token_pass
from analysis.cam.passes import float_tower
from tests.analysis.readable_tower import GRID, PATCH, WIDTH, one_bright_patch, readable_encoder
from tests.analysis.tiny_encoder import some_pixels, tiny_encoder

OF_EVIDENCE = ["gradcam", "gradcam-elementwise", "hirescam", "layercam", "xgradcam", "grad-eclip", "legrad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def a_vector(seed: int, length: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(length).astype(np.float32)


class OpenClipByHand:
    """open_clip's ViT written out, with each block's attention as a tensor of its own."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.heads = visual.transformer.resblocks[0].attn.num_heads

    def block(self, number: int, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tokens that leave a block, then its attention (heads, n, n), queries, keys and values."""
        block = self.visual.transformer.resblocks[number]
        normed = block.ln_1(tokens)
        q, k, v = functional.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        split = [part.reshape(len(part), self.heads, -1).transpose(0, 1) for part in (q, k, v)]
        attention = (split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5).softmax(-1)
        attention = attention.detach().requires_grad_()
        gathered = (attention @ split[2]).transpose(0, 1).reshape(len(q), -1)
        tokens = tokens + block.ls_1(block.attn.out_proj(gathered))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens))), attention, q, k, v, gathered

    def embedding(self, token: torch.Tensor) -> torch.Tensor:
        return self.visual.ln_post(token) @ self.visual.proj


def test_legrad_is_the_clamped_gradient_of_attention_averaged(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, vector = some_pixels(encoder), torch.from_numpy(a_vector(1))
    by_hand = OpenClipByHand(encoder.model.visual)
    for first in (0, 1):
        tokens = encoder.model.visual._embeds(encoder.preprocess.normalise(pixels[None]))[0]
        maps = []
        for number in range(3):
            tokens, attention, *_ = by_hand.block(number, tokens)
            score = functional.cosine_similarity(by_hand.embedding(tokens.mean(0)), vector, dim=0)
            gradient = torch.autograd.grad(score, attention, retain_graph=True)[0]
            maps.append(gradient.clamp(min=0).mean(dim=(0, 1))[1:].reshape(4, 4))
        expected = torch.stack(maps[first:]).mean(0).numpy()
        found = cam.heatmap(encoder, pixels, cam.TextTarget(vector.numpy()), first, "legrad")
        np.testing.assert_allclose(found.raw, expected, rtol=1e-3, atol=1e-8)
        assert found.raw.min() >= 0 and found.raw.max() > 0
    default = cam.heatmap(encoder, pixels, cam.TextTarget(vector.numpy()), method="legrad")
    np.testing.assert_allclose(default.raw, expected, rtol=1e-3, atol=1e-8)
    assert default.layer == "attention of blocks 1 to 2"


def test_grad_eclip_weighs_values_by_the_gradient_and_loosened_attention(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, vector = some_pixels(encoder), torch.from_numpy(a_vector(2))
    by_hand = OpenClipByHand(encoder.model.visual)
    tokens = encoder.model.visual._embeds(encoder.preprocess.normalise(pixels[None]))[0]
    for number in range(3):
        tokens, _, q, k, v, gathered = by_hand.block(number, tokens)
    score = functional.cosine_similarity(by_hand.embedding(tokens[0]), vector, dim=0)
    gradient = torch.autograd.grad(score, gathered, retain_graph=True)[0][0]
    likeness = functional.cosine_similarity(q[:1], k[1:], dim=-1)
    loosened = (likeness - likeness.min()) / (likeness.max() - likeness.min())
    expected = (gradient * v[1:] * loosened[:, None]).sum(-1).reshape(4, 4).detach().numpy()
    found = cam.heatmap(encoder, pixels, cam.TextTarget(vector.numpy()), method="grad-eclip")
    np.testing.assert_allclose(found.raw, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit"])
def test_grad_eclip_decomposes_what_the_class_token_gathers(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels = some_pixels(encoder, 2)
    targets = [cam.TextTarget(a_vector(seed)) for seed in range(3)]
    found = class_token_pass(float_tower(encoder), pixels, targets)
    # With the model's own attention for weights, the places' evidence adds up to the gradient along all it gathered.
    gathered = torch.einsum("bhn,bhnd->bhd", found.attention, found.values)
    parts = torch.einsum("bthn,bhn->bt", found.evidence, found.attention)
    torch.testing.assert_close(parts, torch.einsum("bthd,bhd->bt", found.gathered, gathered))
    if kind == "timm_token_vit":
        kept: list[torch.Tensor] = []
        handle = encoder.trunk.blocks[-1].attn.proj.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        with torch.no_grad():
            encoder.model.visual(encoder.preprocess.normalise(pixels))
        handle.remove()
        torch.testing.assert_close(kept[0][:, 0], gathered.flatten(1), rtol=1e-4, atol=1e-5)


def test_rollout_multiplies_half_kept_attention(folder: Path) -> None:
    for kind in ("open_clip_token_vit", "open_clip_average_vit"):
        encoder = tiny_encoder(kind, folder)
        pixels = some_pixels(encoder)
        by_hand = OpenClipByHand(encoder.model.visual)
        tokens = encoder.model.visual._embeds(encoder.preprocess.normalise(pixels[None]))[0]
        joint = np.eye(17)
        for number in range(3):
            tokens, attention, *_ = by_hand.block(number, tokens)
            joint = (attention.detach().mean(0).numpy() / 2 + np.eye(17) / 2) @ joint
        np.testing.assert_allclose(joint.sum(1), 1, rtol=1e-5)
        row = joint[0] if kind == "open_clip_token_vit" else joint[1:].mean(0)
        explainer = cam.Explainer(encoder, method="rollout")
        maps = explainer.heatmaps(pixels, [cam.TextTarget(a_vector(1)), cam.HeadTarget(a_vector(2))])
        for found in maps:
            np.testing.assert_allclose(found.raw, row[1:].reshape(4, 4), rtol=1e-4)
    assert not cam.METHODS["rollout"].of_target


# -- What a heatmap must show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 3), (2, 1)])
@pytest.mark.parametrize("method", OF_EVIDENCE)
def test_peak_lies_on_the_one_patch_that_matters(method: str, place: tuple[int, int]) -> None:
    encoder = readable_encoder(layers=1)
    found = cam.heatmap(encoder, one_bright_patch(*place), cam.HeadTarget(np.eye(WIDTH)[0]), method=method)
    assert np.unravel_index(found.raw.argmax(), found.raw.shape) == place
    others = np.delete(found.raw.ravel(), place[0] * GRID + place[1])
    assert found.raw[place] > 0 and np.abs(others).max() < 1e-6 * found.raw[place]


@pytest.mark.parametrize("method", OF_EVIDENCE)
def test_text_at_right_angles_to_the_evidence_shows_none(method: str) -> None:
    encoder = readable_encoder()
    explainer = cam.Explainer(encoder, method=method)
    pixels, targets = one_bright_patch(1, 1), [cam.HeadTarget(np.eye(WIDTH)[3], name="edema")]
    found = explainer.batch_heatmaps(pixels[None], targets, state_unreached=True)[0][0]
    assert found.empty and found.note.startswith("empty") and not found.map.any() and not found.raw.any()
    raw = explainer.batch(pixels[None], targets)
    if not raw.reached.all():
        with pytest.raises(cam.ZeroGradientError, match="edema"):
            explainer.heatmaps(pixels, targets)


def test_even_attention_rolls_out_flat_and_says_so() -> None:
    found = cam.heatmap(readable_encoder(), one_bright_patch(1, 1), cam.HeadTarget(np.eye(WIDTH)[0]), method="rollout")
    assert found.flat and "does not say where" in found.note


@pytest.mark.parametrize("method", ["gradcam", "layercam", "grad-eclip", "legrad", "rollout"])
def test_map_moves_with_the_patches_where_the_tower_knows_no_places(method: str, folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    with torch.no_grad():
        encoder.model.visual.positional_embedding[1:] = 0
    pixels = some_pixels(encoder)
    order = np.random.default_rng(0).permutation(16)
    cut = pixels.reshape(4, PATCH, 4, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(16, PATCH, PATCH, 3)
    moved = cut[order].reshape(4, 4, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)
    explainer = cam.Explainer(encoder, method=method)
    target = cam.TextTarget(a_vector(3))
    before = explainer.batch(pixels[None], [target]).raw[0, 0].ravel()
    after = explainer.batch(np.ascontiguousarray(moved)[None], [target]).raw[0, 0].ravel()
    torch.testing.assert_close(after, before[order], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["grad-eclip", "legrad"])
@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit"])
def test_map_does_not_depend_on_the_texts_length_or_the_heads_bias(kind: str, method: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, vector = some_pixels(encoder), a_vector(4)
    one = cam.heatmap(encoder, pixels, cam.TextTarget(vector), method=method)
    other = cam.heatmap(encoder, pixels, cam.TextTarget(50 * vector), method=method)
    np.testing.assert_allclose(one.raw, other.raw, rtol=1e-3, atol=1e-8)
    scaled = [cam.heatmap(encoder, pixels, cam.HeadTarget(vector, bias), method=method).map for bias in (0.0, 9.0)]
    np.testing.assert_allclose(scaled[0], scaled[1], atol=1e-5)
