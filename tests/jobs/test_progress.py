"""jobs/progress.py: rates and time left, on a terminal and in log lines."""

import io
import logging

import pytest

from jobs.progress import (
    LiveProgress,
    PlainProgress,
    Progress,
    make_progress,
    spoken_bytes,
    spoken_rate,
    spoken_time,
)


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="fluoroscope.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_plain_lines_tell_rate_and_time_left(said):
    clock = Clock()
    with PlainProgress(clock) as progress, progress.step("embed images", total=1000, unit="images") as step:
        for _ in range(5):
            clock.now += 4
            step.advance(100)
    assert said() == [
        "embed images: started, 1,000 images",
        "embed images: 300 of 1,000 (30 %) images, 25/s, 28 s left",
        "embed images: done in 20 s, 500 images, 25/s",
    ]


def test_a_step_that_fails_says_stopped(said):
    with pytest.raises(RuntimeError), PlainProgress(Clock()) as progress, progress.step("train"):
        raise RuntimeError
    assert said()[-1].startswith("train: stopped")


def test_the_engine_reports_absolute_figures_by_name(said):
    clock = Clock()
    with PlainProgress(clock) as progress:
        for done in (1, 50, 100):
            clock.now += 1
            progress("embed texts", done, 100)
        progress("embed texts", 2, 2)
    assert said() == [
        "embed texts: started, 100 items",
        "embed texts: done in 2.0 s, 100 items, 50/s",  # 99 in the 2 s since the first report, to two digits
        "embed texts: started, 2 items",
        "embed texts: done, 2 items",
    ]


def test_work_that_stops_early_ends_when_other_work_begins(said):
    with PlainProgress(Clock()) as progress:
        progress("fine-tune", 60, 120)
        progress("embed images", 1, 1)
        assert said()[1].startswith("fine-tune: done")


def test_live_display_shows_bar_rate_and_remark():
    from rich.console import Console

    stream = io.StringIO()
    clock = Clock()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=120), clock)
    with progress, progress:  # a job enters what the command line has entered
        with progress.step("embed images", total=10, unit="images") as step:
            clock.now += 2
            step.advance(5)
        progress.note("one file could not be read")
    text = stream.getvalue()
    assert "embed images" in text and "5/10 images" in text and "2.5/s" in text and "could not be read" in text


@pytest.mark.parametrize(
    ("mode", "quiet", "said"),
    [("live", False, ["a warning", "the plan"]), ("plain", False, ["a line", "a warning", "the plan"]),
     ("live", True, ["a warning"]), ("plain", True, ["a warning"])],
)  # fmt: skip
def test_how_a_job_computes_is_said_on_a_terminal_too(monkeypatch, mode, quiet, said):
    """What a display leaves out is logged all the same, for the run's folder."""
    from jobs import LOGGERS
    from jobs.commands.verb import log_shown

    loggers, stream, records = [logging.getLogger(name) for name in ("", *LOGGERS)], io.StringIO(), []
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    monkeypatch.setattr("sys.stderr", stream)
    keeper = logging.Handler()
    monkeypatch.setattr(keeper, "emit", records.append)
    with log_shown(make_progress(mode, stream), quiet, debug=False):
        logging.getLogger("engine").addHandler(keeper)
        logging.getLogger("engine.hub").info("a line")
        logging.getLogger("engine.hub").warning("a warning")
        logging.getLogger("engine.plan").info("the plan")
        logging.getLogger("engine").removeHandler(keeper)
    text = stream.getvalue()
    assert [words for words in ("a line", "a warning", "the plan") if words in text] == said
    assert len(records) == 3
    # A program that calls a command, and closes what it showed it on, goes on logging as before.
    assert [(logger.level, logger.handlers[:]) for logger in loggers] == before
    stream.close()
    logging.getLogger("engine.hub").warning("another warning")


def test_quiet_says_nothing(said, capsys):
    with make_progress("quiet") as progress, progress.step("x", total=1) as step:
        step.advance()
        progress.note("nothing")
    assert type(progress) is Progress and said() == [] and capsys.readouterr().err == ""


def test_auto_is_plain_where_there_is_no_terminal():
    assert isinstance(make_progress("auto", io.StringIO()), PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.2, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (None, "?")],
)
def test_spoken_time(seconds, text):
    assert spoken_time(seconds) == text


def test_spoken_rates_and_bytes():
    assert [spoken_rate(rate) for rate in (0, 0.314, 4.23, 87.4, 12345)] == ["0", "0.31", "4.2", "87", "12,300"]
    assert [spoken_bytes(count) for count in (512, 7.2 * 2**20, 1.5 * 2**40)] == ["512 B", "7.2 MB", "1.5 TB"]
