"""The verbs `model info`, `model pack` and `model train-phantom-clip`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands.verb import verb


@verb("model info", "jobs.model", config="InfoConfig", run="info")
@click.argument("model", metavar="MODEL", required=False)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Numbers the model computes in. [fp32]")
@click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]")
def info(**given: Any) -> dict[str, Any]:
    """Print what MODEL is: architecture, parameters, weights digest, preprocessing, encoder id.

    MODEL is ARCHITECTURE/WEIGHTS as open_clip names them, hf-hub:OWNER/NAME, local-dir:PATH or phantom-clip.
    """
    return given


@verb("model pack", "jobs.model", config="PackConfig", run="pack")
@click.argument("model", metavar="MODEL", required=False)
@click.argument("directory", metavar="DIRECTORY", required=False)
@click.option("--overwrite", is_flag=True, default=None, help="Replace a model folder that is there.")
def pack(**given: Any) -> dict[str, Any]:
    """Write MODEL as a folder DIRECTORY that loads offline as local-dir:DIRECTORY, wherever it is moved to."""
    return given


@verb("model train-phantom-clip", "jobs.train_phantom_clip")
@click.option("--output", "-o", metavar="DIR", help="Model folder to write. [phantom-clip]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace a model folder that is there.")
@click.option("--seed", type=int, metavar="S", help="Seed of the phantoms, weights and batches. [1001]")
@click.option("--phantoms", type=int, metavar="N", help="Phantoms to train on.")
@click.option("--minutes", "objective__limit_minutes", type=float, metavar="M", help="Longest wall time.")
@click.option("--workers", type=int, metavar="N", help="Processes that draw phantoms.")
@click.option("--threads", type=int, metavar="N", help="Threads of the training. [all cores]")
def train_phantom_clip(**given: Any) -> dict[str, Any]:
    """Train phantom-clip, the demo's model, again from nothing: about an hour on two cores."""
    return given
