"""What stands in the JSON beside an index: which rows it covers, what it was built with, digests of file and document.

The file is ``<cache>/indexes/<encoder>-<kind>-<how>.faiss``, plain FAISS; the JSON beside it makes it an index of the
cache. Whoever reads it can tell an index that is damaged, over other rows or behind, before it gives a wrong answer.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays.file_digest import file_digest
from engine.errors import CacheError
from engine.keys import short_hash

INDEX_VERSION = 1


@dataclass(frozen=True)
class IndexInfo:
    """What stands in the JSON beside an index.

    Parameters
    ----------
    encoder, kind, how : str
        `how` is a plain name or a FAISS factory string, see `engine.index.kinds`.
    rows : int
        The index covers rows 0 to rows - 1 of the keyed array.
    keys_digest : str
        BLAKE2b over their keys.
    generation : int
        Of the keyed array.
    dim : int
    bytes : int
        Size of the index file.
    file_digest : str
        Of the index file, see `engine.arrays.file_digest`; "" where an earlier version wrote it.
    parameters : dict
        What the index was built with: factory string, rows it was trained on, cells to look into (nprobe).
    """

    encoder: str
    kind: str
    how: str
    rows: int
    keys_digest: str
    generation: int
    dim: int
    bytes: int = 0
    file_digest: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    metric: str = "cosine"
    version: int = INDEX_VERSION

    @property
    def name(self) -> str:
        """File name without its suffix."""
        return f"{self.encoder}-{self.kind}-{self.how}"

    def document(self) -> builtins.bytes:
        """Return the JSON that stands beside the index, with a digest over all of it."""
        values = asdict(self)
        return (json.dumps({**values, "digest": _document_digest(values)}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> IndexInfo:
        """Read the JSON beside an index; CacheError where there is none, it is damaged or of a newer version."""
        try:
            content = path.read_bytes()
            values = json.loads(content)
            digest = values.pop("digest", None)
            ours = _document_digest({**values, "version": INDEX_VERSION})
            if values["version"] > INDEX_VERSION and digest != ours:  # else it is a damaged digit
                raise CacheError(f"the index {path} is of the newer version {values['version']}; upgrade fluoroscope")
            info = cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"no index {path} ({error})") from error
        if values["version"] > INDEX_VERSION or (digest is not None and content != info.document()):
            raise CacheError(f"the JSON {path} of an index does not match its digest {digest!r}")
        return info

    def damage_of(self, path: Path) -> str:
        """Return what is wrong with the index file that this describes, "" where nothing is."""
        try:
            if path.stat().st_size != self.bytes or file_digest(path) != (self.file_digest or file_digest(path)):
                return f"the index {path} is not the one that its JSON describes"
        except OSError as error:
            return f"the index {path} cannot be read ({error.strerror})"
        return ""


def _document_digest(values: dict[str, Any]) -> str:
    return short_hash(json.dumps(values, sort_keys=True), digits=32)


def index_name(encoder_id: str, kind: str, how: str) -> str:
    """Return where an index and its JSON lie in a cache, without their suffixes."""
    return f"indexes/{encoder_id}-{kind}-{how}"


def keys_digest(keys: np.ndarray) -> str:
    """Return the digest of the keys, (rows, 16) uint8, that an index covers."""
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()
