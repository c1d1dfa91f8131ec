"""One label in one sample: its maps scored where it is annotated, beside where such findings usually are, and drawn.

Comes in: a sample's image, a label or a free text, and each setting's map. Goes out: result rows, and pictures. Null
maps (the centre, the label's usual place in annotated samples of other groups) stand beside the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis import localization, overlays
from engine.dataset import Dataset
from engine.errors import ImageError
from jobs.figure_names import figure_stem, safe
from jobs.heatmap_scoring import CENTRE, LOCATION
from jobs.opening import read_image
from jobs.runs import Run

PRIOR_SAMPLES = 100


@dataclass(frozen=True)
class Drawn:
    """A map on the original image's pixels, and what is said of it.

    Parameters
    ----------
    setting : str
    heat : ndarray of float32, (H, W)
        NaN outside the model's crop.
    note : str
        Why it is empty or flat.
    score : float or None
        The target's value.
    layer : str
    method : str
    source : str
        Where what the model saw was found: the image, cached pixels or cached tokens.
    baseline : bool
        Whether it is a null.
    """

    setting: str
    heat: np.ndarray
    note: str
    score: float | None
    layer: str
    method: str = ""
    source: str = ""
    baseline: bool = False


@dataclass(frozen=True)
class Finding:
    """One label, or one free text, in one sample.

    Parameters
    ----------
    dataset : Dataset
    position : int
    label : str
    image : PIL.Image.Image
    """

    dataset: Dataset
    position: int
    label: str
    image: Image.Image

    @property
    def sample(self) -> str:
        """Id of the sample."""
        return str(self.dataset.ids[self.position])

    @property
    def annotated(self) -> bool:
        """Whether the label has boxes or a mask in this sample."""
        return self.dataset.annotations.has(self.sample, self.label)

    @property
    def truth(self) -> int | None:
        """The label's value; None for a free text."""
        if self.label not in self.dataset.label_names:
            return None
        return int(self.dataset.labels[self.position, self.dataset.label_position(self.label)])

    def region(self) -> np.ndarray:
        """Return where it is annotated, (H, W) bool."""
        return self.dataset.annotations.region(self.sample, self.label, self.image.height, self.image.width)

    def scored(self, drawn: Sequence[Drawn], usual: UsualPlaces, tolerance: float | None) -> list[dict[str, Any]]:
        """Return one row a map, with scores and null maps beside them where the label is annotated."""
        rows: list[dict[str, Any]] = []
        region = self.region() if self.annotated else None
        point = self.dataset.annotations.only_points(self.sample, self.label)
        maps = [*drawn, *(self._nulls(drawn[0].heat, usual) if region is not None else [])]
        for each in maps:
            row = {
                "id": self.sample,
                "label": self.label,
                "truth": self.truth,
                "setting": each.setting,
                "baseline": each.baseline,
                "score": each.score,
                "method": each.method,
                "layer": each.layer,
                "source": each.source,
                "empty": not bool(np.nanmax(each.heat) > 0),
                "note": each.note,
            }
            if region is not None:
                row |= localization.score_heatmap(each.heat, region, tolerance, point=point).as_dict()
            rows.append(row)
        return rows

    def outline(self) -> tuple[np.ndarray | None, list[overlays.Box]]:
        """Return the truth to draw: a mask where the data set has masks, else boxes."""
        if self.annotated and self.dataset.annotations.mask_reader is not None:
            return self.region(), []
        boxes = self.dataset.annotations.boxes_of(self.sample, self.label)
        return None, [overlays.Box(*map(float, box), self.label.replace("_", " ")) for box in boxes]  # type: ignore[arg-type, call-arg]

    def draw(self, drawn: Sequence[Drawn], scored: Sequence[dict[str, Any]], side: int, record: Run) -> Path:
        """Write one picture a map and the sheet of all; return the sheet's path."""
        stem = figure_stem(self.sample, self.label)
        image = np.asarray(self.image)
        truth, boxes = self.outline()
        panels = [overlays.Panel("Image", None, ("annotated",) if self.annotated else ("not annotated",))]
        for each, row in zip(drawn, scored, strict=False):
            panels.append(overlays.Panel(each.setting, each.heat, caption(row), each.note))
            picture = overlays.overlay(image, each.heat, boxes=boxes, mask=truth, side=max(side, 512), note=each.note)
            overlays.save_picture(picture, record.path(f"maps/{stem}-{safe(each.setting)}.png"))
        sheet = overlays.sheet(
            image,
            panels,
            boxes=boxes,
            mask=truth,
            title=f"{self.label.replace('_', ' ')} · {self.sample}",
            subtitle=self._subtitle(drawn, scored),
            side=side,
        )
        path = record.path(f"{stem}.png")
        overlays.save_picture(sheet, path)
        return path

    def _nulls(self, heat: np.ndarray, usual: UsualPlaces) -> list[Drawn]:
        height, width = heat.shape
        found = [(CENTRE, localization.centre_prior(height, width))]
        prior = usual.prior(self.label, self.dataset.groups[self.position])
        if prior is not None:
            found.append((LOCATION, localization.place_prior(prior, height, width)))
        return [Drawn(name, localization.in_view_of(null, heat), "", None, "", baseline=True) for name, null in found]

    def _subtitle(self, drawn: Sequence[Drawn], scored: Sequence[dict[str, Any]]) -> str:
        said = [] if self.truth is None else [f"label {'positive' if self.truth else 'negative'}"]
        said += dict.fromkeys(f"{each.method} at {each.layer}" for each in drawn)
        for row in scored[len(drawn) :]:
            said.append(f"{row['setting'].lower()}: {', '.join(caption(row))}")
        return " · ".join(said)


def _region_of(dataset: Dataset, position: int, label: str) -> np.ndarray | None:
    """Return the region of a label in a sample that is only asked where the label lies; None if it cannot be read."""
    sample = dataset.ids[position]
    reader = dataset.annotations.mask_reader
    mask = reader(sample, label) if reader is not None else None
    if mask is not None:
        return mask
    try:
        image = read_image(dataset, position)
    except ImageError:
        return None
    return dataset.annotations.region(sample, label, image.height, image.width)


class UsualPlaces:
    """Where labels lie in annotated samples, read once a label, to be asked without the group that is explained."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def prior(self, label: str, group: str) -> np.ndarray | None:
        """Return the label's location prior by the samples of other groups; None where there are none."""
        if label not in self._known:
            self._known[label] = self._read(label)
        regions, groups = self._known[label]
        others = regions[groups != group]
        return others.mean(axis=0) if len(others) else None

    def _read(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the priors of single samples, (k, grid, grid), and their groups, (k,)."""
        position_of = {sample: place for place, sample in enumerate(self.dataset.ids)}
        there = [position_of[each] for each in self.dataset.annotations.sample_ids(label) if each in position_of]
        if len(there) > PRIOR_SAMPLES:
            rng = np.random.Generator(np.random.PCG64(self.seed))
            there = [there[place] for place in np.sort(rng.permutation(len(there))[:PRIOR_SAMPLES])]
        found = [(place, region) for place in there if (region := _region_of(self.dataset, place, label)) is not None]
        regions = np.array([localization.location_prior([region]) for _, region in found])
        return regions, self.dataset.groups[np.array([place for place, _ in found], dtype=np.int64)]


def caption(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what stands under a map: the target's value, and how it was scored where it could be."""
    lines = [] if row["score"] is None else [f"score {row['score']:.3f}"]
    if "pointing_game" in row:
        lines.append(localised(row))
    return tuple(lines)


def localised(row: dict[str, Any], *, short: bool = False) -> str:
    """Return how a map of an annotated label was scored, in a line."""
    if row["region_visible"] == 0:
        return "annotation outside the model's view"
    pointing = row["pointing_game"]
    hit = "hit" if pointing == 1 else "miss" if pointing == 0 else f"{pointing:.2f}"
    if short:
        return f"{hit} · energy {row['energy']:.2f}"
    return f"pointing {hit} · energy {row['energy']:.2f} · IoU {row['best_iou']:.2f}"
