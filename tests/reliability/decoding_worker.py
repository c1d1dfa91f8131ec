"""Decodes broken files in a process of its own, under a limit of memory, so that a crash is its end and nobody else's.

Names of files come in, one a line (``mutant 17``, ``bomb PNG of 60,000 x 60,000``); one line of JSON a file goes out.
Pillow itself is asked about the same bytes: what it decodes must be what comes out here.
"""

from __future__ import annotations

import io
import json
import logging
import resource
import sys
import time
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from engine.dicom import is_dicom
from engine.errors import ImageError
from engine.pixels import Preprocess, decode
from tests.reliability.mutants import bombs, mutant

MAX_PIXELS = 4_000_000
# Address space beyond what is loaded before the first file; the largest image that is allowed takes a tenth of it.
MEMORY = 1 << 30
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


def outcome_of(content: bytes, *, ask_pillow: bool) -> dict[str, Any]:
    """Return what became of a file: "image" or "refused" with the reason, CPU seconds, bytes, and what Pillow says."""
    forget_peak()
    before, start = peak_memory(), time.process_time()
    try:
        image = decode(content, max_pixels=MAX_PIXELS)
        pixels, _ = Preprocess((32, 32))(image)
        assert pixels.shape == (32, 32, 3) and image.mode in ("L", "RGB"), (pixels.shape, image.mode)
        told: dict[str, Any] = {"outcome": "image", "reason": ""}
    except ImageError as error:
        image, told = None, {"outcome": "refused", "reason": str(error)}
    told |= {"seconds": time.process_time() - start, "grown": peak_memory() - before, "pillow": "not asked"}
    if ask_pillow and not is_dicom(content):
        told["pillow"] = _beside_pillow(content, image)
    return told


def _beside_pillow(content: bytes, image: Image.Image | None) -> str:
    """Return "same", "other pixels", "other mode" where it needs a conversion, "refuses" or "reads"."""
    try:
        theirs = Image.open(io.BytesIO(content), formats=FORMATS)
        if theirs.width * theirs.height > MAX_PIXELS:
            return "too large"
        theirs.load()
    except Exception:  # Pillow's decoders raise what they like; here it only matters that they do
        return "refuses"
    if image is None:
        return "reads"
    if theirs.mode not in ("L", "RGB") or theirs.has_transparency_data:
        return "other mode"
    try:
        theirs = ImageOps.exif_transpose(theirs)
    except Exception:  # a broken EXIF block turns nothing
        return "other mode"
    return "same" if np.array_equal(np.asarray(theirs), np.asarray(image)) else "other pixels"


def forget_peak() -> None:
    """Let the peak of resident memory begin at what is held now, where the system can."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_memory() -> int:
    """Return the largest resident memory of this process, in bytes, since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    """Decode what stdin names, one after the other."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    decode(mutant(0).content[:0] or b"P5 1 1 255\n\0")
    with open("/proc/self/statm", encoding="ascii") as file:
        loaded = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (loaded + MEMORY, loaded + MEMORY))
    for line in sys.stdin:
        kind, _, name = line.strip().partition(" ")
        content = bombs()[name] if kind == "bomb" else mutant(int(name)).content
        # Bombs are not for Pillow, which some of them would keep busy for minutes.
        told = outcome_of(content, ask_pillow=kind == "mutant") | {"file": line.strip(), "bytes": len(content)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
