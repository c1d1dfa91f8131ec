"""A data set: columns that the engine carries and never interprets, and a way to read each image.

Comes in from the schema readers (`engine.sources`); goes out to extraction, analysis and jobs. One row a sample: one
image and/or one text with id, group, view, split and labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from engine.annotations import Annotations
from engine.errors import DataError, UsageError

REQUIRED_COLUMNS = ("id", "uri", "text", "group", "view", "split")


class Fingerprint(NamedTuple):
    """What tells an unchanged file without reading it, as git's index does (times in nanoseconds)."""

    size: int
    mtime: int
    ctime: int
    inode: int


# Arrow's strings behind pandas: a million names are then a few buffers and not a million Python objects.
TEXT = pd.StringDtype("pyarrow", na_value=np.nan)


class Reader(Protocol):
    """How the images of a data set are reached; must be picklable, so that workers can carry it."""

    def read(self, uri: str) -> bytes | np.ndarray:
        """Return the encoded file, or uint8 pixels (h, w) or (h, w, 3) where there is no file.

        Raises `engine.errors.ImageError` with the uri and the reason.
        """

    def fingerprint(self, uri: str) -> Fingerprint | None:
        """Return the cheap identity of a uri, or None where only reading can tell."""


@runtime_checkable
class BulkReader(Reader, Protocol):
    """A reader that can look at many files at once, which is several times faster than one call each."""

    def fingerprints(self, uris: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Return fingerprints, (n, 4) uint64 and zeros where there is none, and why some cannot be had, by position.

        An empty uri has neither.
        """


# Letters of a schema that an error still repeats; a table's with its options has some hundred.
LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Dataset:
    """Samples in the order of their source.

    Parameters
    ----------
    schema : str
        The string it was opened with, such as ``iu-xray:/data/openi``.
    name : str
        Short and safe as a file name.
    samples : DataFrame, n rows, RangeIndex
        The columns named here hold Arrow strings (`TEXT`), whatever they came as.
        Columns id (unique str), uri (str, "" without image), text (str, "" without text), group (str), view (str, "" if
        unknown), split ("train" | "val" | "test" | ""), and any further columns of the source.
    label_names : tuple of str, length L
    labels : ndarray of int8, (n, L)
        1 where positive, else 0.
    reader : Reader
    annotations : Annotations
        Boxes and masks by sample id, in pixels of the original image.
    notes : tuple of str
        What the reader left out, guessed or could not tell, one sentence each, for a job's summary.
    """

    schema: str
    name: str
    samples: pd.DataFrame
    label_names: tuple[str, ...]
    labels: np.ndarray
    reader: Reader
    annotations: Annotations = field(default_factory=Annotations.empty)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = [column for column in REQUIRED_COLUMNS if column not in self.samples.columns]
        if missing:
            raise DataError(f"data set {self.schema!r} lacks the columns {missing}; its reader must fill them")
        loose = {name: TEXT for name in REQUIRED_COLUMNS if self.samples[name].dtype != TEXT}
        if loose:
            object.__setattr__(self, "samples", self.samples.astype(loose))
        if self.labels.shape != (len(self.samples), len(self.label_names)):
            raise DataError(
                f"data set {self.schema!r} has labels of shape {self.labels.shape}, "
                f"expected {(len(self.samples), len(self.label_names))}"
            )
        duplicated = self.samples["id"][self.samples["id"].duplicated()]
        if len(duplicated):
            raise DataError(
                f"data set {self.schema!r} has {duplicated.nunique()} ids more than once, "
                f"first {duplicated.iloc[0]!r}; ids must be unique: name another id column or remove the double rows"
            )

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def called(self) -> str:
        """What errors call it: its schema in quotes, or its name where the schema is long."""
        return repr(self.schema if len(self.schema) <= LONGEST_SHOWN else self.name)

    @property
    def ids(self) -> np.ndarray:
        """Sample ids, (n,) object."""
        return self.samples["id"].to_numpy(dtype=object)

    @property
    def groups(self) -> np.ndarray:
        """Patient or study of each sample, (n,) object."""
        return self.samples["group"].to_numpy(dtype=object)

    def position(self, sample_id: str) -> int:
        """Return the row of a sample id; UsageError with the nearest ids where there is none."""
        found = np.flatnonzero(self.ids == sample_id)
        if not len(found):
            import difflib

            near = difflib.get_close_matches(sample_id, [str(value) for value in self.ids[:20000]], n=3)
            raise UsageError(
                f"no sample {sample_id!r} in {self.called}" + (f"; nearest: {', '.join(near)}" if near else "")
            )
        return int(found[0])

    def label_position(self, label: str) -> int:
        """Return the column of a label; UsageError with the known names where there is none."""
        if label not in self.label_names:
            raise UsageError(f"unknown label {label!r} in {self.called}; known: {', '.join(self.label_names)}")
        return self.label_names.index(label)

    def take(self, rows: Sequence[int] | np.ndarray) -> Dataset:
        """Return the data set of some rows (positions or a boolean mask), in the given order."""
        positions = np.asarray(rows)
        if positions.dtype == bool:
            positions = np.flatnonzero(positions)
        return replace(self, samples=self.samples.iloc[positions].reset_index(drop=True), labels=self.labels[positions])

    def with_split(self, split: Sequence[str] | np.ndarray) -> Dataset:
        """Return the data set with another split column (length n)."""
        return replace(self, samples=self.samples.assign(split=np.asarray(split, dtype=object)))

    def with_columns(self, **columns: Any) -> Dataset:
        """Return the data set with further sample columns."""
        return replace(self, samples=self.samples.assign(**columns))
