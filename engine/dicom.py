"""DICOM files to upright 8-bit images, grey or RGB, through pydicom (the ``dicom`` extra).

What a viewer shows is made in the standard's order: modality LUT or rescale, then VOI LUT (the first; a table goes
before a window, and the first of several windows is taken), then MONOCHROME1 inverted. To 8 bits goes the full range of
what came last, whatever values this one image holds, so that equal values stay equal between images:

- after a VOI LUT the range of its entries, after a window the range that it maps to;
- without either the range of the modality LUT's entries, or of the stored bits, rescaled where the file says so.

The lowest of that range is 0, the highest 255, the nearest grey in between. Colour (RGB, YBR, palette) becomes RGB,
from more than 8 bits in the same way. Overlays, presentation states and padding values are not applied. Files of
several frames are refused. One without the preamble is recognised by its first element.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import ImageError
from engine.image_headers import check_code_stream, check_scans, jpeg_size, read_code_stream, too_large

EXTRA = "pip install 'fluoroscope[dicom]'"
# Everything that decides what is shown. Other elements are skipped, however many a file has.
TAGS = [
    "SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
]  # fmt: skip
# What functional groups of an enhanced file say of its one frame, by the group that says it.
LIFTED = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
GREY = ("MONOCHROME1", "MONOCHROME2")
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
# What pydicom and its decoders raise on malformed files.
ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    MemoryError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Above so many different stored values they are mapped one by one; below, each value once.
LARGEST_TABLE = 1 << 17
# A deflated file may say much in few bytes: its header and pixels together may grow to this many bytes a pixel.
BYTES_A_PIXEL = 8
HEADER_ROOM = 1 << 24


def is_dicom(content: bytes) -> bool:
    """Tell whether a file is DICOM: by its prefix, or without the preamble by a first element of group 2 or 8."""
    if content[128:132] == b"DICM":
        return True
    group, element = content[:2], content[2:4]
    if group == b"\x02\x00":
        return element == b"\x00\x00" and content[4:6] == b"UL"
    return group == b"\x08\x00" and element in (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00")


def decode_dicom(content: bytes, max_pixels: int) -> Image.Image:
    """Decode a DICOM file.

    Parameters
    ----------
    content : bytes
        The file, with its preamble or without.
    max_pixels : int
        Limit on rows times columns, held against the header, and the header of compressed pixels, before any is
        decoded.

    Returns
    -------
    PIL.Image.Image
        In mode ``L`` or ``RGB``.

    Raises
    ------
    ImageError
        pydicom or a decoder is missing (the message names the extra), several frames, no pixels, broken, or too large.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ImageError(f"DICOM files need pydicom: {EXTRA}") from error
    try:
        _check_deflated(content, max_pixels)
        dataset = pydicom.dcmread(io.BytesIO(content), force=True, specific_tags=TAGS)
        _lift(dataset)
        _check_header(dataset, max_pixels)
        samples = _samples(dataset)
        if str(dataset.PhotometricInterpretation) in GREY:
            return Image.fromarray(_shown_grey(dataset, samples))
        return Image.fromarray(_shown_colour(dataset, samples))
    except (InvalidDicomError, BytesLengthException, *ERRORS) as error:
        raise ImageError(f"cannot decode this DICOM file: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message: pydicom's list all decoders that were tried."""
    text = str(error).strip().splitlines()
    return " ".join(text[:2]) if text else type(error).__name__


def _check_deflated(content: bytes, max_pixels: int) -> None:
    """Raise ImageError where a deflated file would grow beyond all that its pixels can need."""
    meta = content[132:144]
    if content[128:132] != b"DICM" or meta[:6] != b"\x02\x00\x00\x00UL":
        return
    start = 144 + int.from_bytes(meta[8:12], "little")
    if DEFLATED.encode() not in content[144:start]:
        return
    most = max_pixels * BYTES_A_PIXEL + HEADER_ROOM
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size, rest = 0, content[start:]
    while rest and not inflater.eof:
        size += len(inflater.decompress(rest, 1 << 20))
        rest = inflater.unconsumed_tail
        if size > most:
            raise ImageError(f"the deflated DICOM file grows beyond {most:,} bytes, more than its pixels can need")


def _lift(dataset: Any) -> None:
    """Put what functional groups say of the one frame where a classic file has it, and drop values left blank."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in (dataset.get(groups) or [])[:1]:
            for sequence, keywords in LIFTED.items():
                for item in (group.get(sequence) or [])[:1]:
                    for keyword in keywords:
                        if keyword in item and keyword not in dataset:
                            setattr(dataset, keyword, item[keyword].value)
    for keyword in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"):
        if keyword in dataset and dataset[keyword].value in (None, ""):
            delattr(dataset, keyword)


def _check_header(dataset: Any, max_pixels: int) -> None:
    """Raise ImageError for what is no single image of whole-number samples, or too large."""
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = getattr(dataset.get("SOPClassUID"), "name", "") or "unknown kind"
        raise ImageError(f"the DICOM file has no pixels ({kind}); leave it out")
    if "PixelData" not in dataset:
        raise ImageError("the DICOM file has floating-point samples, whose range no file tells; convert it to 16 bits")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"the DICOM file has {frames} frames; give one file a frame")
    height, width = int(dataset.Rows), int(dataset.Columns)
    if height < 1 or width < 1:
        raise ImageError(f"the DICOM file says that it has {width} x {height} pixels")
    if width * height > max_pixels:
        raise too_large(height, width, max_pixels)
    if not 1 <= int(dataset.BitsStored) <= int(dataset.BitsAllocated) <= 32:
        raise ImageError(f"the DICOM file stores {dataset.BitsStored} of {dataset.BitsAllocated} bits a sample")


def _samples(dataset: Any) -> np.ndarray:
    """Return the stored samples, (rows, columns) or (rows, columns, 3) as RGB where they are colour."""
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = syntax
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise ImageError(f"no decoder for the transfer syntax {syntax.name}: {EXTRA}")
    if syntax.is_encapsulated:
        _check_compressed(dataset, syntax)
    samples = pixel_array(dataset, raw=False)
    if str(dataset.PhotometricInterpretation) == "PALETTE COLOR":
        samples = apply_color_lut(samples, dataset)
    if samples.shape[:2] != (dataset.Rows, dataset.Columns):
        raise ImageError(f"the DICOM file's pixels are {samples.shape}, its header says otherwise")
    return samples


def _check_compressed(dataset: Any, syntax: Any) -> None:
    """Raise ImageError where compressed pixels have another size than the file says: decoders believe the former."""
    from pydicom.encaps import get_frame

    height, width = int(dataset.Rows), int(dataset.Columns)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == RLE:
        raw = height * width * int(dataset.SamplesPerPixel) * -(-int(dataset.BitsAllocated) // 8)
        if len(frame) > 2 * raw + 4096:
            raise ImageError(f"the DICOM file has {len(frame):,} compressed bytes for pixels of {raw:,}")
        return
    found = compressed_size(frame)
    if found is not None and found != (height, width):
        raise ImageError(
            f"the DICOM file's compressed pixels are {found[1]:,} x {found[0]:,}, its header says {width:,} x "
            f"{height:,}"
        )
    check_scans(frame)
    check_code_stream(frame)


def compressed_size(frame: bytes) -> tuple[int, int] | None:
    """Return the (height, width) that a JPEG, JPEG-LS or JPEG 2000 stream says, None where it says none."""
    if frame[:2] == b"\xff\xd8":
        return jpeg_size(frame)
    stream = read_code_stream(frame)
    return None if stream is None else (stream.height, stream.width)


def _shown_grey(dataset: Any, samples: np.ndarray) -> np.ndarray:
    """Return what a viewer shows of grey samples, uint8 (rows, columns)."""
    if samples.ndim != 2:
        raise ImageError(f"the DICOM file says it is grey, but its pixels are {samples.shape}")
    low, high = int(samples.min()), int(samples.max())
    if high - low < min(LARGEST_TABLE, samples.size):
        # All steps work on each value alone, so each is shown once instead of for every pixel.
        table = _shown_values(dataset, np.arange(low, high + 1).astype(samples.dtype))
        shown = table[samples.astype(np.int64) - low]
    else:
        shown = _shown_values(dataset, samples)
    return 255 - shown if str(dataset.PhotometricInterpretation) == "MONOCHROME1" else shown


def _shown_values(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Return stored values after modality and VOI LUT in 8 bits, of the same shape, before any inversion."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    values = apply_modality_lut(stored, dataset)
    first, last = _modality_range(dataset)
    tables = dataset.get("VOILUTSequence")
    if tables and "LUTDescriptor" in tables[0] and "LUTData" in tables[0]:
        # A rescale of 1 and 0 makes floats of whole numbers, which are no places in a table.
        whole = values if values.dtype.kind in "iu" else np.rint(values).astype(np.int64)
        values = apply_voi(whole, dataset)
        first, last = 0.0, 2.0 ** int(tables[0].LUTDescriptor[2]) - 1
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        values = apply_windowing(values, dataset)
    else:
        first, last = min(first, last), max(first, last)
    return _eight_bits(values, first, last)


def _modality_range(dataset: Any) -> tuple[float, float]:
    """Return what the lowest and the highest value that can be stored become; the range that windows map to."""
    tables = dataset.get("ModalityLUTSequence")
    if tables:
        return 0.0, 2.0 ** int(tables[0].LUTDescriptor[2]) - 1
    bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
    first, last = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if "RescaleSlope" in dataset and "RescaleIntercept" in dataset:
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        return first * slope + intercept, last * slope + intercept
    return first, last


def _eight_bits(values: np.ndarray, first: float, last: float) -> np.ndarray:
    if first == last or not np.isfinite(last - first):
        raise ImageError(f"the DICOM file's grey values range from {first:g} to {last:g}, which shows nothing")
    scaled = (values.astype(np.float64) - first) * (255 / (last - first))
    if not np.isfinite(scaled).all():
        raise ImageError("the DICOM file's rescale or window makes values that are no finite numbers")
    return np.clip(np.floor(scaled + 0.5), 0, 255).astype(np.uint8)


def _shown_colour(dataset: Any, samples: np.ndarray) -> np.ndarray:
    """Return colour samples as uint8 (rows, columns, 3)."""
    kind = str(dataset.PhotometricInterpretation)
    if samples.ndim != 3 or samples.shape[2] != 3 or not (kind in ("RGB", "PALETTE COLOR") or kind.startswith("YBR")):
        raise ImageError(
            f"DICOM pixels of the kind {kind!r} with shape {samples.shape} are not read; convert them to RGB"
        )
    if samples.dtype == np.uint8:
        return np.ascontiguousarray(samples)
    if kind == "PALETTE COLOR":
        return _eight_bits(samples, 0.0, 65535.0)
    return _eight_bits(samples, 0.0, 2.0 ** int(dataset.BitsStored) - 1)
