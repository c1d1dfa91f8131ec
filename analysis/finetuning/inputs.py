"""What a tower's free part is trained on: pixels taken through the frozen part, or its results kept in memory.

In come pixels by row, a tower (`analysis.finetuning.tower`) and a limit on memory; out go batches on its device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from analysis.finetuning.tower import TowerWithHead
from engine.errors import DataError

log = logging.getLogger(__name__)

Augment = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[str, int, int | None], None]


class PixelSource(Protocol):
    """Pixels by row: a NumPy array, or the cache's pixels, which are read when they are needed."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return uint8 pixels (b, h, w, 3) of some rows."""


def of_rows(
    pixels: PixelSource,
    rows: np.ndarray,
    model: TowerWithHead,
    device: torch.device,
    batch_size: int,
    token_memory: int,
    augmented: Augment | None = None,
    progress: Progress | None = None,
    kept: KeptResults | None = None,
) -> Inputs:
    """Return what the free part starts from: the frozen part's results where those can be kept and fit, else pixels.

    Parameters
    ----------
    rows : ndarray of int, (m,)
    token_memory : int
        Bytes that the results may take.
    augmented : callable, optional
        Changes uint8 pixels (b, h, w, 3) at each call, so that nothing can be kept.
    kept : KeptResults, optional
        Of earlier trainings that freeze the same part; what it lacks is added to it.
    """
    if not model.can_keep or augmented is not None:
        return FromPixels(pixels, rows, model, device, augmented)
    kept = kept if kept is not None else KeptResults()
    lacking = kept.lacking(rows)
    model.eval()
    for places in slices(len(lacking), batch_size):
        with torch.no_grad():
            tokens = model.frozen(read_pixels(pixels, lacking[places]).to(device)).float().cpu()
        needed = tokens.nbytes // len(tokens) * len(rows)
        if needed > token_memory:
            log.warning(
                "the frozen part's results would take %.1f GB (token_memory %.1f GB), so it runs in every epoch",
                *(needed / 1e9, token_memory / 1e9),
            )
            return FromPixels(pixels, rows, model, device, None)
        kept.add(lacking[places], tokens)
        if progress is not None:
            progress(f"frozen part, {len(lacking)} images", int(places[-1]) + 1, len(lacking))
    return FromTokens(kept.of(rows), device)


class KeptResults:
    """What a frozen part gave, by row: shared between trainings that freeze the same part, such as those of folds."""

    def __init__(self) -> None:
        self._of_row: dict[int, torch.Tensor] = {}

    def lacking(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that have no result yet, in their order."""
        return np.array([row for row in rows.tolist() if row not in self._of_row], dtype=np.int64)

    def add(self, rows: np.ndarray, results: torch.Tensor) -> None:
        """Keep the results (m, ...) of some rows (m,)."""
        self._of_row.update(zip(rows.tolist(), results, strict=True))

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """Return the results of some rows, (m, ...)."""
        return torch.stack([self._of_row[row] for row in rows.tolist()])


class Inputs(Protocol):
    """Where the free part's inputs come from."""

    def batch(self, places: np.ndarray) -> torch.Tensor:
        """Return them for some places among the rows."""


class FromPixels:
    """Pixels read, augmented and taken through the frozen part whenever they are needed."""

    def __init__(
        self,
        pixels: PixelSource,
        rows: np.ndarray,
        model: TowerWithHead,
        device: torch.device,
        augmented: Augment | None,
    ) -> None:
        self.pixels, self.rows, self.model, self.device, self.augmented = pixels, rows, model, device, augmented

    def batch(self, places: np.ndarray) -> torch.Tensor:
        """Return what the frozen part gives for pixels as they are now."""
        pixels = read_pixels(self.pixels, self.rows[places])
        if self.augmented is not None:
            pixels = self.augmented(pixels)
        return self.model.frozen(pixels.to(self.device))


class FromTokens:
    """What the frozen part gave, kept in memory."""

    def __init__(self, tokens: torch.Tensor, device: torch.device) -> None:
        self.tokens, self.device = tokens, device

    def batch(self, places: np.ndarray) -> torch.Tensor:
        """Return the kept results."""
        return self.tokens[torch.from_numpy(places)].to(self.device)


def augment(pixels: torch.Tensor, rng: np.random.Generator, *, shift: int = 0, contrast: float = 0.0) -> torch.Tensor:
    """Return images moved by up to `shift` pixels (edges repeated), with contrast and brightness varied.

    Parameters
    ----------
    pixels : Tensor of uint8, (b, h, w, 3)
    shift : int
        Largest move along each axis, in pixels.
    contrast : float
        Contrast varies by a factor of 1 - contrast to 1 + contrast around the image's mean, brightness by up to that
        share of a quarter of the range.

    Returns
    -------
    Tensor of uint8, (b, h, w, 3)
    """
    count, height, width, _ = pixels.shape
    moved = pixels
    if shift:
        moves = rng.integers(-shift, shift + 1, size=(count, 2))
        rows = np.clip(np.arange(height)[None] + moves[:, :1], 0, height - 1)
        columns = np.clip(np.arange(width)[None] + moves[:, 1:], 0, width - 1)
        each = torch.arange(count)[:, None, None]
        moved = pixels[each, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]]
    if not contrast:
        return moved
    factor = torch.from_numpy(rng.uniform(1 - contrast, 1 + contrast, count)).float().view(-1, 1, 1, 1)
    offset = torch.from_numpy(rng.uniform(-contrast, contrast, count) * 64).float().view(-1, 1, 1, 1)
    values = moved.float()
    mean = values.mean(dim=(1, 2, 3), keepdim=True)
    return ((values - mean) * factor + mean + offset).round_().clamp_(0, 255).to(torch.uint8)


def read_pixels(pixels: PixelSource, rows: np.ndarray) -> torch.Tensor:
    """Return uint8 pixels (b, h, w, 3) of some rows; DataError where the source gives something else."""
    found = np.asarray(pixels[rows])
    if found.dtype != np.uint8 or found.ndim != 4 or len(found) != len(rows):
        raise DataError(f"pixels of {len(rows)} rows came as {found.dtype} {found.shape}, not uint8 (b, h, w, 3)")
    return torch.from_numpy(np.ascontiguousarray(found))


def slices(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield 0..count-1 in order, at most `size` at a time."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
