"""A study's settings done again with other splits and seeds, from the cache: nothing is embedded again.

Comes in: the settings of the run itself, which are the first repeat. Goes out: three tables and sentences in the
section "seeds".

- ``tables/seeds-<protocol>.csv``: one row a setting (and the prevalence ranking) and metric: repeats, mean, deviation
  (between repeats), lowest, highest, within (what the intervals within a repeat stand for), ratio of the two.
- ``tables/seeds-pairs-<protocol>.csv``: one row a pair of settings and metric: repeats, better (in how many), mean,
  lowest and highest difference.
- ``tables/seeds-each-<protocol>.csv``: one row a repeat, setting and metric: seed, split, value, low, high.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import baselines, repeats
from analysis.bootstrap import bootstrap_metrics
from analysis.metrics import Prediction
from engine import encoder as encoders
from engine.splits import resplit
from jobs import config as configs
from jobs import runs, study_settings
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import Material, Setting

SECTION = "seeds"
METRICS = ("lrap", "f1_macro", "exact_match", "coverage_error", "map", "auroc_macro")
BATCH = 64

ProgressCall = Callable[[str, int, int | None], None]


class RepeatSection(configs.JobConfig):
    """What is done again for each of the `seeds`."""

    splits: Literal["again", "same"] = Field(
        "again", description="again: another split each, made in the same way; same: another seed of training alone"
    )
    finetune: bool = Field(False, description="fine-tune again, too; minutes each, where a probe takes seconds")


def write_repeats(
    material: Material,
    settings: Sequence[Setting],
    protocol: str,
    config: Any,
    run: runs.Run,
    progress: ProgressCall,
) -> int:
    """Do zero-shot, the probe and, where asked for, fine-tuning again; return how many repeats there are in all.

    Parameters
    ----------
    config : jobs.study.Config
        Its `seeds`, `repeats`, `split`, sections and seed.
    """
    section: RepeatSection = config.repeats
    rows: list[dict[str, Any]] = []
    for number in range(config.seeds):
        progress(f"seeds ({protocol})", number, config.seeds)
        if number == 0:
            again, made = material, [each for each in settings if _repeated(each.name, section)]
        else:
            again = material if section.splits == "same" else _resplit(material, number, config.split)
            made = _settings(again, config, protocol, config.seed + number, progress)
        rows += _scored(again, made, number, config.seed + number, config.replicates)
    progress(f"seeds ({protocol})", config.seeds, config.seeds)
    table = pd.DataFrame(rows)
    names = list(dict.fromkeys(table["setting"]))
    pairs = [(later, earlier) for earlier, later in itertools.combinations(names[:-1], 2)]
    pairs += [(name, baselines.PREVALENCE) for name in names[:-1]]
    spreads, agreements = repeats.spread(table), repeats.agreement_of_repeats(table, pairs)
    which = "other splits and seeds" if section.splits == "again" else "other seeds of training on the same split"
    for name, frame, title, text in (
        ("seeds", spreads, "Seeds", f"The settings under {which}: mean over repeats, standard deviation between them, "
         "and the one that the intervals within them stand for (half-width over 1.96)."),
        ("seeds-pairs", agreements, "Pairs over seeds", "In how many repeats one setting is better than another."),
        ("seeds-each", table, "Each repeat", "Every repeat's test metrics with their intervals by patient."),
    ):  # fmt: skip
        write_table(run, f"{name}-{protocol}", frame, title=title, text=text, section=SECTION, protocol=protocol)
    run.record_all(sentence_rows(SECTION, repeats.repeat_sentences(spreads, agreements), protocol))
    return config.seeds


def _repeated(name: str, section: RepeatSection) -> bool:
    return section.finetune or name != study_settings.FINE_TUNING


def _resplit(material: Material, number: int, split: configs.SplitOptions) -> Material:
    how = split.how
    if how == "auto":
        # The rule of `jobs.opening.split_data`, which has set the column by now.
        how = "given"
    dataset = resplit(material.dataset, number, how, split.seed, split.fractions)
    return dataclasses.replace(material, dataset=dataset)


def _settings(material: Material, config: Any, protocol: str, seed: int, progress: ProgressCall) -> list[Setting]:
    zero_shot = study_settings.zero_shot(material, config.zero_shot, protocol)
    probe = study_settings.linear_probe(material, config.probe, protocol, seed, config.zero_shot)
    made = [zero_shot, probe]
    if config.finetune.enabled and config.repeats.finetune:
        head = probe.explained.head if protocol == "sound" else None

        def embed(child: encoders.Encoder) -> np.ndarray:
            return _embedded(material, child)

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            tuned = study_settings.fine_tuning(material, config.finetune, protocol, seed, folder, head, embed, progress)
            made.append(tuned)
    return made


def _embedded(material: Material, child: encoders.Encoder) -> np.ndarray:
    """Return embeddings (n, d) by an encoder that nobody asks again, so that they do not go into the cache."""
    pixels = material.cache.pixels(material.dataset, material.encoder.preprocess)
    count = len(material.dataset)
    parts = [
        child.encode_pixels(np.asarray(pixels[start : min(start + BATCH, count)])).cpu().numpy()
        for start in range(0, count, BATCH)
    ]
    return np.concatenate(parts)


def _scored(
    material: Material, settings: Sequence[Setting], number: int, seed: int, replicates: int
) -> list[dict[str, Any]]:
    test = material.rows("test")
    predictions = {
        each.name: Prediction(each.prediction.scores[test], each.prediction.decisions[test]) for each in settings
    }
    predictions[baselines.PREVALENCE] = baselines.prevalence_ranking(material.y[material.rows("train")], len(test))
    drawn = bootstrap_metrics(
        material.y[test],
        predictions,
        material.dataset.groups[test],
        label_names=material.dataset.label_names,
        replicates=replicates,
        seed=seed,
    )
    rows = []
    for name in predictions:
        for metric in METRICS:
            value, low, high, _ = drawn.interval(name, metric)
            rows.append(
                {"repeat": number, "seed": seed, "split": material.split_digest, "test_images": len(test),
                 "setting": name, "metric": metric, "value": value, "low": low, "high": high}
            )  # fmt: skip
    return rows
