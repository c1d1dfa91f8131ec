"""`fluoro dataset info` and `fluoro dataset write`: look into a data set before work is spent on it, or write phantoms.

Comes in: a schema string with its options. Goes out: counts that show whether it was read as meant (samples, patients,
views, splits, labels, boxes, texts), or a folder of files in the form of Open-i that `iu-xray:DIR` reads back equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from engine import phantom_files
from engine.dataset import Dataset
from engine.errors import UsageError
from engine.splits import SPLITS
from engine.stratified_split import split_report
from jobs import opening
from jobs.config import DatasetOptions, SplitOptions
from jobs.progress import Progress, spoken_bytes

EXAMPLES_SHOWN = 3


class InfoConfig(DatasetOptions):
    """What `fluoro dataset info` needs."""

    split: SplitOptions | None = Field(None, description="split to apply; as given in the data if empty")


class WriteConfig(DatasetOptions):
    """What `fluoro dataset write` needs."""

    directory: Path = Field(description="folder to write; must not exist, or be empty")


@dataclass(frozen=True)
class Info:
    """What a data set holds.

    Parameters
    ----------
    labels : DataFrame
        One row a label: label, one column of positives a split, all, share, annotated (samples with a box or mask).
    kept : DataFrame
        How well the split kept each label's prevalence (`engine.stratified_split.split_report`); empty without a split.
    """

    schema: str
    samples: int
    groups: int
    images: int
    texts: int
    distinct_texts: int
    views: dict[str, int]
    splits: dict[str, int]
    labels_a_sample: float
    without_label: int
    annotated: int
    columns: list[str]
    examples: list[str]
    labels: pd.DataFrame = field(compare=False)
    kept: pd.DataFrame = field(compare=False, default_factory=pd.DataFrame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the table of labels, and that of the split."""
        tables = {f"Labels of {self.schema}": self.labels, "Prevalence in each part of the split": self.kept}
        return {title: table for title, table in tables.items() if len(table)}

    def lines(self) -> Iterator[str]:
        """Return the counts as sentences."""
        yield f"{self.samples:,} samples of {self.groups:,} groups; {self.images:,} with an image"
        if self.texts:
            yield f"{self.texts:,} with a text, {self.distinct_texts:,} of them different"
        yield f"views: {_counts(self.views)}"
        yield f"splits: {_counts(self.splits)}"
        if len(self.labels):
            yield f"{self.labels_a_sample:.3f} labels a sample, {self.without_label:,} samples without any"
        yield f"{self.annotated:,} samples with boxes or masks"
        yield f"columns: {', '.join(self.columns)}"
        yield f"first ids: {', '.join(self.examples)}"


@dataclass(frozen=True)
class Written:
    """What `fluoro dataset write` left."""

    directory: Path
    samples: int
    files: int
    bytes: int

    def lines(self) -> Iterator[str]:
        """Return what was written, and how to read it."""
        yield f"{self.samples:,} phantoms in {self.files:,} files, {spoken_bytes(self.bytes)}"
        yield f"read them with: fluoro dataset info 'iu-xray:{self.directory}'"


def info(config: InfoConfig) -> Info:
    """Open a data set and count what is in it."""
    dataset = opening.open_data(config, config.split)
    texts = dataset.samples["text"]
    has_text = texts != ""
    return Info(
        schema=dataset.schema,
        samples=len(dataset),
        groups=int(dataset.samples["group"].nunique()),
        images=int((dataset.samples["uri"] != "").sum()),
        texts=int(has_text.sum()),
        distinct_texts=int(texts[has_text].nunique()),
        views=_value_counts(dataset.samples["view"]),
        splits=_value_counts(dataset.samples["split"]),
        labels_a_sample=float(dataset.labels.sum(axis=1).mean()) if dataset.labels.size else 0.0,
        without_label=int((dataset.labels.sum(axis=1) == 0).sum()),
        annotated=len(dataset.annotations.sample_ids()),
        columns=[str(column) for column in dataset.samples.columns],
        examples=[str(value) for value in dataset.ids[:EXAMPLES_SHOWN]],
        labels=label_table(dataset),
        kept=_kept(dataset),
    )


def _kept(dataset: Dataset) -> pd.DataFrame:
    split = dataset.samples["split"].to_numpy(dtype=object)
    if not dataset.label_names or not (split != "").any():
        return pd.DataFrame()
    return split_report(split, dataset.labels, dataset.label_names, SPLITS)


def label_table(dataset: Dataset) -> pd.DataFrame:
    """Return each label's positives by split: columns label, train, val, test (if there), all, share, annotated."""
    if not dataset.label_names:
        return pd.DataFrame()
    positive = dataset.labels == 1
    split = dataset.samples["split"].to_numpy(dtype=object)
    table = pd.DataFrame({"label": dataset.label_names})
    for name in SPLITS:
        if (split == name).any():
            table[name] = positive[split == name].sum(axis=0)
    table["all"] = positive.sum(axis=0)
    table["share"] = positive.mean(axis=0) if len(dataset) else np.zeros(len(table))
    table["annotated"] = [len(dataset.annotations.sample_ids(label)) for label in dataset.label_names]
    return table


def write(config: WriteConfig, progress: Progress | None = None) -> Written:
    """Write phantoms as files.

    Raises
    ------
    UsageError
        The data set is not one of phantoms, or the folder holds something already.
    """
    dataset = opening.open_data(config)
    if not dataset.schema.startswith("phantom:"):
        raise UsageError(f"only phantoms can be written, not {dataset.schema!r}; give phantom:N?seed=S")
    directory = config.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"output {str(directory)!r} exists and is not an empty folder; give another one")
    with (progress or Progress()).step("draw phantoms", total=len(dataset), unit="phantoms") as step:
        phantom_files.write_phantoms(dataset, directory, step.update)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return Written(directory, len(dataset), len(files), sum(path.stat().st_size for path in files))


def _value_counts(column: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in column.value_counts(sort=True).items()}


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or 'none'} {count:,}" for name, count in counts.items()) or "none"
