"""DICOM to 8 bits: against pydicom's own modality and VOI LUT, compressed forms against the samples that went in."""

import builtins
import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from engine.dicom import compressed_size
from engine.errors import ImageError
from engine.pixels import decode
from tests.engine.dicom_files import as_bytes, dicom_dataset, lossless_jpeg_dataset, table_item

RNG = np.random.default_rng(3)
TWELVE = RNG.integers(0, 4096, (40, 30)).astype(np.uint16)
SIXTEEN = RNG.integers(0, 65536, (40, 30)).astype(np.uint16)
SIGNED = RNG.integers(-2048, 2048, (40, 30)).astype(np.int16)
EIGHT = RNG.integers(0, 256, (40, 30)).astype(np.uint8)


def expected(dataset, low: float, high: float) -> np.ndarray:
    """Return what pydicom shows, with [low, high] as 0..255."""
    dataset = pydicom.dcmread(io.BytesIO(as_bytes(dataset)))
    values = apply_modality_lut(dataset.pixel_array, dataset)
    if "VOILUTSequence" in dataset:
        values = apply_voi(values.astype(np.int64), dataset)
    else:
        values = apply_windowing(values, dataset)
    shown = np.clip(np.floor((values.astype(float) - low) / (high - low) * 255 + 0.5), 0, 255)
    return 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


CURVE = (np.linspace(0, 1, 4096) ** 2 * 1023).astype(int)
CASES = {
    "12 bits, nothing": (TWELVE, 12, {}, 0, 4095),
    "16 bits, nothing": (SIXTEEN, 16, {}, 0, 65535),
    "8 bits, nothing": (EIGHT, 8, {}, 0, 255),
    "signed, nothing": (SIGNED, 12, {}, -2048, 2047),
    "inverted": (TWELVE, 12, {"PhotometricInterpretation": "MONOCHROME1"}, 0, 4095),
    "window": (TWELVE, 12, {"WindowCenter": 1500, "WindowWidth": 900}, 0, 4095),
    "window, inverted": (
        TWELVE,
        12,
        {"WindowCenter": 1500, "WindowWidth": 900, "PhotometricInterpretation": "MONOCHROME1"},
        0,
        4095,
    ),
    "exact window": (
        TWELVE,
        12,
        {"WindowCenter": 1500, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
        0,
        4095,
    ),
    "sigmoid": (TWELVE, 12, {"WindowCenter": 2048, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}, 0, 4095),
    "first of two windows": (TWELVE, 12, {"WindowCenter": [1500, 9], "WindowWidth": [900, 9]}, 0, 4095),
    "rescale": (TWELVE, 12, {"RescaleSlope": 2, "RescaleIntercept": -1000}, -1000, 7190),
    "rescale and window": (
        SIGNED,
        12,
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400},
        -3072,
        1023,
    ),
    "falling rescale": (TWELVE, 12, {"RescaleSlope": -1, "RescaleIntercept": 4095}, 0, 4095),
    "modality table": (TWELVE, 12, {"ModalityLUTSequence": [table_item(100, 16, np.arange(3000) * 20)]}, 0, 65535),
    "modality table and window": (
        TWELVE,
        12,
        {"ModalityLUTSequence": [table_item(0, 16, np.arange(4096) * 16)], "WindowCenter": 30000, "WindowWidth": 9000},
        0,
        65535,
    ),
    "VOI table": (TWELVE, 12, {"VOILUTSequence": [table_item(0, 10, CURVE)]}, 0, 1023),
    "VOI table before window, after a rescale to floats": (
        SIGNED,
        12,
        {
            "VOILUTSequence": [table_item(-2000, 10, CURVE), table_item(0, 8, np.arange(9))],
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            "WindowCenter": 5,
            "WindowWidth": 2,
        },
        0,
        1023,
    ),
    "unused high bits stay unused": (TWELVE, 13, {}, 0, 8191),
}


@pytest.mark.parametrize("case", CASES)
def test_grey__is_what_pydicom_shows(case):
    samples, bits, elements, low, high = CASES[case]
    dataset = dicom_dataset(samples, bits, **elements)
    shown = decode(as_bytes(dataset))
    assert shown.mode == "L"
    np.testing.assert_array_equal(np.asarray(shown), expected(dataset, low, high))
    assert len(np.unique(np.asarray(shown))) > 1


def test_grey__large_range_is_mapped_pixel_by_pixel():
    samples = np.array([[0, 2**31, 2**32 - 1], [1, 5, 2**30]], np.uint32)
    shown = np.asarray(decode(as_bytes(dicom_dataset(samples, 32))))
    np.testing.assert_array_equal(shown, np.floor(samples / (2**32 - 1) * 255 + 0.5))


def test_grey__blank_values_are_none():
    dataset = dicom_dataset(TWELVE, 12, WindowCenter="", WindowWidth="", RescaleSlope="", RescaleIntercept="")
    np.testing.assert_array_equal(decode(as_bytes(dataset)), decode(as_bytes(dicom_dataset(TWELVE, 12))))


def test_grey__enhanced_files_say_it_in_groups():
    from pydicom.dataset import Dataset

    rescale, window, shared = Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    window.WindowCenter, window.WindowWidth = 40, 400
    shared.PixelValueTransformationSequence, shared.FrameVOILUTSequence = [rescale], [window]
    plain = dicom_dataset(SIGNED, 12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    enhanced = dicom_dataset(SIGNED, 12, SharedFunctionalGroupsSequence=[shared], NumberOfFrames=1)
    np.testing.assert_array_equal(decode(as_bytes(enhanced)), decode(as_bytes(plain)))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian], ids=lambda uid: uid.name
)
def test_native_transfer_syntaxes(syntax):
    dataset = dicom_dataset(TWELVE, 12, syntax, WindowCenter=1500, WindowWidth=900)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = TWELVE.astype(">u2").tobytes()
    stream = io.BytesIO()
    little = syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(stream, dataset, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=little)
    plain = dicom_dataset(TWELVE, 12, WindowCenter=1500, WindowWidth=900)
    np.testing.assert_array_equal(decode(as_bytes(dataset)), decode(as_bytes(plain)))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize(("samples", "bits"), [(TWELVE, 12), (SIXTEEN, 16), (EIGHT, 8)], ids=["12", "16", "8"])
def test_compressed__gives_the_samples_that_went_in(syntax, samples, bits):
    elements = {"WindowCenter": 1500, "WindowWidth": 900} if bits == 12 else {}
    dataset = dicom_dataset(np.tile(samples, 2), bits, **elements)  # the JPEG 2000 encoder wants 32 pixels a side
    plain = decode(as_bytes(dataset))
    dataset.compress(syntax)
    np.testing.assert_array_equal(decode(as_bytes(dataset)), plain)


@pytest.mark.parametrize(("samples", "bits"), [(TWELVE, 12), (SIXTEEN, 16), (EIGHT, 8)], ids=["12", "16", "8"])
def test_compressed__lossless_jpeg(samples, bits):
    plain = decode(as_bytes(dicom_dataset(samples, bits)))
    np.testing.assert_array_equal(decode(as_bytes(lossless_jpeg_dataset(samples, bits))), plain)


def encapsulated(dataset, stream: bytes, syntax):
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream + bytes(len(stream) % 2)])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    return dataset


def test_compressed__baseline_jpeg_in_grey_and_colour():
    smooth = np.add.outer(np.arange(40) * 3, np.arange(30) * 4).astype(np.uint8)
    for image, kind in (
        (Image.fromarray(smooth), "MONOCHROME2"),
        (Image.fromarray(np.dstack([smooth] * 3)), "YBR_FULL_422"),
    ):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=95)
        dataset = dicom_dataset(np.asarray(image), 8, PhotometricInterpretation=kind)
        shown = np.asarray(decode(as_bytes(encapsulated(dataset, stream.getvalue(), JPEGBaseline8Bit))))
        assert np.abs(shown.astype(int) - np.asarray(Image.open(stream))).max() <= 2
        assert shown.shape == np.asarray(image).shape


def test_colour__rgb_planes_ybr_and_deep_samples():
    colours = RNG.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    shown = decode(as_bytes(dicom_dataset(colours, 8)))
    assert shown.mode == "RGB"
    np.testing.assert_array_equal(shown, colours)
    planes = dicom_dataset(colours, 8, PlanarConfiguration=1, PixelData=colours.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(decode(as_bytes(planes)), colours)
    ybr = pydicom.pixels.convert_color_space(colours, "RGB", "YBR_FULL")
    dataset = dicom_dataset(ybr, 8, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(decode(as_bytes(dataset))).astype(int) - colours).max() <= 2
    deep = RNG.integers(0, 4096, (40, 30, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode(as_bytes(dicom_dataset(deep, 12))), np.floor(deep / 4095 * 255 + 0.5))


def test_colour__palette():
    colours = RNG.integers(0, 65536, (3, 256)).astype("<u2")
    names = ("Red", "Green", "Blue")
    elements = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in names}
    elements |= {f"{name}PaletteColorLookupTableData": row.tobytes() for name, row in zip(names, colours, strict=True)}
    shown = decode(as_bytes(dicom_dataset(EIGHT, 8, PhotometricInterpretation="PALETTE COLOR", **elements)))
    np.testing.assert_array_equal(shown, np.floor(colours.T[EIGHT] / 65535 * 255 + 0.5))


def test_one_bit():
    bits = RNG.integers(0, 2, (16, 16)).astype(np.uint8)
    dataset = dicom_dataset(bits, 8, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    np.testing.assert_array_equal(decode(as_bytes(dataset)), bits * 255)


@pytest.mark.parametrize("implicit", [True, False])
def test_without_preamble(implicit):
    dataset = dicom_dataset(TWELVE, 12, WindowCenter=1500, WindowWidth=900)
    plain = decode(as_bytes(dataset))
    whole = as_bytes(dataset)
    np.testing.assert_array_equal(decode(whole[132:]), plain)
    bare = io.BytesIO()
    dataset = dicom_dataset(TWELVE, 12, WindowCenter=1500, WindowWidth=900)
    del dataset.file_meta
    pydicom.dcmwrite(bare, dataset, implicit_vr=implicit, little_endian=True)
    np.testing.assert_array_equal(decode(bare.getvalue()), plain)


def without_pixels():
    return dicom_dataset(TWELVE, 12, PixelData=None)


def mpeg():
    return encapsulated(dicom_dataset(EIGHT, 8), b"\0\0\1\xb3" * 10, MPEG2MPML)


def liar():
    dataset = dicom_dataset(EIGHT, 8)
    stream = io.BytesIO()
    Image.new("L", (3000, 2000)).save(stream, "JPEG")
    return encapsulated(dataset, stream.getvalue(), JPEGBaseline8Bit)


def bloated():
    dataset = dicom_dataset(EIGHT, 8)
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    return encapsulated(dataset, header + b"\x81\x07" * 100_000, RLELossless)


def deflated_bomb():
    dataset = dicom_dataset(EIGHT, 8, DeflatedExplicitVRLittleEndian)
    dataset.add_new(0x00091010, "OB", bytes(60_000_000))
    return dataset


REFUSED = {
    "several frames": (
        lambda: dicom_dataset(EIGHT, 8, NumberOfFrames=4, PixelData=EIGHT.tobytes() * 4),
        "has 4 frames; give one file a frame",
    ),
    "no pixels": (without_pixels, r"has no pixels \(Digital X-Ray Image Storage - For Presentation\)"),
    "floats": (lambda: dicom_dataset(EIGHT, 8, PixelData=None, FloatPixelData=bytes(4800)), "floating-point samples"),
    "too few pixels": (lambda: dicom_dataset(EIGHT, 8, PixelData=bytes(600)), "cannot decode this DICOM file"),
    "no width": (lambda: dicom_dataset(EIGHT, 8, Columns=None), "cannot decode this DICOM file.*Columns"),
    "nothing": (lambda: dicom_dataset(EIGHT, 8, Rows=0), "says that it has 30 x 0 pixels"),
    "window of no width": (
        lambda: dicom_dataset(EIGHT, 8, WindowCenter=5, WindowWidth=0),
        "Window Width must be greater than or equal to 1",
    ),
    "no contrast": (lambda: dicom_dataset(EIGHT, 8, RescaleSlope=0, RescaleIntercept=7), "range from 7 to 7"),
    "no number": (lambda: dicom_dataset(EIGHT, 8, RescaleSlope="1e400", RescaleIntercept=7), "range from|finite"),
    "bits": (lambda: dicom_dataset(EIGHT, 8, BitsStored=12), "stores 12 of 8 bits"),
    "other colours": (
        lambda: dicom_dataset(np.dstack([EIGHT] * 3), 8, PhotometricInterpretation="HSV"),
        "kind 'HSV' .*convert them to RGB",
    ),
    "film": (mpeg, "MPEG"),
    "compressed size lies": (liar, r"compressed pixels are 3,000 x 2,000, its header says 30 x 40"),
    "compressed bytes lie": (bloated, "compressed bytes for pixels of 1,200"),
    "too large": (
        lambda: dicom_dataset(EIGHT, 8, Rows=60000, Columns=60000),
        r"60,000 x 60,000 pixels exceeds the limit",
    ),
    "deflated bomb": (deflated_bomb, "grows beyond"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
@pytest.mark.parametrize("case", REFUSED)
def test_refused__with_the_reason(case):
    make, message = REFUSED[case]
    with pytest.raises(ImageError, match=message):
        decode(as_bytes(make()), max_pixels=1_000_000)


def test_refused__before_pixels_are_touched(monkeypatch):
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)
    with pytest.raises(ImageError, match="30 x 40 pixels exceeds the limit of 1,199"):
        decode(as_bytes(dicom_dataset(EIGHT, 8)), max_pixels=1199)


def test_missing__pydicom_and_decoders_are_named_with_the_extra(monkeypatch):
    content = as_bytes(lossless_jpeg_dataset(TWELVE, 12))
    from pydicom.pixels.decoders.base import Decoder

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "is_available", property(lambda self: False))
        with pytest.raises(ImageError, match=r"JPEG Lossless.*pip install 'fluoroscope\[dicom\]'"):
            decode(content)
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name == "pydicom":
            raise ImportError(name)
        return real(name, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", missing)
        with pytest.raises(ImageError, match=r"need pydicom: pip install 'fluoroscope\[dicom\]'"):
            decode(content)


def test_compressed_size__of_streams():
    grey = Image.fromarray(EIGHT)
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG2000", {"no_jp2": True}),
        ("JPEG2000", {}),
    ):
        stream = io.BytesIO()
        grey.save(stream, kind, **options)
        assert compressed_size(stream.getvalue()) == (40, 30)
    assert compressed_size(b"") is None and compressed_size(b"\xff\xd8\xff") is None
    assert compressed_size(b"\xff\xd8\xff\xe0\0\0\xff\xda" + bytes(20)) is None
    assert compressed_size(b"\xff\xd8\xff\xff\xff\xc0\0\x0b\x08\0\x02\0\x03\x01") == (2, 3)
    assert compressed_size(b"\xff\x4f\xff\x51\0") is None


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
def test_truncated_files():
    for dataset in (dicom_dataset(TWELVE, 12), lossless_jpeg_dataset(TWELVE, 12)):
        content = as_bytes(dataset)
        for kept in (len(content) // 2, 400, 140):
            with pytest.raises(ImageError):
                decode(content[:kept])
