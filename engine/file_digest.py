"""A digest of a whole file at memory speed, and Parquet files that carry the digest of their own bytes.

Comes in: a path. Goes out: 32 hexadecimal digits, or whether a file still is what was written. Sample tables decide
which row a sample gets, so a flipped byte in one must not pass for another key; Parquet itself would read most of them
without a word. The digest stands among the file's own key-value metadata, where it was zeros while it was computed, so
file and digest come and go together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.errors import CacheError
from engine.keys import KEY_BYTES
from engine.row_check import row_checks

BLOCK = 1 << 20
BLOCKS_AT_ONCE = 16
DIGITS = 32
SEAL = b"fluoroscope.digest"
UNSEALED = b"0" * DIGITS
# The second pair tells a file whose seal itself is damaged from one that never had one.
SEAL_METADATA = {SEAL: UNSEALED, b"fluoroscope.sealed": b"yes"}


def file_digest(path: Path) -> str:
    """Return the digest of a file: BLAKE2b over the checks of its blocks of 1 MiB; constant memory.

    A changed word is found for certain, any other change with a probability of 1 - 2**-64; see `engine.row_check`.
    """
    with open(path, "rb") as file:
        return _digest(_pieces(file))


def seal_parquet(path: Path) -> None:
    """Write a Parquet file's digest into it; its key-value metadata must hold `SEAL_METADATA`.

    Call it on the temporary file, before the rename.
    """
    content = path.read_bytes()
    place = _place_of_seal(content)
    if place is None or content[place : place + DIGITS] != UNSEALED:
        raise CacheError(f"{path} has no room for a digest; write it with the metadata {SEAL_METADATA}")
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(_digest([content]).encode())


def seal_is_whole(path: Path) -> bool | None:
    """Tell whether a sealed Parquet file is as it was written; None for one without a seal (of an earlier version)."""
    content = bytearray(path.read_bytes())
    place = _place_of_seal(content)
    if place is None:
        return False if b"fluoroscope.sealed" in content or SEAL in content else None
    found = bytes(content[place : place + DIGITS])
    content[place : place + DIGITS] = UNSEALED
    return _digest([bytes(content)]).encode() == found


def _place_of_seal(content: bytes | bytearray) -> int | None:
    """Return where the digits stand: Thrift writes key, type and length of a value, then the value."""
    at = content.rfind(SEAL)
    if at < 0:
        return None
    # Field header 0x18 (a binary, one field on) and the length as a one-byte variable-length integer.
    place = at + len(SEAL) + 2
    return place if len(content) >= place + DIGITS and content[place - 1] == DIGITS else None


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(BLOCK * BLOCKS_AT_ONCE):
        yield piece


def _digest(pieces: Iterator[bytes] | list[bytes]) -> str:
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
