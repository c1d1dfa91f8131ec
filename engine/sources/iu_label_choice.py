"""Where the 14 labels of Open-i's reports come from: a labels file, MeSH/major, or torchxrayvision's mapping.

Samples with their terms and, where there is one, a labels file come in; the chosen labels go out, and a column for
every source that is there (`engine.sources.label_sources`), so that they can be held against one another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from engine.errors import DataError
from engine.labels import STUDY_LABELS
from engine.sources.annotation_files import beside
from engine.sources.iu_labels import read_labels
from engine.sources.label_sources import PREFIX, LabelSource, source_column
from engine.sources.mesh import is_indexed, study_labels
from engine.sources.openi import find_table
from engine.sources.txrv import WITHOUT_COUNTERPART, txrv_study_labels

AUTO, FILE, MESH, TXRV = "auto", "file", "mesh", "torchxrayvision"
LABEL_SOURCES = (AUTO, FILE, MESH, TXRV)
AUTOMATIC = "mesh_automatic"


class ChosenLabels(NamedTuple):
    """The labels of the samples.

    Parameters
    ----------
    values : ndarray of int8, (n, 14)
    known : ndarray of bool, (n,)
        Whether the chosen source knows the sample.
    columns : dict of str to list of str
        One column a source that is there.
    source : str
        The one that was chosen.
    """

    values: np.ndarray
    known: np.ndarray
    columns: dict[str, list[str]]
    source: str


def labels_in_folder(files: list[str]) -> str | None:
    """Return the labels file that lies in the folder itself, None where there is none."""
    return find_table([name for name in files if "/" not in name], "labels.csv", "labels.json")


def choose_labels(
    samples: pd.DataFrame,
    root: str,
    files: list[str],
    labels: str | None,
    label_source: str,
    schema: str,
    notes: list[str],
) -> ChosenLabels:
    """Return the labels by the source that was asked for, and all that are there.

    Parameters
    ----------
    samples : DataFrame
        Columns id, group, mesh and, from the official reports, mesh_automatic.
    labels : str, optional
        A labels file; else one that lies in the folder.
    label_source : {"auto", "file", "mesh", "torchxrayvision"}
        auto: the file where there is one, else mesh.
    notes : list of str
        What was chosen is added.

    Raises
    ------
    DataError
        The source is not there.
    """
    found: dict[str, LabelSource] = {}
    named = labels or labels_in_folder(files)
    path = (beside(labels, root) if labels else os.path.join(root, named)) if named else None
    if path is not None:
        found[FILE] = _from_file(path, samples, schema)
    found[MESH] = _from_mesh(samples)
    if AUTOMATIC in samples:
        terms = [_terms(cell) for cell in samples[AUTOMATIC]]
        values = np.array([txrv_study_labels(of_report) for of_report in terms], dtype=np.int8)
        found[TXRV] = LabelSource(values.reshape(-1, len(STUDY_LABELS)), np.ones(len(samples), dtype=bool))
    chosen = (FILE if FILE in found else MESH) if label_source == AUTO else label_source
    if chosen not in found:
        step = (
            "name one with labels=FILE, or put labels.csv into the folder"
            if chosen == FILE
            else "the Kaggle tables have no MeSH/automatic: take the official reports (NLMCXR_reports.tgz)"
        )
        raise DataError(f"{schema!r}: label_source={chosen} is not there; {step}")
    notes.append(_note(chosen, found[chosen], path))
    columns = {f"{PREFIX}{name}": source_column(*source, STUDY_LABELS) for name, source in found.items()}
    return ChosenLabels(*found[chosen], columns, chosen)


def _from_mesh(samples: pd.DataFrame) -> LabelSource:
    terms = [_terms(cell) for cell in samples["mesh"]]
    values = np.array([study_labels(of_report) for of_report in terms], dtype=np.int8)
    indexed = np.array([is_indexed(of_report) for of_report in terms], dtype=bool)
    return LabelSource(values.reshape(len(samples), len(STUDY_LABELS)), indexed)


def _from_file(path: str | Path, samples: pd.DataFrame, schema: str) -> LabelSource:
    table = read_labels(path)
    rows = table.index.get_indexer(samples["id"])
    rows = np.where(rows >= 0, rows, table.index.get_indexer(samples["group"]))
    if not (rows >= 0).any():
        raise DataError(
            f"{schema!r}: no report or image of the data set is in the labels {str(path)!r}: their keys are like "
            f"{table.index[0]!r}, those of the data set like {samples['group'].iloc[0]!r} and {samples['id'].iloc[0]!r}"
        )
    nothing = pd.Series(0, index=table.columns).where(table.columns != STUDY_LABELS[-1], 1).to_numpy(dtype=np.int8)
    values = np.where((rows >= 0)[:, None], table.to_numpy()[np.maximum(rows, 0)], nothing)
    return LabelSource(values.astype(np.int8), rows >= 0)


def _note(chosen: str, source: LabelSource, path: str | Path | None) -> str:
    if chosen == FILE:
        return f"labels come from {os.path.basename(path or '')}"
    if chosen == TXRV:
        return (
            "labels come from MeSH/automatic by torchxrayvision's mapping, which has no counterpart of "
            f"{', '.join(WITHOUT_COUNTERPART)}"
        )
    never = int((~source.known).sum())
    return "labels come from MeSH/major" + (f"; {never} samples were never coded: No Finding" if never else "")


def _terms(cell: str) -> list[str]:
    return [term for term in str(cell).split(";") if term.strip()]
