"""Grids of small heatmaps of one sample: every label in every setting, or every block of the towers for one label.

Comes in: a decoded image, its maps as `jobs.cam` made them. Goes out: one PNG each, and rows of numbers for the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import localization, overlays
from analysis.cam import HeatMap, LayerMaps
from analysis.map_grid import Cell, bands_of, map_grid
from engine.geometry import Geometry
from jobs.cam_findings import Drawn, Finding, localised
from jobs.figure_names import figure_stem
from jobs.runs import Run

COLUMNS = 7
"""Labels side by side before the grid is broken."""


class LayerStrip(NamedTuple):
    """One setting's maps of all blocks.

    Parameters
    ----------
    maps : sequence of LayerMaps
        From `analysis.cam.layer_strip`.
    geometry : Geometry
        How the setting's tower saw the image.
    source : str
        Where that was found.
    tower : str
        Id of its encoder.
    """

    maps: Sequence[LayerMaps]
    geometry: Geometry
    source: str
    tower: str


def draw_labels(
    findings: Sequence[Finding],
    drawn: Sequence[Sequence[Drawn]],
    scored: Sequence[Sequence[dict[str, Any]]],
    side: int,
    record: Run,
) -> Path:
    """Write the grid of all labels of one sample, a row a setting; return its path.

    Parameters
    ----------
    findings : sequence of Finding
        All of the same sample, one a label.
    drawn, scored : one sequence a finding
        Its maps, and their rows of numbers.
    """
    columns = [f"{each.label.replace('_', ' ')}{' · positive' if each.truth else ''}" for each in findings]
    by_setting: dict[str, dict[int, Cell]] = {}
    for place, (finding, maps, rows) in enumerate(zip(findings, drawn, scored, strict=True)):
        mask, boxes = finding.outline()
        for each, row in zip(maps, rows, strict=False):
            lines = [f"score {each.score:.3f}"] + ([localised(row, short=True)] if "pointing_game" in row else [])
            cell = Cell(each.heat, lines, each.note, mask, [overlays.Box(b.x, b.y, b.width, b.height) for b in boxes])
            by_setting.setdefault(each.setting, {})[place] = cell
    missing = Cell(note="not a label of this head")
    rows_of = [
        (name, [cells.get(place, missing) for place in range(len(findings))]) for name, cells in by_setting.items()
    ]
    first, how = findings[0], dict.fromkeys(f"{each.method} at {each.layer}" for maps in drawn for each in maps)
    picture = map_grid(
        np.asarray(first.image),
        bands_of(columns, rows_of, COLUMNS),
        title=f"All labels · {first.sample}",
        subtitle=" · ".join([*how, "each map coloured from 0 to its own maximum"]),
        side=side,
    )
    path = record.path(f"{figure_stem(first.sample, 'all labels')}.png")
    overlays.save_picture(picture, path)
    return path


def draw_layers(
    finding: Finding,
    strips: Mapping[str, LayerStrip],
    tolerance: float | None,
    side: int,
    record: Run,
) -> tuple[Path, list[dict[str, Any]]]:
    """Write the strip of all blocks for one label in one sample, rows for each setting.

    Parameters
    ----------
    strips : mapping of setting to LayerStrip
        Rollout does not depend on the setting, so it is shown once a tower.

    Returns
    -------
    path : Path
    rows : list of dict
        One a setting, block and method: block, layer, method, reached, strongest, note, and scores where the label is
        annotated.
    """
    region = finding.region() if finding.annotated else None
    mask, boxes = finding.outline()
    bare = [overlays.Box(box.x, box.y, box.width, box.height) for box in boxes]
    depth = max(len(strip.maps) for strip in strips.values())
    columns = [f"block {block}" for block in range(depth)]
    table: list[dict[str, Any]] = []
    rows: list[tuple[str, list[Cell]]] = []

    def cell(setting: str, block: int, found: HeatMap, reached: bool, geometry: Geometry, source: str) -> Cell:
        heat = found.on_original(geometry)
        row: dict[str, Any] = {
            "id": finding.sample,
            "label": finding.label,
            "setting": setting,
            "block": block,
            "layer": found.layer,
            "method": found.method,
            "reached": reached,
            "strongest": float(found.raw.max()),
            "source": source,
            "note": found.note,
        }
        lines = []
        if region is not None:
            row |= localization.score_heatmap(heat, region, tolerance).as_dict()
            if not found.note:
                lines.append(localised(row, short=True))
        if not found.note and found.method == "gradcam":
            lines.append(f"strongest {row['strongest']:.1e}")
        table.append(row)
        return Cell(heat, lines, found.note, mask, bare)

    seen: set[str] = set()
    for setting, (maps, geometry, source, tower) in strips.items():
        leaves = [each for each in maps if each.leaving]
        if leaves:
            columns[leaves[0].block] = f"leaving block {leaves[0].block - 1}"
        of_gradients = [cell(setting, each.block, each.gradcam, each.reached, geometry, source) for each in maps]
        rows.append((f"{setting}\nGrad-CAM", _filled(of_gradients, depth)))
        if tower not in seen and any(each.rollout is not None for each in maps):
            seen.add(tower)
            of_attention = [
                cell(setting, each.block, each.rollout, True, geometry, source)
                for each in maps
                if each.rollout is not None
            ]
            whose = "" if len({strip.tower for strip in strips.values()}) == 1 else f"{setting}\n"
            rows.append((f"{whose}attention rollout\n(of no label)", _filled(of_attention, depth)))
    name = finding.label.replace("_", " ")
    how = "Grad-CAM of what each stage gives"
    if any(each.leaving for strip in strips.values() for each in strip.maps):
        how = "Grad-CAM of what enters each block; rollout of attention from the image through that block"
    picture = map_grid(
        np.asarray(finding.image),
        bands_of(columns, rows, COLUMNS),
        title=f"{name} · {finding.sample} · layer by layer",
        subtitle=f"{how}; each map coloured from 0 to its own maximum",
        side=side,
    )
    path = record.path(f"{figure_stem(finding.sample, finding.label)}-layers.png")
    overlays.save_picture(picture, path)
    return path, table


def _filled(cells: list[Cell], count: int) -> list[Cell]:
    return cells + [Cell(note=f"nothing beyond block {len(cells) - 1}")] * (count - len(cells))
