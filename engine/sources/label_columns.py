"""Labels from a table's columns: 0/1 columns, or one column of lists such as ``Edema;Pneumonia``.

1 is positive; 0, -1 (uncertain) and blank are negative, as in the study. Anything else is an error with its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from engine.errors import DataError, UsageError
from engine.sources.schema import as_names
from engine.tables import BLANK_VALUES, TRUTH_VALUES, numbers_of, offer, place, require_columns, text_of


def label_matrix(table: pd.DataFrame, columns: Iterable[str], path: str | Path) -> np.ndarray:
    """Return 0/1 columns as labels: 1 is positive; 0, -1 and blank are negative.

    Returns
    -------
    ndarray of int8, (n, number of columns)

    Raises
    ------
    DataError
        A missing column, or a cell that is something else.
    """
    names = list(columns)
    require_columns(table, names, path)
    values = np.zeros((len(table), len(names)), dtype=np.int8)
    for column, name in enumerate(names):
        numbers = numbers_of(table, name, path, blank=0.0)
        wrong = ~np.isin(numbers, (-1.0, 0.0, 1.0))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{place(path, table.index[row])}, column {name!r}: {numbers[row]:g} is no label; "
                "1 is positive, 0, -1 and blank are negative"
            )
        values[:, column] = numbers == 1
    return values


def read_label_columns(
    table: pd.DataFrame,
    file: str | Path,
    labels: str | Sequence[str] | None,
    label_names: list[str],
    separator: str,
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Return label names, the (n, L) matrix, and the columns that it was made from.

    Parameters
    ----------
    labels, label_names, separator
        See `engine.sources.table.open_table`.

    Raises
    ------
    UsageError
        An empty separator, a label named twice, or names for other columns than there are.
    DataError
        A missing column, or a cell that is no label.
    """
    if not separator:
        raise UsageError(
            "separator='' separates no names; leave it out where a cell holds one name, or give a character"
        )
    columns = [labels] if isinstance(labels, str) and labels in table.columns else as_names(labels)
    if not columns:
        if label_names:
            raise UsageError("label_names says which labels there are, but labels=COLUMN does not say where they stand")
        return (), np.zeros((len(table), 0), dtype=np.int8), []
    for option, names in (("label_names", label_names), ("labels", columns)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{option} names {twice[0]!r} more than once; leave one of them out")
    require_columns(table, columns, file)
    if len(columns) > 1 or not isinstance(labels, str) or _is_numeric(table[columns[0]]):
        if label_names and len(label_names) != len(columns):
            raise UsageError(f"label_names names {len(label_names)} labels, but labels names {len(columns)} columns")
        return tuple(label_names or columns), label_matrix(table, columns, file), columns
    return (*_labels_of_lists(table, columns[0], file, label_names, separator), columns)


def _labels_of_lists(
    table: pd.DataFrame, column: str, file: str | Path, label_names: list[str], separator: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return label names and the (n, L) matrix of a column of lists; each distinct list is taken apart once."""
    codes, distinct = pd.factorize(text_of(table[column]))
    exploded = pd.Series(distinct).str.split(separator, regex=False).explode().str.strip()
    exploded = exploded[~exploded.str.lower().isin(BLANK_VALUES)]
    names = label_names or sorted(exploded.unique())
    unknown = exploded[~exploded.isin(names)]
    if len(unknown):
        first = int(np.flatnonzero(np.isin(codes, unknown.index))[0])
        name = unknown[[codes[first]]].iloc[0]
        raise DataError(
            f"{place(file, table.index[first])}, column {column!r}: unknown label {name!r} "
            f"({unknown.nunique()} such names); {offer(name, names)}"
        )
    of_list = np.zeros((len(distinct), len(names)), dtype=np.int8)
    of_list[exploded.index.to_numpy(dtype=np.int64), pd.Index(names).get_indexer(exploded)] = 1
    return tuple(names), of_list[codes]


def _is_numeric(values: pd.Series) -> bool:
    """Tell whether a column holds numbers, true, false or blanks only, and not blanks alone."""
    text = pd.Series(text_of(values).unique()).str.lower()
    text = text[~text.isin(BLANK_VALUES)]
    return len(text) > 0 and bool(pd.to_numeric(text[~text.isin(TRUTH_VALUES)], errors="coerce").notna().all())
