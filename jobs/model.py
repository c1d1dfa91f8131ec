"""`fluoro model info` and `fluoro model pack`: what a model is, and how to have it as a folder that needs no network.

Comes in: a model's name. Goes out: its architecture, size, digest, preprocessing, id and the layers that Grad-CAM may
look at; or a folder, loaded once from where it was written, so that what is said of it was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.hf_model import HFTextEncoder
from pydantic import Field

from engine.encoder import Encoder, load_encoder
from engine.model_folder import pack_model
from jobs.config import JobConfig, ModelOptions
from jobs.progress import spoken_bytes


class InfoConfig(ModelOptions):
    """What `fluoro model info` needs."""


class PackConfig(JobConfig):
    """What `fluoro model pack` needs."""

    model: str = Field(description="hf-hub:OWNER/NAME, or local-dir:PATH to copy a folder")
    directory: Path = Field(description="folder to write; must not exist, or be empty")
    overwrite: bool = Field(False, description="replace a folder that is there")


@dataclass(frozen=True)
class Info:
    """What a model is.

    Parameters
    ----------
    encoder : str
        Its id: what the cache, `index` and `search` know it by.
    image_tower, text_tower : str
        In words.
    parameters, image_parameters : int
    dim, context_length : int
        Of an embedding; of a text, in tokens.
    logit_scale : float
    logit_bias : float or None
    weights : Path
    weights_bytes : int
    weights_digest : str
        BLAKE2b-256 of the file's bytes, in hexadecimal.
    cam_layer, paper_layer : str
        Where Grad-CAM looks by default and under the study's protocol.
    preprocess, description : dict
    """

    encoder: str
    name: str
    source: str
    precision: str
    device: str
    image_tower: str
    text_tower: str
    parameters: int
    image_parameters: int
    dim: int
    context_length: int
    logit_scale: float
    logit_bias: float | None
    weights: Path
    weights_bytes: int
    weights_digest: str
    cam_layer: str
    paper_layer: str
    preprocess: dict[str, Any]
    description: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """Return it in words."""
        yield f"{self.name}: {self.encoder}"
        yield f"image tower: {self.image_tower}; {self.image_parameters / 1e6:.1f} M parameters"
        text_parameters = self.parameters - self.image_parameters
        yield f"text tower: {self.text_tower}; {text_parameters / 1e6:.1f} M parameters, {self.context_length} tokens"
        bias = "" if self.logit_bias is None else f", bias {self.logit_bias:.3g}"
        yield f"embedding: {self.dim} numbers, temperature {self.logit_scale:.4g}{bias}"
        yield f"weights: {self.weights} ({spoken_bytes(self.weights_bytes)}), BLAKE2b-256 {self.weights_digest}"
        height, width = self.preprocess["size"]
        way = f"{self.preprocess['resize_mode']}, {self.preprocess['interpolation']}"
        mean, std = (", ".join(f"{value:.4g}" for value in self.preprocess[key]) for key in ("mean", "std"))
        yield f"preprocessing: {height} x {width} px, {way}; mean {mean}; std {std}"
        yield f"pixels in the cache: {self.preprocess['id']}"
        yield f"heatmaps at: {self.cam_layer} (the study's own layer: {self.paper_layer})"
        yield f"loaded in {self.precision} on {self.device}"


@dataclass(frozen=True)
class Packed:
    """What `fluoro model pack` left."""

    directory: Path
    encoder: str
    files: list[str]
    bytes: int

    def lines(self) -> Iterator[str]:
        """Return what was written, and how to use it."""
        yield f"{len(self.files)} files, {spoken_bytes(self.bytes)}: {', '.join(self.files)}"
        yield f"loads without a network as local-dir:{self.directory}, as encoder {self.encoder}"


def info(config: InfoConfig) -> Info:
    """Load a model and say what it is."""
    precision = "fp32" if config.precision == "auto" else config.precision
    encoder = load_encoder(config.model, device=config.device, precision=precision)
    files = encoder.files
    return Info(
        encoder=encoder.id,
        name=encoder.name,
        source=encoder.source,
        precision=encoder.precision,
        device=str(encoder.device),
        image_tower=_image_tower(encoder),
        text_tower=_text_tower(encoder),
        parameters=encoder.parameters["all"],
        image_parameters=encoder.parameters["image"],
        dim=encoder.dim,
        context_length=encoder.tokenizer.context_length,
        logit_scale=encoder.logit_scale,
        logit_bias=encoder.logit_bias,
        weights=files.weights,
        weights_bytes=files.weights.stat().st_size,
        weights_digest=files.weights_digest,
        cam_layer=encoder.cam_layer().name,
        paper_layer=encoder.cam_layer("paper").name,
        preprocess=encoder.preprocess.description,
        description=encoder.description,
    )


def pack(config: PackConfig) -> Packed:
    """Write a model as a folder, and load it from there."""
    directory = pack_model(config.model, config.directory, overwrite=config.overwrite)
    encoder = load_encoder(f"local-dir:{directory}", device="cpu")
    written = sorted(path for path in directory.iterdir() if path.is_file())
    return Packed(
        directory=directory,
        encoder=encoder.id,
        files=[path.name for path in written],
        bytes=sum(path.stat().st_size for path in written),
    )


def _image_tower(encoder: Encoder) -> str:
    vision = encoder.files.config["model_cfg"]["vision_cfg"]
    trunk = encoder.trunk
    built = (
        f"timm {vision['timm_model_name']}" if vision.get("timm_model_name") else type(encoder.model.visual).__name__
    )
    if trunk.grid is None:
        return f"{built}, CNN of {len(trunk.blocks)} stages"
    pooled = {"vit-token": "its class token", "vit-average": "the average", "vit-attention": "attention"}[trunk.kind]
    grid = f"{trunk.grid[0]} x {trunk.grid[1]} patches"
    return f"{built}, transformer of {len(trunk.blocks)} blocks over {grid}, pooled by {pooled}"


def _text_tower(encoder: Encoder) -> str:
    text = getattr(encoder.model, "text", None)
    if isinstance(text, HFTextEncoder):
        cfg = text.config
        layers, width = getattr(cfg, "num_hidden_layers", "?"), getattr(cfg, "hidden_size", "?")
        return f"Hugging Face {cfg.model_type}, {layers} layers of width {width}"
    blocks = getattr(encoder.model, "transformer", None) or getattr(text, "transformer", None)
    return f"open_clip's own, {len(blocks.resblocks)} layers" if blocks is not None else type(text).__name__
