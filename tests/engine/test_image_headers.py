"""What headers ask for: sizes as Pillow reads them, parts as counted by hand; nothing refused that encoders write."""

import io

import numpy as np
import pytest
from PIL import Image

from engine.errors import ImageError
from engine.image_headers import check_demands, jpeg_markers, jpeg_size, read_code_stream, webp_size
from engine.pixels import decode


def saved(kind: str, size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, None).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (300, 20), (20, 16000)])
def test_webp_size__of_all_three_forms(size):
    exif = Image.Exif()
    exif[0x010E] = "x"
    for mode, options in (("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {}), ("RGB", {"exif": exif})):
        assert webp_size(saved("WEBP", size, mode, **options)) == size[::-1]
    assert webp_size(b"RIFF") == (0, 0)


def test_jpeg_size_and_scans():
    progressive = saved("JPEG", (300, 20), progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 300)
    assert jpeg_size(progressive) == (20, 300)
    assert sum(code == 0xDA for code, _ in jpeg_markers(progressive)) == 10
    check_demands("JPEG", progressive, 10**6)  # what stands in application data is no scan
    many = progressive[:-2] + progressive[progressive.rindex(b"\xff\xda") : -2] * 200 + progressive[-2:]
    assert decode(many).size == (300, 20)  # 210 scans of 6,000 pixels take no time


def test_code_stream__counts_parts_as_by_hand():
    stream = read_code_stream(saved("JPEG2000", (1000, 700), "L", num_resolutions=3, codeblock_size=(32, 32)))
    assert (stream.height, stream.width, stream.tiles, stream.precincts) == (700, 1000, 1, 3)
    levels = [(175, 250), (350, 500), (700, 1000)]
    assert stream.code_blocks == sum(height * width // 1024 for height, width in levels)
    stream = read_code_stream(
        saved("JPEG2000", (1000, 700), "RGB", tile_size=(256, 256), num_resolutions=2, precinct_size=(64, 64))
    )
    assert stream.tiles == 12 and stream.precincts == 12 * 3 * (4 * 4 + 4 * 4)
    assert read_code_stream(b"nothing") is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile_size": (256, 256)},
        {"precinct_size": (128, 128)},
        {"codeblock_size": (16, 16)},
        {"num_resolutions": 8},
    ],
    ids=str,
)
def test_demands__nothing_that_encoders_write_is_refused(options):
    check_demands("JPEG2000", saved("JPEG2000", (2500, 2000), "L", **options), 10**7)


def test_demands__of_a_large_gif_without_comments():
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "GIF")
    check_demands("GIF", stream.getvalue(), 10**7)
    with pytest.raises(ImageError, match="more than 100,000 comments"):
        check_demands("GIF", b"\x21\xfe\x01x\0" * 100_001, 10**7)
