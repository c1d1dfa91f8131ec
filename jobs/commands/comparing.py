"""The verb `compare`."""

from __future__ import annotations

from typing import Any

import click

from jobs.commands.verb import verb


@verb("compare", "jobs.compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=False)
@click.option("--protocol", type=click.Choice(["sound", "paper"]), help="Settings of this protocol only. [all]")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Overall metric; may be given several times.")
@click.option("--common", is_flag=True, default=None, help="Compare on the samples that all runs have.")
@click.option("--against", metavar="SETTING", help="Compare each setting with this one only. [with each other]")
@click.option("--replicates", type=int, metavar="R", help="Bootstrap replicates, by patient. [10000]")
@click.option("--seed", type=int, metavar="S", help="Seed of resampling. [0]")
def compare(**given: Any) -> dict[str, Any]:
    """Set the settings of each RUN folder side by side on the same test samples, with paired differences.

    Intervals are by patient; p-values are corrected (Holm) for all differences of the table together.
    """
    return given
