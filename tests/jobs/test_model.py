"""`model info` and `model pack` on small folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.encoder import load_encoder
from engine.errors import UsageError
from engine.model_files import file_digest
from jobs import model as model_job
from jobs.plain import plain
from tests import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return models.biomedclip_like(tmp_path_factory.mktemp("model") / "clip")


def test_info__says_what_the_model_is(folder):
    found = model_job.info(model_job.InfoConfig(model=f"local-dir:{folder}", device="cpu"))
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    assert found.encoder == encoder.id
    assert found.parameters == sum(parameter.numel() for parameter in encoder.model.parameters())
    assert found.weights_digest == file_digest(folder / "open_clip_model.safetensors")
    text = "\n".join(found.lines())
    assert "timm test_vit, transformer of 6 blocks over 10 x 10 patches, pooled by its class token" in text
    assert "Hugging Face bert, 2 layers of width 32" in text
    assert "160 x 160 px, shortest, bicubic; mean 0.4815, 0.4578, 0.4082" in text
    assert "trunk.blocks.5.norm1 (the study's own layer: trunk.blocks.5.attn.proj)" in text
    assert encoder.id in text
    assert json.loads(json.dumps(plain(found)))["dim"] == 32


@pytest.mark.parametrize(
    ("build", "expected"),
    [(models.cnn, "CNN of 5 stages"), (models.open_clip_pair, "open_clip's own, 2 layers")],
)
def test_info__of_other_towers(tmp_path, build, expected):
    found = model_job.info(model_job.InfoConfig(model=f"local-dir:{build(tmp_path / 'model')}", device="cpu"))
    assert expected in "\n".join(found.lines())


def test_pack__says_what_was_written(folder, tmp_path):
    config = model_job.PackConfig(model=f"local-dir:{folder}", directory=tmp_path / "packed")
    packed = model_job.pack(config)
    assert packed.encoder == load_encoder(f"local-dir:{folder}", device="cpu").id
    assert "open_clip_config.json" in packed.files
    assert f"local-dir:{tmp_path / 'packed'}" in "\n".join(packed.lines())
    with pytest.raises(UsageError, match="not empty"):
        model_job.pack(config)
    assert model_job.pack(config.model_copy(update={"overwrite": True})).encoder == packed.encoder
