"""The map of the embeddings as the page draws it: points by label that tell on hover which sample they are.

Comes in: ``embedding_map.csv`` (id, setting, x, y, label, split). Goes out: one SVG path a label and panel, a legend,
and the points' coordinates as JSON for the script. Without a script, and in print, the drawing is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.blocks import PointMap

MOST_POINTS = 4000
SIDE, MARGIN = 1000, 24
COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))
BACKGROUND = "var(--muted)"
OWN_COLOURS = 5


def point_map(points: pd.DataFrame, labels: Sequence[str], shareable: bool) -> PointMap | None:
    """Return the map's block; None without points.

    Parameters
    ----------
    points : DataFrame
        Columns id, setting, x, y, label, split.
    labels : sequence of str
        The data set's own order.
    shareable : bool
        Leave out which sample a point is.
    """
    if points.empty:
        return None
    settings = list(dict.fromkeys(points["setting"]))
    names = points["label"].fillna("none").astype(str)
    points = points.assign(label=names)
    first = points[points["setting"] == settings[0]]
    kept = _kept(first)
    counts = first["label"].value_counts()
    # The largest class would hide the others: faint, and underneath.
    background = str(counts.index[0]) if len(counts) > 2 else ""
    ranked = [str(label) for label in counts.index if label != background]
    colour = {label: COLOURS[min(place, OWN_COLOURS)] for place, label in enumerate(ranked)}
    legend: list[dict[str, Any]] = [
        {
            "label": label,
            "count": int(counts[label]),
            "colour": colour.get(label, BACKGROUND),
            "shape": "faint" if label == background else "other" if ranked.index(label) >= OWN_COLOURS else "own",
        }
        for label in [*ranked, *([background] if background else [])]
    ]
    panels, data = [], []
    order = [str(entry["label"]) for entry in legend]
    for setting in settings:
        part = points[points["setting"] == setting]
        part = part[part["id"].isin(kept)] if len(kept) < len(first) else part
        places = _scaled(part[["x", "y"]].to_numpy(dtype=float))
        of_label = part["label"].to_numpy()
        paths = [
            {
                "label": label,
                "colour": colour.get(label, BACKGROUND),
                "faint": label == background,
                "d": "".join(f"M{x} {y}h0" for x, y in places[of_label == label]),
            }
            for label in reversed(order)
        ]
        panels.append({"setting": setting, "paths": paths, "n": len(part)})
        data.append(_data(part, places, order, shareable))
    shown = f" {len(kept):,} of {len(first):,} samples are drawn, by a seed." if len(kept) < len(first) else ""
    alt = f"Map of {len(kept):,} image embeddings, coloured by first positive label." + shown
    text = json.dumps({"labels": order, "panels": data}, separators=(",", ":"), ensure_ascii=False)
    # Ends no script element, whatever a sample is called.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return PointMap(panels, legend, text, alt)


def _kept(first: pd.DataFrame) -> set[str]:
    """Return the ids of the samples that are drawn: all, or a random part of them that is always the same."""
    ids = first["id"].to_numpy()
    if len(ids) <= MOST_POINTS:
        return set(ids)
    return set(ids[np.random.Generator(np.random.PCG64(0)).permutation(len(ids))[:MOST_POINTS]])


def _scaled(places: np.ndarray) -> np.ndarray:
    """Return places as whole units of the drawing, same scale in both directions, y upwards."""
    centre = (places.max(axis=0) + places.min(axis=0)) / 2
    reach = max(float(np.ptp(places, axis=0).max()), 1e-12)
    unit = (places - centre) / reach * (SIDE - 2 * MARGIN)
    return np.stack([SIDE / 2 + unit[:, 0], SIDE / 2 - unit[:, 1]], axis=1).round().astype(int)


def _data(part: pd.DataFrame, places: np.ndarray, order: Sequence[str], shareable: bool) -> dict[str, list[object]]:
    number = {label: place for place, label in enumerate(order)}
    return {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "l": [number[label] for label in part["label"]],
        "s": part["split"].astype(str).tolist(),
        "id": [] if shareable else part["id"].astype(str).tolist(),
    }
