"""``fluoro study CONFIG``: a whole study in one run folder.

Comes in: a config (data, split, model, protocols). The way through: open -> embed -> index -> the settings of
each protocol -> metrics and distances -> heatmaps against annotations -> neighbours and map -> report. Goes out: a
run folder from whose files alone ``report.html`` can be built again. Each step is timed in the run's cost ledger; what
was cached is not computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import report
from analysis.finetuning.inputs import KeptResults
from engine import cache as caches
from engine import encoder as encoders
from engine import index as indexes
from engine import sources, splits
from engine.dataset import Dataset
from engine.errors import DataError, UsageError
from jobs import config as configs
from jobs import (
    heads,
    heatmap_tables,
    measuring,
    opening,
    probe_section,
    run_tables,
    runs,
    study_analyses,
    study_cards,
    study_claims,
    study_data,
    study_fidelity,
    study_heatmaps,
    study_labels,
    study_ledger,
    study_records,
    study_repeats,
    study_scores,
    study_sensitivity,
    study_settings,
    study_showcase,
)
from jobs import progress as displays

log = logging.getLogger(__name__)


class DataSection(configs.JobConfig):
    """Which samples."""

    source: str = Field(description="schema string; a relative path in it is taken under root where root is given")
    root: Path | None = Field(None, description="folder of the data, given with --set data.root=FOLDER")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the data set's reader")


class Config(configs.ModelOptions, configs.CacheOptions):
    """A study."""

    title: str = "Study report"
    subtitle: str = ""
    # Training changes weights, and figures are compared between machines: float32 unless asked for otherwise.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("fp32", description="numbers the model computes in")
    data: DataSection
    split: configs.SplitOptions = Field(default_factory=configs.SplitOptions)
    protocols: list[Literal["sound", "paper"]] = Field(["sound"], min_length=1)
    zero_shot: study_settings.ZeroShotSection = Field(default_factory=study_settings.ZeroShotSection)
    probe: probe_section.StudyProbeSection = Field(default_factory=probe_section.StudyProbeSection)
    finetune: study_settings.FinetuneSection = Field(default_factory=study_settings.FinetuneSection)
    heatmaps: study_heatmaps.HeatmapSection = Field(default_factory=study_heatmaps.HeatmapSection)
    showcase: study_showcase.ShowcaseSection = Field(default_factory=study_showcase.ShowcaseSection)
    subgroups: study_analyses.SubgroupSection = Field(default_factory=study_analyses.SubgroupSection)
    space: study_analyses.SpaceSection = Field(default_factory=study_analyses.SpaceSection)
    leaks: study_analyses.LeakSection = Field(default_factory=study_analyses.LeakSection)
    replicates: int = Field(1000, ge=100, description="bootstrap replicates, resampling patients")
    permutations: int = Field(200, ge=20, description="of the nulls: truth dealt to other patients")
    seed: int = 0
    seeds: int = Field(1, ge=1, le=100, description="how often splits and training are done, this run's included")
    repeats: study_repeats.RepeatSection = Field(default_factory=study_repeats.RepeatSection)
    sensitivity: bool = Field(True, description="change thresholds, prompts, normalisation and labels, one at a time")
    batch_size: int | None = Field(None, ge=1, description="images a batch; by device unless given")
    threads: int | None = Field(None, ge=1, description="threads that read and decode; by cores unless given")
    max_pixels: int | None = Field(None, ge=1, description="refuse larger images (decompression bombs)")


@dataclass(frozen=True)
class Result:
    """Where the study lies, what it found and how many samples failed."""

    folder: Path
    report: Path
    failures: int
    summary: dict[str, dict[str, dict[str, float]]]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the settings' test metrics of each protocol."""
        shown = {}
        for protocol, settings in self.summary.items():
            frame = pd.DataFrame(settings).T.rename_axis("setting").reset_index()
            shown[f"Test metrics, protocol {protocol}"] = frame
        return shown

    def lines(self) -> Iterator[str]:
        """Return where to look."""
        yield f"report: {self.report}"


def run(
    config: Config,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: displays.Progress | None = None,
) -> Result:
    """Run a whole study and return where its report lies.

    Parameters
    ----------
    config : Config
    out : Path, optional
        Run folder; a new one in the cache unless given.
    overwrite, resume : bool
        What to do where it exists (`jobs.runs.open_run`).
    progress : Progress, optional

    Raises
    ------
    UsageError
        No data root given, an output folder that exists.
    engine.errors.FluoroscopeError
        What any step raises; samples that fail alone are listed in the result instead.
    """
    source = _source(config.data)
    _check_head(config)
    progress = progress or displays.make_progress("quiet")
    cache = caches.Cache(config.cache)
    with runs.open_run("study", config, out=out, cache=config.cache, overwrite=overwrite, resume=resume) as record:
        record.note(title=config.title, subtitle=config.subtitle, protocol=config.protocols)
        with record.step("open data") as step:
            dataset = sources.open_dataset(source, **config.data.options)
            dataset = opening.split_data(dataset, config.split)
            step.items = len(dataset)
        with record.step("load model"):
            encoder = opening.load_model(config, config.cache, dataset)
        material = _embed(config, dataset, encoder, cache, record, progress)
        empty = [name for name in splits.SPLITS if not len(material.rows(name))]
        if empty:
            raise DataError(
                f"the split {config.split.how!r} leaves no samples in {', '.join(empty)}; choose another with "
                "--set split.how="
            )
        measuring.describe(material, config.split, record)
        with record.step("split and leaks"):
            study_analyses.write_split(material, config.leaks, record)
            study_data.write_data(material, record)
        with record.step("label sources") as step:
            step.items = study_labels.write_label_sources(material, record, config.replicates, config.seed)
        with record.step("index") as step:
            index = indexes.build_index(cache, encoder.id, "image", "exact")
            step.items = len(index)
        compared: dict[str, list[study_settings.Setting]] = {}
        cases: list[dict[str, Any]] = []
        between: list[pd.DataFrame] = []
        for protocol in config.protocols:
            # What fine-tuning leaves frozen need not run again for each fold of the heatmaps.
            kept = KeptResults() if config.heatmaps.enabled and config.heatmaps.folds else None
            compared[protocol] = _settings(config, material, protocol, record, progress, kept)
            with record.step(f"metrics ({protocol})") as step:
                step.items = study_scores.write_metrics(
                    material, compared[protocol], protocol, record, config.replicates, config.seed, config.permutations
                )
            with record.step(f"distances ({protocol})"):
                between.append(
                    study_scores.write_distances(
                        material, compared[protocol], protocol, record, config.replicates, config.seed
                    )
                )
                study_scores.write_pairs(between, record)
            _questions(config, material, compared[protocol], protocol, record)
            _soundness(config, material, compared[protocol], protocol, record, progress)
            if config.heatmaps.enabled:
                cases += _heatmaps(config, material, compared[protocol], protocol, record, progress, kept)
        record.path("heatmaps.json").write_text(json.dumps(cases, ensure_ascii=False))
        study_scores.write_score_arrays(material, compared, record)
        if "paper" in config.protocols:
            study_scores.write_references(record)
            study_fidelity.write_fidelity(material, compared["paper"], config.split.how, record)
        first = compared[config.protocols[0]]
        with record.step("neighbours"):
            study_showcase.write_retrieval(material, first[0], index, config.showcase, record)
        with record.step("embedding map") as step:
            distinct = [setting for setting in first if not probe_section.is_probe(setting.name)]
            study_showcase.write_embedding_map(material.dataset, distinct, record, config.seed)
            step.items = len(material.dataset)
        study_cards.write_model(material, compared, record)
        study_ledger.write_ledger(
            record, compared, encoder.id, len(material.dataset), config.seeds, runs.runs_folder(config.cache)
        )
        study_cards.write_cards(record)
    page = report.render_report(record.folder)
    return Result(record.folder, page, len(record.failures), study_scores.summary(record.folder))


def _check_head(config: Config) -> None:
    """Refuse what would test a head that was trained before on the samples it learnt from."""
    if config.probe.head is None:
        return
    others = []
    if config.seeds > 1 and config.repeats.splits == "again":
        others.append("seeds with other splits (take --set seeds=1 or --set repeats.splits=same)")
    if config.heatmaps.enabled and config.heatmaps.folds:
        others.append("heatmaps by folds (take --set heatmaps.folds=0)")
    if others:
        raise UsageError(
            f"the head {str(config.probe.head)!r} is trained already and cannot be trained again for "
            f"{' and '.join(others)}; or leave probe.head out"
        )
    if "sound" not in config.protocols:
        raise UsageError("probe.head is for the sound protocol; the published one trains a probe of its own")


def _source(data: DataSection) -> str:
    """Return the schema string with its path taken under the data root."""
    if data.root is None:
        kind, _, path = data.source.partition(":")
        if kind in ("table", "iu-xray", "folder") and not Path(path.partition("?")[0]).is_absolute():
            raise UsageError(
                f"data.source {data.source!r} is relative and no data.root is given; add --set data.root=FOLDER, "
                "the folder that holds the data"
            )
        return data.source
    kind, _, path = data.source.partition(":")
    place, mark, query = path.partition("?")
    return f"{kind}:{(data.root / place).as_posix()}{mark}{query}"


def _embed(
    config: Config, dataset: Dataset, encoder: encoders.Encoder, cache: caches.Cache, record: runs.Run,
    progress: displays.Progress,
) -> study_settings.Material:  # fmt: skip
    """Embed images, pixels and texts, and keep the samples that have an image embedding."""
    texts = bool((dataset.samples["text"] != "").any())
    for what in [("image", "pixels"), ("text",)] if texts else [("image", "pixels")]:
        with record.step(f"embed {' and '.join(what)}") as step:
            settled = partial(record.plan, encoder.id, dataset.schema, what)
            done = cache.embed(dataset, encoder, what, **_plan(config), settled=settled, progress=progress)
            step.items = done.computed.get(what[0], 0)
            step.reused = done.reused.get(what[0], 0)
            step.bytes = done.bytes
            record.fail(done.failures)
            if "image" in what and not step.items and not step.reused:
                place = record.folder / "failures.csv"
                raise DataError(f"no image of {dataset.called} could be embedded; {place} has the reason of each")
    features = cache.features(dataset, encoder, "image")
    kept = dataset.take(features.rows)
    return study_settings.Material(kept, encoder, features.values, features.keys, cache)


def _plan(config: Config) -> dict[str, Any]:
    """Return how embedding is to be done, for `Cache.embed`."""
    limits = {"max_pixels": config.max_pixels} if config.max_pixels else None
    return {"batch_size": config.batch_size, "threads": config.threads, "limits": limits}


def _settings(
    config: Config,
    material: study_settings.Material,
    protocol: str,
    record: runs.Run,
    progress: displays.Progress,
    kept: KeptResults | None,
) -> list[study_settings.Setting]:
    """Run zero-shot, linear probe and, where asked, fine-tuning."""
    with record.step(f"zero-shot ({protocol})") as step:
        zero_shot = study_settings.zero_shot(material, config.zero_shot, protocol)
        step.items = len(material.dataset)
    with record.step(f"linear probe ({protocol})") as step:
        probe = study_settings.linear_probe(material, config.probe, protocol, config.seed, config.zero_shot)
        step.items = len(material.rows("train"))
    probe_head = probe.explained.head
    assert probe_head is not None  # a probe is a head
    if config.probe.head is not None and protocol == "sound":
        said = heads.origin_sentence(probe_head, config.probe.head, material.split_digest)
        own = probe_head.provenance.get(heads.SPLIT) == material.split_digest
        log.log(logging.INFO if own else logging.WARNING, said)
        record.record_all(study_records.sentence_rows("classification", [said], protocol))
    else:
        probe_head = heads.trained_in(probe_head, material.split_digest)
    probe_head.save(record.path(f"heads/probe-{protocol}.npz"))
    if not config.finetune.enabled:
        return [zero_shot, probe]

    def embed(child: encoders.Encoder) -> np.ndarray:
        settled = partial(record.plan, child.id, material.dataset.schema, ("image",))
        done = material.cache.embed(
            material.dataset, child, ("image",), **_plan(config), settled=settled, progress=progress
        )
        if len(done.failures):
            record.fail(done.failures)
            raise DataError(f"{len(done.failures)} images failed under the fine-tuned encoder; see failures.csv")
        return material.cache.features(material.dataset, child, "image").values

    with record.step(f"fine-tuning ({protocol})") as step:
        tuned = study_settings.fine_tuning(
            material,
            config.finetune,
            protocol,
            config.seed,
            record.path(f"models/finetuned-{protocol}"),
            probe_head if protocol == "sound" else None,
            embed,
            progress,
            kept,
        )
        step.items = tuned.details["images"]
    record.record_all(study_records.sentence_rows("classification", [tuned.details["said"]], protocol))
    known = [*record.provenance["encoders"]]
    record.note(encoders=[*known, opening.encoder_row(tuned.explained.encoder)])
    return [zero_shot, probe, tuned]


def _questions(
    config: Config,
    material: study_settings.Material,
    settings: Sequence[study_settings.Setting],
    protocol: str,
    record: runs.Run,
) -> None:
    """Ask what the threshold, the subgroup and the shape of the space have to say."""
    with record.step(f"thresholds ({protocol})"):
        study_analyses.write_thresholds(material, settings, protocol, record, config.replicates, config.seed)
    if config.subgroups.enabled:
        with record.step(f"subgroups ({protocol})") as step:
            step.items = study_analyses.write_subgroups(
                material, settings, config.subgroups, protocol, record, config.replicates, config.seed
            )
    if config.space.enabled:
        with record.step(f"space ({protocol})") as step:
            step.items = study_analyses.write_space(material, settings, config.space, protocol, record, config.seed)
    with record.step(f"retrieval ({protocol})") as step:
        step.items = study_analyses.write_retrieval_scores(
            material, settings, protocol, record, config.replicates, config.seed
        )


def _soundness(
    config: Config,
    material: study_settings.Material,
    settings: Sequence[study_settings.Setting],
    protocol: str,
    record: runs.Run,
    progress: displays.Progress,
) -> None:
    """Test the study's claims, do it again from other seeds, and change its choices one at a time."""
    with record.step(f"claims ({protocol})") as step:
        step.items = study_claims.write_claims(
            material, settings, protocol, record, config.replicates, config.permutations, config.seed
        )
    if config.sensitivity:
        with record.step(f"sensitivity ({protocol})") as step:
            step.items = study_sensitivity.write_sensitivity(
                material,
                settings,
                config.zero_shot,
                config.probe,
                protocol,
                record,
                config.replicates,
                config.seed,
            )
    if config.seeds > 1:
        with record.step(f"seeds ({protocol})") as step:
            step.items = study_repeats.write_repeats(material, settings, protocol, config, record, progress)


def _heatmaps(
    config: Config,
    material: study_settings.Material,
    settings: Sequence[study_settings.Setting],
    protocol: str,
    record: runs.Run,
    progress: displays.Progress,
    kept: KeptResults | None,
) -> list[dict[str, Any]]:
    """Score the settings' heatmaps against the annotations, where there are any; return what the report shows."""
    section, dataset = config.heatmaps, material.dataset
    if not len(dataset.annotations.pairs):
        text = "The data set has no boxes or masks, so heatmaps are not scored."
        record.record("sentence", section="heatmaps", text=text)
        return []
    pictures = study_heatmaps.PictureWriter(record, protocol, dataset)
    with record.step(f"heatmaps ({protocol})") as step, tempfile.TemporaryDirectory() as scratch:

        def refit(fold: int, held_out: np.ndarray) -> list[study_settings.Explained]:
            return _without(material, held_out, config, protocol, Path(scratch) / f"fold-{fold}", progress, kept)

        scored = study_heatmaps.score(
            dataset,
            [setting.explained for setting in settings],
            section,
            pictures,
            refit,
            lambda done, total: progress(f"heatmaps ({protocol})", done, total),
        )
        step.items = len(scored)
    if not len(scored):
        text = "No annotated finding lies in the samples that are scored, so heatmaps are not."
        record.record("sentence", section="heatmaps", text=text)
        return []
    scored.to_csv(record.path(f"tables/findings-{protocol}.csv"), index=False)
    means = heatmap_tables.summaries(scored, config.replicates, config.seed)
    record.record_all(heatmap_tables.localization_rows(means, protocol))
    compared = heatmap_tables.differences(scored, config.replicates, config.seed)
    compared.to_csv(record.path(f"tables/heatmap-differences-{protocol}.csv"), index=False)
    run_tables.write_table(
        record,
        f"heatmap-verdicts-{protocol}",
        heatmap_tables.verdict_grid(compared),
        title="Heatmaps against what knows less",
        text="Each setting minus each null over the same findings, in pointing game / energy inside; above or below "
        "only where the 95 % intervals of both, by patient, leave out zero. The mean map of others has not seen the "
        "image, a random label is not in it, random weights have learnt nothing. The intervals: "
        f"tables/heatmap-differences-{protocol}.csv.",
        section="heatmaps",
        protocol=protocol,
    )
    sentences = heatmap_tables.heatmap_sentences(scored, compared)
    record.record_all(study_records.sentence_rows("heatmaps", sentences, protocol))
    return pictures.cases


def _without(
    material: study_settings.Material,
    held_out: np.ndarray,
    config: Config,
    protocol: str,
    scratch: Path,
    progress: displays.Progress,
    kept: KeptResults | None,
) -> list[study_settings.Explained]:
    """Return the settings trained without some rows; an eighth of the other groups chooses."""
    dataset = material.dataset
    rest = np.setdiff1d(np.arange(len(dataset)), held_out)
    split = np.full(len(dataset), "test", dtype=object)
    split[rest] = splits.grouped_split(dataset.groups[rest], (0.875, 0.125, 0.0), config.seed)
    fold = dataclasses.replace(material, dataset=dataset.with_split(split))
    head, _ = study_settings.probe_head(fold, config.probe, protocol, config.seed, config.zero_shot)
    name = study_settings.probe_name(config.probe, protocol)
    found = [
        study_settings.zero_shot(fold, config.zero_shot, protocol).explained,
        study_settings.Explained(name, protocol, material.encoder, head.label_names, head=head),
    ]
    if config.finetune.enabled:
        start = head if protocol == "sound" else None
        tuned, _ = study_settings.tuned_tower(
            fold, config.finetune, protocol, config.seed, scratch, start, progress, kept
        )
        found.append(tuned)
    return found
