"""The phantom as others see it: pixels with everything that is known about them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engine.errors import UsageError
from engine.phantom.case import draw_case
from engine.phantom.draw import draw
from engine.phantom.report import write_report

GENERATOR_VERSION = "1"
SMALLEST, LARGEST = 64, 2048
# A piece of a mask smaller than this share of the image gets no box of its own.
SMALLEST_PIECE = 0.001


@dataclass(frozen=True)
class Phantom:
    """One phantom.

    Parameters
    ----------
    pixels : ndarray of uint8, (size, size)
    labels : ndarray of int8, (14,)
        In the order of `engine.labels.STUDY_LABELS`.
    masks : dict of label to ndarray of bool, (size, size)
        What is visible of each finding; every positive label but No Finding has one.
    boxes : dict of label to list of (x, y, width, height)
        Integers in pixels, origin at the top left; one for each separate piece of the mask.
    report : dict
        ``indication``, ``findings``, ``impression``.
    mesh : tuple of str
        Terms as in Open-i's ``MeSH/major``.
    patient, view, projection : str
    index : int
    """

    pixels: np.ndarray
    labels: np.ndarray
    masks: dict[str, np.ndarray]
    boxes: dict[str, list[tuple[int, int, int, int]]]
    report: dict[str, str]
    mesh: tuple[str, ...]
    patient: str
    view: str
    projection: str
    index: int


def boxes_of(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (x, y, width, height) of the separate pieces of a mask, largest first; never none for a mask with pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    part = np.ascontiguousarray(mask[top : rows[-1] + 1, left : columns[-1] + 1]).view(np.uint8)
    count, _, statistics, _ = cv2.connectedComponentsWithStats(part, connectivity=8)
    found = [(left + x, top + y, wide, high, area) for x, y, wide, high, area in statistics[1:count].tolist()]
    pieces = sorted(found, key=lambda piece: (-piece[4], piece[1], piece[0]))
    least = mask.size * SMALLEST_PIECE
    return [piece[:4] for rank, piece in enumerate(pieces) if rank == 0 or piece[4] >= least]


def draw_phantom(seed: int, index: int, size: int = 256, enrich: float = 0.0) -> Phantom:
    """Draw phantom `index` of `seed`.

    Parameters
    ----------
    seed, index : int
        Both 0 or more; nothing else decides what the phantom is.
    size : int
        Side of the image in pixels, 64 to 2048.
    enrich : float
        Least share of each label, 0 for the study's own prevalences, at most 0.2.

    Raises
    ------
    UsageError
        If an argument is out of range.
    """
    if not SMALLEST <= size <= LARGEST:
        raise UsageError(f"phantom size={size}: between {SMALLEST} and {LARGEST} pixels")
    case = draw_case(seed, index, enrich)
    pixels, masks = draw(case, size)
    report, mesh = write_report(case)
    boxes = {label: boxes_of(mask) for label, mask in masks.items()}
    return Phantom(pixels, case.labels, masks, boxes, report, mesh, case.patient, case.view, case.projection, index)
