"""From a table's columns to what the engine carries: which column is what, rows to keep, texts joined, splits named.

Shared by the sources that have columns (`engine.sources.table`, `engine.sources.tar`). The index of a table says where
each row stands, for messages: line numbers, or names of samples (see `engine.tables.place`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from engine.errors import DataError
from engine.sources.schema import as_names
from engine.splits import SPLITS, split_name
from engine.tables import offer, place, require_columns, text_from_codes, text_of

# Columns that are taken when the caller names none; option="" says that there is no such column.
USUAL_COLUMNS = {
    "id": ("id", "sample_id"),
    "image": ("image", "image_path", "path", "file", "filename", "uri"),
    "text": ("text", "report", "caption"),
    "group": ("group", "patient_id", "patient", "subject_id"),
    "view": ("view",),
    "split": ("split",),
}


def chosen_columns(table: pd.DataFrame, file: str, **named: str | None) -> dict[str, str]:
    """Return the table's column for each role, "" where there is none."""
    chosen = {}
    for role, column in named.items():
        if column:
            require_columns(table, [column], file)
        elif column is None:
            column = next((usual for usual in USUAL_COLUMNS[role] if usual in table.columns), "")
        chosen[role] = column
    return chosen


def text_columns_of(table: pd.DataFrame, file: str, text: str | Sequence[str] | None) -> list[str]:
    """Return the columns that make up the text."""
    if text is None:
        return [column for column in USUAL_COLUMNS["text"] if column in table.columns][:1]
    columns = [text] if isinstance(text, str) and text in table.columns else as_names(text)
    require_columns(table, columns, file)
    return columns


def kept_rows(table: pd.DataFrame, keep: Mapping[str, Any], file: str) -> pd.DataFrame:
    """Return the rows that have the wanted values; DataError where none has."""
    for column, wanted in keep.items():
        require_columns(table, [column], file)
        values = [str(value) for value in (wanted if isinstance(wanted, (list, tuple, set)) else [wanted])]
        present = text_of(table[column])
        matches = present.isin(values).to_numpy()
        if not matches.any():
            raise DataError(f"no row of {file!r} has {column} {values}; {offer(values[0], present.unique())}")
        table = table[matches]
    return table


def joined_text(texts: Sequence[pd.Series], blank: pd.Series) -> pd.Series:
    """Return several columns of text as one, with a space between what is not blank."""
    joined = texts[0] if texts else blank
    for text in texts[1:]:
        both = ((joined != "") & (text != "")).to_numpy(dtype=np.int64)
        joined = joined + text_from_codes(both, ["", " "], text.index) + text
    return joined


def split_column(values: pd.Series, file: str, column: str) -> pd.Series:
    """Return a column of splits in the engine's words; DataError for a word that is none."""
    codes, words = pd.factorize(values)
    names = [split_name(word) for word in words]
    for word, name in zip(words, names, strict=True):
        if name is None:
            row = values.index[int(np.flatnonzero(values == word)[0])]
            raise DataError(
                f"{place(file, row)}, column {column!r}: unknown split {word!r}; known are {', '.join(SPLITS)} and "
                "blank (split='' ignores the column)"
            )
    return text_from_codes(codes, [name or "" for name in names], values.index)
