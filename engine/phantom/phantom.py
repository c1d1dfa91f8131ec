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
# Pieces of a mask nearer than twice this share of the image's side share a box, as a reader would draw it.
NEIGHBOURS = 0.02
# What is smaller than this share of the image gets no box of its own.
SMALLEST_PIECE = 0.0004


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
        Integers in pixels, origin at the top left; one around each piece, or pieces close together, of the mask.
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
    """Return (x, y, width, height) around a mask's pieces, largest first; pieces close together share a box.

    A speck gets no box unless there is nothing else.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    reach = 2 * int(mask.shape[0] * NEIGHBOURS) + 1
    count, groups = cv2.connectedComponents(cv2.dilate(part, np.ones((reach, reach), np.uint8)), connectivity=8)
    groups[part == 0] = 0
    found = []
    for number in range(1, count):
        down, across = np.nonzero(groups == number)
        x, y = int(across.min()), int(down.min())
        found.append((len(down), left + x, top + y, int(across.max()) - x + 1, int(down.max()) - y + 1))
    found.sort(key=lambda piece: (-piece[0], piece[2], piece[1]))
    least = mask.size * SMALLEST_PIECE
    return [piece[1:] for rank, piece in enumerate(found) if rank == 0 or piece[0] >= least]


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
