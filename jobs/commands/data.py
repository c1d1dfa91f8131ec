"""The verbs `dataset info`, `dataset write` and `dataset leaks`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands import options
from jobs.commands.verb import verb


@verb("dataset info", "jobs.dataset", config="InfoConfig", run="info")
@options.dataset
@options.splits
def info(**given: Any) -> dict[str, Any]:
    """Tell what DATASET holds: samples, patients, views, splits, labels, boxes, texts.

    DATASET is folder:PATH, table:FILE.csv, tar:PATTERN, iu-xray:PATH or phantom:N?seed=S.
    """
    return options.with_data(given)


@verb("dataset write", "jobs.dataset", config="WriteConfig", run="write")
@options.dataset
@click.argument("directory", metavar="DIRECTORY", required=False)
def write(**given: Any) -> dict[str, Any]:
    """Write the phantoms of DATASET into DIRECTORY: PNG images, XML reports, labels and boxes.

    'iu-xray:DIRECTORY' reads them back equal.
    """
    return options.with_data(given)


@verb("dataset leaks", "jobs.dataset_leaks")
@options.dataset
@options.model
@options.cache
@options.splits
@click.option("--threshold", type=float, metavar="COSINE", help="From which two images count as one. [0.99]")
@click.option("--how", metavar="KIND", help="Index to ask: exact, ivf, hnsw, pq or a FAISS string. [auto]")
@options.batches
def leaks(**given: Any) -> dict[str, Any]:
    """Find images of DATASET that lie on both sides of its split: the same bytes, or nearly the same embedding.

    Texts that occur in several parts are listed too. Exit status 1 where there is such a pair of images.
    """
    return options.with_data(given)
