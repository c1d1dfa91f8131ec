"""Every method against pytorch-grad-cam called as its own documentation calls it, one image and one label at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from open_clip.modified_resnet import ModifiedResNet
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit

from analysis import cam
from analysis.cam import explainer as explaining
from engine.errors import DataError, ModelError, UsageError
from engine.pixels import Preprocess
from engine.trunks import describe_trunk
from tests.analysis.tiny_encoder import KINDS, some_pixels, tiny_encoder

CLASSES = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "gradcam-elementwise": "GradCAMElementWise",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "segeigencam": "SegEigenCAM",
    "kpcacam": "KPCA_CAM",
    "fem": "FEM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
    "fullgrad": "FullGrad",
}
BATCHED = [name for name, method in cam.METHODS.items() if method.batched and method.family == "gradients"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def small_resnet() -> Any:
    """Return open_clip's ResNet in small: batch norms of torch's own kind, activations in place."""
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], 32, 4, image_size=64, width=8).eval().requires_grad_(False)
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    return SimpleNamespace(
        id="small-resnet",
        model=SimpleNamespace(visual=visual),
        trunk=describe_trunk(visual),
        preprocess=Preprocess(size=(64, 64)),
        dim=32,
    )


def encoder_of(kind: str, folder: Path) -> Any:
    return small_resnet() if kind == "resnet" else tiny_encoder(kind, folder)


def a_vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(32).astype(np.float32)


def tokens_to_maps(encoder: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what the library's documentation tells users of ViTs to write."""
    trunk = encoder.trunk
    if trunk.kind == "cnn":
        return None
    return lambda values: values[:, trunk.prefix_tokens :].reshape(len(values), *trunk.grid, -1).permute(0, 3, 1, 2)


def by_library(
    encoder: Any, method: str, module: torch.nn.Module, pixels: np.ndarray, vector: np.ndarray
) -> np.ndarray:
    """Return the library's scaled map of one image and one label."""
    options: dict[str, Any] = {"reshape_transform": tokens_to_maps(encoder)}
    if method == "ablationcam":
        options["ablation_layer"] = AblationLayer() if encoder.trunk.kind == "cnn" else AblationLayerVit()
    layers = [] if method == "fullgrad" else [module]
    inputs = encoder.preprocess.normalise(pixels[None]).requires_grad_()
    weight = torch.from_numpy(vector)
    with getattr(pytorch_grad_cam, CLASSES[method])(encoder.model.visual, layers, **options) as library:
        return library(inputs, [lambda embedding: embedding @ weight])[0]


def likeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])


def visible(encoder: Any, method: str, pixels: np.ndarray, seed: int = 1) -> tuple[np.ndarray, cam.HeatMap]:
    """Return a vector, or its opposite, whose map has something to show, and the map."""
    for sign in (1, -1):
        found = cam.heatmap(encoder, pixels, cam.HeadTarget(sign * a_vector(seed)), method=method)
        if not found.empty:
            return sign * a_vector(seed), found
    raise AssertionError("both maps are empty")


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit", "open_clip_average_vit", "resnet"])
@pytest.mark.parametrize("method", CLASSES)
def test_method_equals_the_library_called_by_hand(method: str, kind: str, folder: Path) -> None:
    if kind == "timm_token_vit" and method in ("scorecam", "ablationcam"):
        pytest.skip("hundreds of forward passes; shown on the smaller ViTs")
    if kind == "resnet" and method == "fem":
        pytest.skip("of four places none lies two deviations above their mean")
    encoder = encoder_of(kind, folder)
    if method not in cam.methods_for(encoder.trunk):
        pytest.skip("not for this tower, or not in the installed library")
    pixels = some_pixels(encoder)
    module = encoder.trunk.cam_layer("default").module
    vector, found = visible(encoder, method, pixels)
    theirs = by_library(encoder, method, module, pixels, vector)
    assert likeness(found.map, theirs) > 0.999
    assert found.method == method and found.map.max() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("kind", ["timm_token_vit", "open_clip_token_vit", "timm_register_vit", "cnn", "resnet"])
@pytest.mark.parametrize("layer", ["default", -2])
def test_labels_of_a_batch_equal_the_librarys_loop(layer: cam.Layer, kind: str, folder: Path) -> None:
    encoder = encoder_of(kind, folder)
    pixels = some_pixels(encoder, 3)
    vectors = [a_vector(seed) for seed in range(4)]
    targets = [cam.HeadTarget(vector, name=str(place)) for place, vector in enumerate(vectors)]
    module = encoder.trunk.cam_layer(layer).module
    for method in BATCHED:
        found = cam.Explainer(encoder, layer, method).batch(pixels, targets)
        assert found.raw.shape[:2] == (3, 4) and found.raw.dtype == torch.float32 and bool(found.reached.all())
        other = cam.Explainer(encoder, layer, method, by_library=True).batch(pixels, targets)
        for image in range(3):
            for place in range(4):
                ours, combined = found.raw[image, place].numpy(), other.raw[image, place].numpy()
                assert likeness(ours, combined) > 0.999, method
        theirs = by_library(encoder, method, module, pixels[1], vectors[2])
        seen = np.maximum(found.raw[1, 2].numpy(), 0)
        if seen.any():
            enlarged = torch.nn.functional.interpolate(
                torch.from_numpy(seen)[None, None], size=theirs.shape, mode="bilinear"
            )
            assert likeness(enlarged[0, 0].numpy(), theirs) > 0.999, method
        with torch.no_grad():
            embeddings = encoder.model.visual(encoder.preprocess.normalise(pixels)).numpy()
        np.testing.assert_allclose(found.scores.numpy(), embeddings @ np.array(vectors).T, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cnn"])
@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam", "grad-eclip", "legrad", "rollout"])
def test_map_from_tokens_is_the_map_from_pixels(method: str, kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    if method not in cam.methods_for(encoder.trunk):
        pytest.skip("not for this tower")
    pixels = some_pixels(encoder, 2)
    explainer = cam.Explainer(encoder, method=method)
    targets = [cam.TextTarget(a_vector(seed)) for seed in range(3)]
    expected = explainer.batch(pixels, targets)
    first = encoder.trunk.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for block in {0, explainer.first_block}:
        with torch.no_grad():
            tokens = encoder.trunk.tokens(encoder.preprocess.normalise(pixels), block).numpy()
        calls: list[int] = []
        found = explainer.batch(cam.Tokens(tokens, block), targets)
        torch.testing.assert_close(found.raw, expected.raw, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
        assert block == 0 or not calls, "the blocks before the tokens are not run"
    first.remove()
    with pytest.raises(UsageError, match="earlier one"):
        explainer.batch(cam.Tokens(tokens, explainer.first_block + 1), targets)


def test_large_batches_are_taken_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, targets = some_pixels(encoder, 5), [cam.TextTarget(a_vector(seed)) for seed in range(3)]
    explainer = cam.Explainer(encoder, method="layercam")
    whole = explainer.batch(pixels, targets)
    monkeypatch.setattr(explaining, "MOST_VALUES", 2 * 3 * 64 * 64 * 3)
    in_parts = explainer.batch(pixels, targets)
    torch.testing.assert_close(in_parts.raw, whole.raw)
    torch.testing.assert_close(in_parts.scores, whole.scores)


def test_weights_keep_their_gradients_and_their_wish_for_them(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    weights = list(encoder.model.visual.parameters())
    for place, weight in enumerate(weights):
        weight.requires_grad_(place % 2 == 0)
        weight.grad = torch.ones_like(weight) if place % 2 == 0 else None
    for method in ("gradcam", "grad-eclip", "ablationcam"):
        cam.heatmap(encoder, some_pixels(encoder), cam.TextTarget(a_vector(1)), method=method)
    for place, weight in enumerate(weights):
        assert weight.requires_grad == (place % 2 == 0)
        assert weight.grad is None or bool((weight.grad == 1).all())


def test_library_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    for method in ("scorecam", "ablationcam"):
        cam.heatmap(encoder, some_pixels(encoder), cam.TextTarget(a_vector(1)), method=method)
    resnet = small_resnet()
    visible(resnet, "fullgrad", some_pixels(resnet))
    said = capfd.readouterr()
    assert not said.out and not said.err


# -- What cannot be served ---------------------------------------------------------------------------------------------


def test_method_that_a_tower_does_not_support_is_refused_with_those_that_it_does(folder: Path) -> None:
    cnn, average = tiny_encoder("cnn", folder), tiny_encoder("timm_average_vit", folder)
    for method in ("grad-eclip", "legrad", "rollout"):
        with pytest.raises(UsageError, match=f"'{method}' does not fit.*attention.*It has gradcam"):
            cam.Explainer(cnn, method=method)
    with pytest.raises(UsageError, match=r"class token.*It has .*legrad, rollout"):
        cam.Explainer(average, method="grad-eclip")
    with pytest.raises(UsageError, match="a transformer has not"):
        cam.Explainer(average, method="fullgrad")
    with pytest.raises(UsageError, match="of a kind of their own"):
        cam.Explainer(cnn, method="fullgrad")
    with pytest.raises(UsageError, match="did you mean 'gradcam'"):
        cam.Explainer(cnn, method="grad-cam")
    assert "fullgrad" in cam.methods_for(small_resnet().trunk)


def test_layer_with_no_such_module_names_the_nearest(folder: Path) -> None:
    encoder = tiny_encoder("timm_token_vit", folder)
    with pytest.raises(UsageError, match=r"no layer 'trunk\.block\.3\.norm1'.*nearest: .*trunk\.blocks\.3\.norm1"):
        cam.Explainer(encoder, "trunk.block.3.norm1")
    with pytest.raises(UsageError, match="6 blocks"):
        cam.Explainer(encoder, 6)
    with pytest.raises(UsageError, match="no map of the 10 x 10 patches"):
        cam.heatmap(encoder, some_pixels(encoder), cam.TextTarget(a_vector(1)), "trunk.head_drop")
    cnn = tiny_encoder("cnn", folder)
    with pytest.raises(UsageError, match="no height and width"):
        cam.heatmap(cnn, some_pixels(cnn), cam.TextTarget(a_vector(1)), "head.proj")
    vit = tiny_encoder("open_clip_token_vit", folder)
    with pytest.raises(UsageError, match="MultiheadAttention gives a tuple"):
        cam.heatmap(vit, some_pixels(vit), cam.TextTarget(a_vector(1)), "transformer.resblocks.1.attn")
    with pytest.raises(ModelError, match="never calls"):
        cam.heatmap(vit, some_pixels(vit), cam.TextTarget(a_vector(1)), "transformer.resblocks.1.attn.out_proj")


@pytest.mark.parametrize("kind", ["timm_token_vit", "cnn"])
def test_layer_by_its_name_is_the_layer_by_its_number(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, target = some_pixels(encoder), cam.TextTarget(a_vector(1))
    name = encoder.trunk.cam_layer(2).name
    by_name, by_number = cam.heatmap(encoder, pixels, target, name), cam.heatmap(encoder, pixels, target, 2)
    np.testing.assert_array_equal(by_name.raw, by_number.raw)
    assert by_name.layer == by_number.layer == name


@pytest.mark.parametrize(
    ("method", "layer", "said"),
    [
        ("rollout", 3, "all blocks"),
        ("grad-eclip", "trunk.norm", "the last block"),
        ("legrad", "trunk.norm", "first block"),
    ],
)
def test_methods_with_layers_of_their_own_take_no_other(method: str, layer: cam.Layer, said: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=said):
        cam.Explainer(tiny_encoder("timm_token_vit", folder), layer, method)


def test_methods_that_run_the_tower_want_its_images(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    explainer = cam.Explainer(encoder, method="scorecam")
    assert explainer.first_block is None
    with pytest.raises(UsageError, match="needs the images"):
        explainer.batch(cam.Tokens(np.zeros((1, 17, 32), np.float32), 0), [cam.TextTarget(a_vector(1))])
    with pytest.raises(DataError, match="uint8"):
        cam.Explainer(encoder).batch(np.zeros((2, 64, 64, 3), np.float32), [cam.TextTarget(a_vector(1))])


@pytest.mark.parametrize("method", cam.METHODS)
def test_flat_or_zero_map_is_never_stretched_into_one(method: str, folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    if method not in cam.methods_for(encoder.trunk):
        pytest.skip("not for this tower")
    with torch.no_grad():
        # Without places and differences between patches, nothing can say where.
        encoder.model.visual.positional_embedding.zero_()
    grey = np.full((64, 64, 3), 90, np.uint8)
    target = cam.HeadTarget(a_vector(1), name="edema")
    found = cam.Explainer(encoder, method=method).batch_heatmaps(grey[None], [target], state_unreached=True)[0][0]
    assert found.note and (found.empty or found.flat)
    assert found.map.max() - found.map.min() < 1e-4
