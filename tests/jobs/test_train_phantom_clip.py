"""phantom-clip's training: a tiny run from nothing to a loadable folder, and what its parts promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from engine.errors import UsageError
from engine.labels import NO_FINDING, STUDY_LABELS
from engine.phantom import draw_phantom
from engine.resources import resource
from jobs import phantom_captions, phantom_clip_folder, phantom_pool, train_phantom_clip
from jobs.config import load_config

POOL = phantom_pool.PoolConfig(seed=501, count=6, enrich=0.2, image_size=48, patch_size=12, drawn_size=64)


def tiny_config(output: Path, **changes: object) -> train_phantom_clip.Config:
    values = {
        "output": output,
        "phantoms": 24,
        "first_phantoms": 24,
        "vocabulary_phantoms": 24,
        "check_phantoms": 0,
        "check_every": 1,
        "embed_dim": 16,
        "vision": {"image_size": 48, "patch_size": 12, "width": 32, "layers": 2, "head_width": 16},
        "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 32},
        "objective": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
        "workers": 0,
        "threads": 1,
        **changes,
    }
    return load_config(train_phantom_clip.Config, values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> train_phantom_clip.Result:
    before = torch.get_num_threads()
    try:
        return train_phantom_clip.run(tiny_config(tmp_path_factory.mktemp("model") / "small"))
    finally:
        torch.set_num_threads(before)


def load(folder: Path, tmp_path: Path) -> tuple[torch.nn.Module, object]:
    """Load a folder through open_clip alone, with its own place written into a copy of its config."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(hf_model_name=str(copy), hf_tokenizer_name=str(copy))
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{copy}", weights_only=True)
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{copy}")


def test_run__writes_a_folder_that_open_clip_loads_offline(trained: train_phantom_clip.Result, tmp_path: Path) -> None:
    assert trained.steps == 2
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {
        "config.json", "open_clip_config.json", "open_clip_model.safetensors", "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    model, tokenizer = load(trained.folder, tmp_path)
    weights = safetensors.torch.load_file(trained.folder / "open_clip_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, weights[name].float(), rtol=0, atol=0)
    tokens = tokenizer(["Pleural Effusion"])  # type: ignore[operator]
    assert tokens.shape == (1, 32)
    assert 1 not in tokens  # no unknown piece
    assert model.encode_text(tokens).shape == (1, 16)
    assert model.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 16)


def test_run__twice_gives_the_same_model(trained: train_phantom_clip.Result, tmp_path: Path) -> None:
    again = train_phantom_clip.run(tiny_config(tmp_path / "again"))
    for path in trained.folder.iterdir():
        other = again.folder / path.name
        if path.suffix != ".safetensors":
            assert path.read_bytes() == other.read_bytes(), path.name
            continue
        # Weights to the last bit of float16: where memory lies decides how a processor sums.
        first, second = safetensors.torch.load_file(path), safetensors.torch.load_file(other)
        assert first.keys() == second.keys()
        for name, weights in first.items():
            torch.testing.assert_close(weights, second[name], rtol=2e-3, atol=1e-5, msg=name)


def test_run__refuses_seeds_of_data_sets_and_an_output_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seed 7 is one that data sets"):
        train_phantom_clip.run(tiny_config(tmp_path / "new", seed=7))
    with pytest.raises(UsageError, match="overwrite=true"):
        train_phantom_clip.run(tiny_config(tmp_path))
    with pytest.raises(UsageError, match="no multiple of patch_size 20"):
        train_phantom_clip.run(tiny_config(tmp_path / "new", vision={"image_size": 48, "patch_size": 20}))


def test_config__the_shipped_file_says_the_defaults() -> None:
    shipped = load_config(train_phantom_clip.Config, resource("configs/phantom_clip.yaml"))
    assert shipped == train_phantom_clip.Config()


def test_vocabulary__knows_every_label_and_does_not_change() -> None:
    texts = ["Zebra zebra seen.", *phantom_pool.all_phrases()]
    pieces = phantom_clip_folder.build_vocabulary(texts)
    assert pieces == phantom_clip_folder.build_vocabulary(texts)
    assert len(pieces) == len(set(pieces))
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word for label in STUDY_LABELS for word in label.lower().split()}
    assert words <= set(pieces)
    assert "zebra" in pieces


def test_draw_shard__sees_what_the_models_own_transform_gives() -> None:
    shard = phantom_pool.draw_shard(POOL, 2, 3)
    cfg = open_clip.transform.PreprocessCfg(size=48, mean=(0,) * 3, std=(1,) * 3, interpolation="bicubic")
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    for row in range(3):
        phantom = draw_phantom(POOL.seed, 2 + row, size=64, enrich=0.2)
        wanted = (transform(Image.fromarray(phantom.pixels))[0] * 255).round().numpy()
        np.testing.assert_array_equal(shard.pixels[row], wanted)
        np.testing.assert_array_equal(shard.labels[row], phantom.labels)
        for column, label in enumerate(STUDY_LABELS):
            mask = phantom.masks.get(label)
            share = 0 if mask is None else mask.reshape(4, 16, 4, 16).mean(axis=(1, 3)) * 255
            np.testing.assert_allclose(shard.coverage[row, column], share, atol=1)


def test_pool__kept_shards_are_read_back_equal(tmp_path: Path) -> None:
    drawn = phantom_pool.Pool(POOL, workers=0, directory=tmp_path)
    kept = phantom_pool.Pool(POOL, workers=0, directory=tmp_path)
    for part in ("pixels", "labels", "coverage"):
        np.testing.assert_array_equal(getattr(drawn, part), getattr(kept, part))
    assert drawn.reports == kept.reports
    assert drawn.filled == POOL.count


def test_augment__moves_coverage_with_the_pixels() -> None:
    grid = torch.zeros(64, 1, 4, 4)
    grid[:, 0, 1, 2] = 1.0
    pixels = grid[:, 0].repeat_interleave(12, 1).repeat_interleave(12, 2)
    moved, coverage = phantom_pool.augment(pixels, grid, 12, torch.Generator().manual_seed(3))
    assert moved.shape == pixels.shape
    for image, share in zip(moved, coverage[:, 0], strict=True):
        y, x = divmod(int((share == 1).float().argmax()), 4)
        inside = image[12 * y + 4 : 12 * y + 8, 12 * x + 4 : 12 * x + 8].mean()
        assert inside > image.mean() + 0.3
    assert bool(coverage.isnan().any())


def test_captions__assert_only_what_the_image_has() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 14)) < 0.2).astype(np.int8)
    labels[:, -1] = labels[:, :-1].sum(axis=1) == 0
    writer = phantom_captions.CaptionWriter(np.random.Generator(np.random.PCG64(0)))
    reports = [f"report {row}" for row in range(50)]
    for _ in range(20):
        captions, asserted = writer.write(labels, reports, reports)
        assert (asserted <= labels).all()
        assert (asserted.sum(axis=1) > 0).all()
        assert all(captions)


def test_captions__without_reports_label_names_are_used() -> None:
    labels = np.zeros((1, 14), np.int8)
    labels[0, -1] = 1
    writer = phantom_captions.CaptionWriter(np.random.Generator(np.random.PCG64(0)))
    wordings = (NO_FINDING.lower(), *phantom_captions.SYNONYMS[NO_FINDING])
    for _ in range(30):
        captions, _ = writer.write(labels, [""], [""])
        assert any(wording in captions[0] for wording in wordings)


def test_join__as_in_writing() -> None:
    assert phantom_captions.join(["a"]) == "a"
    assert phantom_captions.join(["a", "b"]) == "a and b"
    assert phantom_captions.join(["a", "b", "c"]) == "a, b and c"
