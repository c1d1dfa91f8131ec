"""Augmentation against OpenCV's warps, and what it must not do."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from analysis.finetuning.augmentation import Augmentation
from engine.errors import UsageError


def smooth(height: int = 60, width: int = 44, count: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(0)
    images = [
        cv2.resize(rng.integers(0, 255, (6, 5, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(images))


def drawn(count: int, **values: float) -> np.ndarray:
    columns = {"right": 0, "down": 1, "kept": 2, "place_x": 3, "place_y": 4, "angle": 5, "factor": 6, "mirror": 8}
    numbers = np.zeros((count, 9))
    numbers[:, [2, 6, 8]] = 1
    for name, value in values.items():
        numbers[:, columns[name]] = value
    return numbers


def by_open_cv(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Resample where `matrix` says each output pixel is read from."""
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )


def inner_difference(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy().astype(int) - expected.astype(int))[:, 3:-3, 3:-3].max())


def test_turns_about_the_middle_as_opencv_does_also_where_images_are_not_square() -> None:
    images = smooth()
    angle = 9.0
    found = Augmentation(rotation=10).apply(images, drawn(3, angle=np.radians(angle)))
    matrix = cv2.getRotationMatrix2D((21.5, 29.5), -angle, 1.0)
    expected = np.stack([by_open_cv(image, matrix) for image in images.numpy()])
    assert inner_difference(found, expected) <= 2


def test_a_crop_is_enlarged_to_the_whole() -> None:
    images = smooth()
    found = Augmentation(crop=0.5).apply(images, drawn(3, kept=0.5, place_x=-1, place_y=1))
    corner = images.numpy()[:, 30:, :22]
    expected = np.stack([cv2.resize(image, (44, 60), interpolation=cv2.INTER_LINEAR) for image in corner])
    assert inner_difference(found, expected) <= 2


def test_mirrors_only_where_that_is_asked_for() -> None:
    images = smooth()
    mirrored = Augmentation(flip=True).apply(images, drawn(3, mirror=-1))
    np.testing.assert_array_equal(mirrored.numpy(), images.numpy()[:, :, ::-1])
    rng = np.random.Generator(np.random.PCG64(0))
    signs = Augmentation(flip=True).draw(200, rng)[:, 8]
    assert 60 < (signs == -1).sum() < 140
    assert (Augmentation(shift=4, crop=0.2, rotation=5, contrast=0.1).draw(200, rng)[:, 8] == 1).all()


def test_what_is_drawn_lies_within_what_was_said() -> None:
    numbers = Augmentation(2, 0.3, 10, 0.2).draw(2000, np.random.Generator(np.random.PCG64(1)))
    assert np.abs(numbers[:, :2]).max() == 2 and np.array_equal(numbers[:, :2], np.round(numbers[:, :2]))
    assert 0.7 <= numbers[:, 2].min() < 0.71 and 0.99 < numbers[:, 2].max() <= 1
    assert 0.95 < np.abs(numbers[:, 3:5]).max() <= 1
    assert 9.5 < np.degrees(np.abs(numbers[:, 5]).max()) <= 10
    assert 0.8 <= numbers[:, 6].min() < 0.81 and 1.19 < numbers[:, 6].max() <= 1.2


def test_no_augmentation_is_the_image_itself() -> None:
    images = smooth()
    assert Augmentation().apply(images, drawn(3)) is images and not Augmentation().any
    turned = Augmentation(rotation=5).apply(images, drawn(3))
    np.testing.assert_array_equal(turned.numpy(), images.numpy())


@pytest.mark.parametrize("wrong", [{"shift": -1}, {"crop": 1.0}, {"rotation": 200}, {"contrast": 1.0}])
def test_wrong_values_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} "):
        Augmentation(**wrong)
