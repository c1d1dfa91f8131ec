"""The verbs `cam sweep` and `cam check`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands import options
from jobs.commands.analysis import protocol, replicates, templates
from jobs.commands.verb import verb

methods = click.option(
    "--method", "methods", multiple=True, metavar="NAME", help="Method to try; may be given several times. [batched]"
)
labels = click.option(
    "--label", "labels", multiple=True, metavar="LABEL", help="Label to explain; may be given several times. [all]"
)
head = click.option("--head", metavar="FILE", help="Head saved by 'fluoro probe', explained instead of the prompts.")


@verb("cam sweep", "jobs.cam_sweep")
@options.dataset
@options.model
@options.cache
@options.splits
@methods
@click.option("--layer", "layers", multiple=True, metavar="LAYER", help="Block to try; several times. [every block]")
@labels
@head
@templates
@protocol
@click.option("--per-label", type=int, metavar="N", help="Findings of each label that choose. [20]")
@click.option("--test-per-label", type=int, metavar="N", help="Findings of each label that test. [all]")
@click.option(
    "--choose-by",
    type=click.Choice(["both", "pointing_game", "energy", "pixel_ap"]),
    help="Figure that chooses. [both: pointing game and energy]",
)
@replicates
@options.out
def sweep(**given: Any) -> dict[str, Any]:
    """Try heatmap methods and layers on annotated validation samples of DATASET; test the best one beside the nulls.

    Leaves choice.json, which 'fluoro cam --choice' and a study's heatmaps.choice take, and which becomes a model's
    default as heatmaps.json in its folder.
    """
    return options.with_data(given)


@verb("cam check", "jobs.cam_check")
@options.dataset
@options.model
@options.cache
@options.splits
@methods
@click.option("--layer", metavar="LAYER", help="Block that is looked at. [right for the tower]")
@labels
@head
@templates
@protocol
@click.option("--per-label", type=int, metavar="N", help="Findings of each label that are looked at. [2]")
@replicates
@options.batches
@options.out
def check(**given: Any) -> dict[str, Any]:
    """Ask of each heatmap method whether its maps follow what the model learnt, and mark what it uses.

    Weights are shuffled from the output down to the input, labels are permuted before a probe is trained, and pixels
    are taken away in the map's order (ROAD, deletion, insertion), on annotated test samples of DATASET.
    """
    return options.with_data(given)
