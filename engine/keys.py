"""Content addresses: what a row of the cache is called.

A key is BLAKE2b-128 of a sample's encoded bytes (image file), of its decoded pixels (phantom) or of its UTF-8 text. The
same content has the same key whichever data set, path or run it came from.
"""

from __future__ import annotations

import hashlib

import numpy as np

KEY_BYTES = 16


def key_of_bytes(content: bytes) -> bytes:
    """Return the 16-byte key of an encoded image file."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def key_of_text(text: str) -> bytes:
    """Return the 16-byte key of a text, taken over its UTF-8 bytes exactly as given."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=KEY_BYTES, person=b"text").digest()


def key_of_pixels(pixels: np.ndarray) -> bytes:
    """Return the 16-byte key of decoded pixels.

    Parameters
    ----------
    pixels : ndarray of uint8, (h, w) or (h, w, c)
        The shape is part of the key, so a reshaped copy is another image.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"pixels")
    digest.update(repr((pixels.shape, pixels.dtype.str)).encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.digest()


def key_of_content(content: bytes | np.ndarray) -> bytes:
    """Return the key of what a reader gave: encoded bytes or decoded pixels."""
    return key_of_pixels(content) if isinstance(content, np.ndarray) else key_of_bytes(content)


def short_hash(description: str, digits: int = 12) -> str:
    """Return the first hexadecimal digits of a description's BLAKE2b hash, for readable ids."""
    return hashlib.blake2b(description.encode("utf-8"), digest_size=32).hexdigest()[:digits]
