"""`fluoro probe`: fit one probe or a sweep of probes on cached embeddings, choose, test, and save what was chosen.

Comes in: a data set and a model. Goes out: a run folder with ``probe.npz``: a head (`analysis.heads.LinearHead`) that
`cam`, `search` and `study` take, or, for kinds without weights on the embedding, an
`analysis.probes.stored.StoredProbe`; result lines, and ``sweep.csv``, one row a candidate, metric and label with
intervals, with ``convergence.csv``, one row a problem. Probes learn from train; strengths, thresholds and all else are
chosen on val, or with ``folds`` on folds of train and val together. Test rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from analysis import thresholds
from analysis.heads import LinearHead
from analysis.metrics import Prediction
from analysis.probes import candidates, sweeping
from jobs import heads, measuring, probe_inputs, probe_options, probe_section, probe_table, study_scores, study_settings
from jobs.metric_tables import subgroup_tables
from jobs.probe_options import Config
from jobs.progress import Progress
from jobs.runs import open_run
from jobs.study_analyses import SubgroupSection, write_subgroups

__all__ = ["Config", "Probed", "run"]


@dataclass(frozen=True)
class Probed(measuring.Measured):
    """What `fluoro probe` found: the tested probe, and the sweep it was chosen from.

    Parameters
    ----------
    sweep : DataFrame
        One row a candidate, metric and label: class_weight, C, features and the kind's own parameters, metric, label,
        value, low, high, n, chosen.
    convergence : str
        How well the problems of the sweep are solved, in a sentence; "" for kinds without.
    """

    sweep: pd.DataFrame = field(default_factory=pd.DataFrame)
    convergence: str = ""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return labels that cannot be judged, the candidates, then the chosen one beside baselines and by label."""
        shown = dict(super().tables())
        first = {title: shown.pop(title) for title in list(shown) if title == measuring.UNJUDGED}
        tried = probe_table.candidate_table(self.sweep)
        title = "Candidates on held-out rows (no test row among them), with 95 % intervals by patient"
        apart = subgroup_tables(measuring.result_lines(self.folder, "subgroup"))
        return first | ({title: tried} if len(tried) else {}) | shown | apart

    def lines(self) -> Iterator[str]:
        """Return how well the problems are solved, and where things lie."""
        if self.convergence:
            yield self.convergence
        if len(self.sweep):
            yield f"sweep: {self.folder / probe_table.SWEEP_FILE}"
        yield from super().lines()


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Probed:
    """Fit, choose, save and test.

    Raises
    ------
    UsageError
        An output that exists, an option that the kind does not take, or a sweep under the paper's protocol.
    DataError
        No labels, an empty split, or no label with a positive sample where the choice is made and tested.
    """
    progress = progress or Progress()
    probe_options.check(config)
    with open_run("probe", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        from_text = config.kind in candidates.FROM_TEXT and config.protocol == "sound"
        needed = ("train", "test") if config.folds else ("train", "val", "test")
        material = measuring.prepare(config, record, progress, texts=from_text, columns=config.by, needed=needed)
        inputs = material.features
        if config.kind == "attention":
            material, inputs = probe_inputs.tokens(material, config, record, progress)
        unjudged = measuring.check_positives(material, held_rows(material, config))
        table, convergence = pd.DataFrame(), ""
        with record.step("linear probe") as step:
            step.items = len(material.rows("train"))
            if config.protocol == "paper":
                setting = study_settings.linear_probe(material, config.probe, "paper", config.seed)
                assert setting.explained.head is not None  # the study's probe is a head
                kept: Any = setting.explained.head
            else:
                start = time.perf_counter()
                found, held = fit(material, inputs, config)
                setting = setting_of(material, inputs, found, held)
                kept, setting = found.probe, dataclasses.replace(setting, seconds=time.perf_counter() - start)
        if config.protocol == "sound":
            with record.step("score candidates") as step:
                step.items = len(found.candidates)
                table = probe_table.sweep_table(material, found, held, config.replicates, config.seed)
                probe_table.write_sweep(record, table, found)
                convergence = found.convergence_sentence()
        path = record.path(heads.HEAD_FILE)
        more = {"layer": config.layer} if config.kind == "attention" else {}
        heads.trained_in(kept, material.split_digest, **more).save(path)
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
        if config.by:
            with record.step("subgroups") as step:
                wanted = SubgroupSection(columns=config.by, findings=False)
                step.items = write_subgroups(
                    material, [setting], wanted, config.protocol, record, config.replicates, config.seed
                )
    done = measuring.measured(record, setting.name, head=path, unjudged=unjudged)
    return Probed(**vars(done), sweep=table, convergence=convergence)


def held_rows(material: study_settings.Material, config: Config) -> np.ndarray:
    """Return the positions of the rows on which the choice is made."""
    val = material.rows("val")
    return np.sort(np.concatenate([material.rows("train"), val])) if config.folds else val


def fit(material: study_settings.Material, inputs: np.ndarray, config: Config) -> tuple[sweeping.Sweep, np.ndarray]:
    """Return the sweep of embeddings or tokens, and the positions of the rows that it held out."""
    names, y, section = material.dataset.label_names, material.y, config.probe
    options: dict[str, Any] = {
        "label_names": names, "kind": config.kind, "c_grid": section.C, "class_weights": config.class_weight,
        "features": section.features, "ridge": section.ridge, "select": config.select, "seed": config.seed,
        "grid": {name: getattr(section, name) for name in candidates.PARAMETERS.get(config.kind, ())},
        "encoder_id": material.encoder.id, "device": str(material.encoder.device),
    }  # fmt: skip
    if config.kind in candidates.FROM_TEXT:
        asked = study_settings.ZeroShotSection(templates=config.templates)
        options["text"] = study_settings.label_texts(asked, "sound", names, material.encoder, material.cache)
        options["scale"] = float(material.encoder.logit_scale)
    held = held_rows(material, config)
    if config.folds:
        groups, seeds = material.dataset.groups[held], config.seeds
        found = sweeping.sweep_on_folds(inputs[held], y[held], groups, folds=config.folds, seeds=seeds, **options)
    else:
        train = material.rows("train")
        found = sweeping.sweep_on_validation(inputs[train], y[train], inputs[held], y[held], **options)
    return found, held


def setting_of(
    material: study_settings.Material, inputs: np.ndarray, found: sweeping.Sweep, held: np.ndarray
) -> study_settings.Setting:
    """Return the chosen probe as a setting; its thresholds come from the held-out rows."""
    scores = found.probe.probabilities(inputs)
    cut = thresholds.choose("f1", material.y[held], expit(found.logits[found.chosen]))
    name = probe_section.LINEAR_PROBE if found.kind == "logistic" else f"Probe ({found.kind})"
    head = found.probe if isinstance(found.probe, LinearHead) else None
    explained = study_settings.Explained(name, "sound", material.encoder, material.dataset.label_names, head=head)
    return study_settings.Setting(
        explained, material.features, Prediction(scores, thresholds.decide(scores, cut)), cut, 0.0
    )
