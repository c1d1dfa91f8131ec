"""Heatmaps of a study, held against boxes and masks.

Comes in: the data set with its annotations and, for each sample to score, the settings that may explain it (with folds:
those trained without its patient). Goes out: one row of scores a finding and setting, the nulls beside them, and
pictures of a few findings. Nothing is kept but scores and those pictures: a map is made again when it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from analysis import cam, localization, overlays
from analysis.bootstrap import clustered_bootstrap
from analysis.crossfit import group_folds
from analysis.sentences import difference_sentence
from engine import pixels as decoding
from engine.dataset import Dataset
from engine.keys import short_hash
from jobs import config as configs
from jobs import runs
from jobs.study_records import Row, number
from jobs.study_settings import Explained

CENTRE, LOCATION = "Centre prior", "Location prior"
NULLS = (CENTRE, LOCATION)
SCORES = (("pointing_game", "pointing_game"), ("energy", "energy"), ("iou", "best_iou"))
PRIOR_REGIONS = 200
PANEL_SIDE = 320


class HeatmapSection(configs.JobConfig):
    """Which heatmaps are made and scored."""

    enabled: bool = True
    method: str = Field("gradcam", description="a method of pytorch-grad-cam")
    layer: Literal["default"] | int = Field(
        "default", description="the layer that suits the tower, or a block's number"
    )
    per_label: int | None = Field(20, ge=1, description="findings scored a label, all if empty")
    panels: int = Field(6, ge=0, description="findings shown in the report")
    folds: int = Field(0, ge=0, description="0: the test split; k: all annotated samples, each by heads of other folds")
    tolerance: float | None = Field(None, gt=0, description="of the pointing game, in original pixels")
    seed: int = 0


@dataclass(frozen=True)
class Finding:
    """One annotated label of one sample, by row of the data set."""

    row: int
    label: str


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


def read_image(dataset: Dataset, row: int) -> Image.Image:
    """Return a sample's original image, decoded (mode L or RGB)."""
    return decoding.decode(dataset.reader.read(str(dataset.samples["uri"].iloc[row])))


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
    everything = np.arange(len(dataset))
    if section.folds:
        fold_of = group_folds(dataset.groups, section.folds, section.seed, dataset.labels)
        rounds = [(np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)) for fold in range(section.folds)]
    else:
        rounds = [(np.flatnonzero(split == "test"), np.flatnonzero(split == "train"))]
    scored_rows = np.concatenate([held_out for held_out, _ in rounds]) if section.folds else rounds[0][0]
    chosen = choose_findings(dataset, np.intersect1d(everything, scored_rows), section.per_label, section.seed)
    shown = set(choose_panels(chosen, section.panels, section.seed))
    tables = []
    scored_so_far = itertools.count(1)

    def count() -> None:
        advance(next(scored_so_far), len(chosen))

    for fold, (held_out, rest) in enumerate(rounds):
        findings = [finding for finding in chosen if finding.row in set(held_out.tolist())]
        if not findings:
            continue
        explained = refit(fold, held_out) if section.folds else settings
        priors = location_priors(dataset, rest, section.seed)
        tables.append(score_findings(dataset, findings, explained, priors, section, shown, pictures, count))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def score_findings(
    dataset: Dataset,
    findings: Sequence[Finding],
    settings: Sequence[Explained],
    priors: Mapping[str, np.ndarray],
    section: HeatmapSection,
    panels: Collection[Finding],
    pictures: PictureWriter,
    scored_one: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Return one row a finding and setting (or null): row, label, setting, baseline and the scores.

    Parameters
    ----------
    findings : sequence of Finding
    settings : sequence of Explained
        Whose maps are made; none may have been trained on these samples.
    priors : mapping of label to ndarray
        Location priors, from samples that are not scored here.
    panels : collection of Finding
        Those that are also drawn.
    scored_one : callable
        Called after each finding.
    """
    explainers = {
        setting.name: cam.Explainer(setting.encoder, layer_of(setting, section), section.method) for setting in settings
    }
    by_row: dict[int, list[Finding]] = {}
    for finding in findings:
        by_row.setdefault(finding.row, []).append(finding)
    scored: list[dict[str, Any]] = []
    for row, of_image in by_row.items():
        image = read_image(dataset, row)
        width, height = image.size
        pixels, geometry = settings[0].encoder.preprocess(image)
        maps = {
            setting.name: explainers[setting.name].heatmaps(pixels, [setting.target(each.label) for each in of_image])
            for setting in settings
        }
        for place, finding in enumerate(of_image):
            region = dataset.annotations.region(dataset.ids[row], finding.label, height, width)
            drawn: list[tuple[str, np.ndarray | None, localization.LocalizationScores | None, str]] = []
            heats: dict[str, tuple[np.ndarray, str]] = {
                name: (found[place].on_original(geometry), found[place].note) for name, found in maps.items()
            }
            view = next(iter(heats.values()))[0]
            nulls = {CENTRE: localization.centre_prior(height, width)}
            if finding.label in priors:
                nulls[LOCATION] = localization.place_prior(priors[finding.label], height, width)
            for name, null in nulls.items():
                heats[name] = (localization.in_view_of(null, view), "")
            for name, (heat, note) in heats.items():
                scores = localization.score_heatmap(heat, region, section.tolerance)
                scored.append(
                    {
                        "row": row,
                        "id": dataset.ids[row],
                        "group": dataset.groups[row],
                        "label": finding.label,
                        "setting": name,
                        "baseline": name in NULLS,
                        "note": note,
                        **scores.as_dict(),
                    }
                )
                if name not in NULLS:
                    drawn.append((name, heat, scores, note))
            if finding in panels:
                pictures.add(dataset, finding, np.asarray(image), region, drawn)
            scored_one()
    return pd.DataFrame(scored)


def layer_of(setting: Explained, section: HeatmapSection) -> cam.Layer:
    """Return the layer of a setting's maps: under the published protocol the study's own, even where it is empty."""
    return "paper" if setting.protocol == "paper" else section.layer


class PictureWriter:
    """Draws findings as they are scored, and remembers what the report needs to show them."""

    def __init__(self, run: runs.Run, protocol: str) -> None:
        self.run = run
        self.protocol = protocol
        self.cases: list[dict[str, Any]] = []

    def add(
        self,
        dataset: Dataset,
        finding: Finding,
        image: np.ndarray,
        region: np.ndarray,
        drawn: Sequence[tuple[str, np.ndarray | None, localization.LocalizationScores | None, str]],
    ) -> None:
        """Draw one finding: the image with its truth, then each setting's map."""
        sample = str(dataset.ids[finding.row])
        stem = f"heatmaps/{self.protocol}-{short_hash(sample + finding.label, 10)}"
        has_mask = dataset.annotations.mask_reader is not None
        boxes = [] if has_mask else [overlays.Box(*box) for box in dataset.annotations.boxes_of(sample, finding.label)]
        mask = region if has_mask else None
        original = overlays.overlay(image, boxes=boxes, mask=mask, side=PANEL_SIDE)
        overlays.save_picture(original, self.run.path(f"{stem}-original.png"))
        panels = []
        for number_, (name, heat, scores, note) in enumerate(drawn):
            file = f"{stem}-{number_}.png"
            picture = overlays.overlay(image, heat, boxes=boxes, mask=mask, side=PANEL_SIDE, note=note)
            overlays.save_picture(picture, self.run.path(file))
            panel: dict[str, Any] = {"setting": name, "file": file, "note": note}
            if scores is not None:
                panel |= {
                    "pointing": number(scores.pointing_game),
                    "energy": number(scores.energy),
                    "iou": number(scores.best_iou),
                    "empty": scores.empty,
                }
            panels.append(panel)
        self.cases.append(
            {
                "protocol": self.protocol,
                "id": sample,
                "label": finding.label,
                "image": f"{stem}-original.png",
                "truth": [list(map(float, box)) for box in dataset.annotations.boxes_of(sample, finding.label)],
                "size": list(image.shape[:2]),
                "panels": panels,
            }
        )


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


def localization_rows(scored: pd.DataFrame, protocol: str, replicates: int, seed: int) -> list[Row]:
    """Return means with intervals by patient, over all findings and a label, as result lines."""
    rows: list[Row] = []
    for label, part in [(None, scored), *scored.groupby("label", sort=False)]:
        for setting, of_setting in part.groupby("setting", sort=False):
            values = of_setting[[column for _, column in SCORES]].to_numpy(dtype=float)
            means = clustered_bootstrap(values, of_setting["group"].to_numpy(), replicates=replicates, seed=seed)
            for place, (metric, _) in enumerate(SCORES):
                rows.append(
                    {
                        "kind": "localization",
                        "protocol": protocol,
                        "setting": setting,
                        "baseline": setting in NULLS,
                        "label": label,
                        "metric": metric,
                        "value": number(means.value[place]),
                        "low": number(means.low[place]),
                        "high": number(means.high[place]),
                        "n": len(of_setting),
                    }
                )
    return rows


def heatmap_sentences(scored: pd.DataFrame, replicates: int, seed: int) -> list[str]:
    """Return what the scores say of each setting against each null, by paired differences over the same findings."""
    wide = scored.pivot_table(index=["row", "label", "group"], columns="setting", values="pointing_game", sort=False)
    sentences = []
    for setting in scored.loc[~scored["baseline"], "setting"].unique():
        for null in (name for name in NULLS if name in wide):
            both = wide[[setting, null]].dropna()
            if both.empty:
                continue
            difference = (both[setting] - both[null]).to_numpy()[:, None]
            groups = both.index.get_level_values("group").to_numpy()
            found = clustered_bootstrap(difference, groups, replicates=replicates, seed=seed)
            sentences.append(
                difference_sentence(
                    f"{setting}'s pointing game",
                    null.lower(),
                    float(found.value[0]),
                    float(found.low[0]),
                    float(found.high[0]),
                )
            )
    empty = scored[~scored["baseline"]].groupby("setting", sort=False)["empty"].agg(["sum", "count"])
    sentences += [
        f"{setting}: {int(row['sum'])} of {int(row['count'])} maps are empty and count as misses."
        for setting, row in empty.iterrows()
        if row["sum"]
    ]
    unseen = int((scored.groupby(["row", "label"])["region_visible"].first() < 0.5).sum())
    if unseen:
        sentences.append(
            f"{unseen} findings lie more than half outside what the model sees; only their visible part is scored."
        )
    return sentences
