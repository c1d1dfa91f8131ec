"""Which method and layer a model's heatmaps use: those asked for, else those a sweep chose for it, else Grad-CAM.

A sweep (`fluoro cam sweep`) compares layers and methods on the validation split of an annotated data set and leaves
``choice.json`` in its run folder. Laid into a model's folder as ``heatmaps.json`` it becomes that model's default. It
names the encoder that it was made for, because another one's best layer says nothing of this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from analysis import cam
from engine.encoder import Encoder
from engine.errors import DataError, UsageError

CHOICE_FILE = "choice.json"
MODEL_FILE = "heatmaps.json"


class Choice(NamedTuple):
    """A method, a layer, and where they come from in words."""

    method: str
    layer: cam.Layer
    reason: str


FALLBACK = Choice("gradcam", "default", "Grad-CAM at the deepest layer that the gradient reaches")


def choose(
    encoder: Encoder, method: str | None = None, layer: cam.Layer | None = None, choice: Path | None = None
) -> Choice:
    """Return the method and layer of an encoder's heatmaps.

    Parameters
    ----------
    method, layer : optional
        Asked for; whatever is given wins over what was chosen.
    choice : Path, optional
        A sweep's run folder or its ``choice.json``; without it, ``heatmaps.json`` in the model's folder.

    Raises
    ------
    UsageError
        No such choice.
    DataError
        A file that is none, or one that was made for another encoder.
    """
    found = FALLBACK
    if choice is not None:
        file = choice / CHOICE_FILE if choice.is_dir() else choice
        if not file.is_file():
            raise UsageError(f"no choice of a sweep at {str(choice)!r}; run fluoro cam sweep and name its folder")
        found = _read(file, encoder)
    elif encoder.files.folder is not None and (encoder.files.folder / MODEL_FILE).is_file():
        found = _read(encoder.files.folder / MODEL_FILE, encoder)
    if method is None and layer is None:
        return found
    # A layer that was chosen for one method is not another one's.
    kept = found.layer if method in (None, found.method) else FALLBACK.layer
    return Choice(method or found.method, kept if layer is None else layer, "as asked for")


def _read(file: Path, encoder: Encoder) -> Choice:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        choice = Choice(str(told["method"]), told["layer"], str(told["reason"]))
        made_for = str(told["encoder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(file)!r} is no choice of a sweep ({type(error).__name__}: {error})") from error
    if made_for != encoder.name:
        raise DataError(
            f"{str(file)!r} was chosen for {made_for!r}, not for {encoder.name!r}; sweep this model, or name a method"
        )
    return choice
