"""Labels of the same samples by several sources: how a data set carries them beside those it was opened with.

A data set whose reader knows more than one source of labels has one further column a source, ``labels_from_<source>``,
with the positive labels' names joined by ";", and nothing where that source does not know the sample. `label_sources`
reads them back. A table may bring such columns of its own: a second reader's labels, another labeller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.dataset import Dataset
from engine.errors import DataError
from engine.tables import offer

PREFIX = "labels_from_"


class LabelSource(NamedTuple):
    """What one source says.

    Parameters
    ----------
    values : ndarray of int8, (n, L)
        In the order of the data set's labels; samples that the source does not know have No Finding alone, or nothing.
    known : ndarray of bool, (n,)
    """

    values: np.ndarray
    known: np.ndarray


def source_column(values: np.ndarray, known: np.ndarray, label_names: Sequence[str]) -> list[str]:
    """Return a source's labels as a column of text.

    Parameters
    ----------
    values : ndarray of 0/1, (n, L)
    known : ndarray of bool, (n,)
    label_names : sequence of str, length L

    Raises
    ------
    DataError
        A sample that the source knows has no label at all, which the column could not tell from one it does not know.
    """
    rows = [
        ";".join(name for name, value in zip(label_names, row, strict=True) if value) if knows else ""
        for row, knows in zip(values, known, strict=True)
    ]
    mute = [place for place, (row, knows) in enumerate(zip(rows, known, strict=True)) if knows and not row]
    if mute:
        raise DataError(f"sample {mute[0]} has no label, not even one that says so; a column of names cannot hold that")
    return rows


def label_sources(dataset: Dataset) -> dict[str, LabelSource]:
    """Return every source that the data set carries, by name, in the order of its columns; {} where there is none.

    Raises
    ------
    DataError
        A name in such a column is none of the data set's labels; the sample and the nearest name are said.
    """
    names = list(dataset.label_names)
    nothing = next((place for place, name in enumerate(names) if name.replace("_", " ") == "No Finding"), None)
    found: dict[str, LabelSource] = {}
    for column in dataset.samples.columns:
        if not str(column).startswith(PREFIX):
            continue
        cells = [str(cell) if isinstance(cell, str) else "" for cell in dataset.samples[column]]
        values = np.zeros((len(cells), len(names)), dtype=np.int8)
        for row, cell in enumerate(cells):
            for name in filter(None, (part.strip() for part in cell.split(";"))):
                if name not in names:
                    raise DataError(
                        f"column {column!r}, sample {dataset.ids[row]!r}: unknown label {name!r}; {offer(name, names)}"
                    )
                values[row, names.index(name)] = 1
        known = np.array([bool(cell.strip()) for cell in cells], dtype=bool)
        if nothing is not None:
            values[~known, nothing] = 1
        found[str(column).removeprefix(PREFIX)] = LabelSource(values, known)
    return found
