"""`fluoro cam check`: do a method's heatmaps follow what the model learnt, and do they mark what it uses?

Comes in: an annotated data set, a model, methods. Goes out: a run folder with one table a method:

- cascade: rank correlation with the intact model's maps, and energy inside the annotation, while the tower's weights
  are shuffled from the output down to the input (Adebayo et al., NeurIPS 2018);
- label permutation: the same for a probe that was trained on permuted labels, beside one trained on the true ones;
- faithfulness: ROAD, deletion and insertion of the method's maps beside those of an order drawn by lot and of the
  centre prior, on the same images and targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import cam, faithfulness, localization
from analysis.bootstrap import clustered_bootstrap
from analysis.heads import LinearHead
from analysis.map_sanity import map_similarity
from analysis.probes import fit_probe
from analysis.randomised import cascade
from engine.pixels import Geometry
from jobs import measuring, probe_section, run_tables
from jobs.heatmap_choice import FALLBACK, choose
from jobs.heatmap_scoring import Finding
from jobs.heatmap_trial import TrialOptions, by_image, explained_setting, findings_of
from jobs.opening import read_image
from jobs.progress import Progress
from jobs.runs import open_run
from jobs.study_settings import Explained, Material

SANITY, FAITHFUL = "sanity", "faithfulness"
LOT, CENTRE = "order by lot", "centre prior"
FIGURES = faithfulness.Faithfulness._fields


class Config(TrialOptions):
    """What `fluoro cam check` needs."""

    layer: int | str | None = Field(None, union_mode="left_to_right", description="block; the model's own if empty")
    per_label: int | None = Field(2, ge=1, description="findings of each label that are looked at, all if empty")


@dataclass(frozen=True)
class Result:
    """What was found, a table a method.

    Parameters
    ----------
    folder : Path
    methods : mapping from method to DataFrame
        test, stage, figure, value, low, high, n.
    """

    folder: Path
    methods: Mapping[str, pd.DataFrame]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the table of each method."""
        return dict(self.methods)

    def lines(self) -> Iterator[str]:
        """Return where things lie."""
        yield f"run: {self.folder}"


@dataclass(frozen=True)
class _Case:
    """One image with its findings, as the model sees it."""

    pixels: np.ndarray
    geometry: Geometry
    findings: tuple[Finding, ...]
    regions: tuple[np.ndarray, ...]
    group: str


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Check.

    Raises
    ------
    UsageError
        An unknown label or method.
    DataError
        No annotated finding in the test split.
    """
    progress = progress or Progress()
    with open_run("cam-check", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        material = measuring.prepare(config, record, progress)
        setting = explained_setting(config, material.encoder, material.dataset)
        choice = choose(material.encoder, None, config.layer)
        methods = config.methods or [choice.method]
        findings = findings_of(config, material.dataset, setting, "test", config.per_label)
        cases = _cases(material, findings)
        probes = _probes(material, config.seed)
        with record.step("orders that know nothing") as step:
            nulls = _faithful_nulls(cases, setting, config)
            step.items = len(findings)
        found = {}
        for method in methods:
            layer = (
                config.layer
                if config.layer is not None
                else choice.layer
                if method == choice.method
                else FALLBACK.layer
            )
            rows: list[dict[str, Any]] = []
            with record.step(f"{method}: sanity") as step:
                rows += _sanity(cases, setting, probes, method, layer, config)
                step.items = len(findings)
            with record.step(f"{method}: faithfulness") as step:
                rows += _faithful(cases, setting, method, layer, config, nulls)
                step.items = len(findings)
            found[method] = pd.DataFrame(rows)
            run_tables.write_table(
                record,
                f"check-{method}",
                found[method],
                title=f"Checks of {method}",
                text="Similarity: Spearman's correlation with the intact model's maps; near 1 while weights are "
                "shuffled, the map does not come from what was learnt. ROAD and insertion: higher is better; deletion: "
                "lower.",
                section="heatmap-checks",
            )
            record.record_all([{"kind": "heatmap_check", "method": method, **row} for row in rows])
    return Result(record.folder, found)


def _cases(material: Material, findings: Sequence[Finding]) -> list[_Case]:
    dataset = material.dataset
    cases = []
    for row, of_image in by_image(findings).items():
        pixels, geometry = material.encoder.preprocess(read_image(dataset, row))
        regions = [dataset.annotations.region(dataset.ids[row], each.label, *geometry.original) for each in of_image]
        cases.append(_Case(pixels, geometry, tuple(of_image), tuple(regions), dataset.groups[row]))
    return cases


def _probes(material: Material, seed: int) -> dict[str, LinearHead]:
    """Return a probe of the true labels, and one of labels that were dealt out anew among the training samples."""
    train, val = material.rows("train"), material.rows("val")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(train))
    heads = {}
    for name, truth in (("true", material.y[train]), ("permuted", material.y[train][order])):
        fitted = fit_probe(
            material.features[train],
            truth,
            material.features[val],
            material.y[val],
            label_names=material.dataset.label_names,
            encoder_id=material.encoder.id,
        )
        heads[name] = fitted.head
    return heads


Maps = list[cam.HeatMap]


def _maps(cases: Sequence[_Case], setting: Explained, method: str, layer: cam.Layer) -> Maps:
    explainer = cam.Explainer(setting.encoder, layer, method)
    return [
        heat
        for case in cases
        for heat in explainer.heatmaps(case.pixels, [setting.target(each.label) for each in case.findings])
    ]


def _sanity(
    cases: Sequence[_Case],
    setting: Explained,
    probes: Mapping[str, LinearHead],
    method: str,
    layer: cam.Layer,
    config: Config,
) -> list[dict[str, Any]]:
    """Return similarity and energy inside at each stage of the cascade, and for the permuted labels."""
    summarise = _Summary(cases, config)
    intact = _maps(cases, setting, method, layer)
    rows = summarise(SANITY, "intact", {"energy inside": _energies(cases, intact)})
    for stage, altered in cascade(setting.encoder, config.seed):
        maps = _maps(cases, replace(setting, encoder=altered), method, layer)
        rows += summarise(SANITY, f"shuffled down to: {stage}", _likeness(cases, intact, maps))
    named = {
        name: Explained(probe_section.LINEAR_PROBE, setting.protocol, setting.encoder, head.label_names, head=head)
        for name, head in probes.items()
    }
    true = _maps(cases, named["true"], method, layer)
    rows += summarise(SANITY, "probe on true labels", {"energy inside": _energies(cases, true)})
    permuted = _maps(cases, named["permuted"], method, layer)
    return rows + summarise(SANITY, "probe on permuted labels", _likeness(cases, true, permuted))


def _likeness(cases: Sequence[_Case], before: Maps, after: Maps) -> dict[str, np.ndarray]:
    similar = map_similarity([each.raw for each in before], [each.raw for each in after])
    return {"similarity": similar, "energy inside": _energies(cases, after)}


def _energies(cases: Sequence[_Case], maps: Maps) -> np.ndarray:
    pairs = [(case, region) for case in cases for region in case.regions]
    return np.array(
        [
            localization.energy_inside(heat.on_original(case.geometry), region)
            for heat, (case, region) in zip(maps, pairs, strict=True)
        ]
    )


def _faithful_nulls(
    cases: Sequence[_Case], setting: Explained, config: Config
) -> dict[str, list[faithfulness.Faithfulness]]:
    """Return ROAD, deletion and insertion of orders that know nothing of the image; the same for every method."""
    rng = np.random.Generator(np.random.PCG64(config.seed))
    height, width = setting.encoder.preprocess.size
    grid = max(2, height // 16), max(2, width // 16)
    centre = localization.centre_prior(height, width)
    found: dict[str, list[faithfulness.Faithfulness]] = {LOT: [], CENTRE: []}
    for case in cases:
        for finding in case.findings:
            target = setting.target(finding.label)
            for name, order in ((LOT, localization.random_map(height, width, grid, rng)), (CENTRE, centre)):
                found[name].append(faithfulness.faithfulness(setting.encoder, case.pixels, target, order, config.seed))
    return found


def _faithful(
    cases: Sequence[_Case],
    setting: Explained,
    method: str,
    layer: cam.Layer,
    config: Config,
    nulls: Mapping[str, Sequence[faithfulness.Faithfulness]],
) -> list[dict[str, Any]]:
    """Return ROAD, deletion and insertion of the method's maps, beside those of the nulls and paired with them."""
    explainer = cam.Explainer(setting.encoder, layer, method)
    own = []
    for case in cases:
        targets = [setting.target(each.label) for each in case.findings]
        for target, heat in zip(targets, explainer.heatmaps(case.pixels, targets), strict=True):
            own.append(faithfulness.faithfulness(setting.encoder, case.pixels, target, heat.map, config.seed))
    summarise = _Summary(cases, config)
    rows: list[dict[str, Any]] = []
    for name, values in {method: own, **nulls}.items():
        rows += summarise(FAITHFUL, name, dict(zip(FIGURES, np.array(values).T, strict=True)))
    for name, values in nulls.items():
        apart = (np.array(own) - np.array(values)).T
        rows += summarise(FAITHFUL, f"{method} - {name}", dict(zip(FIGURES, apart, strict=True)))
    return rows


class _Summary:
    """Means with intervals by patient."""

    def __init__(self, cases: Sequence[_Case], config: Config) -> None:
        self.groups = np.array([case.group for case in cases for _ in case.findings], dtype=object)
        self.config = config

    def __call__(self, test: str, stage: str, figures: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        rows = []
        for figure, values in figures.items():
            known = np.isfinite(values)
            told = {"test": test, "stage": stage, "figure": figure, "n": int(known.sum())}
            if not known.any():
                rows.append({**told, "value": np.nan, "low": np.nan, "high": np.nan})
                continue
            means = clustered_bootstrap(
                values[known][:, None],
                self.groups[known],
                replicates=self.config.replicates,
                seed=self.config.seed,
            )
            ends = (float(each[0]) for each in means[:3])
            rows.append(told | dict(zip(("value", "low", "high"), ends, strict=True)))
        return rows
