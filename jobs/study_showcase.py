"""What a study shows of its embeddings: nearest neighbours of texts and images, and a map in two dimensions.

Comes in: the data set, cached embeddings, an index. Goes out: ``retrieval.json`` with thumbnails and
``embedding_map.csv``, as the report reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from analysis import embedding_map
from analysis.distances import first_positive
from engine import index as indexes
from engine.dataset import Dataset
from engine.keys import short_hash
from engine.labels import nothing_label
from jobs import config as configs
from jobs import runs
from jobs.opening import read_image
from jobs.study_settings import Material, Setting

THUMBNAIL_SIDE = 160


class ShowcaseSection(configs.JobConfig):
    """Which neighbours are shown."""

    texts: list[str] | None = Field(None, description="labels queried by their prompt; three frequent ones if empty")
    images: int = Field(2, ge=0, description="image queries, drawn by a seed from the test split")
    neighbours: int = Field(8, ge=1)
    seed: int = 0


def write_retrieval(
    material: Material, zero_shot: Setting, index: indexes.Index, section: ShowcaseSection, run: runs.Run
) -> None:
    """Write the neighbours of some labels' prompts and of some test images, found through the index.

    Text queries are labels, so that right and wrong can be told; an image never counts as its own neighbour.
    """
    dataset = material.dataset
    row_of_key = {key.tobytes(): row for row, key in enumerate(material.keys)}
    prompts = zero_shot.explained.text
    assert prompts is not None  # the zero-shot setting has one vector a label
    asked: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    for label in _labels_to_ask(dataset, section):
        position = dataset.label_position(label)
        asked.append({"text": label, "wanted": {position}})
        vectors.append(prompts[position])
    for row in _images_to_ask(dataset, section):
        labels = np.flatnonzero(dataset.labels[row])
        asked.append({"id": dataset.ids[row], "labels": [dataset.label_names[column] for column in labels],
                      "wanted": set(labels.tolist()), "row": int(row)})  # fmt: skip
        vectors.append(material.features[row])
    scores, keys = index.search(np.stack(vectors).astype(np.float32), section.neighbours + 20)
    queries = []
    for query, found_scores, found_keys in zip(asked, scores, keys, strict=True):
        group = dataset.groups[query["row"]] if "row" in query else None
        hits: list[dict[str, Any]] = []
        for score, key in zip(found_scores, found_keys, strict=True):
            row = row_of_key.get(np.asarray(key).tobytes())
            if row is None or dataset.groups[row] == group or len(hits) == section.neighbours:
                continue
            hits.append(_hit(dataset, row, float(score), query["wanted"], run))
        shown = {name: value for name, value in query.items() if name not in ("wanted", "row")}
        if "row" in query:
            shown["thumbnail"] = _thumbnail(dataset, query["row"], run)
        queries.append({"query": shown, "hits": hits})
    run.path("retrieval.json").write_text(json.dumps(queries, ensure_ascii=False))


def write_embedding_map(dataset: Dataset, settings: Sequence[Setting], run: runs.Run, seed: int) -> None:
    """Write two-dimensional places of the images under each different encoder, with their first positive label."""
    labels = first_positive(dataset.labels)
    names = np.array([*dataset.label_names, "none"], dtype=object)[labels]
    tables = []
    for setting in settings:
        places = embedding_map.embedding_map(setting.features, seed=seed)
        tables.append(pd.DataFrame({"id": dataset.ids, "setting": setting.name, "x": places[:, 0], "y": places[:, 1],
                                    "label": names, "split": dataset.samples["split"]}))  # fmt: skip
    run.note(embedding_map=embedding_map.describe(len(dataset)))
    pd.concat(tables).to_csv(run.path("embedding_map.csv"), index=False, float_format="%.4f")


def _labels_to_ask(dataset: Dataset, section: ShowcaseSection) -> list[str]:
    if section.texts is not None:
        return section.texts
    counts, nothing = dataset.labels.sum(axis=0), nothing_label(dataset.label_names)
    findings = [column for column in np.argsort(-counts, kind="stable") if dataset.label_names[column] != nothing]
    return [dataset.label_names[column] for column in findings[:3] if counts[column]]


def _images_to_ask(dataset: Dataset, section: ShowcaseSection) -> np.ndarray:
    test = (dataset.samples["split"] == "test").to_numpy()
    nothing = nothing_label(dataset.label_names)
    finding = np.array([name != nothing for name in dataset.label_names])
    rows = np.flatnonzero(test & dataset.labels[:, finding].any(axis=1))
    rng = np.random.Generator(np.random.PCG64(section.seed))
    return rng.permutation(rows)[: section.images]


def _hit(dataset: Dataset, row: int, score: float, wanted: set[int], run: runs.Run) -> dict[str, Any]:
    labels = np.flatnonzero(dataset.labels[row])
    return {
        "id": str(dataset.ids[row]),
        "score": score,
        "labels": [dataset.label_names[column] for column in labels],
        "match": bool(wanted & set(labels.tolist())),
        "thumbnail": _thumbnail(dataset, row, run),
    }


def _thumbnail(dataset: Dataset, row: int, run: runs.Run) -> str:
    """Write a sample's small picture unless it is there, and return its place in the run folder."""
    file = f"thumbnails/{short_hash(str(dataset.ids[row]), 12)}.jpg"
    path = run.path(file)
    if not path.is_file():
        image = read_image(dataset, row).convert("L")
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(path, quality=82)
    return file
