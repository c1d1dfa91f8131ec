"""`fluoro probe`: fit one probe or a sweep of probes on cached embeddings, choose, test, and save what was chosen.

Comes in: a data set and a model. Goes out: a run folder with ``probe.npz`` (`analysis.heads.LinearHead`, which `fluoro
cam --head` takes) or, for kinds that are not linear, ``probe.joblib``; result lines, and ``sweep.csv``, one row a
candidate, metric and label with intervals, with ``convergence.csv``, one row a problem. Probes learn from train;
strength, class weighting and thresholds are chosen on val, or with ``folds`` on folds of train and val together. Test
rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
import pandas as pd
from pydantic import Field
from scipy.special import expit

from analysis import prompts, thresholds
from analysis.bootstrap import bootstrap_metrics
from analysis.heads import LinearHead
from analysis.metrics import Prediction
from analysis.probes import sweeping
from engine.errors import UsageError
from jobs import measuring, probe_section, study_scores, study_settings
from jobs.metric_tables import with_interval
from jobs.progress import Progress
from jobs.runs import Run, open_run
from jobs.study_records import number

HEAD_FILE, PROBE_FILE = "probe.npz", "probe.joblib"
SWEEP_FILE, CONVERGENCE_FILE = "sweep.csv", "convergence.csv"
KINDS_FROM_TEXT = ("text-prior", "tip-adapter")
SWEPT = ("auroc_macro", "map", "auroc", "ap")


class Config(measuring.MeasureOptions):
    """What `fluoro probe` needs."""

    probe: probe_section.ProbeSection = Field(
        default_factory=probe_section.ProbeSection, description="heads of the sound protocol"
    )
    kind: Literal["logistic", "text-prior", "ridge", "nearest-mean", "neighbours", "tip-adapter", "mlp"] = Field(
        "logistic", description="the probe; text-prior and tip-adapter start from the labels' prompts"
    )
    class_weight: list[Literal["none", "balanced"]] = Field(["none"], description="class weightings to try")
    folds: int = Field(0, ge=0, description="choose on so many folds of train and val by group; 0: choose on val")
    seeds: list[int] = Field([0], description="seeds that deal out the folds anew; held-out logits are averaged")
    select: Literal["log_loss", "average_precision"] = Field("log_loss", description="what the choice is made by")
    templates: str | list[str] = Field("ensemble", description="prompts of the kinds that start from text")


@dataclass(frozen=True)
class Probed(measuring.Measured):
    """What `fluoro probe` found: the tested probe, and the sweep it was chosen from.

    Parameters
    ----------
    sweep : DataFrame
        One row a candidate, metric and label: class_weight, C, metric, label, value, low, high, n, chosen.
    """

    sweep: pd.DataFrame = field(default_factory=pd.DataFrame)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the candidates, then the chosen one beside the baselines and by label."""
        rows = []
        overall = self.sweep[self.sweep["label"].isna()] if len(self.sweep) else self.sweep
        for place, part in overall.groupby("candidate", sort=False) if len(overall) else []:
            by_metric = part.set_index("metric")
            first = part.iloc[0]
            rows.append(
                {
                    "candidate": place,
                    "log-loss": f"{by_metric.loc['log_loss', 'value']:.4f}",
                    "mean AUROC": with_interval(by_metric, "auroc_macro"),
                    "mean AP": with_interval(by_metric, "map"),
                    "problems": int(first["problems"]),
                    "converged": int(first["converged"]),
                    "chosen": "*" if first["chosen"] else "",
                }
            )
        title = "Candidates on held-out rows (no test row among them), with 95 % intervals by patient"
        return ({title: pd.DataFrame(rows)} if rows else {}) | super().tables()

    def lines(self) -> Iterator[str]:
        """Return where things lie."""
        if len(self.sweep):
            yield f"sweep: {self.folder / SWEEP_FILE}"
        yield from super().lines()


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Probed:
    """Fit, choose, save and test.

    Raises
    ------
    UsageError
        An output that exists, or a sweep under the paper's protocol.
    DataError
        No labels, or an empty split.
    """
    progress = progress or Progress()
    own = {"kind", "class_weight", "folds"} & config.model_fields_set
    if config.protocol == "paper" and own:
        raise UsageError(f"the paper's protocol has one probe of its own; leave out {', '.join(sorted(own))}")
    with open_run("probe", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        from_text = config.kind in KINDS_FROM_TEXT and config.protocol == "sound"
        material = measuring.prepare(config, record, progress, texts=from_text)
        table = pd.DataFrame()
        with record.step("linear probe") as step:
            step.items = len(material.rows("train"))
            if config.protocol == "paper":
                setting = study_settings.linear_probe(material, config.probe, "paper", config.seed)
                assert setting.explained.head is not None  # the study's probe is a head
                kept: Any = setting.explained.head
            else:
                start = time.perf_counter()
                found, held = fit(material, config)
                setting = setting_of(material, found, held)
                kept, setting = found.probe, dataclasses.replace(setting, seconds=time.perf_counter() - start)
        if config.protocol == "sound":
            with record.step("score candidates") as step:
                step.items = len(found.candidates)
                table = sweep_table(material, found, held, config.replicates, config.seed)
                write_sweep(record, table, found)
        path = record.path(HEAD_FILE if isinstance(kept, LinearHead) else PROBE_FILE)
        if isinstance(kept, LinearHead):
            kept.save(path)
        else:
            joblib.dump(kept, path)
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
    done = measuring.measured(record, setting.name, head=path)
    return Probed(done.folder, done.setting, done.metrics, done.failures, done.head, table)


def fit(material: study_settings.Material, config: Config) -> tuple[sweeping.Sweep, np.ndarray]:
    """Return the sweep, and the positions of the rows that it held out."""
    names, x, y = material.dataset.label_names, material.features, material.y
    options: dict[str, Any] = {
        "label_names": names, "kind": config.kind, "c_grid": config.probe.C, "class_weights": config.class_weight,
        "select": config.select, "encoder_id": material.encoder.id, "seeds": config.seeds,
    }  # fmt: skip
    if config.kind in KINDS_FROM_TEXT:
        wanted = prompts.build_prompts(names, config.templates)
        options["text"], _ = wanted.combine(
            material.cache.text_features(wanted.texts, material.encoder), normalize=True
        )
        options["scale"] = float(material.encoder.logit_scale)
    train, val = material.rows("train"), material.rows("val")
    if config.folds:
        pool = np.sort(np.concatenate([train, val]))
        groups = material.dataset.groups[pool]
        return sweeping.sweep_on_folds(x[pool], y[pool], groups, folds=config.folds, **options), pool
    return sweeping.sweep_on_validation(x[train], y[train], x[val], y[val], **options), val


def setting_of(material: study_settings.Material, found: sweeping.Sweep, held: np.ndarray) -> study_settings.Setting:
    """Return the chosen probe as a setting; its thresholds come from the held-out rows."""
    names = material.dataset.label_names
    if isinstance(found.probe, LinearHead):
        scores = found.probe.probabilities(material.features)
    else:
        unit = material.features / np.linalg.norm(material.features, axis=1, keepdims=True)
        logits = found.probe.decision_function(unit.astype(np.float64))
        scores = expit(logits.reshape(len(unit), -1))
    cut = thresholds.choose("f1", material.y[held], expit(found.logits[found.chosen]))
    name = probe_section.LINEAR_PROBE if found.kind == "logistic" else f"Probe ({found.kind})"
    head = found.probe if isinstance(found.probe, LinearHead) else None
    explained = study_settings.Explained(name, "sound", material.encoder, names, head=head)
    return study_settings.Setting(
        explained, material.features, Prediction(scores, thresholds.decide(scores, cut)), cut, 0.0
    )


def sweep_table(
    material: study_settings.Material, found: sweeping.Sweep, held: np.ndarray, replicates: int, seed: int
) -> pd.DataFrame:
    """Return one row a candidate, metric and label, with intervals by patient over the held-out rows."""
    predictions = {}
    for candidate, logits, ranked in zip(found.candidates, found.logits, found.levelled, strict=True):
        predictions[candidate.name] = Prediction(ranked, logits > 0)
    table = bootstrap_metrics(
        material.y[held], predictions, material.dataset.groups[held], label_names=material.dataset.label_names,
        replicates=replicates, seed=seed,
    ).table()  # fmt: skip
    table = table[table["metric"].isin(SWEPT)].rename(columns={"setting": "candidate"})
    losses = pd.DataFrame(
        [
            {
                "candidate": candidate.name,
                "metric": "log_loss",
                "label": None,
                "value": score["log_loss"],
                "n": len(held),
            }
            for candidate, score in zip(found.candidates, found.scores, strict=True)
        ]
    )
    table = pd.concat([losses, table.drop(columns="replicates")], ignore_index=True)
    place = {candidate.name: number for number, candidate in enumerate(found.candidates)}
    order = table["candidate"].map(place)
    table["class_weight"] = [found.candidates[number].class_weight for number in order]
    table["C"] = [found.candidates[number].C for number in order]
    table["chosen"] = order == found.chosen
    problems = found.convergence()
    counts = []
    for candidate in found.candidates:
        mine = (
            problems[(problems["C"] == candidate.C) & (problems["class_weight"] == candidate.class_weight)]
            if len(problems)
            else problems
        )
        counts.append((len(mine), int(mine["converged"].sum()) if len(mine) else 0))
    table["problems"] = [counts[number][0] for number in order]
    table["converged"] = [counts[number][1] for number in order]
    table = table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
    first = ["candidate", "class_weight", "C", "metric", "label", "value", "low", "high", "n"]
    return table[[*first, "chosen", "problems", "converged"]]


def write_sweep(record: Run, table: pd.DataFrame, found: sweeping.Sweep) -> None:
    """Write the sweep as result lines and as tables."""
    record.record_all(
        [
            {
                "kind": "sweep",
                "probe": found.kind,
                **{name: row[name] for name in ("candidate", "class_weight", "metric", "n", "chosen")},
                "C": number(row["C"]),
                "label": row["label"] if isinstance(row["label"], str) else None,
                **{name: number(row[name]) for name in ("value", "low", "high")},
            }
            for row in table.to_dict("records")
        ]
    )
    table.to_csv(record.path(SWEEP_FILE), index=False, float_format="%.6g")
    if found.fits is not None:
        found.convergence().to_csv(record.path(CONVERGENCE_FILE), index=False, float_format="%.6g")
