"""Heatmaps of annotated findings made, held against their regions, and the maps that know less beside them.

Comes in: a data set, findings, and the settings that may explain them (none trained on these samples). Goes out: one
row of scores a finding and setting or null. Maps are kept on the model's coarse grid while all are made, because the
mean map of other patients needs them; nothing else is stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.special import expit

from analysis import cam, heatmap_nulls, localization
from analysis.randomised import random_weights
from engine.dataset import Dataset
from engine.pixels import Geometry
from jobs.opening import read_image
from jobs.study_settings import Explained

CENTRE, LOCATION = "Centre prior", "Location prior"
MEAN_MAP, RANDOM_LABEL = "Mean map of others ({})", "Random label ({})"
RANDOM_WEIGHTS, ANNOTATOR = "Random weights", "Other annotator"


@dataclass(frozen=True)
class Finding:
    """One annotated label of one sample, by row of the data set."""

    row: int
    label: str


@dataclass(frozen=True)
class Drawn:
    """One setting's map of a finding, ready to be shown.

    Parameters
    ----------
    setting : str
    heat : ndarray of float32, (H, W)
        On the original image's pixels.
    scores : LocalizationScores
    note : str
    value : float
        The target's.
    unit : str
        What the value is: a probability (of a head), a cosine, or a dot product.
    """

    setting: str
    heat: np.ndarray
    scores: localization.LocalizationScores
    note: str
    value: float
    unit: str


Explain = Callable[[Explained], cam.Explainer]
Show = Callable[[Finding, Image.Image, np.ndarray, Sequence[Drawn]], None]


@dataclass(frozen=True)
class Options:
    """How maps are made and scored.

    Parameters
    ----------
    tolerance : float or None
        Of the pointing game, in original pixels.
    seed : int
        Of the nulls that are drawn.
    nulls : bool
        Whether the nulls that need maps of their own (mean map, random label, random weights) are made.
    """

    tolerance: float | None = None
    seed: int = 0
    nulls: bool = True


def score_findings(
    dataset: Dataset,
    findings: Sequence[Finding],
    settings: Sequence[Explained],
    explain: Explain,
    priors: Mapping[str, np.ndarray],
    options: Options,
    *,
    show: Mapping[Finding, Show] | None = None,
    scored_one: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Score the maps of all settings, and the nulls, for some findings.

    Parameters
    ----------
    findings : sequence of Finding
    settings : sequence of Explained
        All with the same preprocessing.
    explain : callable
        Gives a setting's `cam.Explainer`.
    priors : mapping from label to ndarray
        Location priors, from samples that are not scored here.
    show : mapping, optional
        What to call with the image and the maps of some findings.
    scored_one : callable
        Called after each finding.

    Returns
    -------
    DataFrame
        row, id, group, label, setting, baseline, note, value and the scores of `LocalizationScores`.
    """
    made = _Maps.of(dataset, findings, settings, explain, options)
    annotators = _Annotators(dataset)
    rows: list[dict[str, Any]] = []
    for place, finding in enumerate(findings):
        sample = dataset.ids[finding.row]
        geometry = made.geometry[finding.row]
        height, width = geometry.original
        region = dataset.annotations.region(sample, finding.label, height, width)
        point = dataset.annotations.only_points(sample, finding.label)
        told = {"row": finding.row, "id": sample, "group": dataset.groups[finding.row], "label": finding.label}
        drawn = []
        for setting in settings:
            found = made.heatmaps[setting.name][place]
            heat = found.on_original(geometry)
            scores = localization.score_heatmap(heat, region, options.tolerance, point=point)
            value, unit = _said(setting, found.score)
            drawn.append(Drawn(setting.name, heat, scores, found.note, value, unit))
            rows.append({**told, "setting": setting.name, "baseline": False, "note": found.note, "value": found.score})
            rows[-1] |= scores.as_dict()
        nulls = {CENTRE: localization.centre_prior(height, width)}
        if finding.label in priors:
            nulls[LOCATION] = localization.place_prior(priors[finding.label], height, width)
        nulls |= {name: geometry.to_original(grid) for name, grid in made.nulls(place).items()}
        for name, heat in nulls.items():
            in_view = localization.in_view_of(heat, drawn[0].heat)
            scores = localization.score_heatmap(in_view, region, options.tolerance, point=point)
            rows.append({**told, "setting": name, "baseline": True, "note": "", **scores.as_dict()})
        agreed = annotators.agreement(sample, finding.label, height, width, options.tolerance)
        if agreed is not None:
            rows.append({**told, "setting": ANNOTATOR, "baseline": True, "note": "", **agreed})
        if show and finding in show:
            show[finding](finding, read_image(dataset, finding.row), region, drawn)
        scored_one()
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Maps:
    """Maps of all findings on the model's grid.

    Parameters
    ----------
    geometry : mapping from row to Geometry
    heatmaps : mapping from setting to one HeatMap a finding
    others : mapping from a null's name to one grid a finding (None where there is none)
    """

    geometry: Mapping[int, Geometry]
    heatmaps: Mapping[str, Sequence[cam.HeatMap]]
    others: Mapping[str, Sequence[np.ndarray | None]]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        findings: Sequence[Finding],
        settings: Sequence[Explained],
        explain: Explain,
        options: Options,
    ) -> _Maps:
        """Make them, image by image."""
        places: dict[int, list[int]] = {}
        for place, finding in enumerate(findings):
            places.setdefault(finding.row, []).append(place)
        distractors = _distractors(dataset, findings, settings, options) if options.nulls else [None] * len(findings)
        explainers = {setting.name: explain(setting) for setting in settings}
        shuffled = None
        if options.nulls:
            altered = random_weights(settings[0].encoder, options.seed)
            shuffled = explain(dataclasses.replace(settings[0], encoder=altered))
        geometry: dict[int, Geometry] = {}
        heatmaps: dict[str, list[Any]] = {setting.name: [None] * len(findings) for setting in settings}
        others: dict[str, list[np.ndarray | None]] = {}
        for row, of_image in places.items():
            pixels, geometry[row] = settings[0].encoder.preprocess(read_image(dataset, row))
            vain = [distractors[place] for place in of_image]
            for setting in settings:
                labels = [findings[place].label for place in of_image] + [label for label in vain if label]
                # A label that training had no positive of has no weights: its map is empty, and named so.
                (found,) = explainers[setting.name].batch_heatmaps(
                    pixels[None],
                    [setting.target(label) for label in labels],
                    state_unreached=setting.head is not None,
                )
                beyond = iter(found[len(of_image) :])
                for place, one, label in zip(of_image, found, vain, strict=False):
                    heatmaps[setting.name][place] = one
                    grids = others.setdefault(RANDOM_LABEL.format(setting.name), [None] * len(findings))
                    grids[place] = _shares(next(beyond).raw) if label else None
            if shuffled is not None:
                targets = [settings[0].target(findings[place].label) for place in of_image]
                grids = others.setdefault(RANDOM_WEIGHTS, [None] * len(findings))
                for place, one in zip(of_image, shuffled.heatmaps(pixels, targets), strict=True):
                    grids[place] = _shares(one.raw)
        if options.nulls:
            for setting in settings:
                others[MEAN_MAP.format(setting.name)] = _mean_maps(dataset, findings, heatmaps[setting.name])
        return cls(geometry, heatmaps, others)

    def nulls(self, place: int) -> dict[str, np.ndarray]:
        """Return the grids of one finding's nulls."""
        return {name: grid for name, grids in self.others.items() if (grid := grids[place]) is not None}


def _said(setting: Explained, score: float) -> tuple[float, str]:
    """Return a target's value as a reader understands it, and what it is."""
    if setting.head is not None:
        return float(expit(score)), "probability"
    return score, "cosine" if setting.protocol == "sound" else "dot product"


def _shares(raw: np.ndarray) -> np.ndarray:
    positive = np.maximum(raw, 0)
    return positive / max(float(positive.max()), np.finfo(np.float32).tiny)


def _mean_maps(dataset: Dataset, findings: Sequence[Finding], made: Sequence[cam.HeatMap]) -> list[np.ndarray | None]:
    """Return, for each finding, the mean map of its label in other patients."""
    found: list[np.ndarray | None] = [None] * len(findings)
    for label in dict.fromkeys(finding.label for finding in findings):
        of_label = [place for place, finding in enumerate(findings) if finding.label == label]
        groups = [dataset.groups[findings[place].row] for place in of_label]
        means = heatmap_nulls.mean_maps_of_others([made[place].raw for place in of_label], groups)
        for place, mean in zip(of_label, means, strict=True):
            found[place] = mean
    return found


def _distractors(
    dataset: Dataset, findings: Sequence[Finding], settings: Sequence[Explained], options: Options
) -> list[str | None]:
    """Return for each finding a label that its image has neither marked nor as positive, and that all can explain."""
    rng = np.random.Generator(np.random.PCG64(options.seed))
    pairs = dataset.annotations.pairs
    marked = pairs.groupby("sample_id", sort=False)["label"].agg(set).to_dict()
    names = [name for name in dataset.label_names if all(each.can_explain(name) for each in settings)]
    drawn = []
    for finding in findings:
        positive = np.flatnonzero(dataset.labels[finding.row])
        present = {dataset.label_names[column] for column in positive} | marked.get(dataset.ids[finding.row], set())
        drawn.append(heatmap_nulls.other_label(finding.label, names, sorted(present), rng))
    return drawn


class _Annotators:
    """How far annotators agree, where a finding has several."""

    def __init__(self, dataset: Dataset) -> None:
        self.annotations = dataset.annotations
        self._of_one: dict[str, Any] = {}

    def agreement(
        self, sample: str, label: str, height: int, width: int, tolerance: float | None
    ) -> dict[str, float] | None:
        """Return the mean scores of each annotator's region against each other's, None where there is but one."""
        names = self.annotations.annotators(sample, label)
        if len(names) < 2 or self.annotations.only_points(sample, label):
            return None
        for name in names:
            if name not in self._of_one:
                self._of_one[name] = self.annotations.by_annotator(name)
        regions = {name: self._of_one[name].region(sample, label, height, width) for name in names}
        scores = [each.as_dict() for _, _, each in heatmap_nulls.other_annotators(regions, tolerance)]
        return {key: float(np.mean([each[key] for each in scores])) for key in scores[0]}
