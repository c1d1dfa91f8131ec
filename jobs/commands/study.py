"""The verbs `study` and `report`."""

from __future__ import annotations

from pathlib import Path
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
@click.argument("runs", metavar="RUN...", nargs=-1, required=False)
@click.option(
    "--shareable", is_flag=True, default=None, help="Without images, texts, sample ids, paths. [into RUN/shareable]"
)
@click.option("--replicates", type=int, metavar="R", help="Bootstrap replicates of a comparison. [10000]")
@click.option(
    "--out", "-o", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write to. [RUN; several: comparison]"
)
def report(**given: Any) -> dict[str, Any]:
    """Build the report of the run folder RUN again, from the results in it alone; of several, one that compares them.

    Leaves report.html, report.md, and for each table a CSV; for one run also its settings as LaTeX.
    """
    return given
