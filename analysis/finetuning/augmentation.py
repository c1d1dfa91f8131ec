"""Augmentation in batches, on the device where the images are: moved, cropped, turned, with other contrast.

In come uint8 pixels (b, h, w, 3), what the model sees, and a generator; out go such pixels again. The numbers are drawn
on the CPU (`Augmentation.draw`) and applied on the device (`Augmentation.apply`), all geometry in one resampling, so
that a batch is the same on every device and however it is split. Images are never mirrored unless that is asked for:
hearts have a side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional

from engine.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """How far images may be changed.

    Parameters
    ----------
    shift : int
        Largest move along each axis, in pixels; the edge is repeated.
    crop : float
        Largest share of the sides that is cut away; what is left, anywhere in the image, is enlarged to full size.
    rotation : float
        Largest angle, in degrees, either way.
    contrast : float
        Contrast varies by a factor of 1 - contrast to 1 + contrast around the image's mean, brightness by up to that
        share of a quarter of the range.
    flip : bool
        Mirror half of the images, left for right.
    """

    shift: int = 0
    crop: float = 0.0
    rotation: float = 0.0
    contrast: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shift < 0 or not 0 <= self.crop < 1 or not 0 <= self.rotation <= 180 or not 0 <= self.contrast < 1:
            raise UsageError(
                "augmentation: shift must be at least 0, crop and contrast must lie in [0, 1), rotation in [0, 180]; "
                f"not {self.described}"
            )

    @property
    def any(self) -> bool:
        """Whether anything changes at all."""
        return self.moves or self.contrast > 0

    @property
    def moves(self) -> bool:
        """Whether pixels change their place."""
        return self.shift > 0 or self.crop > 0 or self.rotation > 0 or self.flip

    @property
    def described(self) -> str:
        """What is changed, such as ``shift 4, contrast 0.1``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return the random numbers of some images.

        Returns
        -------
        ndarray of float64, (count, 9)
            Columns: move right and down in pixels, share of the sides kept, the crop's place within what is left over
            (-1 to 1, both axes), angle in radians, factor of contrast, brightness in grey levels, -1 where mirrored.
        """
        drawn = np.empty((count, 9))
        drawn[:, :2] = rng.integers(-self.shift, self.shift + 1, size=(count, 2))
        drawn[:, 2] = rng.uniform(1 - self.crop, 1, count)
        drawn[:, 3:5] = rng.uniform(-1, 1, (count, 2))
        drawn[:, 5] = np.radians(rng.uniform(-self.rotation, self.rotation, count))
        drawn[:, 6] = rng.uniform(1 - self.contrast, 1 + self.contrast, count)
        drawn[:, 7] = rng.uniform(-self.contrast, self.contrast, count) * 64
        drawn[:, 8] = np.where(self.flip & (rng.random(count) < 0.5), -1.0, 1.0)
        return drawn

    def apply(self, pixels: torch.Tensor, drawn: np.ndarray) -> torch.Tensor:
        """Return changed images.

        Parameters
        ----------
        pixels : Tensor of uint8, (b, h, w, 3)
            On any device.
        drawn : ndarray of float64, (b, 9)
            Of `draw`.

        Returns
        -------
        Tensor of uint8, (b, h, w, 3)
        """
        if not self.any:
            return pixels
        values = pixels.permute(0, 3, 1, 2).float()
        if self.moves:
            height, width = pixels.shape[1:3]
            matrices = torch.from_numpy(_matrices(drawn, height, width)).float().to(pixels.device)
            grid = functional.affine_grid(matrices, list(values.shape), align_corners=False)
            values = functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
        if self.contrast:
            factor, offset = torch.from_numpy(drawn[:, 6:8].T.copy()).float().to(pixels.device).view(2, -1, 1, 1, 1)
            mean = values.mean(dim=(1, 2, 3), keepdim=True)
            values = (values - mean) * factor + mean + offset
        return values.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _matrices(drawn: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return where each output place is read from, (b, 2, 3): torch's affine matrices in coordinates of -1 to 1."""
    move_right, move_down, kept, right, down, angle = drawn[:, :6].T
    mirror = drawn[:, 8]
    cosine, sine = kept * np.cos(angle), kept * np.sin(angle)
    ratio = height / width  # the turn is one in pixels, and the axes' units differ where the image is not square
    found = np.zeros((len(drawn), 2, 3))
    found[:, 0, 0], found[:, 0, 1] = cosine * mirror, -sine * ratio
    found[:, 1, 0], found[:, 1, 1] = sine / ratio * mirror, cosine
    found[:, 0, 2] = right * (1 - kept) + 2 * move_right / width
    found[:, 1, 2] = down * (1 - kept) + 2 * move_down / height
    return found
