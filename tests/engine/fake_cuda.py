"""CUDA without a device: streams, events and captured graphs as `engine.cuda_batches` uses them, and a referee.

All tensors are the processor's, and operations run at once, so the numbers are right whatever the order. What could be
wrong on a device is therefore watched: each stream, and the host, has a clock that counts its operations, and knows
what it has waited for of the others' (vector clocks; Lamport 1978, Mattern 1989). An operation that reads what another
stream has written, or writes what another one has read or written, without having waited for it is a race.

A graph is what torch dispatches while it is captured: replaying it runs the same operations on the same memory, without
Python. What a device refuses during a capture (tensors of Python's numbers, asking for values) is refused here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

HOST = "host"
# Copies to or from the host that wait; a device refuses them while a graph is captured.
WAITING = ("aten.lift_fresh.default", "aten._local_scalar_dense.default", "aten.nonzero.default")
Clock = dict[str, int]


class FakeCuda(TorchDispatchMode):
    """A device while it is entered; `races`, `captures` and `replays` say what has happened."""

    def __init__(self, patch: Any) -> None:
        super().__init__()
        self.races: list[str] = []
        self.captures = self.replays = 0
        self._seen: dict[str, Clock] = {HOST: {HOST: 0}}
        self._current = "main"
        self._written: dict[int, tuple[str, int]] = {}
        self._read: dict[int, Clock] = {}
        self._pinned: set[int] = set()
        self._alive: list[torch.Tensor] = []  # so that no memory is used twice
        self._recording: list[tuple[Any, tuple, dict, Any]] | None = None
        self._patch(patch)

    def _patch(self, patch: Any) -> None:
        for name in ("zeros", "empty"):
            patch.setattr(torch, name, self._pinning(getattr(torch, name)))
        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self))
        patch.setattr(torch.cuda, "Event", lambda: Event(self))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(self, self._current))
        patch.setattr(torch.cuda, "stream", self._within)
        patch.setattr(torch.cuda, "graph", self._capturing)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait_for_all(HOST))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)

    def _pinning(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            before = self._current
            self._current = HOST if pin_memory else before
            made = real(*arguments, **options)
            self._current = before
            if pin_memory:
                self._pinned.add(memory_of(made))
            return made

        return make

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream.name
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _capturing(
        self, graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.wait_for_all(HOST)
        self._recording = []
        try:
            with self._within(stream or Stream(self)):
                yield
            graph.operations = self._recording
            self.captures += 1
        finally:
            self._recording = None
        self._alive += [tensor for *_, made in graph.operations for tensor in tensors_in(made)]
        with _disable_current_modes(), torch.no_grad():  # nothing is computed yet
            for _, arguments, options, made in graph.operations:
                for tensor in new_in(made, (arguments, options)):
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 7)

    # -- Operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        """Run one operation in the current stream, or on the host where all its memory is there."""
        options = options or {}
        if self._recording is not None and str(function) in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = function(*arguments, **options)
        if self._recording is not None:
            self._recording.append((function, arguments, options, made))
        else:
            self.note(function, arguments, options, made)
        return made

    def note(self, function: Any, arguments: tuple, options: dict, made: Any) -> None:
        """Move the clocks on, and tell a race."""
        given, results = tensors_in((arguments, options)), tensors_in(made)
        self._alive += [*given, *results]
        touched = {memory_of(tensor) for tensor in [*given, *results]}
        stream = HOST if touched and touched <= self._pinned else self._current
        written = {memory_of(tensor) for tensor in new_in(made, (arguments, options))}
        if function._schema.is_mutable:
            written.add(memory_of(given[0]))
        if results and not written:
            return  # a view touches nothing
        seen = self.seen(stream)
        if stream != HOST:
            merge(seen, self.seen(HOST))  # what the host had done when it gave the order
        seen[stream] = now = seen.get(stream, 0) + 1
        for memory in touched:
            others = [self._written.get(memory, (stream, 0))]
            if memory in written:
                others += self._read.get(memory, {}).items()
            for other, moment in others:
                if seen.get(other, 0) < moment:
                    self.races.append(f"{function} of {stream} does not wait for {other}")
            if memory in written:
                self._written[memory], self._read[memory] = (stream, now), {}
            else:
                self._read.setdefault(memory, {})[stream] = now

    def seen(self, stream: str) -> Clock:
        """Return what a stream has waited for."""
        return self._seen.setdefault(stream, {})

    def wait_for_all(self, stream: str) -> None:
        """Let a stream, or the host, wait for all that was begun."""
        for other in list(self._seen.values()):
            merge(self.seen(stream), other)

    def host_may_read(self, values: Any) -> bool:
        """Tell whether the host has waited for what was last written to a NumPy array's memory."""
        stream, moment = self._written[values.__array_interface__["data"][0]]
        return self.seen(HOST).get(stream, 0) >= moment


class Stream:
    def __init__(self, cuda: FakeCuda, name: str | None = None) -> None:
        self.cuda, self.name = cuda, name or f"stream {len(cuda._seen)}"
        cuda.seen(self.name)

    def wait_stream(self, other: Stream) -> None:
        merge(self.cuda.seen(self.name), self.cuda.seen(other.name))

    def wait_event(self, event: Event) -> None:
        merge(self.cuda.seen(self.name), event.clock)


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.clock = cuda, {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(self.cuda.seen(stream.name))

    def synchronize(self) -> None:
        merge(self.cuda.seen(HOST), self.clock)


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.operations = cuda, []

    @torch.no_grad()
    def replay(self) -> None:
        self.cuda.replays += 1
        for function, arguments, options, made in self.operations:
            again = function(*arguments, **options)
            self.cuda.note(function, arguments, options, made)
            if not function._schema.is_mutable:
                for old, new in zip(tensors_in(made), tensors_in(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def new_in(made: Any, given: Any) -> list[torch.Tensor]:
    """Return the tensors whose memory was not there before."""
    before = {memory_of(tensor) for tensor in tensors_in(given)}
    return [tensor for tensor in tensors_in(made) if memory_of(tensor) not in before]


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def merge(into: Clock, other: Clock) -> None:
    for stream, moment in other.items():
        into[stream] = max(into.get(stream, 0), moment)
