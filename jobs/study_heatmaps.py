"""Heatmaps of a study, held against boxes and masks.

Comes in: the data set with its annotations and, for each sample to score, the settings that may explain it (with folds:
those trained without its patient). Goes out: one row of scores a finding and setting, the nulls beside them, and
pictures of a few findings. Nothing is kept but scores and those pictures: a map is made again when it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from analysis import cam, localization, overlays, panels
from analysis.crossfit import group_folds
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.keys import short_hash
from jobs import config as configs
from jobs import heatmap_choice, runs
from jobs.heatmap_scoring import Drawn, Explain, Finding, Options, score_findings
from jobs.opening import read_image
from jobs.study_records import number
from jobs.study_settings import Explained

PRIOR_REGIONS = 200
PANEL_SIDE = 320


class HeatmapSection(configs.JobConfig):
    """Which heatmaps are made and scored."""

    enabled: bool = True
    method: str | None = Field(None, description="a method of `fluoro cam`; the model's own, else gradcam, if empty")
    layer: Literal["default"] | int | None = Field(
        None, description="a block's number, or the layer that suits the tower; the model's own if empty"
    )
    choice: Path | None = Field(None, description="run folder of fluoro cam sweep, for method and layer")
    nulls: bool = Field(True, description="mean map, random label and random weights beside the priors")
    per_label: int | None = Field(20, ge=1, description="findings scored a label, all if empty")
    panels: int = Field(6, ge=0, description="findings shown in the report")
    folds: int = Field(0, ge=0, description="0: the test split; k: all annotated samples, each by heads of other folds")
    tolerance: float | None = Field(None, gt=0, description="of the pointing game, in original pixels")
    seed: int = 0


def choose_findings(dataset: Dataset, rows: np.ndarray, per_label: int | None, seed: int) -> list[Finding]:
    """Return the annotated findings among some rows, at most `per_label` of each label, drawn by a seed.

    Parameters
    ----------
    rows : ndarray of int
        Samples that may be scored.
    """
    position = {dataset.ids[row]: int(row) for row in rows}
    pairs = dataset.annotations.pairs.drop_duplicates()
    pairs = pairs[pairs["sample_id"].isin(list(position)) & pairs["label"].isin(dataset.label_names)]
    rng = np.random.Generator(np.random.PCG64(seed))
    found: list[Finding] = []
    for label in dataset.label_names:
        of_label = [Finding(position[sample], label) for sample in pairs.loc[pairs["label"] == label, "sample_id"]]
        if per_label is not None and len(of_label) > per_label:
            chosen = np.sort(rng.permutation(len(of_label))[:per_label])
            of_label = [of_label[index] for index in chosen]
        found += of_label
    return found


def location_priors(dataset: Dataset, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the mean region of each label over annotated samples among some rows, (64, 64) float32 each.

    At most `PRIOR_REGIONS` samples a label are read, drawn by the seed. Labels without any are left out.
    """
    regions: dict[str, list[np.ndarray]] = {}
    for finding in choose_findings(dataset, rows, PRIOR_REGIONS, seed):
        height, width = read_image(dataset, finding.row).size[::-1]
        region = dataset.annotations.region(dataset.ids[finding.row], finding.label, height, width)
        regions.setdefault(finding.label, []).append(region)
    return {label: localization.location_prior(found) for label, found in regions.items()}


def score(
    dataset: Dataset,
    settings: Sequence[Explained],
    section: HeatmapSection,
    pictures: PictureWriter,
    refit: Callable[[int, np.ndarray], Sequence[Explained]],
    advance: Callable[[int, int], None],
) -> pd.DataFrame:
    """Score the chosen findings of the test split, or of all samples fold by fold.

    Parameters
    ----------
    dataset : Dataset
        With its split.
    settings : sequence of Explained
        Trained on the train split; used where there are no folds.
    refit : callable
        ``refit(fold, held_out)`` returns the settings trained without some rows.
    advance : callable
        ``advance(done, total)`` in findings.

    Returns
    -------
    DataFrame
        One row a finding and setting or null (`score_findings`); empty where nothing is annotated.
    """
    split = dataset.samples["split"].to_numpy()
    if section.folds:
        fold_of = group_folds(dataset.groups, section.folds, section.seed, dataset.labels)
        rounds = [(np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)) for fold in range(section.folds)]
    else:
        rounds = [(np.flatnonzero(split == "test"), np.flatnonzero(split == "train"))]
    scored_rows = np.sort(np.concatenate([held_out for held_out, _ in rounds]))
    chosen = choose_findings(dataset, scored_rows, section.per_label, section.seed)
    shown = set(choose_panels(chosen, section.panels, section.seed))
    explain = explain_with(section, settings[0].encoder)
    tables = []
    scored_so_far = itertools.count(1)

    def count() -> None:
        advance(next(scored_so_far), len(chosen))

    for fold, (held_out, rest) in enumerate(rounds):
        of_round = set(held_out.tolist())
        findings = [finding for finding in chosen if finding.row in of_round]
        if not findings:
            continue
        explained = refit(fold, held_out) if section.folds else settings
        priors = location_priors(dataset, rest, section.seed)
        show = {finding: pictures.add for finding in findings if finding in shown}
        options = Options(section.tolerance, section.seed, section.nulls)
        tables.append(
            score_findings(dataset, findings, explained, explain, priors, options, show=show, scored_one=count)
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def explain_with(section: HeatmapSection, encoder: Encoder) -> Explain:
    """Return what makes the explainer of a setting.

    Parameters
    ----------
    encoder : Encoder
        The parent, whose method and layer its fine-tuned children share: only then can their maps be compared. Under
        the published protocol it is the study's own layer, even where its maps are empty.
    """
    choice = heatmap_choice.choose(encoder, section.method, section.layer, section.choice)

    def explain(setting: Explained) -> cam.Explainer:
        if setting.protocol == "paper":
            return cam.Explainer(setting.encoder, "paper", section.method or heatmap_choice.FALLBACK.method)
        return cam.Explainer(setting.encoder, choice.layer, choice.method)

    return explain


class PictureWriter:
    """Draws findings as they are scored, and remembers what the report needs to show them."""

    def __init__(self, run: runs.Run, protocol: str, dataset: Dataset) -> None:
        self.run = run
        self.protocol = protocol
        self.dataset = dataset
        self.cases: list[dict[str, Any]] = []

    def add(self, finding: Finding, picture: Image.Image, region: np.ndarray, drawn: Sequence[Drawn]) -> None:
        """Draw one finding: the image with its truth, each setting's map, and all of it on one sheet."""
        image = np.asarray(picture)
        sample = str(self.dataset.ids[finding.row])
        stem = f"heatmaps/{self.protocol}-{short_hash(sample + finding.label, 10)}"
        marked = self.dataset.annotations.boxes_of(sample, finding.label)
        has_mask = self.dataset.annotations.mask_reader is not None
        boxes = [] if has_mask else [overlays.Box(*box) for box in marked]
        mask = region if has_mask else None
        original = overlays.overlay(image, boxes=boxes, mask=mask, side=PANEL_SIDE)
        overlays.save_picture(original, self.run.path(f"{stem}-original.png"))
        shown = []
        for number_, each in enumerate(drawn):
            file = f"{stem}-{number_}.png"
            over = overlays.overlay(image, each.heat, boxes=boxes, mask=mask, side=PANEL_SIDE, note=each.note)
            overlays.save_picture(over, self.run.path(file))
            shown.append(
                {
                    "setting": each.setting,
                    "file": file,
                    "note": each.note,
                    "pointing": number(each.scores.pointing_game),
                    "energy": number(each.scores.energy),
                    "iou": number(each.scores.best_iou),
                    "empty": each.scores.empty,
                    "value": f"{each.unit} {each.value:.2f}",
                }
            )
        for place, (one, other) in enumerate(panels.pairs(drawn)):
            file = f"{stem}-difference-{place}.png"
            apart = panels.difference(other.heat, one.heat)
            over = panels.difference_overlay(image, apart, boxes=boxes, mask=mask, side=PANEL_SIDE)
            overlays.save_picture(over, self.run.path(file))
            told = f"orange: more heat in {other.setting}, blue: more in {one.setting}"
            shown.append({"setting": f"{other.setting} − {one.setting}", "file": file, "caption": told})
        compared = panels.comparison(
            image,
            [panels.Map(each.setting, each.heat, score_lines(each), each.note) for each in drawn],
            boxes=boxes,
            mask=mask,
            title=f"{finding.label.replace('_', ' ')} · {sample}",
            subtitle="what each setting looks at for this label, and below how the settings differ",
        )
        overlays.save_picture(compared, self.run.path(f"{stem}-panel.png"))
        self.cases.append(
            {
                "protocol": self.protocol,
                "id": sample,
                "label": finding.label,
                "image": f"{stem}-original.png",
                "panel": f"{stem}-panel.png",
                "truth": [list(map(float, box)) for box in marked],
                "size": list(image.shape[:2]),
                "panels": shown,
            }
        )


def score_lines(drawn: Drawn) -> tuple[str, ...]:
    """Return what is written under a map: whether its peak hits, its overlap, and the model's own score."""
    scores = drawn.scores
    if not scores.region_visible:
        return ("annotation outside the model's view", f"{drawn.unit} {drawn.value:.2f}")
    pointing = scores.pointing_game
    hit = {1.0: "peak hits", 0.0: "peak misses"}.get(pointing, f"{pointing:.0%} of a tied peak hits")
    if np.isnan(scores.energy):
        return (hit, f"{drawn.unit} {drawn.value:.2f}")
    overlap = f"{scores.energy:.0%} of the heat inside · best IoU {scores.best_iou:.2f}"
    return (f"{hit} · {drawn.unit} {drawn.value:.2f}", overlap)


def choose_panels(findings: Sequence[Finding], count: int, seed: int) -> list[Finding]:
    """Return findings to show: as many different labels as possible, drawn by a seed, not by how well they look."""
    rng = np.random.Generator(np.random.PCG64(seed))
    shuffled = [findings[index] for index in rng.permutation(len(findings))]
    turn: dict[str, int] = {}
    ranked: list[tuple[int, int, Finding]] = []
    for finding in shuffled:
        ranked.append((turn.setdefault(finding.label, 0), len(ranked), finding))
        turn[finding.label] += 1
    return [finding for _, _, finding in sorted(ranked, key=lambda entry: entry[:2])[:count]]
