"""Ctrl-C as the command line needs it: never lost, and no harm to a job that is done.

Python raises KeyboardInterrupt between any two steps of the main thread. Two of those places spoil it:

- in a ``__del__`` or another callback whose errors Python can only report ("Exception ignored in ..."), the interrupt
  is printed and forgotten, and the job goes on as if nobody had pressed a key. Within `heard` it is raised again a
  moment later, until it arrives where it can be caught;
- after the job, while the interpreter takes itself apart, an interrupt turns a finished job into a dead one. After
  `deafen` nothing hears it any more.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOMENT = 0.02
"""Seconds until a lost interrupt is raised again: by then the callback that it fell into has ended."""


@contextmanager
def heard() -> Iterator[None]:
    """Raise an interrupt again that was lost in a callback; errors of other kinds are reported as before.

    Meant for the main thread of a program. A thread presses again, since what is raised within the report itself is
    lost just the same.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(MOMENT, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            report(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report


def deafen() -> None:
    """Ignore Ctrl-C from here on, also while the interpreter ends; has no effect outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
