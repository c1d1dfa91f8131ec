"""Committing in a thread of its own, while the next rows are computed.

Comes in: buffers of computed rows and a policy that says when. Goes out: commits, one at a time and in order, and a
tally.

- A writer that dies (a full disk) is noticed at the next batch and stops the job with its own error. It is not tried
  again: a second try would hide the error, and later rows must not get in before those that it had in hand.
- An error or Ctrl-C elsewhere commits what is computed before it goes on its way. Ctrl-C may come between any two steps
  of this thread, also while it waits: buffers hold their rows until these are known to be stored, and what is committed
  twice is stored once.
- A second Ctrl-C gives up waiting for that commit; what it has not stored is computed again by the next job.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from engine.row_buffer import CommitPolicy, RowBuffer, Tally


class Storing:
    """A context within which due rows are committed in the background, and the rest at the end."""

    def __init__(self, buffers: Sequence[RowBuffer], tally: Tally, policy: CommitPolicy) -> None:
        self._buffers, self._tally, self._policy = list(buffers), tally, policy
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._running: Future[None] | None = None
        self._dead = False

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
        self._begin()
        self._policy.begun()
        self._tally.seconds["store"] += time.perf_counter() - start
        if self._policy.on_commit is not None:
            self._policy.on_commit()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        start, stopping = time.perf_counter(), kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            self._store_the_rest()
        except KeyboardInterrupt:
            if stopping:
                raise
            self._store_the_rest()
            raise
        finally:
            given_up = self._running is not None
            self._writer.shutdown(wait=not given_up, cancel_futures=given_up)
            self._tally.seconds["store"] += time.perf_counter() - start

    def _store_the_rest(self) -> None:
        if not self._dead:
            self._finish()
            self._begin()
            self._finish()

    def _begin(self) -> None:
        counts = [buffer.hand_over() for buffer in self._buffers]
        self._running = self._writer.submit(self._commit, counts)

    def _finish(self) -> None:
        """Wait for the commit that is running; raise what it died of."""
        if self._running is None:
            return
        wait([self._running])
        running, self._running = self._running, None
        error = running.exception()
        if error is not None:
            self._dead = True
            raise error
        for buffer in self._buffers:
            buffer.forget_committed()

    def _commit(self, counts: Sequence[int]) -> None:
        for buffer, count in zip(self._buffers, counts, strict=True):
            self._tally.computed[buffer.what] = self._tally.computed.get(buffer.what, 0) + buffer.commit(count)
