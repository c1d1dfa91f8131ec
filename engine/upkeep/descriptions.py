"""What an array is, where its own zarr.json no longer says so: taken from what is left around it.

The shape of a row and the rows of a chunk stand in the metadata of payload and keys, whose digests are checked. What
made the rows stands a second time in the other arrays of the same encoder, or is told by the caller (a run's record, or
the model itself).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.arrays import array_format
from engine.arrays.array_format import KEY, METADATA, PARTS, STORE, ArrayFormat
from engine.errors import CacheError
from engine.index import IndexInfo

Description = Mapping[str, Any]


def recovered_format(cache: Path, kind: str, name: str, told: Mapping[str, Description]) -> ArrayFormat | None:
    """Return what an array must be, None where that cannot be told.

    Parameters
    ----------
    told : mapping of encoder or preprocessing id to description
        What the caller knows beyond the cache.
    """
    folder = cache / STORE / kind / name
    description = _description(cache, kind, name, told)
    shape = _shape_of(folder / PARTS[kind][0])
    key_shape = _shape_of(folder / KEY)
    if description is None or shape is None or key_shape is None:
        return None
    form = ArrayFormat(kind, name, shape[1], key_shape[0], description, _generation(cache, kind, name))
    # Both documents as they must be, or they were not this array's.
    for part in (form.payload, KEY):
        content = (folder / part / METADATA).read_bytes()
        if content != array_format.document_bytes(form.array_document(part, json.loads(content)["shape"][0])):
            return None
    return form


def pixels_description(encoder: Description) -> dict[str, Any]:
    """Return what describes the pixels of an encoder: its preprocessing without mean and standard deviation."""
    return {key: value for key, value in encoder["preprocess"].items() if key not in ("mean", "std")}


def _description(cache: Path, kind: str, name: str, told: Mapping[str, Description]) -> dict[str, Any] | None:
    encoder, _, layer = name.partition("@") if kind == "tokens" else (name, "", "")
    if kind == "pixels":
        for description in [*told.values(), *_stored(cache).values()]:
            if isinstance(description.get("preprocess"), Mapping) and description["preprocess"].get("id") == name:
                return pixels_description(description)
        return None
    found = told.get(encoder) or _stored(cache).get(encoder)
    if found is None:
        return None
    return {**found, "layer": int(layer)} if kind == "tokens" and layer.isdigit() else dict(found)


def _stored(cache: Path) -> dict[str, Description]:
    """Return the descriptions of the encoders whose arrays still say what they are."""
    found: dict[str, Description] = {}
    for kind in ("tokens", "text", "image"):
        for path in sorted((cache / STORE / kind).glob(f"*/{METADATA}")):
            try:
                form = array_format.parse_group(path.read_bytes(), path)
            except (OSError, CacheError):
                continue
            description = {key: value for key, value in form.description.items() if kind != "tokens" or key != "layer"}
            found[form.name.partition("@")[0] if kind == "tokens" else form.name] = description
    return found


def _shape_of(folder: Path) -> tuple[int, tuple[int, ...]] | None:
    """Return rows a chunk and shape of a row from an array's zarr.json; None where it is damaged."""
    try:
        document = json.loads((folder / METADATA).read_bytes())
        digest = document["attributes"].pop("digest")
        if digest != array_format.attributes_digest(document):
            return None
        return int(document["chunk_grid"]["configuration"]["chunk_shape"][0]), tuple(document["shape"][1:])
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _generation(cache: Path, kind: str, name: str) -> int:
    """Return the generation that an index knows, else the time, which no count of rebuildings has reached."""
    for path in sorted((cache / "indexes").glob("*.json")):
        try:
            info = IndexInfo.read(path)
        except CacheError:
            continue
        if (info.encoder, info.kind) == (name, kind):
            return info.generation
    return int(time.time())
