"""A digest of a whole file at memory speed, and Parquet files that carry the digest of their own bytes.

Comes in: a path. Goes out: 32 hexadecimal digits, or whether a file still is what was written. Sample tables decide
which row a sample gets, so a flipped byte in one must not pass for another key; Parquet itself would read most of them
without a word. The digest stands among the file's own key-value metadata, where it was zeros while it was computed, so
file and digest come and go together.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.arrays.row_check import row_checks
from engine.errors import CacheError
from engine.keys import KEY_BYTES

BLOCK = 1 << 20
BLOCKS_AT_ONCE = 16
DIGITS = 32
SEAL = b"fluoroscope.digest"
UNSEALED = b"0" * DIGITS
# The second pair tells a file whose seal itself is damaged from one that never had one.
SEAL_METADATA = {SEAL: UNSEALED, b"fluoroscope.sealed": b"yes"}


def file_digest(path: Path) -> str:
    """Return the digest of a file: BLAKE2b over the checks of its blocks of 1 MiB; constant memory.

    A changed word is found for certain, any other change with a probability of 1 - 2**-64; see `row_check`.
    """
    with open(path, "rb") as file:
        return _digest(_pieces(file))


def seal_parquet(path: Path) -> None:
    """Write a Parquet file's digest into it; its key-value metadata must hold `SEAL_METADATA`.

    Call it on the temporary file, before the rename.
    """
    with open(path, "r+b") as file:
        place = _place_of_seal(file)[0]
        if place is None:
            raise CacheError(f"{path} has no room for a digest; write it with the metadata {SEAL_METADATA}")
        digest = _digest(_pieces(file, place))
        file.seek(place)
        file.write(digest.encode())


def seal_is_whole(path: Path) -> bool | None:
    """Tell whether a sealed Parquet file is as it was written; None for one without a seal (of an earlier version)."""
    with open(path, "rb") as file:
        place, sealed = _place_of_seal(file)
        if place is None:
            return False if sealed else None
        file.seek(place)
        found = file.read(DIGITS)
        return _digest(_pieces(file, place)).encode() == found


def _place_of_seal(file: BinaryIO) -> tuple[int | None, bool]:
    """Return where the digits stand, and whether there must be some; a file without a proper end counts as sealed."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    end = file.read()
    footer_size = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or footer_size > size - 8:
        return None, True
    start = size - 8 - footer_size
    file.seek(start)
    footer = file.read(footer_size)
    at = footer.find(SEAL)
    # Thrift writes key, type and length of a value, then the value: here 0x18 (a binary) and the one byte 32.
    place = at + len(SEAL) + 2
    if at < 0 or footer_size < place + DIGITS or footer[place - 1] != DIGITS:
        return None, any(name in footer for name in SEAL_METADATA)
    return start + place, True


def _pieces(file: BinaryIO, place: int | None = None) -> Iterator[bytes]:
    """Yield a file in multiples of a block, with the digest at `place` as it was while it was computed."""
    file.seek(0)
    start = 0
    while piece := file.read(BLOCK * BLOCKS_AT_ONCE):
        size = len(piece)
        if place is not None and start < place + DIGITS and place < start + size:
            patched = bytearray(piece)
            for offset, digit in enumerate(UNSEALED, start=place - start):
                if 0 <= offset < size:
                    patched[offset] = digit
            piece = bytes(patched)
        yield piece
        start += size


def _digest(pieces: Iterator[bytes]) -> str:
    """Return the digest of pieces; all but the last must be multiples of a block."""
    total, size = hashlib.blake2b(digest_size=DIGITS // 2), 0
    for piece in pieces:
        size += len(piece)
        whole = len(piece) // BLOCK * BLOCK
        blocks = np.frombuffer(piece[:whole], np.uint8).reshape(-1, BLOCK)
        total.update(row_checks(np.zeros((len(blocks), KEY_BYTES), np.uint8), blocks).tobytes())
        if rest := piece[whole:]:
            last = np.zeros((1, BLOCK), np.uint8)
            last[0, : len(rest)] = np.frombuffer(rest, np.uint8)
            total.update(row_checks(np.zeros((1, KEY_BYTES), np.uint8), last).tobytes())
    total.update(size.to_bytes(8, "little"))
    return total.hexdigest()
