"""Committing in a thread of its own, while the next rows are computed.

Comes in: buffers of computed rows and a policy that says when. Goes out: commits, one at a time and in order, and a
tally. A writer that dies (a full disk) is noticed at the next batch and stops the job with its own error; an error or
Ctrl-C elsewhere commits what is computed before it goes on its way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from engine.errors import CacheError
from engine.row_buffer import CommitPolicy, RowBuffer, Tally


class Storing:
    """A context within which due rows are committed in the background, and the rest at the end."""

    def __init__(self, buffers: Sequence[RowBuffer], tally: Tally, policy: CommitPolicy) -> None:
        self._buffers, self._tally, self._policy = list(buffers), tally, policy
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._running: Future[None] | None = None

    def __enter__(self) -> Storing:
        return self

    def when_due(self) -> None:
        """Begin a commit if it is time; waits where the one before is still running, so that no more rows pile up.

        Raises
        ------
        CacheError
            That the commit before could not be written.
        """
        if self._running is not None and self._running.done():
            self._finish()
        if not self._policy.due(self._buffers):
            return
        start = time.perf_counter()
        self._finish()
        for buffer in self._buffers:
            buffer.hand_over()
        self._policy.begun()
        self._running = self._writer.submit(self._commit)
        self._tally.seconds["store"] += time.perf_counter() - start
        if self._policy.on_commit is not None:
            self._policy.on_commit()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        start = time.perf_counter()
        try:
            # After a failed commit (a full disk) a second try would only hide the error.
            if kind is None or not issubclass(kind, CacheError):
                self._finish()
                for buffer in self._buffers:
                    buffer.hand_over()
                self._commit()
            elif self._running is not None:
                with suppress(CacheError):
                    self._finish()
        finally:
            self._writer.shutdown(wait=True)
            self._tally.seconds["store"] += time.perf_counter() - start

    def _finish(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()
        for buffer in self._buffers:
            buffer.forget_committed()

    def _commit(self) -> None:
        for buffer in self._buffers:
            self._tally.computed[buffer.what] = self._tally.computed.get(buffer.what, 0) + buffer.commit()
