"""What `zeroshot`, `probe` and `distances` share: cached embeddings of a split data set, a run folder, tables.

Comes in: a config with data, model and cache. Goes out: a `jobs.study_settings.Material` to work on, and afterwards the
run's result lines as tables. The numbers themselves are made where the study makes them, so that both agree.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from engine.cache import Cache
from engine.dataset import Dataset
from engine.embed import EmbedReport
from engine.encoder import Encoder
from engine.errors import DataError
from engine.products import product_of
from engine.splits import SPLITS
from jobs import opening, study_settings
from jobs.config import CacheOptions, DatasetOptions, ModelOptions, SplitOptions
from jobs.metric_tables import label_table, overall_table, undefined_sentences
from jobs.progress import Progress
from jobs.runs import RESULTS_FILE, Run, StepCost

log = logging.getLogger(__name__)

UNJUDGED = "Labels that cannot be judged here: their figures mean nothing"
# Bytes of embeddings up to which they are read at once.
LARGE = 1 << 30


class MeasureOptions(DatasetOptions, ModelOptions, CacheOptions):
    """Fields shared by the verbs that measure cached embeddings."""

    split: SplitOptions = Field(default_factory=SplitOptions, description="who trains, who chooses, who is tested")
    protocol: Literal["sound", "paper"] = Field("sound", description="sound practice, or exactly what the paper did")
    replicates: int = Field(1000, ge=100, description="bootstrap replicates, by patient")
    seed: int = Field(0, description="seed of resampling, baselines and of heads that start at random")
    batch_size: int | None = Field(None, ge=1, description="samples a batch; by the device if empty")
    threads: int | None = Field(None, ge=1, description="threads that read and decode; by cores if empty")


@dataclass(frozen=True)
class Measured:
    """Where a run lies, and its numbers.

    Parameters
    ----------
    folder : Path
        The run folder: config, provenance, results.jsonl.
    setting : str
    metrics : DataFrame
        One row a number: setting, baseline, metric, label, value, low, high, n.
    failures : DataFrame
        Samples that could not be embedded: id, uri, what, reason.
    head : Path or None
        The saved head.
    unjudged : DataFrame
        Labels without a positive sample where the choice is made or tested, with their counts.
    """

    folder: Path
    setting: str
    metrics: pd.DataFrame
    failures: pd.DataFrame
    head: Path | None = None
    unjudged: pd.DataFrame = field(default_factory=pd.DataFrame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return labels that cannot be judged, the settings beside the trivial baselines, and the setting's labels."""
        first = {UNJUDGED: self.unjudged} if len(self.unjudged) else {}
        return first | {
            "On the test split, with 95 % intervals by patient": overall_table(self.metrics),
            f"{self.setting} by label": label_table(self.metrics, self.setting),
        }

    def lines(self) -> Iterator[str]:
        """Return which figures are not defined, and where things lie."""
        yield from undefined_sentences(self.metrics, self.setting)
        if self.head is not None:
            yield f"head: {self.head}"
        yield f"run: {self.folder}"


def embed(
    config: MeasureOptions,
    run: Run,
    cache: Cache,
    dataset: Dataset,
    encoder: Encoder,
    what: str,
    progress: Progress,
    step: StepCost | None = None,
) -> EmbedReport:
    """Bring one product of all samples into the cache; the run keeps plan and failures, the step what it cost."""
    what = product_of(what, encoder).what  # "tokens@-1" by the block's number, as the report has it
    report = cache.embed(
        dataset,
        encoder,
        (what,),
        batch_size=config.batch_size,
        threads=config.threads,
        settled=partial(run.plan, encoder.id, dataset.schema, (what,)),
        progress=progress,
    )
    if step is not None:
        step.items, step.reused, step.bytes = report.computed[what], report.reused[what], report.bytes
    run.fail(report.failures)
    return report


def prepare(
    config: MeasureOptions,
    run: Run,
    progress: Progress,
    *,
    texts: bool = True,
    by_blocks: bool = False,
    columns: Sequence[str] = (),
    needed: Sequence[str] = SPLITS,
) -> study_settings.Material:
    """Open the data, load the encoder and bring the image embeddings, computing those that are missing.

    Parameters
    ----------
    texts : bool
        Whether the job may embed texts or prompts too: both towers' precision has to do then.
    by_blocks : bool
        Above `LARGE` leave the embeddings in the cache: the material's are `engine.features.StoredRows` then.
    columns : sequence of str
        Sample columns that the job will ask for.
    needed : sequence of str
        Parts of the split without which the job cannot be done.

    Raises
    ------
    UsageError
        The samples have no such column.
    DataError
        The data have no labels, or a split that is needed has no embedded sample.
    """
    with run.step("open data") as step:
        dataset = opening.open_data(config)
        if not dataset.label_names:
            raise DataError(f"{dataset.called} has no labels; name them, such as --data labels=[Pneumonia,Edema]")
        opening.check_columns(columns, dataset.samples)
        dataset = opening.split_data(dataset, config.split)
        step.items = len(dataset)
    with run.step("load model"):
        encoder = opening.load_model(config, config.cache, dataset, ("image", "text") if texts else ("image",))
    cache = Cache(config.cache)
    with run.step("embed images") as step:
        embed(config, run, cache, dataset, encoder, "image", progress, step)
    stored = cache.stored_features(dataset, encoder, "image")
    kept = dataset.take(stored.rows)
    # In memory they are float32.
    large = by_blocks and 4 * math.prod(stored.shape) > LARGE
    features: Any = stored if large else stored[:].astype(np.float32)
    if large:
        log.info("%s embeddings are read from the cache block by block", f"{len(stored):,}")
    material = study_settings.Material(kept, encoder, features, stored.keys, cache)
    empty = [name for name in needed if not len(material.rows(name))]
    if empty:
        raise DataError(
            f"{dataset.called} has no embedded sample in {' and '.join(empty)} (split {config.split.how!r}); "
            "choose another split, such as --split grouped"
        )
    describe(material, config.split, run)
    run.note(protocol=[config.protocol])
    return material


def describe(material: study_settings.Material, split: SplitOptions, run: Run) -> None:
    """Write what the data are, how they are split and which encoder looked at them into the run's provenance."""
    dataset, encoder = material.dataset, material.encoder
    counts = dataset.labels.sum(axis=0)
    positive = counts[counts > 0]
    run.note(
        label_names=list(dataset.label_names),
        dataset={
            "schema": dataset.schema,
            "n": len(dataset),
            "groups": len(set(dataset.groups)),
            "imbalance": f"{positive.max() / positive.min():.0f} : 1" if len(positive) else "–",
            "labels": {name: int(count) for name, count in zip(dataset.label_names, counts, strict=True)},
        },
        split={
            "how": split.how,
            "seed": split.seed,
            "digest": material.split_digest,
            "counts": {name: len(material.rows(name)) for name in SPLITS},
        },
        encoders=[opening.encoder_row(encoder)],
    )


def check_positives(material: study_settings.Material, held: np.ndarray) -> pd.DataFrame:
    """Return the labels without a positive sample among those that choose or are tested, and warn of them.

    Parameters
    ----------
    held : ndarray of int
        Positions of the samples on which thresholds, and all else that is chosen, are chosen.

    Returns
    -------
    DataFrame
        label, and positives in train, in what chooses and in test; empty where every label has some in both.

    Raises
    ------
    DataError
        No label has a positive in both: there is nothing to choose by or nothing to test.
    """
    names, parts = np.array(material.dataset.label_names, dtype=object), {
        "train": material.rows("train"), "choosing": held, "test": material.rows("test"),
    }  # fmt: skip
    counts = {part: (material.y[rows] > 0).sum(axis=0) for part, rows in parts.items()}
    lacking = (counts["choosing"] == 0) | (counts["test"] == 0)
    if lacking.all():
        said = "; ".join(
            f"{name}: {counts['choosing'][place]} of {len(held)} that choose, {counts['test'][place]} of "
            f"{len(parts['test'])} test samples"
            for place, name in enumerate(names[:5])
        )
        raise DataError(
            f"no label has a positive sample both where the choice is made and where it is tested ({said}), so no "
            "figure would mean anything; choose another split, such as --split stratified, or other labels"
        )
    for part, which, so in (
        ("choosing", "samples that choose", "their thresholds and their share in the choice say nothing"),
        ("test", "test samples", "their test figures say nothing, and means over labels leave them out or count 0"),
    ):
        none = names[counts[part] == 0]
        if len(none):
            log.warning("%s: no positive among the %d %s, so %s", ", ".join(none), len(parts[part]), which, so)
    titles = {"train": "positives in train", "choosing": "where the choice is made", "test": "in test"}
    return pd.DataFrame({"label": names, **{titles[part]: count for part, count in counts.items()}})[
        lacking
    ].reset_index(drop=True)


def result_lines(folder: Path, kind: str) -> pd.DataFrame:
    """Return the result lines of one kind, one row each."""
    with (folder / RESULTS_FILE).open(encoding="utf-8") as file:
        lines: list[dict[str, Any]] = [json.loads(line) for line in file]
    return pd.DataFrame([{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind])


def measured(
    run: Run,
    setting: str,
    failures: pd.DataFrame | None = None,
    head: Path | None = None,
    unjudged: pd.DataFrame | None = None,
) -> Measured:
    """Return a run's metrics as a result."""
    none = pd.DataFrame() if unjudged is None else unjudged
    failed = pd.DataFrame(run.failures, columns=["id", "uri", "what", "reason"]) if failures is None else failures
    return Measured(run.folder, setting, result_lines(run.folder, "metric"), failed, head, none)
