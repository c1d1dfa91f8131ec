"""Batches on a CUDA device: page-locked buffers, a copy stream, a captured forward pass, results fetched later.

The rules are those of `engine.batches`. What runs here is ordinary torch; a graph that cannot be captured (a tower that
synchronises or branches on data) falls back to launching kernel by kernel, and the log says so.
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
        try:
            batch.answer = self._launch(batch.buffers, image, layers)
        except Exception as error:
            if not is_out_of_memory(error) or self.rows == 1:
                raise
            self._make_room()
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
        device = torch.zeros(shape, dtype=torch.uint8, device=self.encoder.device)
        return _Buffers(host, device, torch.cuda.Event(), torch.cuda.Event())

    def _launch(self, buffers: _Buffers, image: bool, layers: Sequence[int]) -> dict[Product, torch.Tensor]:
        main = torch.cuda.current_stream(self.encoder.device)
        with torch.cuda.stream(self._copying):
            buffers.device.copy_(buffers.host, non_blocking=True)
            buffers.copied.record(self._copying)
        main.wait_event(buffers.copied)
        parts = [self._forward(part, image, layers) for part in buffers.device.split(self.rows)]
        answer = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
            answer[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            answer[name].copy_(values, non_blocking=True)
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
        stream.wait_stream(torch.cuda.current_stream(self.encoder.device))
        try:
            self._graph_input = pixels.clone()
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._encode(self._graph_input)
            torch.cuda.current_stream(self.encoder.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._graph_output = self._encode(self._graph_input)
            self._graph = graph
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._graph_input = self._graph_output = None
            log.info("the forward pass cannot be captured as a CUDA graph (%s); kernels are launched one by one", error)

    def _make_room(self) -> None:
        self._graph = self._graph_input = self._graph_output = None
        self._may_capture = True
        torch.cuda.synchronize(self.encoder.device)
        torch.cuda.empty_cache()

    def _halve(self) -> None:
        super()._halve()
        self._make_room()
