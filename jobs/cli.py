"""The command `fluoro`: a thin skin over the verbs, which turns errors into one message and an exit status.

0 all done; 1 the job failed; 2 wrong usage; 3 done, but some samples failed; 130 stopped by Ctrl-C. Nothing heavy is
imported here: `fluoro --help` must answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import click

from engine.errors import FluoroscopeError
from engine.version import __version__
from jobs import interrupts
from jobs.commands.group import LazyGroup

DONE, FAILED, USAGE, DONE_WITH_FAILURES, STOPPED = 0, 1, 2, 3, 130


@click.group(
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="fluoro", message="%(prog)s %(version)s")
def fluoro() -> None:
    """Look inside an image-text model while it works.

    Embed a data set once, then ask it everything: retrieval, zero-shot, linear probes, distances, fine-tuning,
    heatmaps. 'fluoro VERB --help' tells a verb's options; all verbs take --json.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit status."""
    try:
        with interrupts.heard():
            status = run(list(sys.argv[1:] if arguments is None else arguments))
        if status != STOPPED:
            interrupts.deafen()
    except KeyboardInterrupt:  # while an earlier one was told, or the job had just ended
        status = STOPPED
    if status == STOPPED:
        _leave_at_once(status)
    sys.exit(status)


def _leave_at_once(status: int) -> None:
    """Leave without waiting for a thread that a second Ctrl-C has given up; a cache bears being left at any moment."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if any(not thread.daemon for thread in others):
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit status; all errors end here."""
    debug, stdout = "--debug" in arguments, sys.stdout
    try:
        status = fluoro.main(args=arguments, prog_name="fluoro", standalone_mode=False)
        return status if isinstance(status, int) else DONE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        interrupts.arrived()
        # A run notes how it is gone on with (`jobs.runs.Run`); click hands the interrupt on as the cause of its own.
        notes = getattr(stop.__cause__ or stop, "__notes__", None) or [interrupts.SAME_COMMAND]
        return _told(f"stopped; what was stored so far is kept, and {notes[-1]}", STOPPED, debug)
    except FluoroscopeError as error:
        return _told(f"error: {error}", error.exit_status, debug)
    except SystemExit:
        # The reader of a pipe, such as `head`, has left: nothing to tell, and nobody to tell it to. click puts quiet
        # streams in the places of both and leaves as if the job had failed.
        if sys.stdout is stdout:
            raise
        return DONE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _told(f"error: {error.strerror or error}{where}", FAILED, debug)
    except MemoryError:
        return _told("error: out of memory; try a smaller --batch-size or fewer --threads", FAILED, debug)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _told("error: the accelerator is out of memory; try a smaller --batch-size", FAILED, debug)
        return _told(
            "error: this is a mistake in fluoroscope, not in your request; please report it", FAILED, debug=True
        )


def _told(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(message, err=True)
    return status


if __name__ == "__main__":
    main()
