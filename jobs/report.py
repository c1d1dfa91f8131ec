"""`fluoro report RUN`: build a run's report again from the results in its folder, without computing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from analysis import report
from jobs.config import JobConfig


class Config(JobConfig):
    """What `fluoro report` needs."""

    run: Path = Field(description="run folder that `fluoro study` wrote")


@dataclass(frozen=True)
class Result:
    """Where the report lies."""

    report: Path

    def lines(self) -> Iterator[str]:
        """Return the path."""
        yield str(self.report)


def run(config: Config) -> Result:
    """Build ``report.html``.

    Raises
    ------
    UsageError
        The folder is no run.
    """
    return Result(report.render_report(config.run))
