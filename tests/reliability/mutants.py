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
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

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
    if start < 0 or start + 12 > len(content):
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


@lru_cache(maxsize=1)
def bombs() -> dict[str, bytes]:
    """Return small files that ask for gigabytes or minutes, by what they do."""
    grey, zeros = saved(Image.fromarray(drawn(30, 40, 1)), "PNG"), zlib.compress(bytes(1 << 26), 1)
    text = zlib.compress(bytes(900_000))
    picture = Image.new("RGB", (16, 16))
    gif, still = saved(Image.new("L", (16, 16)), "GIF"), saved(picture, "WEBP")[12:]
    colours = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    frame, scans = gif.rindex(b","), saved(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    baseline = saved(picture, "JPEG")
    return {
        "PNG with a 64 MB zTXt": with_chunks(grey, [(b"zTXt", b"k\0\0" + zeros)]),
        "PNG with a 64 MB iCCP": with_chunks(grey, [(b"iCCP", b"k\0\0" + zeros)]),
        "PNG with a 64 MB iTXt": with_chunks(grey, [(b"iTXt", b"k\0\1\0\0\0" + zeros)]),
        "PNG with 300 texts": with_chunks(grey, [(b"zTXt", b"k\0\0" + text)] * 300),
        "PNG whose pixels go on": grey[:33] + chunk(b"IDAT", zeros) + chunk(b"IEND", b""),
        "PNG of 60,000 x 60,000": grey[:8] + chunk(b"IHDR", struct.pack(">II", 60000, 60000) + grey[24:29]) + grey[33:],
        "PNG with 100,000 empty chunks": with_chunks(grey, [(b"IDAT", b"")] * 100_000),
        "JPEG of 2,000 scans": scans[:-2] + scans[scans.rindex(b"\xff\xda") : -2] * 2000 + scans[-2:],
        "JPEG of 65,500 x 65,500": lied_size(baseline, 65500, 65500),
        "JPEG with 20 MB of application data": baseline[:2] + (b"\xff\xe1\xff\xff" + bytes(65533)) * 300 + baseline[2:],
        "WebP canvas of 13,000 x 13,000": webp_canvas(13000, still, animated=False),
        "WebP animation of 13,000 x 13,000": webp_canvas(13000, still, animated=True),
        "TIFF tiles of 20,000 x 20,000": tiff_tiles(20000),
        "TIFF tiles of 60,000 x 60,000": tiff_tiles(60000),
        "TIFF with 4 billion values": b"II*\0" + struct.pack("<IHHHII", 8, 1, 270, 2, 2**32 - 1, 30) + bytes(4),
        "TIFF directory that is its own next": b"II*\0" + struct.pack("<IHI", 8, 0, 8),
        "GIF screen of 65,535 x 65,535": gif[:6] + b"\xff" * 4 + gif[10:],
        "GIF frame of 65,535 x 65,535": gif[: frame + 5] + b"\xff" * 4 + gif[frame + 9 :],
        "GIF with 3,000,000 comments": gif[:colours] + b"\x21\xfe\x01x\0" * 3_000_000 + gif[frame:],
        "BMP of 2 billion x 2 billion": b"BM"
        + bytes(12)
        + struct.pack("<IiiHHI", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0)
        + bytes(20),
        "PGM of 12 bits": b"P5 1900 1900 4095\n" + bytes(1900 * 1900 * 2),
        "JPEG 2000 of 62,500 tiles": code_stream(2000, 2000, 8),
        "JPEG 2000 of a million precincts": code_stream(1900, 1900, 1900, precinct=0x11),
        "JPEG 2000 of 32 levels and tiny blocks": code_stream(1900, 1900, 1900, precinct=0x33, block=0, levels=32),
        "JPEG 2000 of a tile of 2 billion": code_stream(64, 64, 2**31 - 1),
        **_dicom_bombs(baseline),
    }


def lied_size(jpeg: bytes, height: int, width: int) -> bytes:
    """Return a baseline JPEG whose frame header says another size."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def webp_canvas(side: int, still: bytes, *, animated: bool) -> bytes:
    """Return a WebP of one small picture on a large canvas."""
    canvas = bytes([2 * animated, 0, 0, 0]) + (side - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    if animated:
        frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes([100, 0, 0, 0]) + still
        body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    else:
        body += still
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_tiles(side: int) -> bytes:
    """Return an LZW TIFF of 10 x 10 pixels in one huge tile."""
    tags = {256: 10, 257: 10, 258: 8, 259: 5, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: 100}
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 324 else value) for tag, value in tags.items()]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + bytes(100)


def code_stream(
    height: int,
    width: int,
    tile: int,
    *,
    precinct: int | None = None,
    block: int | None = None,
    levels: int | None = None,
) -> bytes:
    """Return a JPEG 2000 stream of 64 x 64 pixels whose headers say something else."""
    stream = bytearray(saved(Image.new("L", (64, 64)), "JPEG2000", no_jp2=True))
    size, style = stream.index(b"\xff\x51"), stream.index(b"\xff\x52")
    stream[size + 6 : size + 14] = struct.pack(">II", width, height)
    stream[size + 22 : size + 30] = struct.pack(">II", tile, tile)
    length = int.from_bytes(stream[style + 2 : style + 4], "big")
    segment = bytearray(stream[style + 4 : style + 2 + length])
    if levels is not None:
        segment[5] = levels
    if block is not None:
        segment[6] = segment[7] = block
    if precinct is not None:
        segment[0] |= 1
        segment += bytes([precinct]) * (segment[5] + 1)
    stream[style + 2 : style + 2 + length] = struct.pack(">H", len(segment) + 2) + segment
    return bytes(stream)


def _dicom_bombs(jpeg: bytes) -> dict[str, bytes]:
    eight = drawn(40, 48, 1)

    def packed(stream: bytes, syntax: str) -> bytes:
        dataset = dicom_dataset(eight, 8)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([stream + bytes(len(stream) % 2)])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        return as_bytes(dataset)

    deflated = dicom_dataset(eight, 8, DeflatedExplicitVRLittleEndian)
    deflated.add_new(0x00091010, "OB", bytes(1 << 27))
    return {
        "DICOM that inflates to 128 MB": as_bytes(deflated),
        "DICOM of 65,535 x 65,535": as_bytes(dicom_dataset(eight, 8, Rows=65535, Columns=65535)),
        "DICOM of 65,535 frames": as_bytes(dicom_dataset(eight, 8, NumberOfFrames=65535)),
        "DICOM around a JPEG of 65,500 x 65,500": packed(lied_size(jpeg, 65500, 65500), JPEGBaseline8Bit),
        "DICOM around a JPEG 2000 of 40,000 x 40,000": packed(code_stream(40000, 40000, 40000), JPEG2000Lossless),
        "DICOM around endless runs": packed(struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2_000_000, RLELossless),
        "DICOM of 100,000 private elements": _with_private_elements(as_bytes(dicom_dataset(eight, 8)), 100_000),
    }


def _with_private_elements(dicom: bytes, count: int) -> bytes:
    elements = b"".join(struct.pack("<HH2sH", 0x0029, number & 0xFFFF, b"US", 0) for number in range(count))
    start = dicom.index(b"\xe0\x7f\x10\x00")
    return dicom[:start] + elements + dicom[start:]
