"""Encoded bytes to the pixels that a model sees, before mean and standard deviation.

`decode` turns a file (or drawn pixels) into an upright 8-bit image, grey or RGB; `Preprocess` scales and crops it as
open_clip does and says where each pixel came from. For grey and RGB files the result is bit-equal to open_clip's own
transform. It differs, on purpose, where that one is wrong:

- palette and 1-bit images: Pillow scales them by picking neighbours; here they become grey or RGB first;
- CMYK and other colour spaces: here converted before scaling, not after (the conversion is not linear);
- alpha and colour keys: here laid over black, as padding is; there hidden colours come to light. Opaque alpha, the
  usual case, changes nothing;
- 16-bit grey: there clipped to 255, so nearly all white; here the sample's full range is mapped to 0..255 as the PNG
  specification says (65,535 is 255; TIFF's own bits per sample and white-is-zero are minded);
- EXIF orientation: there ignored; here the image is turned as viewers show it.

Of files with several frames the first is taken, as Pillow does. Colour profiles are not applied. DICOM files go their
own way (`engine.dicom`).
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from engine.dicom import decode_dicom, is_dicom
from engine.errors import ImageError, ModelError, UsageError
from engine.geometry import Geometry
from engine.image_headers import LARGEST_TILE, check_demands, too_large
from engine.keys import short_hash

# Part of every preprocess id: to be raised whenever the same file would give other pixels.
PIXELS_VERSION = 1
# The same for what only the fast decoder changes.
FAST_VERSION = 2

# Pillow's own hard limit against decompression bombs (two thirds of a gigabyte as RGB).
DEFAULT_MAX_PIXELS = 178_956_970

DECODERS = ("exact", "fast")

_PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    TiffImagePlugin.TiffImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    PpmImagePlugin.PpmImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
)
_FORMATS = tuple(plugin.format for plugin in _PLUGINS)

# What Pillow's decoders raise on malformed files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ArithmeticError,
    BufferError,
    MemoryError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ON_ITS_SIDE = (5, 6, 7, 8)

# Above this many pixels the scaled image is not built as a whole before it is cropped (a 1 x 10,000 strip would give
# half a billion of them).
_LARGEST_RESIZED = 1 << 26


def decode(
    content: bytes | np.ndarray, *, max_pixels: int = DEFAULT_MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """Decode an image to 8 bits, grey or RGB, upright.

    Parameters
    ----------
    content : bytes or ndarray
        An encoded file, recognised by its content and not by its name, or drawn pixels: uint8 (h, w) or (h, w, 3).
    max_pixels : int
        Limit on width times height, held against the header before anything is decoded.
    at_least : (height, width), optional
        Faster, not exact: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay as large as
        this. Other formats are not concerned.

    Returns
    -------
    PIL.Image.Image
        In mode ``L`` or ``RGB``. The module's text says how other modes get there.

    Raises
    ------
    ImageError
        Empty, of no known format, truncated, broken, larger than `max_pixels`, or of samples whose range is not known.
    """
    if isinstance(content, np.ndarray):
        return _from_array(content)
    if is_dicom(content):
        return decode_dicom(content, max_pixels)
    image = _open(content, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise too_large(height, width, max_pixels)
    _check_tiles(image, max_pixels)
    try:
        if (portable := _portable_pixels(image, content)) is not None:
            return portable
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            # The file's own width and height, which are the other way round where the image is turned on its side.
            turned = _orientation(image) in _ON_ITS_SIDE
            image.draft(image.mode, at_least if turned else (at_least[1], at_least[0]))
        image.load()
        orientation = _orientation(image)
        upright = _to_eight_bits(image)
    except _DECODER_ERRORS as error:
        raise ImageError(f"cannot decode this {image.format} image: {_reason(error)}") from None
    return upright.transpose(_TURNS[orientation]) if orientation in _TURNS else upright


def _from_array(pixels: np.ndarray) -> Image.Image:
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)) or 0 in pixels.shape:
        raise ImageError(f"drawn pixels must be uint8 (h, w) or (h, w, 3), not {pixels.dtype} {pixels.shape}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """Read the header with the one of Pillow's readers that knows the content.

    Pillow's own `Image.open` would also try readers that call other programs, and its limit on size can only be set for
    the whole process.
    """
    if len(content) == 0:
        raise ImageError("the file is empty (zero bytes)")
    prefix = content[:16]
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        answer = accept(prefix) if accept else False
        if isinstance(answer, str):
            raise ImageError(f"this Pillow cannot read {name} images: {answer}")
        if not answer:
            continue
        check_demands(name, content, max_pixels)
        try:
            return factory(io.BytesIO(content), "")
        except _DECODER_ERRORS as error:
            raise ImageError(f"cannot decode this {name} image: {_reason(error)}") from None
    raise ImageError(f"not an image of a known format ({', '.join(_FORMATS)}); it starts with {prefix!r}")


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError where a TIFF's tiles, which are decoded whole, are larger than the image may be."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    width, height = (
        int(image.tag_v2.get(tag, 0) or 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
    )
    if width * height > max(max_pixels, LARGEST_TILE):
        raise ImageError(f"the TIFF image has tiles of {width:,} x {height:,} pixels, more than it may have itself")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 where there is none or the EXIF block is broken, as viewers have it."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        return _from_deep_grey(image)
    if image.mode == "F":
        raise ImageError("the image has floating-point samples, whose range no file tells; convert it to 8 or 16 bits")
    if image.mode in ("P", "PA") and image.palette is None:
        raise ImageError("the image has no palette, which says what its colours are; save it again")
    if image.has_transparency_data:
        return _over_black(image)
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _over_black(image: Image.Image) -> Image.Image:
    grey = image.mode in ("L", "LA", "La", "1")
    layered = image.convert("LA" if grey else "RGBA")
    colour = layered.convert("L" if grey else "RGB")
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return colour
    return Image.composite(colour, Image.new(colour.mode, colour.size, 0), alpha)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = min(16, int(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]))
        white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    full = (1 << bits) - 1
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > full:
        raise ImageError(
            f"grey samples from {low} to {high} do not fit unsigned {bits} bits, so their full range is not known; "
            "convert the image to 8 or 16 bits"
        )
    # In place and in 32 bits, which hold 65,535 * 255: an image may be large, and several are decoded at a time.
    eight = samples.astype(np.uint32)
    eight *= 255
    eight += full // 2
    eight //= full
    grey = eight.astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _portable_pixels(image: Image.Image, content: bytes) -> Image.Image | None:
    """Return a binary PGM or PPM of an odd maximum (as of 12 bits), which Pillow decodes pixel by pixel in Python.

    Pillow's own rounding, value for value; None for all other images.
    """
    if not isinstance(image, PpmImagePlugin.PpmImageFile) or image.tile[0].codec_name != "ppm":
        return None
    greatest, bands = int(tuple(image.tile[0].args or ())[1]), len(image.getbands())
    kind = np.dtype(np.uint8 if greatest < 256 else ">u2")
    count = image.width * image.height * bands
    data = content[image.tile[0].offset :][: count * kind.itemsize]
    if len(data) < count * kind.itemsize:
        raise ImageError(f"cannot decode this PPM image: it has {len(data)} of {count * kind.itemsize} bytes of pixels")
    full = 65535 if image.mode == "I" else 255
    table = np.minimum(np.rint(np.arange(256**kind.itemsize) / greatest * full), full).astype(np.int64)
    table = ((table * 255 + full // 2) // full).astype(np.uint8)
    pixels = np.take(table, np.frombuffer(data, kind))
    return Image.fromarray(pixels.reshape((image.height, image.width) + ((3,) if bands == 3 else ())))


@dataclass(frozen=True)
class Preprocess:
    """From an upright 8-bit image to the pixels of a model's input, as open_clip's inference transform does it.

    Parameters
    ----------
    size : (height, width)
        Of the model's input.
    interpolation : "bicubic" or "bilinear"
    resize_mode : "shortest", "longest" or "squash"
        Scale the shorter side to the input and crop the centre; scale the longer side and pad; or scale both sides.
    mean, std : three floats each
        Of channels in 0..1; not part of `id`, since the pixels are kept as they are before it.
    fill : int
        Grey value of padding.
    decoder : "exact" or "fast"
        Fast decodes JPEGs at a fraction of their size where that still holds the model's input: pixels differ by some
        grey levels (benchmarks/extraction.py prints how many, and what becomes of the embeddings).
    """

    size: tuple[int, int]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    fill: int = 0
    decoder: str = "exact"

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise UsageError(f"unknown decoder {self.decoder!r}; choose exact or fast")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ModelError(f"unknown interpolation {self.interpolation!r}; open_clip has bicubic and bilinear")
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ModelError(f"unknown resize mode {self.resize_mode!r}; open_clip has shortest, longest and squash")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ModelError(f"input size {self.size!r} is not a height and a width")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ModelError(f"mean {self.mean} and std {self.std} must be three numbers each, std above zero")

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """Read open_clip's ``preprocess_cfg`` with its defaults and oddities.

        ``random`` interpolation means bicubic at inference; a non-square ``shortest`` is always scaled bicubic.
        """
        size = cfg.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else (size if len(size) == 2 else (size[0], size[0]))
        resize_mode = cfg.get("resize_mode") or "shortest"
        interpolation = cfg.get("interpolation") or "bicubic"
        if interpolation == "random" or (resize_mode == "shortest" and height != width):
            interpolation = "bicubic"
        return cls(
            size=(int(height), int(width)),
            interpolation=interpolation,
            resize_mode=resize_mode,
            mean=_three(cfg.get("mean") or OPENAI_DATASET_MEAN),
            std=_three(cfg.get("std") or OPENAI_DATASET_STD),
            fill=int(cfg.get("fill_color") or 0),
        )

    @cached_property
    def id(self) -> str:
        """Short readable name of these pixels: size, interpolation, mode and a hash that also holds the fill."""
        height, width = self.size
        size = str(height) if height == width else f"{height}x{width}"
        settings = {
            "size": [height, width],
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill": self.fill,
            "version": PIXELS_VERSION,
            **self._faster,
        }
        return f"{size}-{self.interpolation}-{self.resize_mode}-{short_hash(json.dumps(settings, sort_keys=True))}"

    @property
    def description(self) -> dict[str, Any]:
        """Everything that `__call__` and `normalise` depend on, fit for JSON."""
        return {
            "id": self.id,
            "size": list(self.size),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "mean": list(self.mean),
            "std": list(self.std),
            "fill": self.fill,
            "version": PIXELS_VERSION,
            **self._faster,
        }

    @property
    def _faster(self) -> dict[str, Any]:
        """What a decoder adds to the description; nothing where it is exact."""
        return {} if self.decoder == "exact" else {"decoder": self.decoder, "fast_version": FAST_VERSION}

    @property
    def at_least(self) -> tuple[int, int] | None:
        """The size (height, width) under which `decode` must not go; None where it has to be exact."""
        return None if self.decoder == "exact" else self.size

    def geometry(self, height: int, width: int) -> Geometry:
        """Return the way that an image of this size goes through preprocessing."""
        target_height, target_width = self.size
        if self.resize_mode == "squash":
            resized = self.size
        elif self.resize_mode == "shortest" and target_height == target_width:
            # torchvision's rule: the long side is cut to a whole pixel, not rounded
            short, long = min(height, width), max(height, width)
            scaled = int(target_height * long / short)
            resized = (scaled, target_width) if height > width else (target_height, scaled)
        else:
            ratios = height / target_height, width / target_width
            ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
            # at least one pixel: open_clip fails on strips so thin that they round to none
            resized = max(1, round(height / ratio)), max(1, round(width / ratio))
        top, left = _crop_start(resized[0], target_height), _crop_start(resized[1], target_width)
        return Geometry((height, width), resized, (top, left, target_height, target_width))

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, Geometry]:
        """Scale and crop.

        Parameters
        ----------
        image : PIL.Image.Image
            What `decode` returned: mode ``L`` or ``RGB``.

        Returns
        -------
        pixels : ndarray of uint8 (h, w, 3)
            The model's input before mean and standard deviation; grey images have three equal channels.
        geometry : Geometry

        Notes
        -----
        Images so thin that the scaled one would have more than 67 million pixels are scaled within the crop only, where
        Pillow rounds the crop's edge to single precision: a grey level or two in single pixels.
        """
        if image.mode not in ("L", "RGB"):
            raise UsageError(f"an image of mode {image.mode!r} must go through decode() first")
        geometry = self.geometry(image.height, image.width)
        return np.array(self._cropped(image, geometry).convert("RGB")), geometry

    def _cropped(self, image: Image.Image, geometry: Geometry) -> Image.Image:
        (resized_height, resized_width), (top, left, height, width) = geometry.resized, geometry.crop
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        if resized_height * resized_width > _LARGEST_RESIZED:
            down, across = geometry.scale
            box = (left / across, top / down, (left + width) / across, (top + height) / down)
            return image.resize((width, height), resample, box=box)
        resized = image
        if geometry.resized != geometry.original:
            resized = image.resize((resized_width, resized_height), resample)
        if top == 0 and left == 0 and geometry.resized == (height, width):
            return resized
        if resized.height < height or resized.width < width:
            padded = Image.new(image.mode, (width, height), (self.fill,) * len(image.getbands()))
            padded.paste(resized, (-left, -top))
            return padded
        return resized.crop((left, top, left + width, top + height))

    def normalise(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Return the model's input for pixels, on the device where they are.

        Parameters
        ----------
        pixels : uint8 (b, h, w, 3)

        Returns
        -------
        Tensor of float32 (b, 3, h, w)
            Bit-equal to open_clip's: divided by 255, less the mean, by the standard deviation.
        """
        if isinstance(pixels, np.ndarray):
            # torch cannot mark a tensor as read-only, so it gets a copy of arrays that are
            pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        values = pixels
        if values.ndim != 4 or values.shape[3] != 3 or values.dtype != torch.uint8:
            raise UsageError(f"pixels must be uint8 (b, h, w, 3), not {values.dtype} {tuple(values.shape)}")
        channels_first = values.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = _mean_and_std(self.mean, self.std, values.device)
        return channels_first.div_(255).sub_(mean).div_(std)


@cache
def _mean_and_std(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return mean and standard deviation on a device, each (3, 1, 1), sent there once.

    A copy from ordinary memory waits for all that the device has to do, and cannot be part of a captured graph.
    """
    return tuple(torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std))


def _crop_start(resized: int, target: int) -> int:
    """Return where the crop begins on one axis, negative for padding, with torchvision's roundings."""
    return -((target - resized) // 2) if target > resized else round((resized - target) / 2)


def _three(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, list | tuple) else (float(value),) * 3
