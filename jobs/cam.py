"""`fluoro cam`: draw where a model looks for a label or a free text, for every setting at hand, on the original image.

Comes in: a data set, a model, samples, labels or texts, and optionally heads (`fluoro probe`) and fine-tuning runs
(`fluoro finetune`). Goes out: a run folder with one sheet a sample and label (image and truth, then each setting's
map), one picture a map, ``scores.json`` and result lines; or one grid a sample with every label; or also one map a
block. Maps are made when they are asked for, from cached tokens where there are any, else from cached pixels, else from
the image (`jobs.cam_inputs`). Where the label is annotated in the sample, the maps are scored beside the centre and the
label's usual place (`jobs.cam_findings`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import cam
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.errors import DataError, ImageError, UsageError
from jobs import cam_panels, cam_settings, heatmap_choice, opening, study_settings
from jobs.cam_findings import Drawn, Finding, UsualPlaces
from jobs.cam_inputs import MapInputs
from jobs.config import CacheOptions, DatasetOptions, ModelOptions
from jobs.plain import plain
from jobs.progress import Progress
from jobs.runs import Run, open_run
from jobs.study_settings import Explained


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro cam` needs."""

    ids: list[str] = Field(default_factory=list, description="samples to look at")
    labels: list[str] = Field(
        default_factory=list, description="labels to explain; empty: those annotated in the sample, else its positives"
    )
    texts: list[str] = Field(default_factory=list, description="free texts to explain, by zero-shot")
    all_labels: bool = Field(False, description="explain every label, in one grid a sample")
    layers: bool = Field(False, description="also draw one map a block")
    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts of the sound protocol"
    )
    heads: list[Path] = Field(
        default_factory=list, description="saved heads for this model, or run folders of fluoro probe"
    )
    tuned: list[Path] = Field(default_factory=list, description="run folders of fluoro finetune")
    settings: list[cam_settings.SettingName] = Field(
        default_factory=list, description="zero-shot, probe, fine-tuned; empty: all that are at hand"
    )
    protocol: Literal["sound", "paper"] = Field("sound", description="sound practice, or exactly what the paper did")
    layer: int | str | None = Field(
        None, union_mode="left_to_right", description="block, default, paper or a module; the model's own if empty"
    )
    method: str | None = Field(
        None, description=f"one of {', '.join(cam.METHODS)}; the model's own, else gradcam, if empty"
    )
    choice: Path | None = Field(None, description="run folder of fluoro cam sweep, for method and layer")
    tolerance: float | None = Field(None, gt=0, description="of the pointing game, in original pixels")
    side: int = Field(360, ge=64, le=4096, description="longer side of each picture, in pixels; of a grid's half")
    seed: int = Field(0, description="draws the samples of the location prior where there are many")


@dataclass(frozen=True)
class Result:
    """What was drawn.

    Parameters
    ----------
    folder : Path
    sheets : list of Path
    maps : DataFrame
        One row a sample, label and setting: scores (where annotated), the target's value, layer, source, note.
    failures : DataFrame
        Samples that could not be read: id, uri, what, reason.
    layers : DataFrame
        With `layers`, one row a sample, label, setting, block and method.
    """

    folder: Path
    sheets: list[Path]
    maps: pd.DataFrame
    failures: pd.DataFrame
    layers: pd.DataFrame = field(default_factory=pd.DataFrame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the scores of every map."""
        shown = ["id", "label", "setting", "score", "pointing_game", "energy", "best_iou", "source", "note"]
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
        encoder = opening.load_model(config, config.cache, dataset, texts=config.texts)
        asked = {label for _, of_sample in wanted for label in of_sample}
        labels = [label for label in dataset.label_names if label in asked]
        texts = [text for text in dict.fromkeys(config.texts) if text not in labels]
        settings = cam_settings.settings_at_hand(config, encoder, labels, texts)
        record.note(
            encoders=[{"id": each.encoder.id, "name": each.encoder.name, "setting": each.name} for each in settings],
            dataset={"schema": dataset.schema, "n": len(dataset)},
            protocol=[config.protocol],
        )
        method, layer = _method_and_layer(config, encoder)
        maker = _Maker(
            config,
            settings,
            [cam.Explainer(setting.encoder, layer, method) for setting in settings],
            MapInputs(Cache(config.cache), dataset, [position for position, _ in wanted]),
            UsualPlaces(dataset, config.seed),
            record,
        )
        count = sum(len(of_sample) for _, of_sample in wanted)
        with record.step("heatmaps") as step, progress.step("heatmaps", count, "findings") as shown:
            for position, of_sample in wanted:
                try:
                    maker.draw(dataset, position, of_sample)
                except ImageError as error:
                    row = dataset.samples.iloc[position]
                    record.fail([{"id": row["id"], "uri": row["uri"], "what": "image", "reason": str(error)}])
                    continue
                shown.advance(len(of_sample))
            step.items = len(maker.rows)
        maps = json.dumps(plain(maker.rows), indent=1, ensure_ascii=False)
        record.path("scores.json").write_text(maps, encoding="utf-8")
        record.record_all([{"kind": "heatmap", **row} for row in maker.rows])
        record.record_all([{"kind": "layer", **row} for row in maker.layer_rows])
    failures = pd.DataFrame(record.failures, columns=["id", "uri", "what", "reason"])
    return Result(record.folder, maker.sheets, pd.DataFrame(maker.rows), failures, pd.DataFrame(maker.layer_rows))


def _method_and_layer(config: Config, encoder: Encoder) -> tuple[str, cam.Layer]:
    """Return what was asked for, else the study's own (published protocol), else what a sweep chose for the model."""
    if config.protocol == "paper" and config.choice is None:
        return config.method or heatmap_choice.FALLBACK.method, "paper" if config.layer is None else config.layer
    choice = heatmap_choice.choose(encoder, config.method, config.layer, config.choice)
    return choice.method, choice.layer


class _Maker:
    """Makes, scores and draws the maps of one sample after the other."""

    def __init__(
        self,
        config: Config,
        settings: list[Explained],
        explainers: list[cam.Explainer],
        inputs: MapInputs,
        usual: UsualPlaces,
        record: Run,
    ) -> None:
        self.config, self.settings, self.explainers = config, settings, explainers
        self.inputs, self.usual, self.record = inputs, usual, record
        self.rows: list[dict[str, Any]] = []
        self.layer_rows: list[dict[str, Any]] = []
        self.sheets: list[Path] = []

    def draw(self, dataset: Dataset, position: int, labels: list[str]) -> None:
        """Explain some labels of a sample in every setting that knows them; all labels share a setting's pass."""
        image = self.inputs.image(position)
        findings = [Finding(dataset, position, label, image) for label in labels]
        drawn: list[list[Drawn]] = [[] for _ in labels]
        for setting, explainer in zip(self.settings, self.explainers, strict=True):
            targets = {
                place: target
                for place, label in enumerate(labels)
                if (target := cam_settings.target_of(setting, label)) is not None
            }
            if not targets:
                continue
            seen, source = self.inputs.of(position, setting.encoder, explainer.first_block)
            geometry = setting.encoder.preprocess.geometry(image.height, image.width)
            found = explainer.batch_heatmaps(seen, list(targets.values()), state_unreached=self.config.all_labels)[0]
            for place, each in zip(targets, found, strict=True):
                heat = each.on_original(geometry)
                drawn[place].append(Drawn(setting.name, heat, each.note, each.score, each.layer, each.method, source))
        scored = [
            finding.scored(maps, self.usual, self.config.tolerance)
            for finding, maps in zip(findings, drawn, strict=True)
        ]
        self.rows += [row for rows in scored for row in rows]
        side = self.config.side
        if self.config.all_labels:
            self.sheets.append(cam_panels.draw_labels(findings, drawn, scored, side // 2, self.record))
        else:
            for finding, maps, rows in zip(findings, drawn, scored, strict=True):
                self.sheets.append(finding.draw(maps, rows, side, self.record))
        if self.config.layers:
            for finding in findings:
                self._draw_layers(finding)

    def _draw_layers(self, finding: Finding) -> None:
        strips = {}
        for setting in self.settings:
            target = cam_settings.target_of(setting, finding.label)
            if target is not None:
                first = 0 if setting.encoder.trunk.has_tokens else None
                seen, source = self.inputs.of(finding.position, setting.encoder, first)
                geometry = setting.encoder.preprocess.geometry(finding.image.height, finding.image.width)
                maps = cam.layer_strip(setting.encoder, seen, target)
                strips[setting.name] = cam_panels.LayerStrip(maps, geometry, source, setting.encoder.id)
        config = self.config
        path, rows = cam_panels.draw_layers(finding, strips, config.tolerance, config.side // 2, self.record)
        self.sheets.append(path)
        self.layer_rows += rows


def _wanted(config: Config, dataset: Dataset) -> list[tuple[int, list[str]]]:
    """Return (position, labels and texts) of everything to explain."""
    if not config.ids:
        annotated = dataset.annotations.sample_ids(config.labels[0] if config.labels else None)[:3]
        hint = f", such as {', '.join(annotated)}" if annotated else ""
        raise UsageError(f"name at least one sample with --id{hint}")
    for label in config.labels:
        dataset.label_position(label)
    wanted = []
    for sample in dict.fromkeys(config.ids):
        position = dataset.position(sample)
        labels = config.labels or (list(dataset.label_names) if config.all_labels else [])
        if not labels and not config.texts:
            labels = [name for name in dataset.label_names if dataset.annotations.has(sample, name)]
            labels = labels or list(np.array(dataset.label_names, dtype=object)[dataset.labels[position] == 1])
        asked = list(dict.fromkeys([*labels, *config.texts]))
        if not asked:
            raise DataError(
                f"sample {sample!r} has neither annotations nor a positive label; name one with --label, or a --text"
            )
        wanted.append((position, asked))
    return wanted
