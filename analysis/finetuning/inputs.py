"""What a tower's free part is trained on: pixels taken through the frozen part, its results kept, or cached tokens.

In come pixels or tokens by row, a tower (`analysis.finetuning.tower`) and a limit on memory; out go batches on its
device. Rows are read one step ahead, in a thread, while the device computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from analysis.finetuning.augmentation import Augmentation
from analysis.finetuning.tower import TowerWithHead
from engine.errors import DataError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]


class RowSource(Protocol):
    """Pixels or tokens by row: a NumPy array, or the cache's rows, which are read when they are needed."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return uint8 pixels (b, h, w, 3) or float tokens (b, n, width) of some rows."""


def of_rows(
    source: RowSource,
    rows: np.ndarray,
    model: TowerWithHead,
    device: torch.device,
    batch_size: int,
    token_memory: int,
    augmentation: Augmentation | None = None,
    progress: Progress | None = None,
    kept: KeptResults | None = None,
) -> Inputs:
    """Return what the free part starts from: the frozen part's results where those can be kept and fit, else pixels.

    Parameters
    ----------
    source : RowSource
        Pixels; or, where the model starts from tokens, those.
    rows : ndarray of int, (m,)
    token_memory : int
        Bytes that the results may take.
    augmentation : Augmentation, optional
        Changes pixels each time, so that nothing can be kept.
    kept : KeptResults, optional
        Of earlier trainings that freeze the same part; what it lacks is added to it.
    """
    if model.from_tokens:
        return FromTokens(source, rows, device)
    augments = augmentation is not None and augmentation.any
    if not model.can_keep or augments:
        return FromPixels(source, rows, model, device, augmentation if augments else None)
    kept = kept if kept is not None else KeptResults()
    lacking = kept.lacking(rows)
    model.eval()
    for places in slices(len(lacking), batch_size):
        with torch.no_grad():
            tokens = model.frozen(read_pixels(source, lacking[places]).to(device)).float().cpu()
        needed = tokens.nbytes // len(tokens) * len(rows)
        if needed > token_memory:
            log.warning(
                "the frozen part's results would take %.1f GB (token_memory %.1f GB), so it runs in every epoch; "
                "from_block starts from cached tokens instead",
                *(needed / 1e9, token_memory / 1e9),
            )
            return FromPixels(source, rows, model, device, None)
        kept.add(lacking[places], tokens)
        if progress is not None:
            progress(f"frozen part, {len(lacking)} images", int(places[-1]) + 1, len(lacking))
    return FromMemory(kept.of(rows), device)


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

    augmentation: Augmentation | None

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Return what is stored for some places among the rows, on the CPU."""

    def enter(self, stored: torch.Tensor, drawn: np.ndarray | None = None) -> torch.Tensor:
        """Return what enters the free part for what was read, on the device.

        Parameters
        ----------
        stored : Tensor
            Of `read`, or a slice of it.
        drawn : ndarray, optional
            Random numbers of the augmentation, one row a sample.
        """


class FromPixels:
    """Pixels augmented and taken through the frozen part whenever they are needed."""

    def __init__(
        self,
        source: RowSource,
        rows: np.ndarray,
        model: TowerWithHead,
        device: torch.device,
        augmentation: Augmentation | None,
    ) -> None:
        self.source, self.rows, self.model, self.device = source, rows, model, device
        self.augmentation = augmentation

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Return uint8 pixels (b, h, w, 3)."""
        return _pinned(read_pixels(self.source, self.rows[places]), self.device)

    def enter(self, stored: torch.Tensor, drawn: np.ndarray | None = None) -> torch.Tensor:
        """Return what the frozen part gives for the pixels as they are now."""
        pixels = stored.to(self.device, non_blocking=True)
        if self.augmentation is not None and drawn is not None:
            pixels = self.augmentation.apply(pixels, drawn)
        return self.model.frozen(pixels)


class FromMemory:
    """What the frozen part gave, kept in memory."""

    augmentation: Augmentation | None = None

    def __init__(self, results: torch.Tensor, device: torch.device) -> None:
        self.results, self.device = results, device

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Return the kept results."""
        return self.results[torch.from_numpy(places)]

    def enter(self, stored: torch.Tensor, drawn: np.ndarray | None = None) -> torch.Tensor:
        """Return them on the device."""
        return stored.to(self.device)


class FromTokens:
    """Tokens as they are stored, float16 or float32."""

    augmentation: Augmentation | None = None

    def __init__(self, source: RowSource, rows: np.ndarray, device: torch.device) -> None:
        self.source, self.rows, self.device = source, rows, device

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Return tokens (b, n, width)."""
        found = np.asarray(self.source[self.rows[places]])
        if found.dtype.kind != "f" or found.ndim != 3 or len(found) != len(places):
            raise DataError(f"tokens of {len(places)} rows came as {found.dtype} {found.shape}, not float (b, n, w)")
        return _pinned(torch.from_numpy(np.ascontiguousarray(found)), self.device)

    def enter(self, stored: torch.Tensor, drawn: np.ndarray | None = None) -> torch.Tensor:
        """Return them on the device, in float32."""
        return stored.to(self.device, non_blocking=True).float()


def read_ahead(inputs: Inputs, parts: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield what is stored for each part of the places, the next one being read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as reader:
        following: Future[torch.Tensor] | None = reader.submit(inputs.read, parts[0]) if parts else None
        for number in range(len(parts)):
            assert following is not None
            found = following.result()
            following = reader.submit(inputs.read, parts[number + 1]) if number + 1 < len(parts) else None
            yield found


def read_pixels(pixels: RowSource, rows: np.ndarray) -> torch.Tensor:
    """Return uint8 pixels (b, h, w, 3) of some rows; DataError where the source gives something else."""
    found = np.asarray(pixels[rows])
    if found.dtype != np.uint8 or found.ndim != 4 or len(found) != len(rows):
        raise DataError(f"pixels of {len(rows)} rows came as {found.dtype} {found.shape}, not uint8 (b, h, w, 3)")
    return torch.from_numpy(np.ascontiguousarray(found))


def slices(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield 0..count-1 in order, at most `size` at a time."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _pinned(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return rows in memory that a GPU can fetch by itself."""
    return values.pin_memory() if device.type == "cuda" else values
