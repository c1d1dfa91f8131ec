"""How much memory a training takes, before it starts, and how many samples may go through the tower at once.

In come the model and a forward pass; out goes a `MemoryNeed`: weights, gradients, AdamW's moments and copies are
counted, and what a sample leaves for the way back is measured, on one sample and on two, by looking at what autograd
keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import machine

SHARE_OF_AVAILABLE = 0.85
# Buffers that a pass needs for a moment, beside what autograd keeps.
PASSING = 1.25


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a training takes on its device.

    Parameters
    ----------
    weights : int
        Of the copies that train or run.
    gradients : int
        And their accumulated sums.
    moments : int
        AdamW's two a weight.
    copies : int
        The running average, and on a processor the best epoch's weights.
    batch : int
        What a pass takes whatever the number of samples.
    sample : int
        What each sample in it adds.
    """

    weights: int
    gradients: int
    moments: int
    copies: int
    batch: int
    sample: int

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.moments + self.copies

    def total(self, samples: int) -> int:
        """Bytes with so many samples going through at once."""
        return int(self.fixed + PASSING * (self.batch + samples * self.sample))

    def fitting(self, samples: int, available: int) -> int:
        """Return the batch, halved until the need fits into what is available; at least 1.

        Parameters
        ----------
        samples : int
        available : int
            Bytes; what the weights already take is not in it.
        """
        while samples > 1 and self.total(samples) - self.weights > SHARE_OF_AVAILABLE * available:
            samples = -(-samples // 2)
        return samples

    def sentence(self, samples: int, available: int) -> str:
        """Return what a user is told."""
        return (
            f"memory: weights {_gb(self.weights)}, gradients, moments and copies {_gb(self.fixed - self.weights)}, "
            f"{samples} samples at once {_gb(self.total(samples) - self.fixed)}: about {_gb(self.total(samples))} in "
            f"all, {_gb(available)} available"
        )


def estimate(modules: Iterable[nn.Module], forward: Callable[[int], Tensor], *, copies: int) -> MemoryNeed:
    """Return what training will take.

    Parameters
    ----------
    modules : iterable of Module
        Towers and heads, with `requires_grad` set on what trains.
    forward : callable
        Given a number of samples (1 or 2), runs them to the loss.
    copies : int
        How many copies of the weights that train are kept on the device.
    """
    weights = [value for module in modules for value in module.parameters()]
    free = sum(value.nbytes for value in weights if value.requires_grad)
    spared = {value.untyped_storage().data_ptr() for value in weights}
    one, two = (kept_bytes(lambda count=count: forward(count), spared) for count in (1, 2))  # type: ignore[misc]
    sample = max(two - one, 0)
    return MemoryNeed(
        weights=sum(value.nbytes for value in weights),
        gradients=free,
        moments=2 * free,
        copies=copies * free,
        batch=max(one - sample, 0),
        sample=sample,
    )


def kept_bytes(forward: Callable[[], Tensor], spared: set[int]) -> int:
    """Return how many bytes autograd keeps of a forward pass, storages at some addresses (the weights') left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in spared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(kept.values())
    del result
    return total


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device: of the card, or of the machine within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return machine.memory()[1]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
