"""What benchmarks share: ways of doing one thing, timed in turns, and a record of the figures with their machine."""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import machine


@dataclass(frozen=True)
class Way:
    """One way of doing something; what comes before it and after it is not timed.

    Parameters
    ----------
    run : callable
    before, after : callable, optional
        `after` is given what `run` returned.
    """

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None
    after: Callable[[Any], Any] | None = None

    def seconds(self) -> float:
        """Do it once and return how long it took."""
        if self.before is not None:
            self.before()
        gc.collect()
        start = time.perf_counter()
        result = self.run()
        taken = time.perf_counter() - start
        if self.after is not None:
            self.after(result)
        return taken


def in_turns(ways: Mapping[str, Way], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; the order changes from round to round, so that no one profits.

    Parameters
    ----------
    warm : bool
        Do everything once before, untimed.
    """
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1 if warm else 0, rounds):
        turn = max(number, 0) % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = ways[name].seconds()
            if number >= 0:
                taken[name].append(seconds)
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each way's seconds."""
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def write_record(path: Path, options: Mapping[str, Any], figures: Any) -> None:
    """Write figures with the machine and versions that they were measured with."""
    record = {
        "measured": time.strftime("%Y-%m-%d"),
        "commit": machine.git_commit(),
        "machine": machine.describe_machine(accelerators=False),
        "versions": machine.versions(),
        "options": {name: _without_folders(value) for name, value in options.items()},
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _without_folders(value: Any) -> Any:
    """Return an option as it is, of paths the last part only: where they lay says nothing to others."""
    return re.sub(r"[^:]*/", "", str(value)) if isinstance(value, str | Path) else value
