"""What an image file asks of its decoder, read from its headers before the decoder believes them.

Encoded bytes come in; sizes go out, or an `ImageError` where a file of a few hundred bytes would take gigabytes or
minutes: such demands are legal in these formats, nobody writes them, and Pillow and OpenJPEG serve them. Measured per
demand: a progressive JPEG's further scan costs 1.2 ns a pixel, however empty; a JPEG 2000 precinct 1.6 kB; a tile
10 kB; a comment in a GIF 170 bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import ImageError

# Encoders write ten scans and at most some dozens; the product bounds the time at some seconds.
MOST_SCANS = 100
MOST_SCAN_PIXELS = 2_000_000_000
# Encoders write tiles of 256 pixels and more, precincts of 128 and more, and code blocks of 32 or 64.
MOST_TILES = 1 << 14
MOST_PRECINCTS = 1 << 16
MOST_CODE_BLOCKS = 1 << 18
PIXELS_A_CODE_BLOCK = 64
MOST_COMMENTS = 100_000
# Tiles of TIFF files are decoded whole, so larger ones than the image may be are no way around its limit.
LARGEST_TILE = 1 << 24

_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xDA))


class CodeStream(NamedTuple):
    """A JPEG 2000 stream's size, and how many parts its decoder will make of it."""

    height: int
    width: int
    tiles: int
    precincts: int
    code_blocks: int


def check_demands(kind: str, content: bytes, max_pixels: int) -> None:
    """Raise ImageError where a file of a format (as Pillow names it) asks for unreasonably much.

    Parameters
    ----------
    max_pixels : int
        Limit on the size, for formats whose decoder reserves memory as soon as it is opened.
    """
    if kind == "WEBP":
        height, width = webp_size(content)
        if height * width > max_pixels:
            raise too_large(height, width, max_pixels)
    elif kind == "GIF" and content.count(b"\x21\xfe") > MOST_COMMENTS:
        raise ImageError(f"the GIF image has more than {MOST_COMMENTS:,} comments, which no program writes")
    elif kind == "JPEG":
        check_scans(content)
    elif kind == "JPEG2000":
        check_code_stream(content)


def too_large(height: int, width: int, max_pixels: int) -> ImageError:
    """Return the error for an image of more pixels than are allowed."""
    return ImageError(
        f"image of {width:,} x {height:,} pixels exceeds the limit of {max_pixels:,}; raise max_pixels if it is "
        "meant to be so large"
    )


def webp_size(content: bytes) -> tuple[int, int]:
    """Return the (height, width) that a WebP file's first chunk says, (0, 0) where it says none."""
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[7:10], "little"), 1 + int.from_bytes(data[4:7], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack("<2H", data[6:10])
    return height & 0x3FFF, width & 0x3FFF


def jpeg_markers(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield code and place of each marker of a JPEG or JPEG-LS stream that can be found."""
    position = 2
    while content[:2] == b"\xff\xd8" and position + 1 < len(content):
        code = content[position + 1]
        if content[position] != 0xFF or code in (0x00, 0xFF):
            found = _NEXT_MARKER.search(content, position)
            if found is None:
                return
            position = found.start()
            continue
        yield code, position
        position += 2
        if code not in _WITHOUT_LENGTH:
            position += max(int.from_bytes(content[position : position + 2], "big"), 2)


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return the (height, width) of a JPEG or JPEG-LS stream's first frame, None where there is none."""
    for code, position in jpeg_markers(content):
        if (0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)) or code == 0xF7:
            field = content[position + 5 : position + 9]
            return struct.unpack(">HH", field) if len(field) == 4 else None
        if code == 0xDA:
            return None
    return None


def check_scans(content: bytes) -> None:
    """Raise ImageError for a JPEG of so many scans that decoding takes minutes."""
    if content[:2] != b"\xff\xd8" or content.count(b"\xff\xda") <= MOST_SCANS:
        return
    height, width = jpeg_size(content) or (0, 0)
    scans = sum(code == 0xDA for code, _ in jpeg_markers(content))
    if scans > MOST_SCANS and scans * height * width > MOST_SCAN_PIXELS:
        raise ImageError(
            f"the JPEG image of {width:,} x {height:,} pixels has {scans:,} scans, which no program writes"
        )


def read_code_stream(content: bytes) -> CodeStream | None:
    """Return what the headers of a JPEG 2000 stream (or file) say, None where there is none (ISO 15444-1, annex A)."""
    start = content.find(b"\xff\x4f\xff\x51")
    size = content[start + 8 : start + 42]
    if start < 0 or len(size) < 34:
        return None
    right, low, left, top, tile_width, tile_height, tile_left, tile_top, components = struct.unpack(">8IH", size)
    height, width = max(low - top, 0), max(right - left, 0)
    tiles = -(-max(right - tile_left, 0) // max(tile_width, 1)) * -(-max(low - tile_top, 0) // max(tile_height, 1))
    precincts = blocks = 0
    for style in _coding_styles(content, start + 2):
        here = _parts(style, min(tile_height, height), min(tile_width, width))
        precincts, blocks = max(precincts, here[0]), max(blocks, here[1])
    return CodeStream(height, width, tiles, precincts * tiles * components, blocks * tiles * components)


def _coding_styles(content: bytes, position: int) -> Iterator[bytes]:
    """Yield what the COD and COC segments of all headers say, from the number of decomposition levels on.

    Behind it stand the code blocks' exponents (less 2), style and transform, and the precincts' exponents if given.
    """
    part_end = len(content)
    while position + 4 <= len(content) and content[position] == 0xFF:
        code, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if code == 0x93:  # the packets of this part; the next part's header stands behind them
            if part_end <= position:  # a part's length that lies would lead back, and round for ever
                return
            position = part_end
            continue
        if code == 0x90:
            told = int.from_bytes(content[position + 6 : position + 10], "big")
            part_end = position + told if told else len(content)
        segment = content[position + 4 : position + 2 + length]
        if code == 0x52 and len(segment) >= 10:
            yield segment[5:10] + (segment[10:] if segment[0] & 1 else b"")
        elif code == 0x53 and len(segment) >= 7:
            # The component's number takes two bytes where there are more than 256; such images are not read.
            yield segment[2:7] + (segment[7:] if segment[1] & 1 else b"")
        position += 2 + max(length, 2)


def _parts(style: bytes, height: int, width: int) -> tuple[int, int]:
    """Return how many precincts and code blocks one tile's component has."""
    levels = min(style[0], 32)
    block_area = 1 << (style[1] & 15) + 2 + (style[2] & 15) + 2
    precincts = blocks = 0
    for level in range(levels + 1):
        high, wide = -(-height >> (levels - level)), -(-width >> (levels - level))
        high, wide = max(abs(high), 1), max(abs(wide), 1)
        exponents = style[5 + level] if 5 + level < len(style) else 0xFF
        across, down = exponents & 15, exponents >> 4
        here = -(-wide // (1 << across)) * -(-high // (1 << down))
        precincts += here
        blocks += max(here, high * wide // block_area)
    return precincts, blocks


def check_code_stream(content: bytes) -> None:
    """Raise ImageError for a JPEG 2000 stream of so many parts that they take more memory than the pixels."""
    stream = None if content[:2] == b"\xff\xd8" else read_code_stream(content)
    if stream is None:
        return
    for what, count, most in (
        ("tiles", stream.tiles, MOST_TILES),
        ("precincts", stream.precincts, MOST_PRECINCTS),
        ("code blocks", stream.code_blocks, max(MOST_CODE_BLOCKS, stream.height * stream.width // PIXELS_A_CODE_BLOCK)),
    ):
        if count > most:
            raise ImageError(
                f"the JPEG 2000 image of {stream.width:,} x {stream.height:,} pixels has {count:,} {what}, which no "
                "program writes"
            )
