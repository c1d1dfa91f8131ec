"""Ctrl-C as the command line needs it: never lost, and no harm to a job that is done.

Python raises KeyboardInterrupt between any two steps of the main thread. Some of those places spoil it:

- in a ``__del__`` or another callback whose errors Python can only report ("Exception ignored in ..."), the interrupt
  is printed and forgotten; in a callback that compiled code makes and whose errors it clears (looking for an attribute,
  say), it is forgotten without a word. The job would go on as if nobody had pressed a key. Within `heard` an interrupt
  that vanishes before it has reached `arrived` is raised again a moment later;
- after the job, while the interpreter takes itself apart, an interrupt turns a finished job into a dead one. After
  `deafen` nothing hears it any more.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SAME_COMMAND = "the same command goes on from there"
FIRST_MOMENT, LONGEST_MOMENT = 0.02, 1.0
"""Seconds until a lost interrupt is raised again; twice as long each time, for code that does not want to hear it."""


class Pressed(KeyboardInterrupt):
    """One press of Ctrl-C; what dies without having been heard is pressed again."""


class _Ear:
    """Watches over presses: while an exception is on its way somebody holds it, and who clears it lets it die."""

    def __init__(self) -> None:
        self.open = True
        self._moment = FIRST_MOMENT
        self._thread = threading.main_thread()
        self._watched: set[weakref.ref[Pressed]] = set()

    def __call__(self, number: int, frame: object) -> NoReturn:
        # Not by a name of this frame: the traceback holds the frame, and both would keep one another alive.
        raise self._press()

    def _press(self) -> Pressed:
        pressed = Pressed()
        self._watched.add(weakref.ref(pressed, self._died))
        return pressed

    def _died(self, watched: weakref.ref[Pressed]) -> None:
        self._watched.discard(watched)
        if self.open:
            again = threading.Timer(self._moment, self._again)
            again.daemon = True
            again.start()
            self._moment = min(2 * self._moment, LONGEST_MOMENT)

    def _again(self) -> None:
        # A signal to that very thread: it must also wake it where it waits.
        if self.open and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, signal.SIGINT)


_ears: list[_Ear] = []


@contextmanager
def heard() -> Iterator[None]:
    """Raise an interrupt again that was lost on its way; errors of other kinds are reported as before.

    For the main thread of a program; elsewhere, and where somebody has a handler of their own, it changes nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        yield
        return
    ear, report = _Ear(), sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Pressed):
            report(unraisable)

    sys.unraisablehook = hook
    _ears.append(ear)
    try:
        signal.signal(signal.SIGINT, ear)
        yield
    finally:
        ear.open = False
        _ears.remove(ear)
        sys.unraisablehook = report
        if signal.getsignal(signal.SIGINT) is ear:
            signal.signal(signal.SIGINT, handler)


def arrived() -> None:
    """Say that an interrupt was heard, and is being seen to: from here on none is pressed again."""
    for ear in _ears:
        ear.open = False


def deafen() -> None:
    """Ignore Ctrl-C from here on, also while the interpreter ends; has no effect outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
