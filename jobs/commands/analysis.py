"""The verbs `zeroshot`, `probe`, `distances` and `cam`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands import options
from jobs.commands.verb import verb

protocol = click.option(
    "--protocol", type=click.Choice(["sound", "paper"]), help="Sound practice, or exactly what the paper did. [sound]"
)
replicates = click.option("--replicates", type=int, metavar="R", help="Bootstrap replicates, by patient. [1000]")


def _one_or_several(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    """Return a single text as it is, because it may be the name of a set."""
    return value[0] if len(value) == 1 else list(value) or None


templates = click.option(
    "--template",
    "zero_shot__templates",
    multiple=True,
    metavar="TEXT",
    callback=_one_or_several,
    help="Prompt with {label} in it, or the name of a set; several make an ensemble. [ensemble]",
)


@verb("zeroshot", "jobs.zeroshot")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@templates
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
@click.option(
    "--kind",
    metavar="KIND",
    help="logistic, text-prior, ridge, nearest-mean, neighbours, tip-adapter, mlp, attention. [logistic]",
)
@click.option("--class-weight", multiple=True, metavar="HOW", help="none or balanced; both are tried if given twice.")
@click.option(
    "--features",
    "probe__features",
    multiple=True,
    metavar="SET",
    help="unit (of length 1) or raw embeddings; likewise.",
)
@click.option("--layer", type=int, metavar="BLOCK", help="Block whose entering tokens attention pools. [-1, the last]")
@click.option("--folds", type=int, metavar="K", help="Choose on K folds of train and val by group. [0: choose on val]")
@click.option("--seeds", multiple=True, type=int, metavar="S", help="Deal out the folds anew; may be repeated. [0]")
@click.option(
    "--select", metavar="SCORE", help="Choose by log_loss or average_precision. [log_loss; tip-adapter by the other]"
)
@click.option("--by", multiple=True, metavar="COLUMN", help="Also by the values of a sample column, such as sex.")
@replicates
@options.batches
@options.out
def probe(**given: Any) -> dict[str, Any]:
    """Fit probes for the labels of DATASET on cached embeddings; choose without the test rows, test and save the best.

    All values of C, class weightings, folds and seeds are solved together. What other kinds try is set by
    --set probe.k, probe.alpha, probe.beta, probe.hidden and probe.epochs, such as --set probe.k=[5,20].
    """
    return options.with_data(given)


@verb("distances", "jobs.distances")
@options.dataset
@options.model
@options.cache
@options.splits
@protocol
@click.option("--on", type=click.Choice(["test", "val", "train", "all"]), help="Split that is measured. [test]")
@click.option("--against", metavar="NAME", help="Second model, such as a fine-tuned one: CKA and Procrustes.")
@click.option("-k", "k", type=int, metavar="K", help="Neighbours of each sample. [10]")
@click.option("--map", type=click.Choice(["auto", "pca", "tsne", "umap"]), help="Map beside the PCA. [auto: t-SNE]")
@click.option("--permutations", type=int, metavar="P", help="Permutations of each null. [200]")
@replicates
@options.batches
@options.out
def distances(**given: Any) -> dict[str, Any]:
    """Measure how far the classes of DATASET lie apart and what shape the space has, beside what chance would give.

    The study's distances, forms of them for several labels a sample, silhouette, neighbours, hubs, uniformity, likeness
    to a second model, the gap between images and texts, and maps as pictures.
    """
    return options.with_data(given)


@verb("cam", "jobs.cam")
@options.dataset
@options.model
@options.cache
@click.option("--id", "ids", multiple=True, metavar="SAMPLE", help="Sample to look at; may be given several times.")
@click.option("--label", "labels", multiple=True, metavar="LABEL", help="Label to explain; may be given several times.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="Free text to explain; may be repeated.")
@click.option("--all-labels", is_flag=True, default=None, help="Every label, in one grid a sample.")
@click.option("--layers", is_flag=True, default=None, help="Also one map a block: Grad-CAM and attention rollout.")
@click.option(
    "--head", "heads", multiple=True, metavar="FILE", help="Saved head, or run of 'fluoro probe'; may be repeated."
)
@click.option(
    "--tuned", multiple=True, metavar="DIR", help="Run folder of 'fluoro finetune'; may be given several times."
)
@click.option(
    "--setting", "settings", multiple=True, metavar="NAME", help="zero-shot, probe or fine-tuned. [all at hand]"
)
@templates
@protocol
@click.option("--layer", metavar="LAYER", help="Block number, module, default or paper. [the model's own, or default]")
@click.option("--method", metavar="NAME", help="Of pytorch-grad-cam, grad-eclip, legrad, rollout. [the model's own]")
@click.option("--choice", metavar="DIR", help="Run of 'fluoro cam sweep' that chose method and layer.")
@options.out
def cam(**given: Any) -> dict[str, Any]:
    """Draw where the model looks for a label or a text in samples of DATASET, on the original image's pixels.

    Maps are made when they are asked for: from cached tokens (fluoro embed --what tokens@-1), else from cached pixels,
    else from the image. Boxes and masks are drawn beside and scored: pointing game, energy inside, IoU.
    """
    return options.with_data(given)
