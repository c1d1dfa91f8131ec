"""`fluoro distances`: how far apart classes lie, what shape embedding space has, and what chance would give.

Comes in: a data set, a model, optionally a second model. Goes out: on the samples of one split, the study's inter,
intra and ratio, forms of them that fit several labels, the shape of the space (silhouette, neighbours, hubs, uniformity
...), likeness to the second model's space, the gap between images and texts, each with an interval by patient and
beside its null (docs/verbs.md says which); and maps as pictures. ``protocol: paper`` takes embeddings as they are,
``sound`` brings them to length one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import distances, space
from engine.errors import UsageError
from engine.features import StoredRows
from jobs import measuring, opening, space_maps, study_scores, study_settings
from jobs.progress import Progress
from jobs.runs import Run, open_run
from jobs.study_records import number

SETTING = "Frozen encoder"
SPACE_FILE = "space.csv"
STUDY = "study's distances"
SEVERAL = "several labels a sample"
SHAPE = "shape of the space"
LIKENESS = "likeness of two spaces"
MODALITIES = "images and texts"


class Config(measuring.MeasureOptions):
    """What `fluoro distances` needs."""

    on: Literal["test", "val", "train", "all"] = Field("test", description="the split that is measured")
    against: str | None = Field(None, description="second model, such as a fine-tuned one, for CKA and Procrustes")
    k: int = Field(10, ge=1, description="neighbours of each sample")
    permutations: int = Field(200, ge=1, description="permutations of each null")
    texts: bool = Field(True, description="measure images against texts where samples have texts")
    map: Literal["auto", "pca", "tsne", "umap"] = Field("auto", description="map beside the principal components")


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its numbers.

    Parameters
    ----------
    folder : Path
    distances : DataFrame
        Rows inter, intra, ratio, ratio_null: metric, value, low, high; as the study's report has them, so of the test
        split: none where another one is measured, whose inter, intra and ratio are among the measures.
    pairs : DataFrame
        label_a, label_b, distance of their centroids, likewise.
    measures : DataFrame
        One row a measure and label: section and the fields of `analysis.space.Measure`.
    maps : list of Path
        PNG files.
    failures : DataFrame
    """

    folder: Path
    distances: pd.DataFrame
    pairs: pd.DataFrame
    measures: pd.DataFrame
    maps: list[Path]
    failures: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the study's figures, each class's nearest one, and the measures by section."""
        shown = {"Class distances": self.distances, "Nearest classes": nearest_classes(self.pairs)}
        shown = {title: table for title, table in shown.items() if len(table)}
        for section, part in self.measures.groupby("section", sort=False):
            shown[str(section)[0].upper() + str(section)[1:]] = readable(part)
        return shown

    def lines(self) -> Iterator[str]:
        """Return where things lie."""
        for path in self.maps:
            yield f"map: {path}"
        yield f"run: {self.folder}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Measure.

    Raises
    ------
    UsageError
        An output that exists, more neighbours than there are samples, a map whose package is missing.
    DataError
        No labels, an empty split, a split with fewer than two classes.
    """
    progress = progress or Progress()
    space_maps.check(config.map)
    with open_run("distances", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        needed = () if config.on == "all" else (config.on,)
        material = measuring.prepare(config, record, progress, texts=config.texts, by_blocks=True, needed=needed)
        setting = _bare_setting(material, config.protocol)
        between = pd.DataFrame(columns=["label_a", "label_b", "distance"])
        if config.on == "test":
            with record.step("distances") as step:
                between = study_scores.write_distances(
                    material, [setting], config.protocol, record, config.replicates, config.seed
                )
                study_scores.write_pairs([between], record)
                step.items = len(material.rows("test"))
        rows = np.arange(len(material.dataset)) if config.on == "all" else material.rows(config.on)
        sections: list[tuple[str, Sequence[space.Measure]]] = []
        with record.step("shape of the space") as step:
            sections += _of_one_space(material, rows, config)
            step.items = len(rows)
        if config.against is not None:
            with record.step("second model") as step:
                sections.append((f"{LIKENESS}: {config.against}", _likeness(material, rows, config, record, progress)))
                step.items = len(rows)
        if config.texts and (material.dataset.samples["text"] != "").any():
            with record.step("images and texts") as step:
                found = _modalities(material, rows, config, record, progress)
                sections += [(MODALITIES, found)] if found else []
                step.items = len(rows)
        with record.step("maps") as step:
            maps = space_maps.write_maps(material, rows, config.map, config.seed, config.protocol == "sound", record)
            step.items = len(rows)
        measures = _recorded(sections, config, record)
    numbers = measuring.result_lines(record.folder, "distance").reindex(columns=["metric", "value", "low", "high"])
    pairs = between[["label_a", "label_b", "distance"]]
    failures = pd.DataFrame(record.failures, columns=["id", "uri", "what", "reason"])
    return Result(record.folder, numbers, pairs, measures, maps, failures)


def nearest_classes(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return each class with the one whose centroid is nearest: columns label, nearest, distance."""
    others = pairs[pairs["label_a"] != pairs["label_b"]]
    if not len(others):
        return pd.DataFrame(columns=["label", "nearest", "distance"])
    found = others.loc[others.groupby("label_a", sort=False)["distance"].idxmin()]
    return found.set_axis(["label", "nearest", "distance"], axis=1).reset_index(drop=True)


def readable(measures: pd.DataFrame) -> pd.DataFrame:
    """Return measures as a table to read: value with interval, null with range, p, samples, note."""
    rows = []
    for each in measures.to_dict("records"):
        rows.append(
            {
                "measure": each["name"],
                "label": "" if pd.isna(each["label"]) else each["label"],
                "value": _with_range(each["value"], each["low"], each["high"]),
                "null": _with_range(each["null"], each["null_low"], each["null_high"]),
                "p": "" if pd.isna(each["p"]) else f"{each['p']:.3f}",
                "n": each["samples"],
                "note": each["note"],
            }
        )
    return pd.DataFrame(rows)


def _with_range(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if pd.isna(low) or pd.isna(high) else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _of_one_space(
    material: study_settings.Material, rows: np.ndarray, config: Config
) -> list[tuple[str, Sequence[space.Measure]]]:
    """Return the multi-label distances and the shape of the images' space."""
    names, y = material.dataset.label_names, material.y[rows]
    features, groups = _chosen(material.features, rows), material.dataset.groups[rows]
    options = _options(config, material)
    options["normalize"] = config.protocol == "sound"
    several = [
        *distances.overlap_distances(features, y, groups, label_names=names, **options),
        *distances.label_separation(features, y, groups, label_names=names, **options),
    ]
    first = distances.first_positive(y)
    centroids = space.centroid_measures(features, first, groups, class_names=names, **options)
    shape = space.measure_space(features, first, y, groups, label_names=names, k=config.k, **options)
    study = [each for each in centroids if each.name in ("inter", "intra", "ratio")]
    # Of the test split the study's own figures are there already, as the study's report has them.
    return [*([] if config.on == "test" else [(STUDY, study)]), (SEVERAL, several), (SHAPE, shape)]


def _likeness(
    material: study_settings.Material, rows: np.ndarray, config: Config, record: Run, progress: Progress
) -> list[space.Measure]:
    """Return CKA and Procrustes between the model's space and the second one's, on samples that both have."""
    assert config.against is not None  # asked for
    second = config.model_copy(update={"model": config.against})
    encoder = opening.load_model(second, config.cache, material.dataset, ("image",))
    if encoder.id == material.encoder.id:
        raise UsageError(f"--against {config.against!r} is the model itself, encoder {encoder.id}; name another one")
    measuring.embed(second, record, material.cache, material.dataset, encoder, "image", progress)
    record.note(against=opening.encoder_row(encoder))
    other = material.cache.stored_features(material.dataset, encoder, "image")
    both, here, there = np.intersect1d(rows, other.rows, return_indices=True)
    del here
    # Neither measure changes with the length of vectors as a whole; lengths are kept under "paper" only.
    normalize = config.protocol == "sound"
    x = _chosen(material.features, both)
    y: Any = other.take(there) if isinstance(x, StoredRows) else other[there].astype(np.float32)
    if normalize:
        x, y = (_unit(each) for each in (x, y))
    return space.space_similarity(x, y, material.dataset.groups[both], **_options(config, material))


def _modalities(
    material: study_settings.Material, rows: np.ndarray, config: Config, record: Run, progress: Progress
) -> list[space.Measure]:
    """Return alignment and gap between images and their texts, for samples that have both."""
    measuring.embed(config, record, material.cache, material.dataset, material.encoder, "text", progress)
    texts = material.cache.stored_features(material.dataset, material.encoder, "text")
    both, _, there = np.intersect1d(rows, texts.rows, return_indices=True)
    if len(both) < 2:
        return []
    images, said, groups = _chosen(material.features, both), texts.take(there), material.dataset.groups[both]
    return [
        space.modality_gap(images, said, groups, **_options(config, material)),
        space.pair_alignment(images, said, groups, **_options(config, material)),
    ]


def _chosen(features: Any, rows: np.ndarray) -> Any:
    """Return some embeddings, where they lie in the cache without reading them."""
    if isinstance(features, StoredRows):
        return features.take(rows)
    return features if len(rows) == len(features) else features[rows]


def _unit(rows: Any) -> Any:
    """Return embeddings of length one, as a dask array where they lie in the cache."""

    def scaled(block: np.ndarray) -> np.ndarray:
        values = block.astype(np.float32)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)

    return rows.dask().map_blocks(scaled, dtype=np.float32) if isinstance(rows, StoredRows) else scaled(rows)


def _options(config: Config, material: study_settings.Material) -> dict[str, Any]:
    # Intervals of space measures settle with fewer resamples than those of counts of rare positives.
    return {
        "replicates": min(config.replicates, 200),
        "permutations": config.permutations,
        "seed": config.seed,
        "device": material.device,
    }


def _recorded(sections: Sequence[tuple[str, Sequence[space.Measure]]], config: Config, record: Run) -> pd.DataFrame:
    """Write measures as result lines and as a table."""
    rows = [{"section": section, **asdict(each)} for section, measures in sections for each in measures]
    for row in rows:
        values = {key: number(value) if isinstance(value, float) else value for key, value in row.items()}
        record.record("space", protocol=config.protocol, setting=SETTING, split=config.on, **values)
    table = pd.DataFrame(rows)
    table.to_csv(record.path(SPACE_FILE), index=False, float_format="%.6g")
    return table


def _bare_setting(material: study_settings.Material, protocol: str) -> study_settings.Setting:
    """Return the embeddings as a setting without predictions, which distances do not look at."""
    names = material.dataset.label_names
    nothing = np.zeros((len(material.dataset), len(names)))
    prediction = study_settings.Prediction(nothing, nothing.astype(bool))
    explained = study_settings.Explained(SETTING, protocol, material.encoder, names)
    return study_settings.Setting(explained, material.features, prediction, None, 0.0)
