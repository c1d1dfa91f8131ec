"""Encoders against open_clip's own model, transform and tokenizer."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from engine.encoder import choose_device, load_encoder
from engine.errors import ModelError, UsageError
from engine.model_building import build_model
from engine.model_files import resolve_model
from engine.pixels import decode
from engine.trunks import describe_trunk
from tests import models
from tests.conftest import shared_data

TEXTS = ["", "a", "chest xray showing pneumonia", "no acute disease in the left or right lung " * 12, "zq, x-7?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in models.KINDS.items()}


@pytest.fixture
def no_network(monkeypatch):
    """Fail a test in which the network is asked, also where a library catches what it is answered."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    # the suite's own setting, which would keep the libraries from asking
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def reference(folder: Path):
    """open_clip's own model, transform and tokenizer, with the one thing done by hand that it leaves undone."""
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    options = {}
    if "hf_model_name" in text:
        options["text_cfg"] = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", **options)
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("kind", models.KINDS)
def test_build_model__every_weight_and_buffer_is_what_open_clip_loads(folders, kind):
    built, theirs = build_model(resolve_model(f"local-dir:{folders[kind]}")), reference(folders[kind])[0]
    for parts in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        found, expected = dict(parts(built)), dict(parts(theirs))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert torch.equal(values, expected[name]), name


def drawn(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:170, :230]
    ramps = [(y * (i + 1) + x * 2) % 256 for i in range(count)]
    return [np.clip(ramp + rng.integers(-30, 30, ramp.shape), 0, 255).astype(np.uint8) for ramp in ramps]


def pixels_for(encoder, images) -> np.ndarray:
    return np.stack([encoder.preprocess(decode(image))[0] for image in images])


@pytest.mark.parametrize("kind", models.KINDS)
@torch.no_grad()
def test_encoder__equals_open_clip(folders, kind, no_network):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    model, transform, tokenizer = reference(folders[kind])
    if encoder.trunk.kind == "cnn":
        model.visual.to(memory_format=torch.channels_last)  # as the encoder lays it out: bits depend on the layout
    images = drawn(3)
    expected = model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
    given = encoder.encode_pixels(pixels_for(encoder, images))
    assert given.dtype == torch.float32
    assert given.shape == (3, encoder.dim)
    assert torch.equal(given, expected)
    texts = encoder.encode_text(TEXTS)
    torch.testing.assert_close(texts, model.encode_text(tokenizer(TEXTS)), rtol=1e-5, atol=1e-6)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert encoder.logit_bias is None


@torch.no_grad()
def test_encoder__equals_open_clip_on_real_radiographs(no_network):
    folder = shared_data("models/efflite0-minilm")
    images = sorted(shared_data("data/nih-cxr-subset").rglob("*.jpg"))[:2]
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    model, transform, tokenizer = reference(folder)
    model.visual.to(memory_format=torch.channels_last)
    tensors = [transform(Image.open(path)) for path in images]
    pixels = pixels_for(encoder, [path.read_bytes() for path in images])
    assert torch.equal(encoder.preprocess.normalise(pixels), torch.stack(tensors))
    assert torch.equal(encoder.encode_pixels(pixels), model.encode_image(torch.stack(tensors)))
    torch.testing.assert_close(encoder.encode_text(TEXTS), model.encode_text(tokenizer(TEXTS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_pair"])
def test_encode_text__row_depends_on_nothing_but_its_text(folders, kind):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    together = encoder.encode_text([*TEXTS, *reversed(TEXTS), *TEXTS])
    alone = torch.cat([encoder.encode_text([text]) for text in TEXTS])
    assert torch.equal(together[:5], alone)
    assert torch.equal(together[5:10], alone.flip(0))
    assert torch.equal(together[10:], alone)


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_pair"])
def test_encode_text_batches__what_is_left_comes_in_the_same_order_and_bit_for_bit(folders, kind):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    texts = [" ".join(["lung"] * (7 * number % 40 + 1)) + f" {number}" for number in range(40)]
    batches = list(encoder.encode_text_batches(texts))
    assert all(0 < len(rows) <= 8 for rows, _ in batches)
    order = np.concatenate([rows for rows, _ in batches])
    assert sorted(order) == list(range(40))
    assert torch.equal(torch.cat([values for _, values in batches]), encoder.encode_text(texts)[order])
    done = set(np.concatenate([rows for rows, _ in batches[:3]]).tolist())
    left = [number for number in range(40) if number not in done]
    again = list(encoder.encode_text_batches([texts[number] for number in left]))
    for (rows, values), (before, same) in zip(again, batches[3:], strict=True):
        assert [left[row] for row in rows] == before.tolist() and torch.equal(values, same)


def test_encode__nothing_gives_nothing(folders):
    encoder = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    assert encoder.encode_text([]).shape == (0, 32)
    assert encoder.encode_pixels(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 32)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_encoder__half_precision_is_near(folders, kind, precision):
    exact = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    half = load_encoder(f"local-dir:{folders[kind]}", device="cpu", precision=precision)
    assert half.id != exact.id
    assert f"-{precision}-" in half.id
    assert {parameter.dtype for parameter in half.model.parameters()} == {half.dtype}
    assert half.logit_scale == exact.logit_scale
    pixels = pixels_for(exact, drawn(2))
    for given, expected in [
        (half.encode_pixels(pixels), exact.encode_pixels(pixels)),
        (half.encode_text(TEXTS), exact.encode_text(TEXTS)),
    ]:
        assert given.dtype == torch.float32
        assert not torch.equal(given, expected)
        assert torch.cosine_similarity(given, expected).min() > 0.99


@pytest.mark.parametrize("kind", [kind for kind in models.KINDS if kind != "cnn"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_tokens__computed_on_equal_the_whole(folders, kind, layer):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    pixels = pixels_for(encoder, drawn(3))
    tokens = encoder.tokens(pixels, layer)
    height, width = encoder.trunk.grid
    assert tokens.dtype == torch.float32
    assert tokens.shape[:2] == (3, encoder.trunk.prefix_tokens + height * width)
    expected = encoder.encode_pixels(pixels)
    torch.testing.assert_close(encoder.from_tokens(tokens, layer), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder.from_tokens(tokens.numpy(), layer), expected, rtol=1e-5, atol=1e-6)
    stored = encoder.from_tokens(tokens.numpy().astype(np.float16), layer)
    assert torch.cosine_similarity(stored, expected).min() > 0.9999


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit"])
def test_tokens__are_what_a_hook_sees(folders, kind):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    seen = []
    encoder.trunk.blocks[-2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    pixels = pixels_for(encoder, drawn(1))
    encoder.encode_pixels(pixels)
    assert torch.equal(encoder.tokens(pixels, -2), seen[0])


def test_tokens__wrong_requests(folders):
    vit = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="3 blocks, so there is no block 3"):
        vit.tokens(pixels, 3)
    with pytest.raises(UsageError, match=r"\(b, 17, 32\)"):
        vit.from_tokens(torch.zeros(1, 16, 32), 0)
    with pytest.raises(UsageError, match=r"\(b, 64, 64, 3\)"):
        vit.encode_pixels(np.zeros((1, 65, 64, 3), np.uint8))
    cnn = load_encoder(f"local-dir:{folders['cnn']}", device="cpu")
    with pytest.raises(UsageError, match="CNN image tower has no tokens"):
        cnn.tokens(np.zeros((1, 160, 160, 3), np.uint8), -1)


EXPECTED_TRUNKS = {
    "timm_token_vit": ("vit-token", 6, (10, 10), 1, "trunk.blocks.5.norm1", "trunk.blocks.5.attn.proj"),
    "timm_average_vit": ("vit-average", 6, (10, 10), 1, "trunk.norm", "trunk.blocks.5.attn.proj"),
    "timm_register_vit": ("vit-average", 8, (10, 10), 1, "trunk.blocks.7", "trunk.blocks.7.attn.proj"),
    "open_clip_token_vit": ("vit-token", 3, (4, 4), 1, "transformer.resblocks.2.ln_1", "transformer.resblocks.2.ls_1"),
    "open_clip_pair": ("vit-token", 3, (4, 4), 1, "transformer.resblocks.2.ln_1", "transformer.resblocks.2.ls_1"),
    "cnn": ("cnn", 5, None, 0, "trunk.bn2", "trunk.bn2"),
}


def gradient_on_map(encoder, which) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's map and the gradient of one embedding dimension on it."""
    layer = encoder.cam_layer(which)
    kept = []
    handle = layer.module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    images = encoder.input_of(pixels_for(encoder, drawn(2))).requires_grad_()
    embedding = encoder.model.encode_image(images)
    handle.remove()
    assert len(kept) == 1
    gradient = torch.autograd.grad(embedding[:, 0].sum(), kept[0])[0]
    reshape = layer.reshape or (lambda maps: maps)
    return reshape(kept[0].detach()), reshape(gradient)


@pytest.mark.parametrize("kind", models.KINDS)
def test_trunk__structure_and_cam_layers(folders, kind):
    encoder = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    trunk = encoder.trunk
    named = encoder.cam_layer().name, encoder.cam_layer("paper").name
    assert (trunk.kind, len(trunk.blocks), trunk.grid, trunk.prefix_tokens, *named) == EXPECTED_TRUNKS[kind]
    for which in ["default", 0, -2]:
        maps, gradient = gradient_on_map(encoder, which)
        assert maps.shape == gradient.shape
        assert maps.ndim == 4
        if trunk.grid is not None:
            assert tuple(maps.shape[2:]) == trunk.grid
        assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    _, gradient = gradient_on_map(encoder, "paper")
    assert (gradient.abs().max() == 0) == (trunk.kind == "vit-token")


def test_trunk__map_keeps_the_patches_places(folders):
    encoder = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    flat = np.zeros((1, 64, 64, 3), np.uint8)
    spot = flat.copy()
    spot[:, 16:32, 48:64] = 255
    reshape = encoder.cam_layer(0).reshape
    change = (reshape(encoder.tokens(spot, 0)) - reshape(encoder.tokens(flat, 0))).abs().sum(dim=1)[0]
    assert change.argmax() == 1 * 4 + 3
    assert (change > 0).sum() == 1


def test_trunk__unknown_layers(folders):
    encoder = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    with pytest.raises(UsageError, match="nearest: paper"):
        encoder.cam_layer("papre")
    with pytest.raises(UsageError, match="no block -4"):
        encoder.cam_layer(-4)
    with pytest.raises(ModelError, match="Linear"):
        describe_trunk(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("timm_name", ["test_resnet", "test_convnext"])
def test_trunk__other_cnns(tmp_path, timm_name):
    encoder = load_encoder(f"local-dir:{models.cnn(tmp_path / 'model', timm_name=timm_name)}", device="cpu")
    assert encoder.trunk.kind == "cnn"
    maps, gradient = gradient_on_map(encoder, "default")
    assert maps.shape[2:] == (5, 5)
    assert gradient.abs().max() > 0


def test_trunk__average_pooled_open_clip_vit(tmp_path):
    encoder = load_encoder(f"local-dir:{models.open_clip_vit(tmp_path / 'model', pool_type='avg')}", device="cpu")
    assert (encoder.trunk.kind, encoder.cam_layer().name) == ("vit-average", "ln_post")
    pixels = pixels_for(encoder, drawn(2))
    torch.testing.assert_close(encoder.from_tokens(encoder.tokens(pixels, 1), 1), encoder.encode_pixels(pixels))
    assert gradient_on_map(encoder, "default")[1].abs().max() > 0


def test_loading__moves_no_random_numbers_and_no_environment(folders):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    environment = dict(os.environ)
    load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    assert torch.equal(torch.rand(3), expected)
    assert dict(os.environ) == environment


def test_loading__unknown_device_and_precision(folders):
    name = f"local-dir:{folders['open_clip_token_vit']}"
    with pytest.raises(UsageError, match="'fp8'; choose one of fp32, bf16, fp16"):
        load_encoder(name, precision="fp8")
    with pytest.raises(UsageError, match="'gpu'"):
        load_encoder(name, device="gpu")
    with pytest.raises(UsageError, match="cuda:99"):
        load_encoder(name, device="cuda:99")
    assert choose_device("cpu") == torch.device("cpu")


def test_loading__fp16_that_the_cpu_cannot_do_is_an_error(folders, monkeypatch):
    def refuse(self, pixels):
        raise RuntimeError("\"some_kernel\" not implemented for 'Half'")

    monkeypatch.setattr("engine.encoder.Encoder.encode_pixels", refuse)
    with pytest.raises(ModelError, match=r"cannot compute in fp16 on this CPU .*use fp32 or bf16"):
        load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu", precision="fp16")


def test_encode_pixels__passes_what_is_not_finite_on(folders):
    encoder = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    with torch.no_grad():
        encoder.model.visual.proj[:, 3] = float("nan")
    embedding = encoder.encode_pixels(np.zeros((2, 64, 64, 3), np.uint8))
    assert embedding[:, 3].isnan().all()
    assert embedding[:, :3].isfinite().all()


def test_encode_pixels__takes_read_only_arrays_without_a_warning(folders, recwarn):
    encoder = load_encoder(f"local-dir:{folders['open_clip_token_vit']}", device="cpu")
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    pixels.flags.writeable = False
    encoder.encode_pixels(pixels)
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_encoder__gpu_is_near_the_cpu(folders, kind, precision):
    cpu = load_encoder(f"local-dir:{folders[kind]}", device="cpu")
    gpu = load_encoder(f"local-dir:{folders[kind]}", device="cuda", precision=precision)
    pixels = pixels_for(cpu, drawn(3))
    least = 0.999999 if precision == "fp32" else 0.99
    assert torch.cosine_similarity(gpu.encode_pixels(pixels).cpu(), cpu.encode_pixels(pixels)).min() > least
    assert torch.cosine_similarity(gpu.encode_text(TEXTS).cpu(), cpu.encode_text(TEXTS)).min() > least
