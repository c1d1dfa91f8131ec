"""`fluoro cam sweep`: choose a model's heatmap method and layer on annotated validation samples, then test that one.

Comes in: a data set with boxes or masks, a model, methods and layers. Every pair is scored on findings of the
validation split; the best by one figure that was fixed before is chosen, and only that one is looked at on the test
split, beside the nulls. Goes out: a run folder with both tables, ``choice.json`` (what `fluoro cam`, `fluoro study`
and a model's folder take), and a table that says for each label whether the choice is above the priors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import cam, localization
from analysis.bootstrap import clustered_bootstrap
from engine.dataset import Dataset
from engine.errors import DataError, ModelError, UsageError
from jobs import heatmap_tables, opening, run_tables
from jobs.heatmap_choice import CHOICE_FILE
from jobs.heatmap_scoring import CENTRE, LOCATION, Finding, Options, score_findings
from jobs.heatmap_trial import TrialOptions, by_image, explained_setting, findings_of, methods_to_try
from jobs.opening import read_image
from jobs.progress import Progress
from jobs.runs import Run, open_run
from jobs.study_heatmaps import location_priors
from jobs.study_settings import Explained

FIGURES = ("pointing_game", "energy", "pixel_ap", "best_iou")


class Config(TrialOptions):
    """What `fluoro cam sweep` needs."""

    # A number given on the command line comes as text.
    layers: list[Annotated[int | str, Field(union_mode="left_to_right")]] = Field(
        default_factory=list, description="blocks by number, or default; every block if empty"
    )
    per_label: int | None = Field(20, ge=1, description="findings of each label that choose, all if empty")
    test_per_label: int | None = Field(None, ge=1, description="findings of each label that test, all if empty")
    choose_by: Literal["both", "pointing_game", "energy", "pixel_ap"] = Field(
        "both", description="figure that chooses, a mean over findings; both: mean of pointing game and energy"
    )


@dataclass(frozen=True)
class Result:
    """What was tried, chosen and tested.

    Parameters
    ----------
    folder : Path
    choice : dict
        method, layer, reason, encoder.
    tried : DataFrame
        One row a method and layer, on validation.
    test : DataFrame
        The choice beside the nulls on test, one row a metric (`heatmap_tables.summaries`).
    differences : DataFrame
        The choice minus each null on test (`heatmap_tables.differences`).
    """

    folder: Path
    choice: dict[str, Any]
    tried: pd.DataFrame
    test: pd.DataFrame
    differences: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return what was tried, and what the choice is above on test."""
        return {
            "Tried on validation": self.tried.drop(columns=["note"]),
            "Chosen, on test: is it above the priors?": verdicts(self.differences),
        }

    def lines(self) -> Iterator[str]:
        """Return the choice and where things lie."""
        yield f"chosen: {self.choice['method']} at layer {self.choice['layer']} ({self.choice['reason']})"
        yield from summary(self.differences)
        yield f"run: {self.folder}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Try, choose and test.

    Raises
    ------
    UsageError
        An unknown label, method or layer.
    DataError
        A split without annotated findings; a method and layer of which none gives a map.
    """
    progress = progress or Progress()
    with open_run("cam-sweep", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        dataset = opening.split_data(opening.open_data(config), config.split)
        encoder = opening.load_model(config, config.cache, dataset)
        setting = explained_setting(config, encoder, dataset)
        pairs = _pairs(config, setting)
        findings = {
            "val": findings_of(config, dataset, setting, "val", config.per_label),
            "test": findings_of(config, dataset, setting, "test", config.test_per_label),
        }
        record.note(
            encoders=[{"id": encoder.id, "name": encoder.name, "setting": setting.name}],
            dataset={"schema": dataset.schema, "n": len(dataset)},
            findings={name: len(of_split) for name, of_split in findings.items()},
        )
        with record.step("validation") as step, progress.step("validation", len(findings["val"]), "findings") as shown:
            tried = _tried(config, dataset, findings["val"], setting, pairs, shown.advance)
            step.items = len(findings["val"]) * len(pairs)
        choice = _chosen(config, tried, encoder.name, len(findings["val"]))
        record.path(CHOICE_FILE).write_text(json.dumps(choice, indent=1) + "\n", encoding="utf-8")
        with record.step("test") as step, progress.step("test", len(findings["test"]), "findings") as shown:
            train = np.flatnonzero(dataset.samples["split"].to_numpy() == "train")
            scored = score_findings(
                dataset,
                findings["test"],
                [setting],
                lambda each: cam.Explainer(each.encoder, choice["layer"], choice["method"]),
                location_priors(dataset, train, config.seed),
                Options(config.tolerance, config.seed),
                scored_one=shown.advance,
            )
            step.items = len(scored)
        test = heatmap_tables.summaries(scored, config.replicates, config.seed)
        differences = heatmap_tables.differences(scored, config.replicates, config.seed)
        _write(record, config, tried, scored, test, differences)
    return Result(record.folder, choice, tried, test, differences)


def verdicts(differences: pd.DataFrame, nulls: Sequence[str] = (CENTRE, LOCATION)) -> pd.DataFrame:
    """Return one row a label: the differences from each prior in pointing game and energy, and whether both are above.

    Parameters
    ----------
    differences : DataFrame
        Of `heatmap_tables.differences`, of one setting.
    nulls : sequence of str

    Returns
    -------
    DataFrame
        label, n, and for each null a column with both differences and their intervals, and one "above" that is yes
        where both intervals lie above zero.
    """
    rows = []
    for label, part in differences.groupby("label", sort=False):
        row: dict[str, Any] = {"label": label, "n": int(part["n"].max())}
        for null in nulls:
            held = part[part["null"] == null].set_index("metric")
            if held.empty:
                continue
            for metric, short in (("pointing_game", "pointing"), ("energy", "energy")):
                one = held.loc[metric]
                row[f"{short} - {null.lower()}"] = f"{one.difference:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            row[f"above {null.lower()}"] = "yes" if (held["verdict"] == "above").all() else "no"
        rows.append(row)
    return pd.DataFrame(rows)


def summary(differences: pd.DataFrame) -> list[str]:
    """Return on how many labels the choice is above each prior in both figures, and where it is not."""
    told = verdicts(differences)
    told = told[told["label"] != "all"]
    said = []
    for null in (CENTRE.lower(), LOCATION.lower()):
        column = f"above {null}"
        if column not in told:
            continue
        above, not_above = told[told[column] == "yes"], told[told[column] != "yes"]
        text = f"above the {null} (pointing game and energy) on {len(above)} of {len(told)} labels"
        said.append(f"{text}; not on {', '.join(not_above['label'])}" if len(not_above) else text)
    return said


def _pairs(config: Config, setting: Explained) -> list[tuple[str, cam.Layer]]:
    """Return the methods and layers to try; a method that reads no single layer is tried once."""
    layers: list[cam.Layer] = list(config.layers) or list(range(len(setting.encoder.trunk.blocks)))
    pairs: list[tuple[str, cam.Layer]] = []
    for method in methods_to_try(config, setting.encoder):
        if cam.METHODS[method].family == "attention":
            pairs.append((method, "default"))
        else:
            pairs += [(method, layer) for layer in layers]
    return pairs


def _tried(
    config: Config,
    dataset: Dataset,
    findings: Sequence[Finding],
    setting: Explained,
    pairs: Sequence[tuple[str, cam.Layer]],
    advance: Any,
) -> pd.DataFrame:
    """Return one row a method and layer: the means with intervals by patient, empty maps, and why it gave none."""
    explainers = {pair: cam.Explainer(setting.encoder, pair[1], pair[0]) for pair in pairs}
    values: dict[tuple[str, cam.Layer], list[list[float]]] = {pair: [] for pair in pairs}
    notes = dict.fromkeys(pairs, "")
    groups: list[str] = []
    for row, of_image in by_image(findings).items():
        pixels, geometry = setting.encoder.preprocess(read_image(dataset, row))
        sample = dataset.ids[row]
        targets = [setting.target(each.label) for each in of_image]
        regions = [dataset.annotations.region(sample, each.label, *geometry.original) for each in of_image]
        points = [dataset.annotations.only_points(sample, each.label) for each in of_image]
        groups += [dataset.groups[row]] * len(of_image)
        for pair, explainer in explainers.items():
            if notes[pair]:
                continue
            try:
                found = explainer.heatmaps(pixels, targets)
            except ModelError as error:
                # A layer behind the last one that matters has no map for any image; the table says so.
                notes[pair] = str(error)
                continue
            for heat, region, point in zip(found, regions, points, strict=True):
                scores = localization.score_heatmap(heat.on_original(geometry), region, config.tolerance, point=point)
                values[pair].append([*(getattr(scores, name) for name in FIGURES), float(scores.empty)])
        for _ in of_image:
            advance()
    rows = []
    for pair in pairs:
        told: dict[str, Any] = {"method": pair[0], "layer": pair[1], "module": explainers[pair].layer_name}
        if not notes[pair]:
            means = clustered_bootstrap(
                np.array(values[pair]), np.array(groups), replicates=config.replicates, seed=config.seed
            )
            for place, name in enumerate(FIGURES):
                told |= {name: means.value[place], f"{name}_low": means.low[place], f"{name}_high": means.high[place]}
            told |= {"n": len(groups), "empty": int(np.array(values[pair])[:, -1].sum())}
        rows.append({**told, "note": notes[pair]})
    return pd.DataFrame(rows)


def _chosen(config: Config, tried: pd.DataFrame, encoder: str, count: int) -> dict[str, Any]:
    """Return the best pair by the figure that was fixed before; the first where several are equal."""
    if "pointing_game" not in tried:
        raise DataError(f"no method gives a map at any of these layers: {tried['note'].iloc[0]}")
    both = tried[["pointing_game", "energy"]].mean(axis=1)
    figure = both if config.choose_by == "both" else tried[config.choose_by]
    if figure.isna().all():
        raise UsageError(f"choose_by={config.choose_by!r} is not defined for points; take pointing_game")
    best = tried.iloc[int(figure.argmax())]
    layer = best["layer"]
    by = "the mean of pointing game and energy" if config.choose_by == "both" else config.choose_by.replace("_", " ")
    return {
        "method": str(best["method"]),
        "layer": layer if isinstance(layer, str) else int(layer),
        "reason": f"best of {len(tried)} by {by} on {count} validation findings of {config.dataset}",
        "encoder": encoder,
        "value": round(float(figure.max()), 6),
    }


def _write(
    record: Run,
    config: Config,
    tried: pd.DataFrame,
    scored: pd.DataFrame,
    test: pd.DataFrame,
    differences: pd.DataFrame,
) -> None:
    """Write the tables and result lines."""
    tables = {
        "sweep": (tried, "Methods and layers on validation", "Means over findings, with 95 % intervals by patient."),
        "test": (test, "The choice on test, beside the nulls", "Means and F1 over findings, with intervals."),
        "differences": (differences, "The choice minus each null", "Paired over findings, with intervals by patient."),
        "verdicts": (verdicts(differences), "Is the choice above the priors?", "Yes where both intervals are above 0."),
    }
    for name, (frame, title, text) in tables.items():
        run_tables.write_table(record, name, frame, title=title, text=text, section="heatmaps")
    scored.to_csv(record.path("tables/findings.csv"), index=False)
    record.record_all(heatmap_tables.localization_rows(test, config.protocol))
    for text in summary(differences):
        record.record("sentence", section="heatmaps", text=text)
