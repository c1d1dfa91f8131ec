"""Labels files for Open-i's reports: a table or JSON, keyed by report or by image.

A file comes in; the 14 labels by uid or image id go out. 1 is positive; 0, -1 and blank are negative, as in the study.
Keys may be written in any of the ways in use: ``12``, ``CXR12``, ``ecgen-radiology/12.xml``,
``12_IM-0140-1001.dcm.png``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.errors import DataError, UsageError
from engine.labels import NO_FINDING, STUDY_LABELS
from engine.sources.label_columns import label_matrix
from engine.sources.openi import image_id_of, uid_of
from engine.tables import offer, place, read_table, text_of

KEY_COLUMNS = ("image", "image_id", "id", "filename", "uid", "file", "study_id", "xml")
# The order in which CheXpert's labels stand where a file holds bare lists of 14 numbers.
ALPHABETICAL = tuple(sorted(STUDY_LABELS))


def read_labels(path: str | Path) -> pd.DataFrame:
    """Read a labels file.

    Parameters
    ----------
    path : str
        A table with a key column (`KEY_COLUMNS`) and the 14 labels as columns, in any order and spelling of spaces. Or
        JSON that maps keys to: a list of 14 numbers in alphabetical order of the labels; a mapping of label to number;
        or a list of the positive labels' names. Or JSON that lists rows as a table has them.

    Returns
    -------
    DataFrame of int8
        Index: uids and image ids in Open-i's form. Columns: `STUDY_LABELS`; No Finding where nothing else is positive.

    Raises
    ------
    UsageError
        No such file.
    DataError
        A label that is missing or unknown, a value that is no label, a key twice.
    """
    path = Path(path)
    table = _from_json(path) if path.suffix.lower() == ".json" else read_table(path)
    key_column = next((name for name in KEY_COLUMNS if name in table.columns), None)
    if key_column is None:
        raise DataError(
            f"the labels {str(path)!r} have no column {' or '.join(map(repr, KEY_COLUMNS))} to say whose they are"
        )
    columns = _label_columns(table, path)
    values = label_matrix(table, columns, path)
    keys = text_of(table[key_column]).map(_key)
    twice = keys[keys.duplicated()]
    if len(twice):
        raise DataError(f"{place(path, twice.index[0])}: {twice.iloc[0]!r} has labels more than once; keep one row")
    labels = pd.DataFrame(0, index=pd.Index(keys, name="key"), columns=list(STUDY_LABELS), dtype=np.int8)
    labels[[_spelled(column) for column in columns]] = values
    labels[NO_FINDING] = np.where((labels == 1).any(axis=1), labels[NO_FINDING], 1).astype(np.int8)
    return labels


def _key(name: str) -> str:
    return image_id_of(name) if "_IM-" in name else uid_of(name.removesuffix(".png").removesuffix(".dcm"))


def _folded(name: str) -> str:
    return name.strip().lower().replace("_", " ")


_BY_FOLDED = {_folded(label): label for label in STUDY_LABELS}


def _spelled(column: str) -> str:
    """Return a label as the study spells it."""
    return _BY_FOLDED[_folded(column)]


def _label_columns(table: pd.DataFrame, path: Path) -> list[str]:
    """Return the table's columns that are labels; DataError where one of the 14 is missing (No Finding may be)."""
    present = {_spelled(column): column for column in table.columns if _folded(column) in _BY_FOLDED}
    for label in STUDY_LABELS:
        if label not in present and label != NO_FINDING:
            near = offer(label, [str(name) for name in table.columns])
            raise DataError(f"the labels {str(path)!r} have no column {label!r}; {near}")
    return list(present.values())


def _from_json(path: Path) -> pd.DataFrame:
    """Return a JSON labels file as a table."""
    if not path.is_file():
        raise UsageError(f"no labels file {str(path)!r}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}") from error
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return pd.DataFrame(content)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{str(path)!r} must map reports or images to their labels")
    rows = [{"id": key, **_row(path, key, value)} for key, value in content.items()]
    return pd.DataFrame(rows)


def _row(path: Path, key: str, value: Any) -> dict[str, Any]:
    """Return the 14 values of one entry."""
    if isinstance(value, dict):
        named = {str(label): number for label, number in value.items()}
        _check_known(path, key, list(named))
        return named
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        _check_known(path, key, value)
        positive = {_spelled(label) for label in value}
        return {label: int(label in positive) for label in STUDY_LABELS}
    if isinstance(value, list) and len(value) == len(ALPHABETICAL):
        return dict(zip(ALPHABETICAL, value, strict=True))
    raise DataError(
        f"{path.name}, {key!r}: {value!r} are no labels; give {len(ALPHABETICAL)} numbers in alphabetical order, a "
        "mapping of label to number, or a list of the positive labels"
    )


def _check_known(path: Path, key: str, names: list[str]) -> None:
    for name in names:
        if _folded(name) not in _BY_FOLDED:
            raise DataError(f"{path.name}, {key!r}: unknown label {name!r}; {offer(name, STUDY_LABELS)}")
