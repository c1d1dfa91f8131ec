"""Finding damage in a keyed array: what plain Zarr would read without a word.

Comes in: the cache and an array's name. Goes out: its rows, which of them are sound, and a list of damage by array,
chunk and rows. The metadata are built again from the group's attributes (whose digest is checked) and compared, chunk
files are compared in number and size, every key must be there and stand once, every row must match its check. Takes no
lock, so it can run beside writers: keys are read before payload, and what they add meanwhile is left for the next time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays import array_folder, array_format
from engine.arrays.array_format import CHECK, KEY, METADATA, ArrayFormat
from engine.arrays.row_check import row_checks
from engine.arrays.row_lookup import first_occurrences
from engine.arrays.storage import Storage, storage_of
from engine.errors import CacheError
from engine.keys import KEY_BYTES

# What compaction removes; anything else has to be repaired.
HOLES = "keys are missing before later ones"
DOUBLES = "keys stand a second time"
WRONG_DOCUMENT = "its zarr.json differs from what the group's attributes imply"


@dataclass(frozen=True)
class Damage:
    """One thing found wrong.

    Parameters
    ----------
    array : str
        ``<kind>/<name>``.
    part : str
        The Zarr array in it ("embedding", "key", "check", ...), or "" for the group itself.
    chunk : int
        Number of the row chunk, -1 where it is not about one.
    rows : str
        Row numbers, such as "17" or "4096-8191, 9000"; "" where it is not about rows.
    problem : str
    """

    array: str
    part: str
    chunk: int
    rows: str
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a mapping, for tables and JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Inspection:
    """What was found in a keyed array.

    Parameters
    ----------
    form : ArrayFormat or None
        None where the group's zarr.json does not say what it is.
    keys : ndarray of uint8, (rows, 16)
        Zeros where a key is lost.
    sound : ndarray of bool, (rows,)
        The row's key is there, stands for the first time, and the row matches its check.
    damage : list of Damage
    """

    form: ArrayFormat | None
    keys: np.ndarray
    sound: np.ndarray
    damage: list[Damage]


def verify_array(cache: str | os.PathLike[str] | Storage, kind: str, name: str) -> tuple[int, list[Damage]]:
    """Return the number of rows of a keyed array and all damage found in it; raises for a newer format version only."""
    found = inspect_array(cache, kind, name)
    return len(found.keys), found.damage


def inspect_array(cache: str | os.PathLike[str] | Storage, kind: str, name: str) -> Inspection:
    """Look at everything in a keyed array.

    Parameters
    ----------
    cache : path, URL or Storage
    kind : "image", "text", "pixels" or "tokens"
    name : str

    Raises
    ------
    CacheError
        It was written by a newer format version.
    """
    storage = storage_of(cache)
    while True:
        content, form, found = _read_group(storage, kind, name)
        if form is None:
            return Inspection(None, np.empty((0, KEY_BYTES), np.uint8), np.empty(0, bool), found)
        keys, sound, wrong = inspect_rows(storage, form, name)
        if not wrong or _read_group(storage, kind, name)[0] == content:
            return Inspection(form, keys, sound, found + wrong)
        # It was rebuilt meanwhile (compaction, repair), so files of two generations were compared.


def inspect_rows(
    storage: Storage, form: ArrayFormat, name: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[Damage]]:
    """Return keys, which rows are sound, and the damage in the arrays of a group, given what the group is.

    `name` is that of its folder where it is not the one that the group says.
    """
    label = f"{form.kind}/{name or form.name}"
    folder = array_folder.array_name(form.kind, name or form.name)
    found: list[Damage] = []
    promised: dict[str, int] = {}
    for part in (KEY, CHECK, form.payload):
        rows, problem = _promised_rows(storage, f"{folder}/{part}", form, part)
        promised[part] = rows
        if problem:
            found.append(Damage(label, part, -1, "", problem))
    keys, wrong_keys = _read_keys(storage, folder, form, promised[KEY], label)
    found += wrong_keys
    for part, rows in promised.items():
        if rows > len(keys):
            found.append(Damage(label, part, -1, "", f"its shape promises {rows} rows, there are keys for {len(keys)}"))
    found += _wrong_files(storage, folder, form, label)
    matching = np.zeros(len(keys), bool)
    found += _wrong_rows(storage, folder, form, keys, matching, label)
    sound = np.zeros(len(keys), bool)
    candidates = np.flatnonzero(matching)
    sound[candidates[first_occurrences(keys[candidates])]] = True
    return keys, sound, found


def _read_group(storage: Storage, kind: str, name: str) -> tuple[bytes | None, ArrayFormat | None, list[Damage]]:
    """Return the group's zarr.json, what it says, and what is wrong with it; raises for a newer format version."""
    file, label = f"{array_folder.array_name(kind, name)}/{METADATA}", f"{kind}/{name}"
    path, content = Path(storage.place(file)), None
    try:
        content = storage.read(file)
        if not _is_flipped_version(content):
            array_format.check_version(json.loads(content)["attributes"]["format_version"], path)
        form = array_format.parse_group(content, path)
    except FileNotFoundError:
        return None, None, [Damage(label, "", -1, "", "the group's zarr.json is lost")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return content, None, [Damage(label, "", -1, "", f"the group's zarr.json cannot be read: {error!r}")]
    except CacheError as error:
        newer = "format version" in str(error)
        if newer and not (content and _is_flipped_version(content)):
            raise
        problem = "its format version is damaged" if newer else str(error)
        return content, None, [Damage(label, "", -1, "", problem)]
    return content, form, list(_wrong_group(form, content, kind, name, label))


def _is_flipped_version(content: bytes) -> bool:
    """Tell damage that looks like a newer format version: with our version the attributes match their digest."""
    try:
        attributes = dict(json.loads(content)["attributes"])
        return attributes.pop("digest") == array_format.attributes_digest(
            {**attributes, "format_version": array_format.FORMAT_VERSION}
        )
    except (ValueError, TypeError, KeyError):
        return False


def _wrong_group(form: ArrayFormat, content: bytes, kind: str, name: str, label: str) -> Iterator[Damage]:
    if (form.kind, form.name) != (kind, name):
        yield Damage(label, "", -1, "", f"its attributes say it is {form.kind}/{form.name}")
    if content != array_format.document_bytes(form.group_document()):
        yield Damage(label, "", -1, "", "the group's zarr.json differs from what its attributes imply")


def _promised_rows(storage: Storage, folder: str, form: ArrayFormat, part: str) -> tuple[int, str]:
    """Return the rows that an array's zarr.json promises, and what is wrong with it."""
    try:
        content = storage.read(f"{folder}/{METADATA}")
        rows = json.loads(content)["shape"][0]
    except FileNotFoundError:
        return 0, "its zarr.json is lost"
    except (CacheError, ValueError, TypeError, KeyError, IndexError) as error:
        return 0, f"its zarr.json cannot be read: {error!r}"
    if not isinstance(rows, int):
        return 0, WRONG_DOCUMENT
    expected = form.array_document(part, rows)
    undigested = {**expected, "attributes": {}}  # as the first fluoroscope wrote it
    if content not in (array_format.document_bytes(expected), array_format.document_bytes(undigested)):
        return 0, WRONG_DOCUMENT
    return rows, ""


def _read_keys(
    storage: Storage, folder: str, form: ArrayFormat, promised: int, label: str
) -> tuple[np.ndarray, list[Damage]]:
    """Return the keys up to the last one that is there or promised, zeros where some are lost."""
    numbers = chunk_numbers(storage, form, KEY, folder)[0]
    last = max([*numbers, (promised - 1) // form.chunk_rows if promised else -1])
    keys = np.zeros(((last + 1) * form.chunk_rows, KEY_BYTES), np.uint8)
    found = []
    for number in range(last + 1):
        start = number * form.chunk_rows
        content = _content(storage, folder, form, KEY, number)
        if isinstance(content, str):
            found.append(Damage(label, KEY, number, f"{start}-{start + form.chunk_rows - 1}", content))
        else:
            keys[start : start + form.chunk_rows] = content.reshape(-1, KEY_BYTES)
    present = np.asarray(keys.any(axis=1))
    there = int(np.flatnonzero(present)[-1]) + 1 if present.any() else 0
    if there < promised:
        found.append(Damage(label, KEY, -1, "", f"its shape promises {promised} rows, there are keys for {there}"))
    count = max(there, promised)
    keys, present = keys[:count], present[:count]
    reported = {damage.chunk for damage in found}
    for number, rows in _by_chunk(np.flatnonzero(~present), form):
        if number not in reported:
            found.append(Damage(label, KEY, number, _ranges(rows), HOLES))
    twice = np.ones(count, bool)
    twice[first_occurrences(keys)] = False
    for number, rows in _by_chunk(np.flatnonzero(twice & present), form):
        found.append(Damage(label, KEY, number, _ranges(rows), DOUBLES))
    return keys, found


def _wrong_files(storage: Storage, folder: str, form: ArrayFormat, label: str) -> Iterator[Damage]:
    for part in (form.payload, CHECK, KEY):
        for stranger in chunk_numbers(storage, form, part, folder)[1]:
            yield Damage(label, part, -1, "", f"the file {stranger!r} does not belong there")


def _wrong_rows(
    storage: Storage, folder: str, form: ArrayFormat, keys: np.ndarray, matching: np.ndarray, label: str
) -> Iterator[Damage]:
    """Yield the chunks whose rows do not match their checks, or whose files are lost; mark the rows that do match."""
    for start in range(0, len(keys), form.chunk_rows):
        number, some = start // form.chunk_rows, keys[start : start + form.chunk_rows]
        contents = {part: _content(storage, folder, form, part, number) for part in (form.payload, CHECK)}
        rows = f"{start}-{start + len(some) - 1}"
        lost = [(part, content) for part, content in contents.items() if isinstance(content, str)]
        for part, problem in lost:
            yield Damage(label, part, number, rows, problem)
        if lost:
            continue
        payload = np.asarray(contents[form.payload]).reshape(form.chunk_rows, *form.row_shape)[: len(some)]
        checks = np.asarray(contents[CHECK])[: len(some)]
        same, present = row_checks(some, payload) == checks, some.any(axis=1)
        matching[start : start + len(some)] = same & present
        wrong = np.flatnonzero(~same & present)
        if len(wrong):
            whole = " (all of them: a swapped or foreign chunk file?)" if len(wrong) == len(some) > 1 else ""
            problem = f"{len(wrong)} rows do not match their checks over key and payload{whole}"
            yield Damage(label, form.payload, number, _ranges(wrong + start), problem)


def _content(storage: Storage, folder: str, form: ArrayFormat, part: str, number: int) -> np.ndarray | str:
    """Return a chunk file's values, or what is wrong with the file."""
    name = form.chunk_file(part, number)
    try:
        content = storage.read(f"{folder}/{part}/{name}")
    except FileNotFoundError:
        return f"chunk file {name} cannot be read: it is lost"
    except CacheError as error:
        return f"chunk file {name} cannot be read: {error}"
    if len(content) != form.chunk_file_bytes(part):
        return f"chunk file {name} has {len(content):,} bytes instead of {form.chunk_file_bytes(part):,}"
    return np.frombuffer(content, form.part_dtype(part))


def chunk_numbers(
    storage: Storage, form: ArrayFormat, part: str, folder: str | None = None
) -> tuple[list[int], list[str]]:
    """Return the numbers of an array's chunk files, and the names of files that are none."""
    numbers, strangers = [], []
    for name in storage.names(f"{folder or array_folder.array_name(form.kind, form.name)}/{part}"):
        match = re.fullmatch(r"c\.(\d+)(\.0)*", name)
        if match and form.chunk_file(part, int(match[1])) == name:
            numbers.append(int(match[1]))
        elif name != METADATA:
            strangers.append(name)
    return sorted(numbers), strangers


def _by_chunk(rows: np.ndarray, form: ArrayFormat) -> Iterator[tuple[int, np.ndarray]]:
    for number in np.unique(rows // form.chunk_rows):
        yield int(number), rows[rows // form.chunk_rows == number]


def _ranges(rows: np.ndarray, most: int = 8) -> str:
    """Return ascending row numbers in short: 3-5, 9."""
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    runs = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in np.split(rows, breaks)]
    return ", ".join(runs[:most]) + (f", ... ({len(runs) - most} more runs)" if len(runs) > most else "")
