"""Decoding and preprocessing against open_clip's own transform and against expectations written out in numpy."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageFile, TiffImagePlugin

from engine.errors import ImageError, ModelError, UsageError
from engine.pixels import Preprocess, decode

SIZES = [(37, 53), (300, 211), (211, 300), (1, 1), (64, 64), (65, 64), (5, 4), (3, 500), (500, 9), (127, 640)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """An image with edges and ramps: noise alone would hide a shift."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [(y * (3 + c) + x * (5 - c)) % 256 + rng.integers(-40, 40, (height, width)) for c in range(channels)]
    return np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8)


def theirs(image: Image.Image, size, mode: str, interpolation: str, fill: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Pixels and final tensor of open_clip's own inference transform."""
    options = {"is_train": False, "resize_mode": mode, "interpolation": interpolation, "fill_color": fill}
    plain = image_transform(size, mean=(0.0,) * 3, std=(1.0,) * 3, **options)(image)
    pixels = (plain * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels, image_transform(size, mean=MEAN, std=STD, **options)(image)


def ours(content: bytes, size, mode: str, interpolation: str, fill: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    cfg = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": fill}
    preprocess = Preprocess.from_cfg({**cfg, "mean": MEAN, "std": STD})
    pixels, _ = preprocess(decode(content))
    return pixels, preprocess.normalise(pixels[None])[0]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(
    ("interpolation", "size"),
    [
        ("bicubic", 64),
        ("bilinear", 64),
        ("random", 64),
        ("bicubic", (64, 64)),
        ("bicubic", (48, 80)),
        ("bilinear", (81, 47)),
    ],
    ids=str,
)
def test_preprocess__bit_equal_to_open_clip(mode, interpolation, size):
    for height, width in SIZES:
        if mode == "longest" and max(height, width) / min(height, width) > 100:
            continue
        for channels, kind in [(3, "PNG"), (3, "JPEG"), (1, "PNG"), (1, "JPEG")]:
            drawn = smooth(height, width, channels)
            content = encoded(Image.fromarray(drawn[..., 0] if channels == 1 else drawn), kind)
            expected = theirs(Image.open(io.BytesIO(content)), size, mode, interpolation, fill=17)
            pixels, tensor = ours(content, size, mode, interpolation, fill=17)
            np.testing.assert_array_equal(pixels, expected[0], err_msg=f"{height}x{width} {channels} {kind}")
            assert torch.equal(tensor, expected[1])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000"])
def test_decode__reads_format(kind):
    drawn = smooth(40, 30, 1)[..., 0]
    content = encoded(Image.fromarray(drawn), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    decoded = decode(content)
    np.testing.assert_array_equal(np.asarray(decoded.convert("L")), expected)


def test_decode__opaque_alpha_is_what_it_would_be_without():
    drawn = smooth(90, 120)
    opaque = np.dstack([drawn, np.full(drawn.shape[:2], 255, np.uint8)])
    pixels, _ = ours(encoded(Image.fromarray(opaque)), 64, "shortest", "bicubic")
    np.testing.assert_array_equal(pixels, theirs(Image.fromarray(drawn), 64, "shortest", "bicubic")[0])
    grey = np.dstack([drawn[..., 0], np.full(drawn.shape[:2], 255, np.uint8)])
    assert decode(encoded(Image.fromarray(grey, "LA"))).mode == "L"


def test_decode__alpha_is_laid_over_black():
    drawn, alpha = smooth(20, 30), smooth(20, 30, 1, seed=5)
    expected = np.round(drawn.astype(float) * alpha / 255)
    decoded = decode(encoded(Image.fromarray(np.dstack([drawn, alpha]))))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded) - expected).max() <= 1
    grey = decode(encoded(Image.fromarray(np.dstack([drawn[..., 0], alpha]), "LA")))
    assert np.abs(np.asarray(grey) - expected[..., 0]).max() <= 1


def test_decode__colour_key_and_transparent_palette_entry_become_black():
    grey = smooth(20, 30, 1)[..., 0]
    grey[:5] = 200
    decoded = np.asarray(decode(encoded(Image.fromarray(grey), transparency=200)))
    np.testing.assert_array_equal(decoded, np.where(grey == 200, 0, grey))
    palette = Image.fromarray(grey // 64, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 250, 240, 230])
    decoded = np.asarray(decode(encoded(palette, transparency=3)))
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [0, 0, 0]])
    np.testing.assert_array_equal(decoded, colours[grey // 64])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_decode__palette_is_scaled_as_colours(kind):
    drawn = smooth(200, 150)
    palette = Image.fromarray(drawn).quantize(16)
    colours = np.array(palette.getpalette()[: 3 * 16]).reshape(-1, 3)[np.asarray(palette)]
    content = encoded(palette, kind)
    np.testing.assert_array_equal(np.asarray(decode(content).convert("RGB")), colours)
    pixels, _ = ours(content, 64, "shortest", "bicubic")
    right = Image.fromarray(colours.astype(np.uint8))
    np.testing.assert_array_equal(pixels, theirs(right, 64, "shortest", "bicubic")[0])
    assert np.abs(pixels.astype(int) - theirs(palette, 64, "shortest", "bicubic")[0]).max() > 20


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_decode__one_bit_is_scaled_as_grey(kind):
    bits = smooth(200, 150, 1)[..., 0] > 128
    content = encoded(Image.fromarray(bits), kind)
    assert decode(content).mode in ("L", "RGB")
    pixels, _ = ours(content, 64, "shortest", "bicubic")
    right = Image.fromarray(np.where(bits, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(pixels, theirs(right, 64, "shortest", "bicubic")[0])
    assert len(np.unique(pixels)) > 10


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_decode__cmyk_is_converted_before_scaling(kind):
    content = encoded(Image.fromarray(smooth(200, 150, 4), "CMYK"), kind)
    inks = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    decoded = np.asarray(decode(content)).astype(int)
    assert np.abs(decoded - expected).max() <= 1
    pixels, _ = ours(content, 64, "shortest", "bicubic")
    right = Image.fromarray(decoded.astype(np.uint8))
    np.testing.assert_array_equal(pixels, theirs(right, 64, "shortest", "bicubic")[0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_decode__sixteen_bits_map_their_full_range(kind):
    values = np.linspace(0, 65535, 200 * 150).astype(np.uint16).reshape(200, 150)
    content = encoded(Image.fromarray(values), kind)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    decoded = decode(content)
    assert decoded.mode == "L"
    np.testing.assert_array_equal(np.asarray(decoded), expected)
    pixels, _ = ours(content, 64, "shortest", "bicubic")
    np.testing.assert_array_equal(pixels, theirs(Image.fromarray(expected), 64, "shortest", "bicubic")[0])


def test_decode__thirty_two_bit_integers_of_sixteen_bit_range():
    values = np.array([[0, 257, 65535], [128, 129, 30000]], dtype=np.int32)
    content = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(np.asarray(decode(content)), np.floor(values / 257 + 0.5))
    pgm = b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095)
    np.testing.assert_array_equal(np.asarray(decode(pgm)), [[0, 128, 255]])


@pytest.mark.parametrize("greatest", [1, 9, 100, 254, 256, 1023, 4095, 65534])
@pytest.mark.parametrize(("magic", "bands"), [(b"P5", 1), (b"P6", 3)])
def test_decode__portable_maps_of_any_maximum_are_pillows_own(magic, bands, greatest):
    values = np.random.default_rng(1).integers(0, greatest + 1, 20 * 15 * bands)
    pixels = values.astype(np.uint8 if greatest < 256 else ">u2").tobytes()
    content = magic + b" # a comment\n20 15 %d\n" % greatest + pixels
    theirs = Image.open(io.BytesIO(content))
    expected = np.asarray(theirs).astype(np.int64)
    if theirs.mode == "I":
        expected = (expected * 255 + 32767) // 65535
    np.testing.assert_array_equal(np.asarray(decode(content)), expected)
    with pytest.raises(ImageError, match=r"of .* bytes of pixels"):
        decode(content[:-1])


def test_decode__palette_indices_without_a_palette_are_refused():
    content = encoded(Image.fromarray(smooth(20, 30)).quantize(16))
    start = content.index(b"PLTE") - 4
    without = content[:start] + content[start + 12 + int.from_bytes(content[start : start + 4], "big") :]
    with pytest.raises(ImageError, match="has no palette"):
        decode(without)


def test_decode__deep_grey_takes_a_few_bytes_a_pixel():
    content = encoded(Image.fromarray(np.zeros((2000, 2000), np.uint16)))
    tracemalloc.start()
    decode(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2000 * 2000


def test_decode__tiff_bits_per_sample_and_white_is_zero():
    values = np.linspace(0, 4095, 60).astype(np.uint16).reshape(6, 10)
    packed = bytearray()
    for first, second in values.reshape(-1, 2).tolist():
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    twelve = tiff(10, 6, 12, 1, bytes(packed))
    np.testing.assert_array_equal(np.asarray(decode(twelve)), np.floor(values / 4095 * 255 + 0.5))
    inverted = tiff(10, 6, 16, 0, values.astype("<u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode(inverted)), 255 - np.floor(values / 257 + 0.5))


def tiff(width: int, height: int, bits: int, photometric: int, data: bytes) -> bytes:
    """A little-endian TIFF of one uncompressed strip."""
    entries = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 0),
        (277, 1),
        (278, height),
    ]
    entries.append((279, len(data)))
    start = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, start if tag == 273 else value, 0) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + data


@pytest.mark.parametrize("values", [[[-5, 100]], [[0, 70000]]], ids=["negative", "too large"])
def test_decode__integers_of_unknown_range_are_refused(values):
    content = encoded(Image.fromarray(np.array(values, dtype=np.int32)), "TIFF")
    with pytest.raises(ImageError, match="full range is not known"):
        decode(content)


def test_decode__floats_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_decode__turns_by_exif(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth(40, 30))
    options = {"lossless": True} if kind == "WEBP" else {}
    stored = np.asarray(decode(encoded(image, kind, **options)))
    turned = np.asarray(decode(encoded(image, kind, exif=exif, **options)))
    np.testing.assert_array_equal(turned, TURNED[orientation](stored))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at_least", [(60, 120), (120, 60), (100, 100)])
def test_decode__at_a_fraction_is_at_least_as_large_as_asked_after_turning(orientation, at_least):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(smooth(260, 500)), "JPEG", exif=exif)
    whole, fraction = decode(content).size, decode(content, at_least=at_least).size
    fitting = [share for share in (1, 2, 4, 8) if whole[1] >= share * at_least[0] and whole[0] >= share * at_least[1]]
    assert fraction == tuple(-(-side // max(fitting)) for side in whole)


def test_decode__sixteen_bits_turned_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    decoded = np.asarray(decode(encoded(Image.fromarray(values), exif=exif)))
    np.testing.assert_array_equal(decoded, np.rot90(np.floor(values / 257 + 0.5), -1))


def test_decode__broken_exif_is_no_orientation():
    drawn = smooth(20, 20)
    content = encoded(Image.fromarray(drawn), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    np.testing.assert_array_equal(np.asarray(decode(content)), drawn)


def test_decode__drawn_pixels():
    drawn = smooth(20, 30)
    assert decode(drawn).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decode(drawn)), drawn)
    np.testing.assert_array_equal(np.asarray(decode(drawn[::2, ::2, 0])), drawn[::2, ::2, 0])
    for wrong in [drawn.astype(np.float32), drawn[..., :2], np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8)]:
        with pytest.raises(ImageError, match="drawn pixels must be uint8"):
            decode(wrong)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000"])
def test_decode__truncated_file(kind):
    content = encoded(Image.fromarray(smooth(200, 200)), kind)
    for kept in (len(content) // 2, 40, 12):
        with pytest.raises(ImageError):
            decode(content[:kept])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_decode__zero_bytes_and_texts():
    with pytest.raises(ImageError, match="zero bytes"):
        decode(b"")
    with pytest.raises(ImageError, match=r"not an image of a known format .* starts with b'patient,label'"):
        decode(b"patient,label")
    with pytest.raises(ImageError, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_decode__bomb_is_refused_by_its_header():
    with pytest.raises(ImageError, match=r"60,000 x 60,000 pixels exceeds the limit of 178,956,970"):
        decode(png_claiming(60_000, 60_000))
    small = encoded(Image.fromarray(smooth(20, 30)))
    with pytest.raises(ImageError, match="exceeds the limit of 599"):
        decode(small, max_pixels=599)
    assert decode(small, max_pixels=600).size == (30, 20)


def test_decode__limit_can_be_raised_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encoded(Image.fromarray(smooth(20, 30)))).size == (30, 20)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000"])
def test_decode__damaged_bytes_give_an_image_or_an_image_error(kind):
    rng = np.random.default_rng(1)
    image = Image.fromarray(smooth(24, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = np.frombuffer(
        encoded(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF") else {})), np.uint8
    )
    for _ in range(150):
        damaged = content.copy()
        # the headers hold the odd cases, so most damage goes there
        places = rng.integers(0, min(len(damaged), 200) if rng.random() < 0.7 else len(damaged), 3)
        damaged[places] = rng.integers(0, 256, 3)
        try:
            assert decode(damaged.tobytes(), max_pixels=1_000_000).mode in ("L", "RGB")
        except ImageError as error:
            assert str(error)


def test_preprocess__strip_too_thin_for_open_clip():
    drawn = smooth(2, 900)
    with pytest.raises(ValueError, match="height and width must be > 0"):
        theirs(Image.fromarray(drawn), 64, "longest", "bicubic")
    pixels, geometry = Preprocess.from_cfg({"size": 64, "resize_mode": "longest"})(decode(drawn))
    assert geometry.resized == (1, 64)
    assert pixels[31].any()
    assert not np.delete(pixels, 31, axis=0).any()


def test_preprocess__extreme_strip_is_scaled_within_the_crop(monkeypatch):
    from engine import pixels as pixels_module

    drawn = smooth(3, 4000)
    expected = theirs(Image.fromarray(drawn), 64, "shortest", "bicubic")[0]
    monkeypatch.setattr(pixels_module, "_LARGEST_RESIZED", 1000)
    pixels, _ = Preprocess.from_cfg({"size": 64})(decode(drawn))
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.01
    monkeypatch.undo()
    strip = np.zeros((1, 100_000), np.uint8)
    strip[0, 50_000] = 255
    assert Preprocess.from_cfg({"size": 224})(decode(strip))[0].shape == (224, 224, 3)


def test_preprocess__id_is_of_pixels_only():
    plain = Preprocess.from_cfg({"size": 224})
    assert plain.id.startswith("224-bicubic-shortest-")
    assert plain.id == Preprocess.from_cfg({"size": (224, 224), "mean": 0.5, "std": [0.5] * 3}).id
    assert plain.id == Preprocess.from_cfg({"interpolation": "random"}).id
    others = [{"size": 225}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"fill_color": 3}]
    assert len({plain.id, *(Preprocess.from_cfg({"size": 224, **other}).id for other in others)}) == 5
    assert Preprocess.from_cfg({"size": [48, 80]}).id.startswith("48x80-")


def test_preprocess__wrong_settings():
    with pytest.raises(ModelError, match="lanczos"):
        Preprocess.from_cfg({"interpolation": "lanczos"})
    with pytest.raises(ModelError, match="fit"):
        Preprocess.from_cfg({"resize_mode": "fit"})
    with pytest.raises(ModelError, match="std"):
        Preprocess.from_cfg({"std": [0, 1, 1]})
    with pytest.raises(UsageError, match="decode"):
        Preprocess.from_cfg({})(Image.new("CMYK", (4, 4)))
    with pytest.raises(UsageError, match="uint8"):
        Preprocess.from_cfg({}).normalise(torch.zeros(1, 4, 4, 3))


def test_tiff_helper_is_read_as_meant():
    image = Image.open(io.BytesIO(tiff(10, 6, 16, 1, bytes(120))))
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    assert image.mode == "I;16"
