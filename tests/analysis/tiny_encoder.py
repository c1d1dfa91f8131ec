"""The image side of the tiny models as an encoder, without text tower and cache: what heatmaps and fine-tuning use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import load_file

from engine.pixels import Preprocess
from engine.trunks import describe_trunk
from tests import models

VITS = ("timm_token_vit", "timm_average_vit", "timm_register_vit", "open_clip_token_vit", "open_clip_average_vit")
KINDS = (*VITS, "cnn")


def tiny_encoder(kind: str, folder: Path, seed: int = 0) -> Any:
    """Return a fresh encoder of a kind; its folder is written once."""
    path = folder / f"{kind}-{seed}"
    if not path.exists():
        if kind == "open_clip_average_vit":
            models.open_clip_vit(path, pool_type="avg", seed=seed)
        else:
            models.KINDS[kind](path, seed=seed)
    config = json.loads((path / "open_clip_config.json").read_text())["model_cfg"]
    visual = _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]))
    state = load_file(path / "open_clip_model.safetensors")
    visual.load_state_dict({name.removeprefix("visual."): v for name, v in state.items() if name.startswith("visual.")})
    visual.eval().requires_grad_(False)
    size = config["vision_cfg"]["image_size"]
    return SimpleNamespace(
        id=f"tiny-{kind}",
        model=SimpleNamespace(visual=visual),
        trunk=describe_trunk(visual),
        preprocess=Preprocess(size=(size, size)),
        dim=config["embed_dim"],
        device=torch.device("cpu"),
    )


def some_pixels(encoder: Any, count: int | None = None, seed: int = 0) -> np.ndarray:
    """Return smooth random images of the encoder's input size, (h, w, 3), or (count, h, w, 3)."""
    rng = np.random.default_rng(seed)
    height, width = encoder.preprocess.size
    coarse = rng.integers(0, 255, (count or 1, height // 8, width // 8, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)
    return pixels if count else pixels[0]
