"""The verbs `finetune`, `finetune wise` and `finetune average`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.commands import options
from jobs.commands.analysis import protocol, replicates
from jobs.commands.verb import verb

OBJECTIVES = ["bce", "weighted_bce", "focal", "asymmetric", "contrastive"]
METRICS = ["bce", "map", "auroc_macro", "lrap"]

by = click.option("--by", type=click.Choice(METRICS), help="Validation metric that chooses. [the run's own]")
device = click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]")


@verb("finetune", "jobs.finetune")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@click.option(
    "--start", metavar="HEAD", help="Head to start from: probe, text, random, or a .npz file or its run. [probe]"
)
@click.option(
    "--trainable",
    "finetune__trainable",
    metavar="WHAT",
    help="all, lora, projection, none (the head alone), or a number of last blocks. [all]",
)
@click.option(
    "--from-block",
    "finetune__from_block",
    type=int,
    metavar="K",
    help="Train from block K on, from its cached tokens; no block before it runs. -1 is the last.",
)
@click.option("--objective", "finetune__objective", type=click.Choice(OBJECTIVES), help="What is minimised. [bce]")
@click.option(
    "--contrastive-weight",
    "finetune__contrastive_weight",
    type=float,
    metavar="W",
    help="Add the contrast of images and texts with this factor. [0]",
)
@click.option("--epochs", "finetune__epochs", type=int, metavar="N", help="Most passes over the training images. [10]")
@click.option("--learning-rate", "finetune__learning_rate", type=float, metavar="R", help="Of the tower. [1e-4]")
@click.option(
    "--monitor",
    "finetune__monitor",
    type=click.Choice([*METRICS, "contrastive"]),
    help="Validation metric that chooses the epoch and stops. [map]",
)
@click.option(
    "--autocast",
    "finetune__autocast",
    type=click.Choice(["none", "bf16", "fp16", "fp16-on-cuda"]),
    help="Mixed precision. [none]",
)
@replicates
@options.batches
@options.out
@click.option("--resume", is_flag=True, default=None, help="Go on with the run in --out from its last checkpoint.")
def finetune(**given: Any) -> dict[str, Any]:
    """Fine-tune the image tower with a head on DATASET; the result is a model folder with an encoder id of its own.

    The rest of the recipe (augmentation, layer-wise rates, running average, accumulation ...) is set by
    --set finetune.KEY=VALUE; a wrong KEY names the known ones. 'fluoro finetune --resume --out RUN' needs nothing else.
    """
    return options.with_data(given)


@verb("finetune wise", "jobs.finetune_wise")
@click.argument("tuned", metavar="RUN", required=False, type=click.Path(path_type=Path))
@click.option("--share", multiple=True, type=float, metavar="A", help="Share of the child, 0 to 1. [0, 0.1, ... 1]")
@by
@device
@options.cache
@options.out
def wise(**given: Any) -> dict[str, Any]:
    """Score the points between the parent and the child of a 'fluoro finetune' RUN, and keep the best on validation."""
    return given


@verb("finetune average", "jobs.finetune_average")
@click.argument("tuned", metavar="RUN...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--how", type=click.Choice(["greedy", "uniform"]), help="What validation agrees to, or all. [greedy]")
@by
@device
@options.cache
@options.out
def average(**given: Any) -> dict[str, Any]:
    """Average the fine-tuned models of several RUNs of one parent, data set and split."""
    return given
