"""Broken image files by number: the same number is always the same file, so that a failure can be looked at again.

Files of every form that is read are flipped, cut, spliced, repeated, and made to lie about themselves with checksums
that are right. `mutant` gives one; `BOMBS` are files that are small and ask for much.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from tests.engine.dicom_files import as_bytes, dicom_dataset, lossless_jpeg_dataset, table_item

# Shares of the forms among the mutants; what the study's data come in makes most of them.
SHARES = {
    "PNG": 0.35,
    "JPEG": 0.3,
    "DICOM": 0.2,
    "WEBP": 0.04,
    "TIFF": 0.04,
    "JPEG2000": 0.03,
    "GIF": 0.02,
    "BMP": 0.01,
    "PPM": 0.01,
}


class Mutant(NamedTuple):
    """A broken file: its number, what was done to which file, and its bytes."""

    number: int
    story: str
    content: bytes


def drawn(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Return a smooth picture with some noise, uint8 (h, w) or (h, w, channels)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + channel) + columns / (5 - channel)) * 90 + 128 for channel in range(channels)]
    pixels = np.stack(waves, axis=-1) + rng.integers(-20, 20, (height, width, channels))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image encoded by Pillow."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@lru_cache(maxsize=1)
def good_files() -> dict[str, list[bytes]]:
    """Return unbroken files by form, in all the ways in which pixels may be stored."""
    grey, colour, four = (Image.fromarray(drawn(37, 45, channels)) for channels in (1, 3, 4))
    deep = Image.fromarray(drawn(37, 45, 1).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    palette = colour.quantize(16)
    inks = Image.fromarray(drawn(37, 45, 4), "CMYK")
    return {
        "PNG": [
            saved(grey, "PNG"),
            saved(colour, "PNG", exif=exif),
            saved(four, "PNG"),
            saved(palette, "PNG", transparency=3),
            saved(deep, "PNG"),
            saved(grey.convert("1"), "PNG"),
            saved(grey.convert("LA"), "PNG"),
            saved(colour, "PNG", compress_level=0),
            with_chunks(saved(grey, "PNG"), [(b"iCCP", b"x\0\0" + zlib.compress(bytes(300))), (b"tEXt", b"k\0v" * 9)]),
        ],
        "JPEG": [
            saved(grey, "JPEG"),
            saved(colour, "JPEG", exif=exif, quality=60),
            saved(colour, "JPEG", progressive=True, subsampling=0),
            saved(grey, "JPEG", progressive=True),
            saved(colour, "JPEG", subsampling=2, restart_marker_rows=1),
            saved(inks, "JPEG"),
            saved(colour, "JPEG", icc_profile=bytes(500), comment=b"a comment"),
        ],
        "WEBP": [saved(colour, "WEBP"), saved(four, "WEBP", lossless=True), saved(colour, "WEBP", exif=exif)],
        "TIFF": [
            saved(colour, "TIFF"),
            saved(deep, "TIFF"),
            saved(colour, "TIFF", compression="tiff_lzw"),
            saved(colour, "TIFF", compression="tiff_adobe_deflate"),
            saved(colour, "TIFF", compression="jpeg"),
            saved(grey.convert("1"), "TIFF", compression="group4"),
            saved(palette, "TIFF", compression="packbits"),
        ],
        "JPEG2000": [saved(colour, "JPEG2000"), saved(grey, "JPEG2000", no_jp2=True, tile_size=(16, 16))],
        "GIF": [saved(palette, "GIF"), saved(grey, "GIF", save_all=True, append_images=[grey.rotate(90)])],
        "BMP": [saved(colour, "BMP"), saved(palette, "BMP"), saved(grey.convert("1"), "BMP")],
        "PPM": [saved(grey, "PPM"), saved(colour, "PPM"), b"P2 3 2 9\n1 2 3 4 5 6\n", b"P5 3 1 4095\n\0\1\2\3\4\5"],
        "DICOM": _good_dicoms(),
    }


def _good_dicoms() -> list[bytes]:
    twelve = (drawn(40, 48, 1).astype(np.uint16) * 16).astype(np.uint16)
    eight, colour = drawn(40, 48, 1), drawn(40, 48, 3)
    window = {"WindowCenter": 1500, "WindowWidth": 2000}
    curve = (np.linspace(0, 1, 4096) ** 2 * 1023).astype(int)
    packed = {}
    for syntax in (RLELossless, JPEG2000Lossless):
        packed[syntax] = dicom_dataset(twelve, 12, **window)
        packed[syntax].compress(syntax)
    baseline = dicom_dataset(eight, 8)
    stream = saved(Image.fromarray(eight), "JPEG")
    baseline.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    baseline.PixelData = encapsulate([stream + bytes(len(stream) % 2)])
    baseline["PixelData"].is_undefined_length = True
    baseline["PixelData"].VR = "OB"
    palette = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    palette |= {f"{name}PaletteColorLookupTableData": bytes(range(256)) * 2 for name in ("Red", "Green", "Blue")}
    datasets = [
        dicom_dataset(twelve, 12, **window),
        dicom_dataset(twelve.astype(np.int16), 13, RescaleSlope=1, RescaleIntercept=-1024),
        dicom_dataset(twelve, 12, VOILUTSequence=[table_item(0, 10, curve)], PhotometricInterpretation="MONOCHROME1"),
        dicom_dataset(twelve, 12, ModalityLUTSequence=[table_item(0, 16, np.arange(4096) * 16)]),
        dicom_dataset(colour, 8),
        dicom_dataset(eight, 8, PhotometricInterpretation="PALETTE COLOR", **palette),
        *packed.values(),
        baseline,
        lossless_jpeg_dataset(twelve, 12, **window),
    ]
    whole = [as_bytes(dataset) for dataset in datasets]
    return [*whole, whole[0][132:]]


def mutant(number: int) -> Mutant:
    """Return the mutant of a number."""
    rng = np.random.Generator(np.random.PCG64([20260, number]))
    form = str(rng.choice(list(SHARES), p=np.array(list(SHARES.values())) / sum(SHARES.values())))
    files = good_files()[form]
    which = int(rng.integers(0, len(files)))
    ways = [flip, flip, flip, cut, splice, remove, repeat, overwrite, LIES.get(form, flip)]
    content, story = files[which], f"{form} {which}"
    for _ in range(int(rng.integers(1, 3))):
        way = ways[int(rng.integers(0, len(ways)))]
        content = way(content, rng)
        story += f", {way.__name__}"
    if form == "PNG" and rng.random() < 0.6:
        content, story = resign(content), f"{story}, resign"
    return Mutant(number, story, content)


Way = Callable[[bytes, np.random.Generator], bytes]


def _place(content: bytes, rng: np.random.Generator) -> int:
    """Return a place in a file: headers hold the odd cases, so most damage goes there."""
    return int(rng.integers(0, min(len(content), 400) if rng.random() < 0.6 else len(content))) if content else 0


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip one to eight bits."""
    hurt = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        if hurt:
            hurt[_place(content, rng)] ^= 1 << int(rng.integers(0, 8))
    return bytes(hurt)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    """Leave off the end."""
    return content[: int(rng.integers(0, len(content) + 1))]


def splice(content: bytes, rng: np.random.Generator) -> bytes:
    """Go on with another file from some place on."""
    forms = list(good_files().values())
    files = forms[int(rng.integers(0, len(forms)))]
    other = files[int(rng.integers(0, len(files)))]
    return content[: _place(content, rng)] + other[_place(other, rng) :]


def remove(content: bytes, rng: np.random.Generator) -> bytes:
    """Leave out a piece."""
    start = _place(content, rng)
    return content[:start] + content[start + int(rng.integers(1, 64)) :]


def repeat(content: bytes, rng: np.random.Generator) -> bytes:
    """Say a piece many times."""
    start = _place(content, rng)
    end = start + int(rng.integers(1, 200))
    return content[:end] + content[start:end] * int(rng.integers(1, 50)) + content[end:]


def overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    """Write an extreme number over a place."""
    numbers = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
    number = numbers[int(rng.integers(0, len(numbers)))]
    width = int(rng.choice([1, 2, 4]))
    written = (number & (256**width - 1)).to_bytes(width, "big" if rng.random() < 0.5 else "little")
    start = _place(content, rng)
    return content[:start] + written + content[start + width :]


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG chunk with the checksum that it must have."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG with further chunks behind its header."""
    return png[:33] + b"".join(chunk(kind, data) for kind, data in chunks) + png[33:]


def resign(content: bytes) -> bytes:
    """Return a PNG with the checksums that its chunks must have, so that damage gets past them."""
    signed, position = bytearray(content), 8
    while position + 12 <= len(signed):
        end = position + 8 + int.from_bytes(signed[position : position + 4], "big")
        if end + 4 > len(signed):
            break
        signed[end : end + 4] = struct.pack(">I", zlib.crc32(signed[position + 4 : end]))
        position = end + 4
    return bytes(signed)


def lie_png(content: bytes, rng: np.random.Generator) -> bytes:
    """Let a PNG's header say another size, depth, colour or interlacing, or hold odd chunks; checksums are right."""
    header = bytearray(content[16:29].ljust(13, b"\0"))
    which = int(rng.integers(0, 8))
    sizes = (0, 1, 2, 44, 46, 1000, 65535, 2**24, 2**31 - 1, 2**32 - 1)
    if which in (0, 1):
        header[4 * which : 4 * which + 4] = struct.pack(">I", int(rng.choice(sizes)))
    elif which < 7:
        header[6 + which] = int(rng.choice([0, 1, 2, 3, 4, 6, 7, 8, 16, 32, 255]))
    lied = content[:8] + chunk(b"IHDR", bytes(header)) + content[33:]
    if which == 7:
        kind = [
            b"tRNS",
            b"PLTE",
            b"gAMA",
            b"iCCP",
            b"zTXt",
            b"iTXt",
            b"eXIf",
            b"acTL",
            b"fcTL",
            b"pHYs",
            b"cHRM",
            b"IDAT",
        ]
        data = rng.bytes(int(rng.integers(0, 40)))
        lied = with_chunks(lied, [(kind[int(rng.integers(0, len(kind)))], data)])
    return lied


def lie_jpeg(content: bytes, rng: np.random.Generator) -> bytes:
    """Let a JPEG's frame say another size, precision or number of components, or its tables another length."""
    position, frames, others = 2, [], []
    while position + 9 < len(content) and content[position] == 0xFF and content[position + 1] != 0xDA:
        (frames if 0xC0 <= content[position + 1] <= 0xC2 else others).append(position)
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    lied = bytearray(content)
    if frames and rng.random() < 0.7:
        field = int(rng.integers(4, 12))
        width = 2 if field in (5, 7) else 1
        extremes = (0, 1, 2, 3, 4, 5, 8, 9, 12, 255, 1000, 65500, 65535)
        lied[frames[0] + field : frames[0] + field + width] = (int(rng.choice(extremes)) & (256**width - 1)).to_bytes(
            width, "big"
        )
    elif others:
        start = others[int(rng.integers(0, len(others)))]
        lied[start + 2 : start + 4] = struct.pack(">H", int(rng.choice([0, 1, 2, 3, 17, 1000, 65535])))
    return bytes(lied)


def lie_dicom(content: bytes, rng: np.random.Generator) -> bytes:
    """Let an element of group 0028 (or the length of any) say something else."""
    elements = (
        0x0002,
        0x0004,
        0x0006,
        0x0008,
        0x0010,
        0x0011,
        0x0100,
        0x0101,
        0x0102,
        0x0103,
        0x1050,
        0x1051,
        0x1052,
        0x1053,
    )
    tag = struct.pack("<HH", 0x0028, int(rng.choice(elements)))
    start = content.find(tag)
    if start < 0:
        start = content.find(b"\xe0\x7f\x10\x00")
    if start < 0:
        return flip(content, rng)
    lied = bytearray(content)
    field = int(rng.choice([4, 6, 8, 8, 8, 8, 9, 10]))
    if rng.random() < 0.5:
        lied[start + field] = int(rng.integers(0, 256))
    else:
        lied[start + field : start + field + 2] = struct.pack(
            "<H", int(rng.choice([0, 1, 3, 15, 17, 32, 48, 64, 255, 65535]))
        )
    return bytes(lied)


LIES: dict[str, Way] = {"PNG": lie_png, "JPEG": lie_jpeg, "DICOM": lie_dicom}
