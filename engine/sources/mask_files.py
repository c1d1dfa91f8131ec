"""Masks as image files beside a data set: ``masks/<image id>.<label>.png``, above 127 where the label is visible.

This is how phantoms are written; anybody's masks may lie so. A space in a label is "_" in the name of its file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.errors import DataError

FOLDER = "masks/"


@dataclass(frozen=True)
class MaskFiles:
    """A mask reader over files.

    Parameters
    ----------
    root : str
        Folder that the paths are relative to.
    paths : mapping from (sample id, label) to path
    """

    root: str
    paths: Mapping[tuple[str, str], str]

    def __call__(self, sample_id: str, label: str) -> np.ndarray | None:
        """Return the mask, bool (height, width), None where there is no file; DataError for one that is no image."""
        name = self.paths.get((sample_id, label))
        if name is None:
            return None
        try:
            with Image.open(os.path.join(self.root, name)) as image:
                return np.asarray(image.convert("L")) > 127
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the mask {name!r} below {self.root!r}: {error}; write it again") from error


def find_masks(root: str, files: Iterable[str], sample_ids: Iterable[str]) -> MaskFiles | None:
    """Return the masks of these samples among a folder's files, None where there are none."""
    known = set(sample_ids)
    paths = {}
    for name in files:
        if name.startswith(FOLDER) and name.lower().endswith(".png"):
            sample_id, dot, label = name[len(FOLDER) : -len(".png")].rpartition(".")
            if dot and sample_id in known:
                paths[(sample_id, label.replace("_", " "))] = name
    return MaskFiles(root, paths) if paths else None
