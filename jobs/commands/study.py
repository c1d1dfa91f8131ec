"""The verbs `study` and `report`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands import options
from jobs.commands.verb import verb


@verb("study", "jobs.study")
@click.argument("config_file", metavar="CONFIG", required=False)
@options.model
@options.cache
@options.batches
@options.out
@click.option("--resume", is_flag=True, default=None, help="Go on with the run in --out, started with the same config.")
def study(**given: Any) -> dict[str, Any]:
    """Run the whole study of CONFIG into one run folder with a self-contained report.html.

    Embeds images and texts, then zero-shot, linear probe and fine-tuning, distances, heatmaps against annotations.
    CONFIG is a YAML file or the name of a shipped one. What is in the cache is not computed again.
    """
    return given


@verb("report", "jobs.report")
@click.argument("run", metavar="RUN", required=False)
def report(**given: Any) -> dict[str, Any]:
    """Build report.html of the run folder RUN again, from the results in it alone."""
    return given
