"""Maps of a data set's images as pictures in the run folder: principal components always, t-SNE or UMAP beside.

Comes in: embedded samples with labels and splits. Goes out: ``maps/by-label.png`` and, where there are several splits,
``maps/by-split.png`` over all samples, and ``maps/places.csv`` with the coordinates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis import embedding_map, map_figure
from analysis.distances import first_positive
from jobs.runs import Run
from jobs.study_settings import Material

TITLES = {"pca": "Principal components", "tsne": "t-SNE", "umap": "UMAP"}
# A map of more points is no clearer, and t-SNE not affordable.
MOST_POINTS = 20_000


def check(method: str) -> None:
    """Raise UsageError where a map cannot be drawn, before anything is computed."""
    embedding_map.map_method(100, method)


def write_maps(
    material: Material, rows: np.ndarray, method: str, seed: int, normalize: bool, record: Run
) -> list[Path]:
    """Draw the maps of some samples, coloured by first positive label and by split.

    Parameters
    ----------
    rows : ndarray of int
        Samples that are coloured by label; splits are drawn over all samples, up to `MOST_POINTS` at random.
    method : str
        As in `analysis.embedding_map.embedding_map`; "pca" for that alone.

    Returns
    -------
    list of Path
    """
    names = np.array([*material.dataset.label_names, "none"], dtype=object)
    labels, splits = names[first_positive(material.y)], material.split
    drawn = {"by-label": (_some(rows, seed), labels, "first positive label")}
    if len(set(splits)) > 1:
        drawn["by-split"] = (_some(np.arange(len(splits)), seed), splits, "split")
    written, tables = [], []
    for stem, (which, colours, title) in drawn.items():
        features = material.features[which]
        chosen = embedding_map.map_method(len(which), method)
        maps = {
            kind: embedding_map.embedding_map(features, seed=seed, method=kind, normalize=normalize)
            for kind in dict.fromkeys(("pca", chosen))
        }
        note = embedding_map.describe(len(which), chosen)
        panels = {TITLES[kind]: places for kind, places in maps.items()}
        path = record.path(f"maps/{stem}.png")
        path.write_bytes(map_figure.map_picture(panels, colours[which], title=title, note=note))
        written.append(path)
        for kind, places in maps.items():
            tables.append(
                pd.DataFrame(
                    {"id": material.dataset.ids[which], "picture": stem, "map": kind, "x": places[:, 0],
                     "y": places[:, 1], "label": labels[which], "split": splits[which]}
                )
            )  # fmt: skip
    pd.concat(tables).to_csv(record.path("maps/places.csv"), index=False, float_format="%.4f")
    return written


def _some(rows: np.ndarray, seed: int) -> np.ndarray:
    if len(rows) <= MOST_POINTS:
        return rows
    return np.sort(np.random.Generator(np.random.PCG64(seed)).choice(rows, MOST_POINTS, replace=False))
