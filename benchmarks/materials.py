"""What benchmarks work on: images of known content, models of known shape, made where they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


def write_jpegs(folder: Path, count: int, size: int = 512, quality: int = 90) -> list[Path]:
    """Write different colour JPEGs, (size, size), of natural roughness (amplitude falls with frequency, some noise)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(size))
    scenes = [_rough(generator, size, size, 3) for _ in range(16)]
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            turn = number // len(scenes)
            scene = np.roll(scenes[number % len(scenes)], (turn * 7 % size, turn * 13 % size), (0, 1))
            Image.fromarray(scene).save(path, quality=quality)
    return paths


def write_grey_pngs(folder: Path, count: int, width: int = 2048, height: int = 2500) -> list[Path]:
    """Write different grey PNGs in the size of IU-Xray's Kaggle copy: smooth, with a radiograph's grain."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(width))
    scene = _rough(generator, height, width, 1)[..., 0]
    paths = [folder / f"{number:06d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            Image.fromarray(np.roll(scene, (number * 31, number * 57), (0, 1))).save(path)
    return paths


def write_small_pngs(folder: Path, count: int, size: int = 16) -> None:
    """Write many tiny grey PNGs, a thousand a folder."""
    generator = np.random.Generator(np.random.PCG64(7))
    for number in range(count):
        parent = folder / f"{number // 1000:05d}"
        if number % 1000 == 0:
            parent.mkdir(parents=True, exist_ok=True)
        path = parent / f"{number:07d}.png"
        pixels = generator.integers(0, 256, (size, size), np.uint8)
        if not path.exists():
            Image.fromarray(pixels).save(path, compress_level=0)


def write_model(folder: Path, architecture: str = "ViT-B-32") -> Path:
    """Write a model of open_clip's with random weights as a `local-dir:` folder."""
    import open_clip

    return _write_random(folder, open_clip.get_model_config(architecture), lambda: open_clip.create_model(architecture))


def write_tiny_model(folder: Path) -> Path:
    """Write a model that costs next to nothing, for what is measured around the model; random weights."""
    import open_clip

    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 32}
    text = {"layers": 1, "width": 64, "heads": 2, "context_length": 77, "vocab_size": 49408}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    return _write_random(folder, config, lambda: open_clip.CLIP(**config))


def _write_random(folder: Path, config: dict, build: Callable[[], torch.nn.Module]) -> Path:
    import open_clip

    if (folder / "open_clip_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    document = {"model_cfg": config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def model_named(name: str, folder: Path) -> str:
    """Return a model's name for fluoroscope: as it stands, or of a folder made for one of open_clip's architectures."""
    return name if ":" in name or name == "phantom-clip" else f"local-dir:{write_model(folder / name, name)}"


def _rough(generator: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    frequencies = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None] ** 2
    amplitude = (frequencies + 1e-5) ** -0.6
    values = np.empty((height, width, channels))
    for channel in range(channels):
        phases = generator.standard_normal(amplitude.shape) + 1j * generator.standard_normal(amplitude.shape)
        values[..., channel] = np.fft.irfft2(phases * amplitude, s=(height, width))
    values = (values - values.mean()) / values.std() * 50 + 128 + generator.normal(0, 3, values.shape)
    return np.clip(values, 0, 255).astype(np.uint8)
