"""What a keyed array looks like on disk: its description in, the bytes of its Zarr v3 metadata out.

A keyed array is the Zarr group ``arrays.zarr/<kind>/<name>`` with three arrays of the same row chunks:

    <payload>  (rows, ...)   embedding, pixels or tokens; fill value NaN for floats, 0 for integers
    key        (rows, 16)    uint8, the content address of each row; never all zero in a row that exists
    check      (rows,)       uint64, see `row_check`

Uncompressed and unsharded: a chunk file is the raw C-order array, its last rows filled up where the array ends within
it. Chunk files are called ``c.<row chunk>[.0...]`` (Zarr's default encoding with the separator "."), so that one folder
holds an array and one sync makes its renames durable. The group's attributes say everything else that is needed to
build all of this metadata again, which is how `array_verify` finds a damaged one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CacheError
from engine.keys import KEY_BYTES, short_hash

FORMAT = "fluoroscope keyed array"
FORMAT_VERSION = 1
STORE = "arrays.zarr"
METADATA = "zarr.json"
KEY, CHECK = "key", "check"
PARTS = {  # of each kind: the payload's name, its dtype and its dimensions after the rows
    "image": ("embedding", "<f2", ("dim",)),
    "text": ("embedding", "<f2", ("dim",)),
    "pixels": ("pixels", "|u1", ("y", "x", "channel")),
    "tokens": ("tokens", "<f2", ("token", "width")),
}
CHUNK_BYTES = 1 << 22
MOST_CHUNK_ROWS = 1 << 14
DAMAGED = "`fluoro cache verify` lists all damage, with --repair it drops and recomputes exactly the damaged rows"
_ZARR_NAMES = {"<f2": "float16", "|u1": "uint8", "<u8": "uint64"}


@dataclass(frozen=True)
class ArrayFormat:
    """Everything that fixes the metadata of a keyed array but its number of rows.

    Parameters
    ----------
    kind : "image", "text", "pixels" or "tokens"
    name : str
        Id of the encoder or preprocessing; tokens add ``@<layer>``.
    row_shape : tuple of int
    chunk_rows : int
    description : mapping
        What made the rows, as JSON values: the encoder's or preprocessing's whole description.
    generation : int
        Counts the rebuildings (compactions) that renumbered the rows.
    """

    kind: str
    name: str
    row_shape: tuple[int, ...]
    chunk_rows: int
    description: Mapping[str, Any]
    generation: int = 0

    @property
    def payload(self) -> str:
        """Name of the payload array."""
        return PARTS[self.kind][0]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the payload."""
        return np.dtype(PARTS[self.kind][1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's payload."""
        return self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))

    def part_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of one row of an array of the group."""
        return {self.payload: self.row_shape, KEY: (KEY_BYTES,), CHECK: ()}[part]

    def part_dtype(self, part: str) -> np.dtype:
        """Return the dtype of an array of the group."""
        return {self.payload: self.dtype, KEY: np.dtype("|u1"), CHECK: np.dtype("<u8")}[part]

    def chunk_file(self, part: str, number: int) -> str:
        """Return the file name of a row chunk within the folder of its array."""
        return ".".join(["c", str(number), *("0" for _ in self.part_shape(part))])

    def chunk_file_bytes(self, part: str) -> int:
        """Return the size of each chunk file of an array of the group."""
        row = self.part_dtype(part).itemsize * int(np.prod(self.part_shape(part), dtype=np.int64))
        return row * self.chunk_rows

    def bytes_of(self, rows: int) -> int:
        """Return the size of all chunk files that hold so many rows."""
        chunks = -(-rows // self.chunk_rows)
        return chunks * sum(self.chunk_file_bytes(part) for part in (self.payload, KEY, CHECK))

    def group_document(self) -> dict[str, Any]:
        """Return the group's zarr.json."""
        attributes = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "name": self.name,
            "payload": self.payload,
            "row_shape": list(self.row_shape),
            "dtype": _ZARR_NAMES[self.dtype.str],
            "chunk_rows": self.chunk_rows,
            "generation": self.generation,
            "description": dict(self.description),
        }
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {**attributes, "digest": attributes_digest(attributes)},
        }

    def array_document(self, part: str, rows: int) -> dict[str, Any]:
        """Return the zarr.json of one array of the group at a number of rows."""
        shape, dtype = self.part_shape(part), self.part_dtype(part)
        dimensions = {self.payload: PARTS[self.kind][2], KEY: ("byte",), CHECK: ()}[part]
        endian = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *shape],
            "data_type": _ZARR_NAMES[dtype.str],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk_rows, *shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if dtype.kind == "f" else 0,
            "codecs": [{"name": "bytes", **endian}],
            "attributes": {},
            "dimension_names": ["row", *dimensions],
            "storage_transformers": [],
        }
        # A shape may lag behind the keys after a kill; the digest tells such a one from a damaged digit.
        return {**document, "attributes": {"digest": attributes_digest(document)}}


def parent_document() -> dict[str, Any]:
    """Return the zarr.json of the store's root and of its kinds."""
    attributes = {"format": "fluoroscope cache", "format_version": FORMAT_VERSION}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """Return metadata as the bytes that are stored: the same document gives the same bytes."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def choose_chunk_rows(row_bytes: int) -> int:
    """Return the rows of a chunk: the power of two that makes it 4 MiB to 8 MiB, fewer rows where rows are tiny.

    Without a limit, tiny rows would make appending ten of them rewrite a long key chunk.
    """
    rows = 1
    while rows * row_bytes < CHUNK_BYTES and rows < MOST_CHUNK_ROWS:
        rows *= 2
    return rows


def plain_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as it will be read back from JSON; CacheError where it cannot be stored."""
    try:
        return json.loads(json.dumps(description, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"a description cannot be stored as JSON: {error}; use texts, numbers, lists and mappings"
        ) from error


def parse_group(content: bytes, path: Path) -> ArrayFormat:
    """Return the format that a group's zarr.json describes.

    Raises
    ------
    CacheError
        It was written by a newer format version, is not a keyed array, or is damaged.
    """
    try:
        document = json.loads(content)
        attributes = dict(document["attributes"])
        version = attributes["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path} is not the metadata of a keyed array ({error!r}); {DAMAGED}") from error
    check_version(version, path)
    try:
        digest = attributes.pop("digest")
        if digest != attributes_digest(attributes):
            raise CacheError(f"the attributes in {path} do not match their digest {digest!r}; {DAMAGED}")
        found = ArrayFormat(
            kind=attributes["kind"],
            name=attributes["name"],
            row_shape=tuple(attributes["row_shape"]),
            chunk_rows=attributes["chunk_rows"],
            description=attributes["description"],
            generation=attributes["generation"],
        )
        found.group_document()
    except (TypeError, KeyError) as error:
        raise CacheError(f"the attributes in {path} lack or misname {error}; {DAMAGED}") from error
    return found


def check_version(version: Any, path: Path) -> None:
    """Raise CacheError where a cache was written by a newer fluoroscope."""
    if isinstance(version, int) and 1 <= version <= FORMAT_VERSION:
        return
    raise CacheError(
        f"{path} has format version {version!r}, this fluoroscope reads versions up to {FORMAT_VERSION}; "
        "upgrade fluoroscope, or name another cache folder to start a new one"
    )


def attributes_digest(attributes: Mapping[str, Any]) -> str:
    """Return the digest of metadata that stands in them: 32 hexadecimal digits."""
    return short_hash(json.dumps(attributes, sort_keys=True, allow_nan=False), digits=32)
