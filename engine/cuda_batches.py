"""Batches on a CUDA device: page-locked buffers, a copy stream, a captured forward pass, results fetched later.

The rules are those of `engine.batches`. What runs here is ordinary torch; a graph that cannot be captured (a tower that
synchronises or branches on data) falls back to launching kernel by kernel, and the log says so.

- Two streams work at once, so whatever one of them writes and the other reads is waited for by an event. The copy
  stream owns the pixels on the device: memory that belongs to the other stream may still be written by it.
- All parts of a halved batch leave the graph in the same memory, so each is copied out before the next one is begun.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.batches import Batch, Product, Runner, is_out_of_memory

log = logging.getLogger(__name__)

WARM_UP = 3


class _Buffers(NamedTuple):
    """What one batch under way needs: page-locked pixels, their copy on the device, and when the copy is done."""

    host: torch.Tensor
    device: torch.Tensor
    copied: torch.cuda.Event
    done: torch.cuda.Event


class CudaRunner(Runner):
    """Runs batches on a GPU, two at a time under way; see `engine.batches.Runner`."""

    ahead = 2

    def __init__(self, encoder: Any, batch_size: int, *, compiled: bool = False) -> None:
        super().__init__(encoder, batch_size, compiled=compiled)
        self._copying = torch.cuda.Stream(encoder.device)
        self._free: list[_Buffers] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_input: torch.Tensor | None = None
        self._graph_output: torch.Tensor | None = None
        self._may_capture = True

    def new_batch(self) -> Batch:
        """Return an empty batch whose pixels are page-locked memory."""
        buffers = self._free.pop() if self._free else self._make_buffers()
        buffers.done.synchronize()
        buffers.host.zero_()
        return Batch(buffers.host.numpy(), buffers=buffers)

    def start(self, batch: Batch, image: bool, layers: Sequence[int]) -> None:
        """Copy a batch to the device and begin to compute, without waiting for either."""
        with torch.cuda.device(self.encoder.device):
            try:
                batch.answer = self._launch(batch.buffers, image, layers)
                return
            except Exception as error:
                if not is_out_of_memory(error) or self.rows == 1:
                    raise
            # Only here, where the error and all that its frames hold on to are gone, is there room again.
            self._halve()
            batch.answer = self._halving(batch.pixels, image, layers)

    def result(self, batch: Batch) -> dict[Product, np.ndarray]:
        """Wait for a batch and return what it comes to."""
        batch.buffers.done.synchronize()
        answer = {name: values.numpy() if torch.is_tensor(values) else values for name, values in batch.answer.items()}
        self._free.append(batch.buffers)
        return answer

    def _make_buffers(self) -> _Buffers:
        shape = (self.batch_size, *self.encoder.preprocess.size, 3)
        host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._copying):
            device = torch.empty(shape, dtype=torch.uint8, device=self.encoder.device)
        return _Buffers(host, device, torch.cuda.Event(), torch.cuda.Event())

    def _launch(self, buffers: _Buffers, image: bool, layers: Sequence[int]) -> dict[Product, torch.Tensor]:
        main = torch.cuda.current_stream(self.encoder.device)
        with torch.cuda.stream(self._copying):
            buffers.device.copy_(buffers.host, non_blocking=True)
            buffers.copied.record(self._copying)
        main.wait_event(buffers.copied)
        answer: dict[Product, torch.Tensor] = {}
        for start in range(0, self.batch_size, self.rows):
            part = self._forward(buffers.device[start : start + self.rows], image, layers)
            for name, values in part.items():
                if name not in answer:
                    shape = (self.batch_size, *values.shape[1:])
                    answer[name] = torch.empty(shape, dtype=values.dtype, pin_memory=True)
                answer[name][start : start + self.rows].copy_(values, non_blocking=True)
        buffers.done.record(main)
        return answer

    def _forward(self, pixels: torch.Tensor, image: bool, layers: Sequence[int]) -> dict[Product, torch.Tensor]:
        if layers:
            return self.encoder.encode_batch(pixels, image=image, layers=layers)
        if self._graph is None and self._may_capture and len(pixels) == self.rows:
            self._capture(pixels)
        if self._graph is None or self._graph_input is None or len(pixels) != len(self._graph_input):
            return {"image": self._encode(pixels)}
        assert self._graph_output is not None
        self._graph_input.copy_(pixels)
        self._graph.replay()
        return {"image": self._graph_output}

    def _capture(self, pixels: torch.Tensor) -> None:
        """Record the forward pass once, so that later batches are one launch."""
        self._may_capture = False
        stream = torch.cuda.Stream(self.encoder.device)
        try:
            self._graph_input = pixels.clone()
            stream.wait_stream(torch.cuda.current_stream(self.encoder.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._encode(self._graph_input)
            torch.cuda.current_stream(self.encoder.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # In the stream that was warmed up: the default one belongs to another device where this is not the first.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._graph_output = self._encode(self._graph_input)
            self._graph = graph
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._graph_input = self._graph_output = None
            log.info("the forward pass cannot be captured as a CUDA graph (%s); kernels are launched one by one", error)

    def _halve(self) -> None:
        super()._halve()
        torch.cuda.synchronize(self.encoder.device)
        self._graph = self._graph_input = self._graph_output = None
        self._may_capture = True
        torch.cuda.empty_cache()
