"""The verbs `zeroshot`, `probe`, `finetune`, `distances` and `cam`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands import options
from jobs.commands.verb import verb

protocol = click.option(
    "--protocol", type=click.Choice(["sound", "paper"]), help="Sound practice, or exactly what the paper did. [sound]"
)
replicates = click.option("--replicates", type=int, metavar="R", help="Bootstrap replicates, by patient. [1000]")


@verb("zeroshot", "jobs.zeroshot")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@click.option(
    "--template", "zero_shot__templates", multiple=True, metavar="TEXT",
    help="Prompt with {label} in it, or the name of a set; several make an ensemble. [ensemble]",
)  # fmt: skip
@replicates
@options.batches
@options.out
def zeroshot(**given: Any) -> dict[str, Any]:
    """Score the labels of DATASET by prompts, without training, and test the scores."""
    return options.with_data(given)


@verb("probe", "jobs.probe")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@click.option("-C", "probe__C", multiple=True, type=float, metavar="C", help="Inverse strength of L2; best of several.")
@replicates
@options.batches
@options.out
def probe(**given: Any) -> dict[str, Any]:
    """Fit a linear head for each label of DATASET on cached embeddings, test them and save them."""
    return options.with_data(given)


@verb("finetune", "jobs.finetune")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@click.option("--epochs", type=int, metavar="N", help="Most passes over the training images.")
@click.option("--learning-rate", type=float, metavar="R", help="Of the tower and its head.")
@options.batches
@options.out
def finetune(**given: Any) -> dict[str, Any]:
    """Fine-tune the image tower with a head on DATASET; the result is a model folder with an encoder id of its own."""
    return options.with_data(given)


@verb("distances", "jobs.distances")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@replicates
@options.batches
@options.out
def distances(**given: Any) -> dict[str, Any]:
    """Measure how far the classes of DATASET lie apart, how wide they are, and what chance would give."""
    return options.with_data(given)


@verb("cam", "jobs.cam")
@options.dataset
@options.model
@options.cache
@click.option("--id", "ids", multiple=True, metavar="SAMPLE", help="Sample to look at; may be given several times.")
@click.option("--label", "labels", multiple=True, metavar="LABEL", help="Label to explain; may be given several times.")
@click.option("--head", metavar="FILE", help="Head saved by 'fluoro probe' or 'fluoro finetune'; prompts if left out.")
@click.option("--layer", metavar="LAYER", help="Block number, or paper. [the right one for the architecture]")
@click.option("--method", help="A method of pytorch-grad-cam. [gradcam]")
@options.out
def cam(**given: Any) -> dict[str, Any]:
    """Draw where the model looks for a label in samples of DATASET, carried back to the original image's pixels.

    Boxes and masks are drawn beside and scored: pointing game, energy inside, IoU.
    """
    return options.with_data(given)
