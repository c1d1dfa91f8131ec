"""Tables that users hand in: read whole, as text, and checked before anything is built on them.

A CSV or parquet file comes in; a DataFrame goes out. CSV cells stay text until a column's meaning is known, so that an
id like "00042" keeps its zeros. Text lies in Arrow buffers: a table of millions of paths has no Python object a cell.
Every complaint names the value, the file with its line, and the next step.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import is_url, last_part, local_path, read_file

logger = logging.getLogger(__name__)

# Text in Arrow buffers; what is missing is NaN, as in pandas' own "str".
TEXT = pd.StringDtype("pyarrow", na_value=np.nan)
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
# Up to here float64 has every whole number.
LARGEST_WHOLE_FLOAT = 2**53
BLANK_VALUES = ("", "nan", "none", "null", "na", "n/a", "<na>")
NUMBERED = re.compile(r"\.[0-9]+$")
TRUTH_VALUES = {"true": "1", "false": "0"}


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the known names that a mistyped one is most like, best first, whatever their case."""
    by_folded = {value.casefold().replace(" ", "_"): value for value in reversed(list(known))}
    near = difflib.get_close_matches(name.casefold().replace(" ", "_"), list(by_folded), n=count, cutoff=0.5)
    return [by_folded[value] for value in near]


def offer(name: str, known: Iterable[str], limit: int = 20) -> str:
    """Return the end of an error message: the nearest known names, or all of them where none is near."""
    names = list(known)
    near = nearest_names(name, names)
    if near:
        return f"nearest: {', '.join(near)}"
    if not names:
        return "there are none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"there are: {', '.join(names[:limit])}{more}"


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV, TSV or parquet file.

    Parameters
    ----------
    path : path or URL of a ``.csv``, ``.tsv`` (either may end in ``.gz``) or ``.parquet`` file

    Returns
    -------
    DataFrame
        n rows with a RangeIndex; cells of CSV files are text ("" where empty), those of parquet files as stored. Text
        has the dtype `TEXT`. Columns of bytes in parquet files, such as images, are left out and named in the log.

    Raises
    ------
    UsageError
        No such file, or a suffix that is not known.
    DataError
        The file is empty, is not a table, or names a column twice.
    """
    file, content = _opened(path)
    kind = os.path.splitext(last_part(file).removesuffix(".gz"))[1].lower()
    if kind not in TABLE_SUFFIXES:
        raise UsageError(f"{file!r} is no table that can be read: its name must end in {', '.join(TABLE_SUFFIXES)}")
    try:
        if kind == ".parquet":
            table = _read_parquet(content, last_part(file))
        else:
            table = _read_csv(content, file, "\t" if kind == ".tsv" else ",")
    except (ValueError, OSError, pa.ArrowException) as error:  # pandas' parser and encodings raise ValueErrors
        reason = " ".join(str(error).split())  # pandas ends some of its messages with a line break
        message = f"cannot read the table {file!r}: {reason}; check that it is a UTF-8 {kind} file"
        raise DataError(message) from error
    table.columns = [str(column).strip() for column in table.columns]
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise DataError(f"the table {file!r} names the column {twice[0]!r} more than once; rename one of them")
    return table


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: str | Path) -> None:
    """Raise DataError, naming the nearest columns, unless the table has all these columns."""
    for column in columns:
        if column not in table.columns:
            near = offer(column, [str(name) for name in table.columns])
            raise DataError(f"the table {str(path)!r} has no column {column!r}; {near}")


def _opened(path: str | Path) -> tuple[str, str | io.BytesIO]:
    """Return a table's path as text, and the path again or a URL's content; UsageError where there is none."""
    file = local_path(str(path))
    if is_url(file):
        try:
            return file, io.BytesIO(read_file(file))
        except ImageError as error:
            raise UsageError(f"no table {file!r}: {error}") from error
    if not os.path.isfile(file):
        folder = os.path.dirname(file) or "."
        beside = os.listdir(folder) if os.path.isdir(folder) else []
        hint = f"in {folder} {offer(last_part(file), beside)}" if beside else f"the folder {folder} is absent or empty"
        raise UsageError(f"no table {file!r}: {hint}")
    return file, file


def _read_parquet(content: str | io.BytesIO, name: str) -> pd.DataFrame:
    """Return a parquet file without its columns of bytes: opening a table must not read the images in it."""
    file = parquet.ParquetFile(content)
    heavy = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
    if heavy:
        logger.warning("%s: the columns %s hold bytes and are not read; images come from paths", name, heavy)
    table = file.read(columns=[field.name for field in file.schema_arrow if field.name not in heavy])
    frame = table.to_pandas(types_mapper=_pandas_type, split_blocks=True).reset_index(drop=True)
    for name in table.column_names:
        if _loses_digits(table[name]):
            frame[name] = table[name].to_pandas(types_mapper=pd.ArrowDtype)
    return frame


def _read_csv(content: str | io.BytesIO, file: str, separator: str) -> pd.DataFrame:
    """Return a CSV file's cells as text; DataError for a row with more cells than the header has names."""

    def read(**options: Any) -> pd.DataFrame:
        if not isinstance(content, str):
            content.seek(0)
        return pd.read_csv(
            content,
            dtype=TEXT,
            keep_default_na=False,
            na_filter=False,
            sep=separator,
            encoding="utf-8-sig",
            compression="gzip" if file.endswith(".gz") else None,
            **options,
        )

    table = read()
    if any(NUMBERED.sub("", str(name)) in table.columns for name in table.columns if NUMBERED.search(str(name))):
        # Perhaps pandas called a second "text" "text.1"; what the file says, is checked by the caller.
        table.columns = [
            mangled if said == "" else said
            for mangled, said in zip(table.columns, read(header=None, nrows=1).iloc[0], strict=True)
        ]
    if isinstance(table.index, pd.RangeIndex):
        return table
    # The first row has more cells than the header, so pandas took its first ones for an index.
    width = len(table.columns)
    surplus = table.reset_index(allow_duplicates=True).iloc[:, width:].astype(str)
    filled = (surplus != "").to_numpy()
    if filled.any():
        row = int(np.flatnonzero(filled.any(axis=1))[0])
        cell = surplus.iloc[row, int(np.flatnonzero(filled[row])[0])]
        raise DataError(
            f"{place(file, row)} has more cells than the header has names ({width}), such as {cell!r}; put cells that "
            f"hold {separator!r} in quotes"
        )
    return read(index_col=False, usecols=range(width)).set_axis(table.columns, axis=1)


def _loses_digits(values: pa.ChunkedArray) -> bool:
    """Tell whether pandas would round whole numbers, which it makes floating-point ones where some are missing."""
    if not (pa.types.is_integer(values.type) and values.null_count):
        return False
    bounds = pc.min_max(values).as_py()
    return any(abs(bound) > LARGEST_WHOLE_FLOAT for bound in bounds.values() if bound is not None)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type is of bytes, or a list or struct that holds such."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(child).type) for child in range(kind.num_fields))


def _pandas_type(kind: pa.DataType) -> Any:
    """Return the pandas dtype of an Arrow type that would become Python objects, None for the others."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        return TEXT
    return pd.ArrowDtype(kind) if pa.types.is_nested(kind) or pa.types.is_decimal(kind) else None


def check_flat(values: pd.Series) -> None:
    """Raise DataError where a column holds lists or the like."""
    if isinstance(values.dtype, pd.ArrowDtype) and pa.types.is_nested(values.dtype.pyarrow_dtype):
        raise DataError(f"the column {values.name!r} holds {values.dtype.pyarrow_dtype}, not text; name another one")


def text_of(values: pd.Series) -> pd.Series:
    """Return a column as stripped text (`TEXT`), "" where blank; whole numbers of parquet files without ".0".

    Raises
    ------
    DataError
        The column holds lists or the like.
    """
    check_flat(values)
    if pd.api.types.is_float_dtype(values.dtype):
        whole = values.notna() & (values % 1 == 0) & (values.abs() < 2.0**63)
        if (whole | values.isna()).all():
            values = values.astype("Int64")
    return values.astype(TEXT).str.strip().fillna("")


def text_from_codes(codes: np.ndarray, distinct: Sequence[str], index: pd.Index | None = None) -> pd.Series:
    """Return the column of text, (n,) `TEXT`, in which row i is distinct[codes[i]]."""
    chosen = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int64()), pa.array(distinct, pa.large_string()))
    return pd.Series(pd.array(chosen.cast(pa.large_string()), dtype=TEXT), index=index)


def constant_text(value: str, count: int, index: pd.Index | None = None) -> pd.Series:
    """Return a column that says the same in every row."""
    return text_from_codes(np.zeros(count, np.int64), [value], index)


def numbers_of(table: pd.DataFrame, column: str, path: str | Path, *, blank: float | None = None) -> np.ndarray:
    """Return a column as float64, (n,).

    Parameters
    ----------
    blank : float, optional
        What an empty cell means; without it an empty cell is an error.

    Raises
    ------
    DataError
        A cell is no finite number, and the message names it with its line; or the column holds lists or the like.
    """
    check_flat(table[column])
    # Each distinct value is understood once: a column of labels has three, however many rows there are.
    codes, distinct = pd.factorize(table[column], use_na_sentinel=False)
    text = text_of(pd.Series(distinct))
    folded = text.str.lower()
    empty = folded.isin(BLANK_VALUES).to_numpy()
    meanings = folded.mask(empty, "nan").replace(TRUTH_VALUES)
    numbers = pd.to_numeric(meanings, errors="coerce").to_numpy(dtype=np.float64)[codes]
    empty = empty[codes]
    wrong = ~np.isfinite(numbers) if blank is None else ~np.isfinite(numbers) & ~empty
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        shown = text.iloc[codes[row]]
        what = f"{shown!r} is not a finite number" if shown else "the cell is empty"
        raise DataError(
            f"{place(path, table.index[row])}, column {column!r}: {what} ({int(wrong.sum())} such cells); "
            "correct the table or name another column"
        )
    if blank is not None:
        numbers[empty] = blank
    return numbers


def place(path: str | Path, row: Hashable) -> str:
    """Return where a row of a table stands, by its index label: a sample's name, or a number.

    Numbers become lines as an editor counts them: the header is line 1.
    """
    if isinstance(row, str):
        return f"{last_part(str(path))}, sample {row!r}"
    return f"{last_part(str(path))} line {int(str(row)) + 2}"
