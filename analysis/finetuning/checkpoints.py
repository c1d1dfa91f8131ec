"""The state of a training on disk, so that a killed one goes on at the very numbers it would have had.

In come plain values and tensors; out go ``last.pt`` and ``best-EPOCH.pt`` in a folder, each written beside its place,
synced and renamed, so that there is a whole one at every moment. ``last.pt`` names the best that belongs to it; others
go when it has taken its place. Files are read back as tensors and plain values only, never as objects.
"""

from __future__ import annotations

import logging
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from engine.arrays.durable import make_folder, sync_folder, write_with
from engine.errors import ModelError, UsageError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
LAST = "last.pt"
SECONDS_BETWEEN = 60.0
LARGEST_SHARE = 0.05
"""Of the time, that writing may take; slow disks get fewer checkpoints."""


class Checkpoints:
    """A training's folder of checkpoints.

    Parameters
    ----------
    folder : Path
        Made if need be.
    seconds : float
        Write the last state at least so long after the one before.
    steps : int, optional
        Write it every so many steps instead.

    Attributes
    ----------
    written : set of Path
        Bests that this process wrote or read.
    """

    def __init__(self, folder: Path, *, seconds: float = SECONDS_BETWEEN, steps: int | None = None) -> None:
        self.folder, self.seconds, self.steps = folder, seconds, steps
        self._scratch = folder / "tmp"
        self.written: set[Path] = set()
        self._when, self._cost = time.monotonic(), 0.0

    @property
    def last(self) -> Path:
        """The last state."""
        return self.folder / LAST

    def begin(self) -> None:
        """Make the folder and sweep what a killed writer left."""
        make_folder(self._scratch)
        for path in self._scratch.iterdir():
            path.unlink()

    def due(self, step: int) -> bool:
        """Tell whether the last state is to be written after a step (counted from 1)."""
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self._when > max(self.seconds, self._cost / LARGEST_SHARE)

    def save_last(self, state: dict[str, Any], best: str | None) -> None:
        """Write the last state, and drop bests that it does not name."""
        start = time.monotonic()
        self._write(self.last, {**state, "best": best})
        for path in self.folder.glob("best-*.pt"):
            if path.name != best:
                path.unlink()
        self._when = time.monotonic()
        self._cost = self._when - start

    def best(self, epoch: int) -> Path:
        """Where an epoch's weights lie, if it is the best."""
        return self.folder / f"best-{epoch}.pt"

    def save_best(self, epoch: int, weights: dict[str, torch.Tensor]) -> None:
        """Write an epoch's weights as the best so far; `save_last` makes them count."""
        self._write(self.best(epoch), {"epoch": epoch, "weights": weights})
        self.written.add(self.best(epoch))

    def load_last(self, fingerprint: str) -> dict[str, Any] | None:
        """Return the last state with the best weights under "best_weights"; None where there is none yet.

        Raises
        ------
        UsageError
            It is the state of another training: other data, model or recipe.
        ModelError
            A file is damaged, or of a newer version.
        """
        if not self.last.is_file():
            return None
        state = _read(self.last)
        if state.get("format") != FORMAT_VERSION:
            raise ModelError(
                f"checkpoint {self.last} has format {state.get('format')!r}, this version reads {FORMAT_VERSION}; go "
                "on with the version that wrote it, or start anew with --overwrite"
            )
        if state["fingerprint"] != fingerprint:
            raise UsageError(
                f"checkpoint {self.last} belongs to another training (data, split, model, head or recipe differ); "
                "resume with the same ones, or start anew with --overwrite"
            )
        best = state["best"]
        state["best_weights"] = None
        if best is not None:
            state["best_weights"] = _read(self.folder / best)["weights"]
            self.written.add(self.folder / best)
        return state

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        content = {"format": FORMAT_VERSION, **state}
        write_with(path, lambda file: torch.save(content, file), self._scratch)
        sync_folder(self.folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"checkpoint {path} is missing; start anew with --overwrite") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"checkpoint {path} is damaged ({reason}); start anew with --overwrite") from error
    if not isinstance(state, dict):
        raise ModelError(f"checkpoint {path} is not one of fluoroscope; start anew with --overwrite")
    return state
