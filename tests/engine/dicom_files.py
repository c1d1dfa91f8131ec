"""Synthetic DICOM files for tests, written by pydicom, and a lossless JPEG encoder, which no Python package brings."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid


def dicom_dataset(samples: np.ndarray, bits: int, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> Dataset:
    """Return a data set of native pixels; further elements by keyword, None takes one away."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.PatientName = "Phantom^One"
    colour = samples.ndim == 3
    dataset.Rows, dataset.Columns = samples.shape[:2]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = samples.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(samples.dtype.kind == "i")
    little = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = little + bytes(len(little) % 2)
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def table_item(first: int, bits: int, entries: np.ndarray) -> Dataset:
    """Return an item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = [int(value) for value in entries]
    item["LUTDescriptor"].VR, item["LUTData"].VR = ("SS" if first < 0 else "US"), "US"
    return item


def as_bytes(dataset: Dataset) -> bytes:
    """Return a data set as a file of the standard's form."""
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


def lossless_jpeg(samples: np.ndarray, bits: int) -> bytes:
    """Encode grey samples as lossless JPEG (ITU-T T.81 annex H, predictor 1), with Huffman codes of five bits each."""
    height, width = samples.shape
    values = samples.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = values[:, :-1], values[:-1, 0], 1 << (bits - 1)
    # Differences are taken modulo 65,536, as signed numbers; 32,768 is a category of its own without further bits.
    differences = (values - predicted + 32768) % 65536 - 32768
    pieces = []
    for difference in differences.ravel().tolist():
        if difference == -32768:
            pieces.append(f"{16:05b}")
            continue
        category = abs(difference).bit_length()
        code = difference if difference > 0 else difference + (1 << category) - 1
        pieces.append(f"{category:05b}" + (f"{code:0{category}b}" if category else ""))
    text = "".join(pieces)
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = bytes([0xFF, 0xC3, 0, 11, bits, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 1, 1, 0x11, 0])
    table = bytes([0xFF, 0xC4, 0, 19 + 17, 0, *[0] * 4, 17, *[0] * 11, *range(17)])
    scan = bytes([0xFF, 0xDA, 0, 8, 1, 1, 0, 1, 0, 0])
    return b"\xff\xd8" + frame + table + scan + coded + b"\xff\xd9"


def lossless_jpeg_dataset(samples: np.ndarray, bits: int, **elements: Any) -> Dataset:
    """Return a data set whose pixels are lossless JPEG."""
    dataset = dicom_dataset(samples, bits, JPEGLosslessSV1, **elements)
    stream = lossless_jpeg(samples, bits)
    dataset.PixelData = encapsulate([stream + bytes(len(stream) % 2)])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    return dataset
