"""Schema strings, as open_clip names models: ``kind:path?option=value&option=value``.

Options of the string and keyword arguments are the same thing; keywords win. A reader is a function whose keyword-only
parameters are its options, so an unknown option is found by its signature and named with the nearest one.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from engine.errors import UsageError
from engine.keys import short_hash

if TYPE_CHECKING:
    from engine.dataset import Dataset

# Module and function of each kind; imported when used, because some bring heavy libraries.
READERS = {
    "folder": ("engine.sources.folder", "open_folder"),
    "table": ("engine.sources.table", "open_table"),
    "tar": ("engine.sources.tar", "open_tar"),
    "iu-xray": ("engine.sources.iu_xray", "open_iu_xray"),
    "phantom": ("engine.sources.phantoms", "open_phantoms"),
}
# In quotes what a shell would expand.
EXAMPLES = "folder:PATH, table:FILE.csv, 'tar:shard-{000..099}.tar', iu-xray:PATH, 'phantom:2000?seed=1'"


class Schema(NamedTuple):
    """A schema string taken apart."""

    kind: str
    path: str
    options: dict[str, str]


def parse_schema(schema: str) -> Schema:
    """Take a schema string apart.

    Raises
    ------
    UsageError
        No colon, an unknown kind, nothing after the colon, or an option without ``=``.

    Examples
    --------
    >>> parse_schema("phantom:2000?seed=1")
    Schema(kind='phantom', path='2000', options={'seed': '1'})
    """
    from engine.tables import offer

    kind, colon, rest = schema.partition(":")
    if not colon:
        here = Path(schema)
        if schema and here.exists():
            meant = f"folder:{schema}" if here.is_dir() else f"table:{schema}"
            raise UsageError(f"the data set {schema!r} lacks its kind; did you mean {meant!r}?")
        raise UsageError(f"the data set {schema!r} has no colon; say its kind first, such as {EXAMPLES}")
    if kind not in READERS:
        raise UsageError(
            f"unknown kind {kind!r} of data set in {schema!r}; {offer(kind, READERS)} (such as {EXAMPLES})"
        )
    path, options = rest, ""
    if "?" in rest and not Path(rest).exists():
        path, _, options = rest.rpartition("?")
    if not path:
        raise UsageError(f"the data set {schema!r} names nothing after the colon; write it such as {EXAMPLES}")
    try:
        pairs = parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options))
    except ValueError as error:
        message = f"cannot read the options {options!r} of {schema!r}; write them as ?name=value&name=value"
        raise UsageError(message) from error
    return Schema(kind, path, dict(pairs))


def open_dataset(schema: str, **options: Any) -> Dataset:
    """Open a data set.

    Parameters
    ----------
    schema : str
        ``folder:PATH``, ``table:FILE.csv|parquet``, ``tar:PATTERN``, ``iu-xray:PATH`` or ``phantom:N?seed=S``, with
        options after ``?``. The first three also take what fsspec opens, such as ``folder:s3://bucket/images``.
    **options
        The same options with their own types; see `open_folder`, `open_table`, `open_tar`, `open_iu_xray` and
        `open_phantoms`. They win over those in the string. None means not given.

    Returns
    -------
    Dataset

    Raises
    ------
    UsageError
        An unknown kind or option, or a path that does not exist.
    DataError
        The data cannot be used as they are.
    """
    from engine.tables import offer

    kind, path, written = parse_schema(schema)
    module, name = READERS[kind]
    reader: Callable[..., Dataset] = getattr(importlib.import_module(module), name)
    known = [
        parameter.name
        for parameter in inspect.signature(reader).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "schema"
    ]
    given = {**written, **{key: value for key, value in options.items() if value is not None}}
    for option in given:
        if option not in known:
            raise UsageError(f"{kind}: data sets have no option {option!r} (in {schema!r}); {offer(option, known)}")
    return reader(path, schema=schema, **given)


def dataset_name(kind: str, path: str, **options: Any) -> str:
    """Return a data set's name, safe as a file's: kind, last part of the path, and a hash over path and options."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name.rpartition(".")[0] or Path(path).name).strip("-.")[:40]
    told = sorted((key, repr(value)) for key, value in options.items() if value is not None)
    return f"{kind}-{readable}-{short_hash(repr((kind, path, told)), 8)}"


def as_names(value: str | Iterable[str] | None) -> list[str]:
    """Return an option that is a list of names; a string is split at its commas."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts if str(part).strip()]


def as_mapping(option: str, value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an option that maps names; a string is written ``old:new,old:new``."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return dict(value)
    pairs = [part.partition(":") for part in value.split(",") if part.strip()]
    for name, colon, _ in pairs:
        if not colon:
            raise UsageError(f"{option}={value!r}: {name!r} has no colon; write {option}=old:new,old:new")
    return {name.strip(): new.strip() for name, _, new in pairs}


def as_flag(option: str, value: str | bool) -> bool:
    """Return an option that is true or false."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    known = words.get(str(value).strip().lower())
    if known is None:
        raise UsageError(f"{option}={value!r} is neither true nor false")
    return known


def as_integer(option: str, value: str | int, least: int = 0) -> int:
    """Return an option that is a whole number of at least `least`."""
    try:
        number = int(str(value).strip())
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(f"{option}={value!r} must be a whole number of {least} or more")
    return number


def as_number(option: str, value: str | float, least: float, most: float) -> float:
    """Return an option that is a number in [least, most]."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise UsageError(f"{option}={value!r} must be a number from {least:g} to {most:g}")
    return number


def as_choice(option: str, value: str, known: Iterable[str]) -> str:
    """Return an option that is one of some words."""
    from engine.tables import offer

    choices = list(known)
    if value not in choices:
        raise UsageError(f"{option}={value!r} is not known; {offer(value, choices)}")
    return value
