"""`fluoro cam`: draw where a model looks for a label, for every setting at hand, on the original image.

Comes in: a data set, a model, samples and labels, and optionally heads (`fluoro probe`) and fine-tuning runs (`fluoro
finetune`). Goes out: a run folder with one sheet a sample and label (image and truth, then each setting's map), one
picture a map, ``scores.json`` and result lines. Where the label is annotated in the sample, the maps are scored beside
the centre and the label's usual place, which is taken from annotated samples of other groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from analysis import cam, localization, overlays, paper, prompts
from analysis.heads import LinearHead
from engine import pixels as decoding
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder, load_encoder
from engine.errors import DataError, ImageError, UsageError
from jobs import finetune as finetuning
from jobs import opening, study_settings
from jobs.config import CacheOptions, DatasetOptions, ModelOptions
from jobs.figure_names import figure_stem, safe
from jobs.plain import plain
from jobs.progress import Progress
from jobs.runs import Run, open_run
from jobs.study_settings import Explained

CENTRE, LOCATION = "Centre prior", "Location prior"
PRIOR_SAMPLES = 100


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro cam` needs."""

    ids: list[str] = Field(default_factory=list, description="samples to look at")
    labels: list[str] = Field(
        default_factory=list, description="labels to explain; empty: those annotated in the sample, else its positives"
    )
    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts of the sound protocol"
    )
    heads: list[Path] = Field(default_factory=list, description="heads saved by fluoro probe, for this model")
    tuned: list[Path] = Field(default_factory=list, description="run folders of fluoro finetune")
    protocol: Literal["sound", "paper"] = Field("sound", description="sound practice, or exactly what the paper did")
    layer: int | str | None = Field(
        None, union_mode="left_to_right", description="block, default, paper or a module; of the protocol if empty"
    )
    method: str = Field("gradcam", description=f"one of {', '.join(cam.METHODS)}")
    tolerance: float | None = Field(None, gt=0, description="of the pointing game, in original pixels")
    side: int = Field(360, ge=64, le=4096, description="longer side of each picture, in pixels")
    seed: int = Field(0, description="draws the samples of the location prior where there are many")


@dataclass(frozen=True)
class Result:
    """What was drawn.

    Parameters
    ----------
    folder : Path
    sheets : list of Path
    maps : DataFrame
        One row a sample, label and setting: scores (where annotated), the target's value, layer, note.
    failures : DataFrame
        Samples that could not be read: id, uri, what, reason.
    """

    folder: Path
    sheets: list[Path]
    maps: pd.DataFrame
    failures: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the scores of every map."""
        shown = ["id", "label", "setting", "score", "pointing_game", "energy", "best_iou", "note"]
        return {"Heatmaps": self.maps[[name for name in shown if name in self.maps]]} if len(self.maps) else {}

    def lines(self) -> Iterator[str]:
        """Return where the pictures lie."""
        yield from (f"sheet: {path}" for path in self.sheets)
        yield f"run: {self.folder}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Draw and score.

    Raises
    ------
    UsageError
        No sample named, an unknown sample or label, an output that exists.
    ModelError
        A head of another encoder; no gradient at the chosen layer.
    """
    progress = progress or Progress()
    with open_run("cam", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        dataset = opening.open_data(config)
        wanted = _wanted(config, dataset)
        encoder = opening.load_model(config, config.cache)
        settings = settings_at_hand(config, encoder, sorted({label for _, label in wanted}))
        record.note(
            encoders=[{"id": each.encoder.id, "name": each.encoder.name, "setting": each.name} for each in settings],
            dataset={"schema": dataset.schema, "n": len(dataset)},
            protocol=[config.protocol],
        )
        layer = config.layer if config.layer is not None else "paper" if config.protocol == "paper" else "default"
        explainers = [cam.Explainer(setting.encoder, layer, config.method) for setting in settings]
        usual = UsualPlaces(dataset, config.seed)
        rows: list[dict[str, Any]] = []
        sheets: list[Path] = []
        with record.step("heatmaps") as step, progress.step("heatmaps", len(wanted), "findings") as shown:
            for position, label in wanted:
                try:
                    image = decoding.decode(dataset.reader.read(str(dataset.samples["uri"].iloc[position])))
                except ImageError as error:
                    row = dataset.samples.iloc[position]
                    record.fail([{"id": row["id"], "uri": row["uri"], "what": "image", "reason": str(error)}])
                    continue
                finding = _Finding(dataset, position, label, image)
                drawn = [_explain(finding, *each) for each in zip(settings, explainers, strict=True)]
                scored = finding.scored(drawn, usual, config.tolerance)
                sheets.append(finding.draw(drawn, scored, config, record))
                rows += scored
                shown.advance()
            step.items = len(rows)
        record.path("scores.json").write_text(json.dumps(plain(rows), indent=1, ensure_ascii=False), encoding="utf-8")
        record.record_all([{"kind": "heatmap", **row} for row in rows])
    failures = pd.DataFrame(record.failures, columns=["id", "uri", "what", "reason"])
    return Result(record.folder, sheets, pd.DataFrame(rows), failures)


def settings_at_hand(config: Config, encoder: Encoder, labels: Sequence[str]) -> list[Explained]:
    """Return zero-shot, the heads that were named, and the fine-tuned towers that were named.

    Heads and towers that do not know a label are refused; a setting never explains something else instead.
    """
    sound = config.protocol == "sound"
    section = config.zero_shot
    built = (
        prompts.build_prompts(labels, section.templates, phrases=section.phrases) if sound else paper.prompts(labels)
    )
    embedded = Cache(config.cache).text_features(built.texts, encoder)
    text, _ = built.combine(embedded, normalize=sound)
    settings = [Explained(study_settings.ZERO_SHOT, config.protocol, encoder, tuple(labels), text=text)]
    for path in config.heads:
        head = LinearHead.load(path)
        head.check_encoder(encoder.id)
        name = study_settings.LINEAR_PROBE if len(config.heads) == 1 else f"{study_settings.LINEAR_PROBE} ({path.stem})"
        settings.append(Explained(name, config.protocol, encoder, head.label_names, head=head))
    for folder in config.tuned:
        model = folder / finetuning.MODEL_FOLDER
        if not model.is_dir():
            raise UsageError(f"{str(folder)!r} is no run of fluoro finetune: it has no folder {model.name!r}")
        tower = load_encoder(f"local-dir:{model.resolve()}", device=config.device, precision=encoder.precision)
        head = LinearHead.load(model / finetuning.HEAD_FILE)
        head.check_encoder(tower.id)
        several = len(config.tuned) > 1
        name = f"{study_settings.FINE_TUNING} ({folder.name})" if several else study_settings.FINE_TUNING
        settings.append(Explained(name, config.protocol, tower, head.label_names, head=head))
    for setting in settings:
        for label in labels:
            setting.target(label)  # says now, and not after an hour, that a head lacks a label
    return settings


@dataclass(frozen=True)
class _Drawn:
    setting: str
    heat: np.ndarray
    note: str
    score: float | None
    layer: str
    baseline: bool = False


@dataclass(frozen=True)
class _Finding:
    """One label in one sample."""

    dataset: Dataset
    position: int
    label: str
    image: Image.Image

    @property
    def sample(self) -> str:
        return str(self.dataset.ids[self.position])

    @property
    def annotated(self) -> bool:
        return self.dataset.annotations.has(self.sample, self.label)

    def region(self) -> np.ndarray:
        return self.dataset.annotations.region(self.sample, self.label, self.image.height, self.image.width)

    def scored(self, drawn: Sequence[_Drawn], usual: UsualPlaces, tolerance: float | None) -> list[dict[str, Any]]:
        """Return one row a map, with scores and null maps beside them where the label is annotated."""
        rows: list[dict[str, Any]] = []
        region = self.region() if self.annotated else None
        maps = [*drawn, *(self._nulls(drawn[0].heat, usual) if region is not None else [])]
        for each in maps:
            row = {
                "id": self.sample,
                "label": self.label,
                "truth": int(self.dataset.labels[self.position, self.dataset.label_position(self.label)]),
                "setting": each.setting,
                "baseline": each.baseline,
                "score": each.score,
                "layer": each.layer,
                "empty": not bool(np.nanmax(each.heat) > 0),
                "note": each.note,
            }
            if region is not None:
                row |= localization.score_heatmap(each.heat, region, tolerance).as_dict()
            rows.append(row)
        return rows

    def draw(self, drawn: Sequence[_Drawn], scored: Sequence[dict[str, Any]], config: Config, record: Run) -> Path:
        """Write one picture a map and the sheet of all; return the sheet's path."""
        stem = figure_stem(self.sample, self.label)
        image = np.asarray(self.image)
        truth = self.region() if self.annotated and self.dataset.annotations.mask_reader is not None else None
        boxes = [] if truth is not None else self._boxes()
        panels = [overlays.Panel("Image", None, ("annotated",) if self.annotated else ("not annotated",))]
        for each, row in zip(drawn, scored, strict=False):
            panels.append(overlays.Panel(each.setting, each.heat, _caption(row), each.note))
            picture = overlays.overlay(
                image, each.heat, boxes=boxes, mask=truth, side=max(config.side, 512), note=each.note
            )
            overlays.save_picture(picture, record.path(f"maps/{stem}-{safe(each.setting)}.png"))
        sheet = overlays.sheet(
            image,
            panels,
            boxes=boxes,
            mask=truth,
            title=f"{self.label.replace('_', ' ')} · {self.sample}",
            subtitle=self._subtitle(drawn, scored, config),
            side=config.side,
        )
        path = record.path(f"{stem}.png")
        overlays.save_picture(sheet, path)
        return path

    def _boxes(self) -> list[overlays.Box]:
        boxes = self.dataset.annotations.boxes_of(self.sample, self.label)
        return [overlays.Box(*map(float, box), self.label.replace("_", " ")) for box in boxes]  # type: ignore[arg-type, call-arg]

    def _nulls(self, heat: np.ndarray, usual: UsualPlaces) -> list[_Drawn]:
        height, width = heat.shape
        found = [(CENTRE, localization.centre_prior(height, width))]
        prior = usual.prior(self.label, self.dataset.groups[self.position])
        if prior is not None:
            found.append((LOCATION, localization.place_prior(prior, height, width)))
        return [_Drawn(name, localization.in_view_of(null, heat), "", None, "", baseline=True) for name, null in found]

    def _subtitle(self, drawn: Sequence[_Drawn], scored: Sequence[dict[str, Any]], config: Config) -> str:
        positive = self.dataset.labels[self.position, self.dataset.label_position(self.label)]
        layers = ", ".join(dict.fromkeys(each.layer for each in drawn))
        said = [f"label {'positive' if positive else 'negative'}", f"{config.method} at {layers}"]
        for row in scored[len(drawn) :]:
            said.append(f"{row['setting'].lower()}: {', '.join(_caption(row))}")
        return " · ".join(said)


def _region_of(dataset: Dataset, position: int, label: str) -> np.ndarray | None:
    """Return the region of a label in a sample that is only asked where the label lies; None if it cannot be read."""
    sample = dataset.ids[position]
    reader = dataset.annotations.mask_reader
    mask = reader(sample, label) if reader is not None else None
    if mask is not None:
        return mask
    try:
        image = decoding.decode(dataset.reader.read(str(dataset.samples["uri"].iloc[position])))
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


def _explain(finding: _Finding, setting: Explained, explainer: cam.Explainer) -> _Drawn:
    pixels, geometry = setting.encoder.preprocess(finding.image)
    found = explainer.heatmaps(pixels, [setting.target(finding.label)])[0]
    return _Drawn(setting.name, found.on_original(geometry), found.note, found.score, found.layer)


def _wanted(config: Config, dataset: Dataset) -> list[tuple[int, str]]:
    """Return (position, label) of everything to explain."""
    if not config.ids:
        annotated = dataset.annotations.sample_ids(config.labels[0] if config.labels else None)[:3]
        hint = f", such as {', '.join(annotated)}" if annotated else ""
        raise UsageError(f"name at least one sample with --id{hint}")
    for label in config.labels:
        dataset.label_position(label)
    wanted = []
    for sample in config.ids:
        position = dataset.position(sample)
        labels = config.labels or [name for name in dataset.label_names if dataset.annotations.has(sample, name)]
        if not labels:
            labels = [name for name, y in zip(dataset.label_names, dataset.labels[position], strict=True) if y]
        if not labels:
            raise DataError(f"sample {sample!r} has neither annotations nor a positive label; name one with --label")
        wanted += [(position, label) for label in labels]
    return wanted


def _caption(row: dict[str, Any]) -> tuple[str, ...]:
    if "pointing_game" not in row:
        return (f"score {row['score']:.3f}",)
    if row["region_visible"] == 0:
        return ("annotation outside the model's view",)
    pointing = row["pointing_game"]
    hit = "hit" if pointing == 1 else "miss" if pointing == 0 else f"{pointing:.2f}"
    return (f"pointing {hit} · energy {row['energy']:.2f} · IoU {row['best_iou']:.2f}",)
