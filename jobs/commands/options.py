"""Options that several verbs share, so that the same thing has the same name everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def dataset(function: Function) -> Function:
    """Add DATASET and --data."""
    return click.argument("dataset", metavar="DATASET", required=False)(data(function))


def data(function: Function) -> Function:
    """Add --data."""
    return click.option(
        "--data",
        "data",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the data set, such as labels=FILE or view=all; like ?KEY=VALUE in DATASET.",
    )(function)


def model(function: Function) -> Function:
    """Add --model, --precision, --decoder and --device."""
    function = click.option(
        "--decoder", type=click.Choice(["exact", "fast"]), help="Fast: JPEGs decoded at a fraction of their size."
    )(function)
    function = click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]")(function)
    function = click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="Numbers the model computes in. [auto]"
    )(function)
    return click.option(
        "--model", "-m", metavar="NAME", help="ARCHITECTURE/WEIGHTS, hf-hub:OWNER/NAME, local-dir:PATH or phantom-clip."
    )(function)


def cache(function: Function) -> Function:
    """Add --cache."""
    return click.option(
        "--cache", metavar="DIR", help="Folder of the cache, or a URL. [$FLUOROSCOPE_CACHE or ~/.cache/fluoroscope]"
    )(function)


def confirmed(function: Function) -> Function:
    """Add --yes and --dry-run."""
    function = click.option("--dry-run", is_flag=True, default=None, help="Only say what would go.")(function)
    return click.option("--yes", "-y", is_flag=True, default=None, help="Do not ask.")(function)


def batches(function: Function) -> Function:
    """Add --batch-size and --threads."""
    function = click.option("--threads", type=int, metavar="N", help="Threads that read and decode. [by cores]")(
        function
    )
    return click.option("--batch-size", type=int, metavar="N", help="Samples a batch. [by memory]")(function)


def splits(function: Function) -> Function:
    """Add --split and --split-seed."""
    function = click.option(
        "--split-seed", "split__seed", type=int, metavar="S", help="Seed of a split by patient. [0]"
    )(function)
    return click.option(
        "--split",
        "split__how",
        type=click.Choice(["auto", "given", "study", "grouped", "stratified"]),
        help="Split given in the data, the study's own, by patient, or so with labels kept. [given if there is one]",
    )(function)


def out(function: Function) -> Function:
    """Add --out, --overwrite."""
    function = click.option(
        "--overwrite", is_flag=True, default=None, help="Replace what an earlier run left in --out."
    )(function)
    return click.option(
        "--out", "-o", metavar="DIR", type=click.Path(path_type=Path), help="Run folder. [a new one in the cache]"
    )(function)


def with_data(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with --data pairs as values."""
    pairs = options.pop("data", ())
    if pairs:
        from jobs.config import parse_pairs

        options["data"] = parse_pairs(pairs, "--data")
    return options
