"""How long work shows itself: a live display on a terminal, plain log lines elsewhere, nothing when asked to be quiet.

A job calls ``with progress.step("embed images", total=2000, unit="images") as step: step.advance(32)``. The engine,
which knows no display, is handed the `Progress` itself as a callable ``progress(name, done, total)``. Everything goes
to standard error, so that standard output stays clean for results and ``--json``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TextIO

log = logging.getLogger("fluoroscope.progress")

SECONDS_BETWEEN_LINES = 10.0
Mode = Literal["auto", "live", "plain", "quiet"]


class Step:
    """One stretch of countable work; made by `Progress.step`, ends when its ``with`` block does."""

    def __init__(self, owner: Progress, name: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.counted_from = 0
        self._owner, self._clock, self._start = owner, clock, clock()

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units a second so far; 0 where nobody can tell yet."""
        done = self.done - self.counted_from
        return done / self.seconds if done and self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the end at the rate so far, None where nobody can tell."""
        if self.total is None or not self.done or not self.rate:
            return None
        return max(self.total - self.done, 0) / self.rate

    def advance(self, count: int = 1) -> None:
        """Count further units as done."""
        self.update(self.done + count)

    def update(self, done: int, total: int | None = None) -> None:
        """Set the units done so far, and the total where it has become known."""
        self.done = done
        self.total = self.total if total is None else total
        self._owner._changed(self)

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._ended(self, failed=kind is not None)


class Progress:
    """The quiet display, and the interface of all of them. Use as a context manager around a whole job."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._named: dict[str, Step] = {}

    def step(self, name: str, total: int | None = None, unit: str = "items") -> Step:
        """Begin a stretch of work.

        Parameters
        ----------
        name : str
            What is being done, such as "embed images".
        total : int, optional
            Units to do, if known.
        unit : str
            What is counted, in the plural.
        """
        step = Step(self, name, total, unit, self._clock)
        self._began(step)
        return step

    def note(self, message: str) -> None:
        """Say one line between the steps."""

    def __call__(self, name: str, done: int, total: int | None = None) -> None:
        """Report absolute figures by name, as the engine does; a step ends at its total, or when another begins."""
        step = self._named.get(name)
        if step is None:
            self._end_named(failed=False)  # training that stops early never reaches its total
            step = self._named[name] = self.step(name, total)
            step.counted_from = done  # how long these took is not known
        step.update(done, total)
        if step.total is not None and done >= step.total:
            self._named.pop(name)
            self._ended(step, failed=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_named(failed=kind is not None)

    def _end_named(self, failed: bool) -> None:
        for step in self._named.values():
            self._ended(step, failed)
        self._named.clear()

    def _began(self, step: Step) -> None: ...

    def _changed(self, step: Step) -> None: ...

    def _ended(self, step: Step, failed: bool) -> None: ...


class PlainProgress(Progress):
    """Log lines: where a step starts, at most every ten seconds while it runs, and where it ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, every: float = SECONDS_BETWEEN_LINES) -> None:
        super().__init__(clock)
        self._every = every
        self._last_line: dict[int, float] = {}

    def note(self, message: str) -> None:
        """Say one line between the steps."""
        log.info("%s", message)

    def _began(self, step: Step) -> None:
        self._last_line[id(step)] = self._clock()
        log.info("%s: started%s", step.name, f", {step.total:,} {step.unit}" if step.total else "")

    def _changed(self, step: Step) -> None:
        now = self._clock()
        if now - self._last_line.get(id(step), now) < self._every:
            return
        self._last_line[id(step)] = now
        share = f" of {step.total:,} ({100 * step.done / step.total:.0f} %)" if step.total else ""
        left = f", {spoken_time(step.seconds_left)} left" if step.seconds_left is not None else ""
        speed = f", {spoken_rate(step.rate)}/s" if step.rate else ""
        log.info("%s: %s%s %s%s%s", step.name, f"{step.done:,}", share, step.unit, speed, left)

    def _ended(self, step: Step, failed: bool) -> None:
        if self._last_line.pop(id(step), None) is None:
            return
        how = "stopped" if failed else "done"
        counted = f", {step.done:,} {step.unit}" if step.done else ""
        speed = f", {spoken_rate(step.rate)}/s" if step.rate else ""
        taken = "" if step.done and step.done == step.counted_from else f" in {spoken_time(step.seconds)}"
        log.info("%s: %s%s%s%s", step.name, how, taken, counted, speed)


class LiveProgress(Progress):
    """A rich display with bar, count, rate and time left for each step; finished steps stay as one line each."""

    def __init__(self, console: Any, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.console = console
        self._display = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[speed]}", justify="right", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="green"),
            console=console,
        )
        self._tasks: dict[int, Any] = {}
        self._entered = 0

    def __enter__(self) -> Progress:
        # A job may enter the display that its caller has entered already; the outer one ends it.
        self._entered += 1
        if self._entered == 1:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            super().__exit__(kind, error, trace)
            self._display.stop()

    def note(self, message: str) -> None:
        """Say one line above the bars."""
        self.console.print(message, markup=False, highlight=False)

    def _began(self, step: Step) -> None:
        self._tasks[id(step)] = self._display.add_task(step.name, total=step.total, count="", speed="", left="")

    def _changed(self, step: Step) -> None:
        self._show(step, f"{spoken_time(step.seconds_left)} left" if step.seconds_left is not None else "")

    def _ended(self, step: Step, failed: bool) -> None:
        if id(step) not in self._tasks:
            return
        if not failed and step.total is None:
            step.total = max(step.done, 1)
            step.done = step.total
        self._show(step, "stopped" if failed else "done")
        self._display.stop_task(self._tasks.pop(id(step)))

    def _show(self, step: Step, left: str) -> None:
        count = f"{step.done:,}" + (f"/{step.total:,}" if step.total else "")
        self._display.update(
            self._tasks[id(step)],
            completed=step.done,
            total=step.total,
            count=f"{count} {step.unit}" if step.done else "",
            speed=f"{spoken_rate(step.rate)}/s" if step.rate else "",
            left=left,
        )


def make_progress(mode: Mode = "auto", stream: TextIO | None = None) -> Progress:
    """Return the display for a mode; "auto" is live on a terminal and plain log lines elsewhere.

    Parameters
    ----------
    mode : "auto", "live", "plain" or "quiet"
    stream : text stream, optional
        Standard error unless given.
    """
    stream = stream or sys.stderr
    if mode == "quiet":
        return Progress()
    if mode == "live" or (mode == "auto" and stream.isatty()):
        from rich.console import Console

        return LiveProgress(Console(file=stream))
    return PlainProgress()


def spoken_time(seconds: float | None) -> str:
    """Return seconds as people say them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def spoken_rate(rate: float) -> str:
    """Return a rate with a sensible number of digits: 0.31, 4.2, 87, 12,300."""
    if rate >= 100:
        return f"{float(f'{rate:.3g}'):,.0f}"
    return f"{rate:.2g}" if rate < 10 else f"{rate:.0f}"


def spoken_bytes(count: float) -> str:
    """Return a number of bytes in powers of 1,024: 512 B, 7.2 MB, 1.4 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
