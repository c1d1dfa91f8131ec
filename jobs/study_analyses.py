"""What a study asks beyond its metrics: other thresholds, subgroups, the shape of the space, leaks between its splits.

Comes in: the settings' predictions and embeddings for all samples. Goes out: result lines, one kind a question
("threshold", "subgroup", "gap", "space", "retrieval", "split", "leak"), and sentences drawn from them by fixed rules.
Only test rows are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import distances, leaks, retrieval_scores, subgroups, threshold_families, verdicts
from analysis.bootstrap import clustered_bootstrap, percentile_ends
from analysis.claims import DISTINCT as ONE
from analysis.claims import OVERLAPPING as SEVERAL
from analysis.metrics import OVERALL_METRICS, mean_of_defined
from analysis.space import survey
from analysis.space.measures import Measure
from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError
from engine.labels import nothing_label
from engine.splits import SPLITS
from jobs import config as configs
from jobs import runs
from jobs.leak_search import image_pairs
from jobs.opening import check_columns
from jobs.study_records import number, sentence_rows
from jobs.study_settings import Material, Setting

USUAL_COLUMNS = ("view", "sex", "age")
FINDINGS = "findings"
SUBGROUP_METRICS = (
    "f1_macro",
    "exact_match",
    "lrap",
    "coverage_error",
    "map",
    "auroc_macro",
    "brier",
    "over_prediction",
)
# Metrics of a label in which one subgroup can be better than another.
LABEL_GAPS = ("precision", "recall", "f1", "auroc", "ap", "brier", "ece", "over_prediction")
# Of the two kinds of images, those that do not count findings.
TOLD_OF_FINDINGS = ("auroc_macro", "lrap")
# Of a column that is used because it is there, and of one that is asked for.
MOST_SUBGROUPS, MOST_ASKED_FOR = 12, 50
NEIGHBOURS = 10


class SubgroupSection(configs.JobConfig):
    """Whom the metrics are taken for apart."""

    enabled: bool = True
    columns: list[str] | None = Field(
        None, description="sample columns, numbers in bands; view, sex and age where the data have them unless given"
    )
    age_bands: list[float] = Field([18, 40, 60, 80], description="ages at which a new band begins")
    permutations: int = Field(500, ge=100, description="of the test of the gap between best and worst")
    findings: bool = Field(True, description="also by how many findings an image has")


class SpaceSection(configs.JobConfig):
    """The shape of the embedding space."""

    enabled: bool = True
    replicates: int = Field(200, ge=0, description="bootstrap replicates, by patient")
    permutations: int = Field(200, ge=0, description="label permutations of the nulls")


class LeakSection(configs.JobConfig):
    """Near-duplicate images and identical texts across the split."""

    enabled: bool = True
    threshold: float = Field(
        leaks.THRESHOLD, gt=-1, le=1, description="cosine from which two images are near-duplicates"
    )


def write_thresholds(
    material: Material, settings: Sequence[Setting], protocol: str, run: runs.Run, replicates: int, seed: int
) -> None:
    """Score all settings' decisions under every family of thresholds, and say where the conclusion changes."""
    table = threshold_families.threshold_families(
        material.y,
        {setting.name: setting.prediction.scores for setting in settings},
        material.split,
        material.dataset.groups,
        label_names=material.dataset.label_names,
        replicates=replicates,
        seed=seed,
    )
    run.record_all(_rows(table, "threshold", protocol))
    said = verdicts.threshold_sentences(threshold_families.conclusions(table)) if len(settings) > 1 else []
    run.record_all(sentence_rows("thresholds", said, protocol))


def write_subgroups(
    material: Material,
    settings: Sequence[Setting],
    section: SubgroupSection,
    protocol: str,
    run: runs.Run,
    replicates: int,
    seed: int,
) -> int:
    """Score all settings in the subgroups of every column and test the gap of best and worst; return how many.

    Every metric, overall and of each label, goes to ``tables/subgroups-all-<protocol>.csv`` and every gap to
    ``tables/subgroup-gaps-<protocol>.csv``; result lines, and so the page, have `SUBGROUP_METRICS`.
    """
    test = material.rows("test")
    predictions = {
        setting.name: type(setting.prediction)(setting.prediction.scores[test], setting.prediction.decisions[test])
        for setting in settings
    }
    columns = _subgroup_columns(material, section)
    every: list[pd.DataFrame] = []
    every_gap: list[pd.DataFrame] = []
    for name, values in columns.items():
        found = subgroups.subgroup_metrics(
            material.y[test],
            predictions,
            material.dataset.groups[test],
            values[test],
            label_names=material.dataset.label_names,
            column=name,
            replicates=replicates,
            permutations=section.permutations,
            seed=seed,
            device=material.device,
        )
        shown = found.table().merge(found.counts[["subgroup", "groups", "compared"]], on="subgroup")
        every.append(shown.assign(column=name))
        shown = shown[shown["metric"].isin(SUBGROUP_METRICS) & shown["label"].isna()]
        run.record_all(_rows(shown, "subgroup", protocol, column=name))
        if name == FINDINGS:
            # Metrics count findings, so gaps between few and many are there by definition: one question, two kinds.
            both = _held_together(found)
            every_gap.append(both.rename(columns={"difference": "gap"}).assign(column=name))
            told = both[both["metric"].isin(TOLD_OF_FINDINGS) & both["label"].isna()]
            run.record_all(sentence_rows("subgroups", verdicts.findings_sentences(told, ONE, SEVERAL), protocol))
            continue
        of_labels = found.gaps(LABEL_GAPS, material.dataset.label_names)
        every_gap.append(pd.concat([found.gaps(OVERALL_METRICS), of_labels], ignore_index=True).assign(column=name))
        gaps = found.gaps(SUBGROUP_METRICS).rename(columns={"gap": "value"})
        run.record_all(_rows(gaps, "gap", protocol, column=name))
        run.record_all(sentence_rows("subgroups", verdicts.gap_sentences(name, gaps, found.counts), protocol))
    _write_whole(every, f"subgroups-all-{protocol}", run)
    _write_whole(every_gap, f"subgroup-gaps-{protocol}", run)
    return len(columns)


def _held_together(found: subgroups.Subgroups) -> pd.DataFrame:
    """Return images with one finding less those with several, every metric; no rows where either is missing."""
    if not {ONE, SEVERAL} <= set(found.bootstraps):
        return pd.DataFrame(columns=["setting", "metric", "label", "low"])
    labels = next(iter(found.bootstraps.values())).label_names
    overall = found.difference(ONE, SEVERAL, OVERALL_METRICS)
    table = pd.concat([overall, found.difference(ONE, SEVERAL, LABEL_GAPS, labels)], ignore_index=True)
    return table.assign(best=ONE, worst=SEVERAL)


def _write_whole(parts: Sequence[pd.DataFrame], name: str, run: runs.Run) -> None:
    """Write a table that is too long for the page, its column of the samples first."""
    if not sum(len(part) for part in parts):
        return
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    table.insert(0, "column", table.pop("column"))
    table.to_csv(run.path(f"tables/{name}.csv"), index=False, float_format="%.6g")


def write_space(
    material: Material, settings: Sequence[Setting], section: SpaceSection, protocol: str, run: runs.Run, seed: int
) -> int:
    """Measure the space of every encoder on the test split, each number beside its null; return how many encoders."""
    test = material.rows("test")
    names, truth, groups = material.dataset.label_names, material.y[test], material.dataset.groups[test]
    classes = distances.first_positive(truth)
    if len(np.unique(classes[classes >= 0])) < 2:
        text = "The shape of the space is not measured: fewer than two classes have test samples."
        run.record_all(sentence_rows("space", [text], protocol))
        return 0
    options: dict[str, Any] = {
        "label_names": names,
        "replicates": section.replicates,
        "permutations": section.permutations,
        "seed": seed,
        "normalize": protocol == "sound",
        "device": material.device,
    }
    distinct = _distinct(settings)
    for setting in distinct:
        features = setting.features[test]
        k = min(NEIGHBOURS, len(np.unique(groups)) - 1)
        found: list[Measure] = []
        asked: list[tuple[str, Callable[[], Sequence[Measure]]]] = [
            ("Label separation", partial(distances.label_separation, features, truth, groups, **options)),
            ("Overlap of labels", partial(distances.overlap_distances, features, truth, groups, **options)),
        ]
        if k >= 1:
            survey_of = partial(survey.measure_space, features, classes, truth, groups, k=k, **options)
            asked.insert(0, ("The shape of the space", survey_of))
        for name, measured in asked:
            # A test split too small for one question must not take the others' answers with it.
            try:
                found += measured()
            except DataError as error:
                text = f"{name} of {setting.name} ({protocol}) is not measured: {error}."
                run.record_all(sentence_rows("space", [text], protocol))
        run.record_all([_measure_row(each, protocol, setting.name) for each in found])
    return len(distinct)


def write_retrieval_scores(
    material: Material, settings: Sequence[Setting], protocol: str, run: runs.Run, replicates: int, seed: int
) -> int:
    """Score search by test images, and by the labels' prompts; return how many queries were asked of each encoder.

    The gallery is all images but those of the query's patient. Texts are told by their words, so that an identical
    report of another patient counts as found. Intervals resample the patients who ask; a prompt asks once for each
    label, so its figures have none.
    """
    test, dataset = material.rows("test"), material.dataset
    own: dict[str, Any] = {"groups": dataset.groups, "queries": test}
    for setting in _distinct(settings):
        found = retrieval_scores.image_to_image(setting.features, material.y, keep_each=True, **own)
        ranking = retrieval_scores.label_ranking(setting.features, material.y, **own)
        chance = float(found.macro()["chance"])
        assert found.each is not None  # asked for
        rows = [
            _searched(f"image to image, precision@{k}", found.each[:, :, place], dataset.groups[test], chance,
                      replicates, seed)
            for place, k in enumerate(found.ks)
        ]  # fmt: skip
        by_chance = float(mean_of_defined(ranking.chance))
        rows.append({"metric": "image to image, mAP", "value": ranking.macro(), "null": by_chance, "n": len(test)})
        if setting.explained.text is not None:
            asked = retrieval_scores.text_to_image(setting.prediction.scores[test], material.y[test])
            rows += [
                {"metric": f"prompt to image, precision@{k}", "value": float(value),
                 "null": float(asked.macro()["chance"]), "n": int(asked.queries.sum())}
                for k, value in zip(asked.ks, asked.macro()["precision"], strict=True)
            ]  # fmt: skip
        rows += _paired_rows(material, setting, test, replicates, seed)
        base = {"kind": "retrieval", "protocol": protocol, "setting": setting.name, "split": "test"}
        run.record_all(
            [{**base, **{name: number(each) if isinstance(each, float) else each for name, each in row.items()}}
             for row in rows]
        )  # fmt: skip
    return len(test)


def _searched(
    metric: str, each: np.ndarray, groups: np.ndarray, chance: float, replicates: int, seed: int
) -> dict[str, Any]:
    """Return a figure's row: the mean over labels of the mean over queries (q, L), with its interval by patient."""
    means = clustered_bootstrap(each, groups, replicates=replicates, seed=seed)
    value = float(mean_of_defined(means.value))
    # A label that no query of a resample has enters with its own value, so that each resample averages the same labels.
    drawn = np.where(np.isnan(means.replicates), means.value, means.replicates)
    low, high = percentile_ends(mean_of_defined(drawn), 0.95)
    ends = (float(low), float(high)) if len(set(groups)) > 1 else (float("nan"), float("nan"))
    return {"metric": metric, "value": value, "low": ends[0], "high": ends[1], "null": chance, "n": len(each)}


def _paired_rows(
    material: Material, setting: Setting, test: np.ndarray, replicates: int, seed: int
) -> list[dict[str, Any]]:
    """Return how often a test image finds its own report and a report its image, with what chance gives; [] without."""
    having = test[(material.dataset.samples["text"] != "").to_numpy()[test]]
    if len(having) < 2:
        return []
    kept = material.dataset.take(having)
    # Fine-tuning moves the image tower only, so its parent's texts are its own.
    texts = material.cache.features(kept, material.encoder, "text")
    if len(texts) < 2:
        return []
    words = kept.samples["text"].to_numpy(dtype=object)[texts.rows]
    groups = kept.groups[texts.rows]
    # One vector a different text; images that have it share it.
    different, first, of_image = np.unique(words.astype(str), return_index=True, return_inverse=True)
    scores = normalise_rows(setting.features[having][texts.rows]) @ normalise_rows(texts.values[first]).T
    there = np.bincount(of_image)
    rows = []
    found = retrieval_scores.paired_hits(scores, words, different)
    for k, hits in zip(retrieval_scores.KS, found.T.astype(np.float64), strict=True):
        chance = min(1.0, k / len(different))
        rows.append(_searched(f"image to report, recall@{k}", hits[:, None], groups, chance, replicates, seed))
    found = retrieval_scores.paired_hits(scores.T, different, words)
    for k, hits in zip(retrieval_scores.KS, found.T.astype(np.float64), strict=True):
        chance = 1 - float(np.mean([_miss(len(words), int(count), k) for count in there]))
        # A text that several patients share is resampled as itself.
        rows.append(_searched(f"report to image, recall@{k}", hits[:, None], different, chance, replicates, seed))
    return rows


def _miss(items: int, right: int, k: int) -> float:
    """Return the chance that none of k items drawn of so many is one of the right ones."""
    left = np.arange(min(k, items), dtype=np.float64)
    return float(np.prod(np.maximum(items - right - left, 0) / (items - left)))


def write_split(material: Material, section: LeakSection, run: runs.Run) -> None:
    """Write each label's prevalence in each part of the split, and what is seen in training and tested again."""
    parts = {name: material.rows(name) for name in SPLITS}
    for name, rows in parts.items():
        counts = material.y[rows].sum(axis=0)
        run.record_all(
            [
                {"kind": "split", "split": name, "label": label, "metric": "prevalence", "value": count / len(rows),
                 "n": len(rows)}
                for label, count in zip(material.dataset.label_names, counts.tolist(), strict=True)
            ]
        )  # fmt: skip
    if not section.enabled:
        return
    dataset, split = material.dataset, material.split
    found = image_pairs(
        material.cache, dataset, material.encoder.id, material.features, material.keys, section.threshold
    )
    texts = np.array([leaks.plain_text(text) for text in dataset.samples["text"]])
    same = leaks.name_pairs(leaks.identical_pairs(texts, split), "identical text", dataset.ids, dataset.groups, split)
    table = pd.concat([found.pairs, same], ignore_index=True)
    table.to_csv(run.path("leaks.csv"), index=False)
    counts = {str(kind): int(count) for kind, count in table["kind"].value_counts().items()}
    run.record_all([{"kind": "leak", "metric": kind, "value": count} for kind, count in counts.items()])
    said = verdicts.leak_sentence(counts, section.threshold)
    if found.how != "exact":
        said += f" Near-duplicates were looked for with the {found.how} index, which may miss some."
    run.record_all(sentence_rows("data", [said]))


def _distinct(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings whose embeddings are their own; the probe's are zero-shot's."""
    distinct: list[Setting] = []
    for setting in settings:
        if not any(setting.features is earlier.features for earlier in distinct):
            distinct.append(setting)
    return distinct


def _subgroup_columns(material: Material, section: SubgroupSection) -> dict[str, np.ndarray]:
    """Return the values of each column for all samples; ages in bands, and how many findings there are."""
    samples = material.dataset.samples
    asked = section.columns
    names = [name for name in USUAL_COLUMNS if name in samples] if asked is None else list(asked)
    check_columns(names, samples)
    found: dict[str, np.ndarray] = {}
    test = material.rows("test")
    for name in names:
        if name == "age":
            given = subgroups.age_bands(samples[name], section.age_bands)
        else:
            given = subgroups.number_bands(samples[name], MOST_SUBGROUPS)
        values = np.array(["" if pd.isna(value) else str(value) for value in given], dtype=object)
        different = len(set(values[test]) - {""})
        # A column asked for by name is an error where it cannot serve; a usual one is left out.
        if asked is None and not 2 <= different <= MOST_SUBGROUPS:
            continue
        if different > MOST_ASKED_FOR:
            raise UsageError(
                f"the column {name!r} has {different} different values among the test samples; subgroups are at most "
                f"{MOST_ASKED_FOR}, so choose a column of fewer"
            )
        found[name] = values
    names_of = material.dataset.label_names
    findings = subgroups.finding_counts(material.y, names_of, nothing_label(names_of))
    if section.findings and len(set(findings[test])) > 1:
        found[FINDINGS] = findings
    return found


def _measure_row(measure: Measure, protocol: str, setting: str) -> dict[str, Any]:
    return {
        "kind": "space",
        "protocol": protocol,
        "setting": setting,
        "baseline": False,
        "split": "test",
        "metric": measure.name,
        "label": measure.label,
        "n": measure.samples,
        "note": measure.note,
        "better": measure.better,
        **{
            name: number(getattr(measure, name))
            for name in ("value", "low", "high", "null", "null_low", "null_high", "p")
        },
    }


def _rows(table: pd.DataFrame, kind: str, protocol: str, **more: Any) -> list[dict[str, Any]]:
    """Return a table's lines as result lines; what is no number is None, because JSON has no NaN."""
    base = {"kind": kind, "protocol": protocol, "split": "test", **more}
    return [
        {**base, **{name: number(value) if isinstance(value, float) else _plain(value) for name, value in line.items()}}
        for line in table.to_dict("records")
    ]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
