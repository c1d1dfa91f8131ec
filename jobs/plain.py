"""Any result as plain data: what `--json` prints and what run records store.

Comes in: dataclasses, configs, arrays, tables, paths. Goes out: dicts, lists, texts and numbers that JSON knows; a
number that JSON cannot say (NaN, infinity) becomes null.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

LARGEST_ARRAY = 10_000


def plain(value: Any) -> Any:
    """Return a value as JSON's own types; arrays of more than 10,000 numbers are told by shape only."""
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    if hasattr(value, "to_dict") and type(value).__name__ in ("DataFrame", "Series"):
        records = value.to_dict("records") if type(value).__name__ == "DataFrame" else value.to_dict()
        return plain(records)
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.repr and not item.name.startswith("_")
        }
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        if math.prod(value.shape) > LARGEST_ARRAY:
            return {"shape": list(value.shape), "dtype": str(value.dtype)}
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | Set):
        return [plain(item) for item in value]
    return str(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else " ".join(map(str, key)) if isinstance(key, tuple) else str(plain(key))
