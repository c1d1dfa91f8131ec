"""A loaded image-text model: pixels and texts in, embeddings out, under an id that says exactly which numbers they are.

The model is open_clip's own, built by its factory from files that `engine.model_files` found. An encoder's id is a
short readable name, the precision and a hash over weights, architecture, preprocessing, tokenizer, precision and the
way texts are padded; where the files lie and how large batches are is not in it.

Precision means the numbers that weights and activations are kept in: the whole model is converted once. Inputs are
normalised in float32 before, and embeddings are returned in float32, un-normalised, as the model gives them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.errors import ModelError, UsageError
from engine.keys import short_hash
from engine.model_building import build_model, build_tokenizer
from engine.model_files import ModelFiles, resolve_model
from engine.pixels import Preprocess
from engine.text_towers import describe_text_tower
from engine.trunks import CamLayer, Trunk, describe_trunk

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Part of every encoder id: to be raised whenever the same files would give other numbers.
ENCODER_VERSION = 1

# Where the tower allows, texts are cut to the shortest of these lengths that holds them, and run in batches of a fixed
# number of rows: a text's embedding then depends on nothing but the text.
TEXT_LENGTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
TEXT_ROWS = {"cpu": 8, "cuda": 64}
TOKENISED_AT_ONCE = 512


def load_encoder(
    name: str | ModelFiles, *, device: str = "auto", precision: str = "fp32", decoder: str = "exact"
) -> Encoder:
    """Load a model.

    Parameters
    ----------
    name : str or ModelFiles
        ``ViT-B-32/laion2b_s34b_b79k``, ``hf-hub:OWNER/NAME``, ``local-dir:PATH`` or ``phantom-clip``. The last two use
        no network.
    device : str
        "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
    precision : "fp32", "bf16" or "fp16"
        What weights and activations are kept in. On a CPU without such instructions bf16 and fp16 are slow, not wrong.
        `engine.precision` chooses one by model and machine.
    decoder : "exact" or "fast"
        See `engine.pixels.Preprocess`; part of the encoder's id.

    Raises
    ------
    ModelError
        The model cannot be found, its weights are missing, of another architecture, or hold more than tensors.
    UsageError
        An unknown device or precision.
    """
    if precision not in DTYPES:
        raise UsageError(f"unknown precision {precision!r}; choose one of {', '.join(DTYPES)}")
    place = choose_device(device)
    files = resolve_model(name) if isinstance(name, str) else name
    hashing = files.hashing  # which needs Python's lock no more than loading does, so both go on at once
    model, tokenizer = build_model(files), build_tokenizer(files)
    hashing.result()
    encoder = Encoder(model, tokenizer, files, device=place, precision=precision, decoder=decoder)
    encoder.wanted_device = device
    if place.type == "cpu" and precision == "fp16":
        _check_half_on_cpu(encoder)
    return encoder


def choose_device(device: str) -> torch.device:
    """Return a device by name; UsageError where this machine does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; choose auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        there = f"has {torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "has no CUDA device"
        raise UsageError(f"device {device!r} is asked for, but this machine {there}; choose auto or cpu")
    return chosen


class Encoder:
    """An image-text model that is ready to be used; made by `load_encoder`.

    Attributes
    ----------
    id : str
        ``<name>-<precision>-<12 hex digits>``.
    name : str
        Short readable name, from the model's files.
    source : str
        The name that it was loaded by.
    precision : "fp32", "bf16" or "fp16"
    precision_reason : str
        Why this one, for the log; see `engine.precision.load_for`.
    device : torch.device
    wanted_device : str
        What was asked for, such as "auto"; a worker elsewhere may have another device.
    dim : int
        Length of an embedding.
    logit_scale, logit_bias : float, float or None
        The model's own temperature (already exponentiated) and bias.
    preprocess : Preprocess
    description : dict
        Everything that the id stands for, fit for JSON and free of paths.
    trunk : Trunk
        The image tower's structure.
    model, tokenizer
        open_clip's own; the model is in evaluation mode.
    files : ModelFiles
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        files: ModelFiles,
        *,
        device: torch.device,
        precision: str,
        decoder: str = "exact",
    ) -> None:
        self.files = files
        self.name = files.name
        self.source = files.source
        self.precision = precision
        self.precision_reason = "as asked for"
        self.device = device
        self.wanted_device = str(device)
        self.dtype = DTYPES[precision]
        self.tokenizer = tokenizer
        self.preprocess = replace(Preprocess.from_cfg(model.visual.preprocess_cfg), decoder=decoder)
        # read before conversion: bfloat16 would round the temperature to three digits
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach().float())
        self.dim = int(files.config["model_cfg"]["embed_dim"])
        self.model = model.to(device=device, dtype=self.dtype).eval()
        self.trunk: Trunk = describe_trunk(model.visual)
        if self.trunk.kind == "cnn" and device.type == "cpu":
            # A third faster on processors, the same numbers to rounding.
            model.visual.to(memory_format=torch.channels_last)
        self._text_tower = describe_text_tower(model, tokenizer)
        self._text_lengths = TEXT_LENGTHS if self._text_tower.can_be_cut else ()
        self._text_rows = TEXT_ROWS.get(device.type, TEXT_ROWS["cuda"])
        self.description = self._describe()
        hashed = json.dumps({**self.description, "name": None}, sort_keys=True)
        self.id = f"{self.name}-{precision}-{short_hash(hashed)}"

    def __repr__(self) -> str:
        return f"Encoder({self.id!r}, device={str(self.device)!r})"

    def _describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": ENCODER_VERSION,
            "precision": self.precision,
            "dim": self.dim,
            **self.files.description,
            "preprocess": self.preprocess.description,
            "context_length": int(self.tokenizer.context_length),
            "text_lengths": list(self._text_lengths),
        }

    # -- Images ------------------------------------------------------------------------------------------------------

    def input_of(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Return the image tower's input for pixels: uint8 (b, h, w, 3) to (b, 3, h, w) on the encoder's device."""
        values = pixels
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(values if values.flags.writeable else values.copy())
        if values.ndim != 4 or tuple(values.shape[1:3]) != self.preprocess.size:
            height, width = self.preprocess.size
            raise UsageError(
                f"pixels for {self.name} must be uint8 (b, {height}, {width}, 3), not {tuple(values.shape)}"
            )
        return self.preprocess.normalise(values.to(self.device, non_blocking=True)).to(self.dtype)

    @torch.no_grad()
    def encode_pixels(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Embed images.

        Parameters
        ----------
        pixels : uint8 (b, h, w, 3)
            What `preprocess` gives, stacked.

        Returns
        -------
        Tensor of float32 (b, dim), on the encoder's device
            Un-normalised. NaN and infinity are passed on as the model gives them.
        """
        return self.encode_batch(pixels)["image"]

    @torch.no_grad()
    def encode_batch(
        self, pixels: np.ndarray | Tensor, *, image: bool = True, layers: Sequence[int] = ()
    ) -> dict[str | int, Tensor]:
        """Compute embeddings and what enters some blocks in one forward pass.

        Parameters
        ----------
        pixels : uint8 (b, h, w, 3)
        image : bool
            Whether the embeddings are wanted.
        layers : sequence of int
            Blocks, counted from 0.

        Returns
        -------
        dict
            "image": float32 (b, dim); for each layer: float32 (b, n, width). The same numbers as from `encode_pixels`
            and `tokens`.
        """
        images = self.input_of(pixels)
        if len(images) == 0:
            return {"image": torch.zeros(0, self.dim, device=self.device)}
        with self._exact():
            if not image:
                return {layer: self.trunk.tokens(images, layer).float() for layer in layers}
            with self.trunk.watched(layers) as entered:
                embeddings = self.model.encode_image(images, normalize=False).float()
            return {"image": embeddings, **{layer: entered[layer].float() for layer in layers}}

    def compiled(self) -> Callable[[np.ndarray | Tensor], Tensor]:
        """Return `encode_pixels` with the image tower compiled; the first batch pays for it, one shape serves all.

        Where the compiler fails (no C compiler, an operation that it does not know) the log says so, and the tower runs
        as it is.
        """
        forward = torch.compile(lambda images: self.model.encode_image(images, normalize=False), dynamic=False)
        working = True

        @torch.no_grad()
        def encode(pixels: np.ndarray | Tensor) -> Tensor:
            nonlocal working
            if working:
                try:
                    with self._exact():
                        return forward(self.input_of(pixels)).float()
                except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                    working = False
                    first = str(error).strip().splitlines()[0]
                    log.warning("the image tower cannot be compiled (%s); it runs uncompiled", first)
            return self.encode_pixels(pixels)

        return encode

    @torch.no_grad()
    def tokens(self, pixels: np.ndarray | Tensor, layer: int) -> Tensor:
        """Return what enters a transformer block of the image tower.

        Parameters
        ----------
        pixels : uint8 (b, h, w, 3)
        layer : int
            The block, counted from the end if negative: -1 is what enters the last one.

        Returns
        -------
        Tensor of float32 (b, n, width), on the encoder's device
            Class and register tokens first, then the patches row by row.

        Raises
        ------
        UsageError
            A CNN has no tokens, or there is no such block.
        """
        with self._exact():
            return self.trunk.tokens(self.input_of(pixels), layer).float()

    @torch.no_grad()
    def from_tokens(self, tokens: np.ndarray | Tensor, layer: int) -> Tensor:
        """Compute on from `tokens` (b, n, width) of the same layer to embeddings: float32 (b, dim)."""
        values = torch.as_tensor(np.array(tokens) if isinstance(tokens, np.ndarray) else tokens)
        with self._exact():
            return self.trunk.from_tokens(values.to(self.device, self.dtype), layer).float()

    def cam_layer(self, which: str | int | None = "default") -> CamLayer:
        """Return the layer at which Grad-CAM looks; see `engine.trunks.Trunk.cam_layer`."""
        return self.trunk.cam_layer(which)

    # -- Texts -------------------------------------------------------------------------------------------------------

    def encode_text(self, texts: list[str]) -> Tensor:
        """Embed texts.

        Parameters
        ----------
        texts : list of b str
            Longer ones are cut off at the model's context length.

        Returns
        -------
        Tensor of float32 (b, dim), on the encoder's device
            Un-normalised, in the order given. Batches have a fixed shape, so a row does not depend on its neighbours.
        """
        embeddings = torch.zeros(len(texts), self.dim, device=self.device)
        for rows, values in self.encode_text_batches(texts):
            embeddings[torch.from_numpy(rows).to(self.device)] = values
        return embeddings

    def encode_text_batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Embed texts, and give each batch as soon as it is computed.

        Parameters
        ----------
        texts : sequence of b str

        Yields
        ------
        rows : ndarray of int, (r,)
            Which of the texts these are. Short ones come first, and in the order given where they are alike: without
            those that were computed before, the others come in the same order.
        embeddings : Tensor of float32 (r, dim), on the encoder's device
        """
        waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            words = self.tokenizer(list(texts[start : start + TOKENISED_AT_ONCE]))
            for length, rows in self._by_length(words):
                # A copy of half the size: a view would keep the padding of all of them.
                waiting.setdefault(length, []).append((rows + start, words[rows, :length].int()))
        for length in sorted(waiting):
            rows, words = (torch.cat(parts) for parts in zip(*waiting.pop(length), strict=True))
            for start in range(0, len(rows), self._text_rows):
                chosen = slice(start, start + self._text_rows)
                yield rows[chosen].numpy(), self._encode_words(words[chosen].long())

    @torch.no_grad()
    def _encode_words(self, words: Tensor) -> Tensor:
        """Embed token numbers (r, length) of at most a batch of texts: (r, dim)."""
        missing = self._text_rows - len(words)
        padded = torch.cat([words, words[:1].expand(missing, -1)]).to(self.device)
        with self._exact():
            return self._text_tower.encode(padded)[: len(words)].float()

    def _by_length(self, words: Tensor) -> list[tuple[int, Tensor]]:
        """Return pairs of a length and the rows whose texts it holds, for token numbers (b, context)."""
        context = words.shape[1]
        own = self._text_tower.lengths(words)
        steps = torch.tensor([*(length for length in self._text_lengths if length < context), context])
        lengths = steps[torch.searchsorted(steps, own)]
        return [(int(length), torch.nonzero(lengths == length).flatten()) for length in lengths.unique()]

    # -- What it is --------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters: of the image tower, and in all."""
        image = sum(parameter.numel() for parameter in self.model.visual.parameters())
        return {"image": image, "all": sum(parameter.numel() for parameter in self.model.parameters())}

    @cached_property
    def image_operations(self) -> int:
        """Multiplications and additions of an image's way through the tower's products and convolutions, about."""
        from torch.utils.flop_counter import FlopCounterMode

        height, width = self.preprocess.size
        images = self.input_of(np.zeros((1, height, width, 3), np.uint8))
        # With gradients, for the layers that are fused without them are not counted.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            self.model.encode_image(images)
        return int(counter.get_total_flops())

    def _exact(self) -> AbstractContextManager[None]:
        """Keep cuDNN from computing float32 convolutions in TF32, which has bfloat16's neighbourhood of precision."""
        if self.device.type == "cuda" and self.precision == "fp32":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()


def cam_layer(encoder: Encoder, which: str | int | None = "default") -> CamLayer:
    """Return (module, reshape, name) of the layer at which Grad-CAM looks; see `engine.trunks.Trunk.cam_layer`."""
    return encoder.trunk.cam_layer(which)


def _check_half_on_cpu(encoder: Encoder) -> None:
    """Try one image and one text: not every operation of every tower exists in float16 on every CPU build of torch."""
    height, width = encoder.preprocess.size
    try:
        encoder.encode_pixels(np.zeros((1, height, width, 3), np.uint8))
        encoder.encode_text(["x"])
    except RuntimeError as error:
        raise ModelError(
            f"model {encoder.source!r} cannot compute in fp16 on this CPU ({error}); use fp32 or bf16, or a GPU"
        ) from error
