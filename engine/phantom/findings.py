"""How each finding looks: one function a label, drawing into the scene and marking what can be seen of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.phantom.anatomy import diaphragm, lung
from engine.phantom.case import LEFT, MIDDLE, RIGHT, UPPER, Finding
from engine.phantom.scene import Scene
from engine.phantom.strokes import share, spline


def draw_opacity(scene: Scene, finding: Finding) -> None:
    """Ground glass: a broad haze without an edge, through which vessels are still seen."""
    for side in finding.sides:
        x, y = scene.spot(side, finding.zone, scene.between(0.35, 0.65))
        reach = 25 + 6 * finding.extent + scene.between(-3, 3)
        layer = scene.frame.soft([scene.blob(x, y, reach, reach * scene.between(0.85, 1.2))], 6.5)
        scene.replace_air(finding.label, scene.cloudy(layer, 24, 0.35) * np.float32(scene.between(0.55, 0.7)), 0.16)


def draw_lesion(scene: Scene, finding: Finding) -> None:
    """Round and sharply bordered: a nodule, several, a mass, or a calcified granuloma."""
    side = finding.sides[0]
    count = 1
    if finding.kind == "nodules":
        count = 3 + int(scene.between(0, 4))
    outlines = []
    for number in range(count):
        zone = finding.zone if number == 0 else int(scene.between(0, 3))
        at = side if number % 2 == 0 else -side
        x, y = scene.spot(at, zone, scene.between(0.25, 0.8))
        radius = {"nodule": 8.5, "nodules": 6.5, "mass": 14.5, "calcified": 6.5}[finding.kind]
        radius *= 0.9 + 0.15 * finding.extent + scene.between(-0.05, 0.1)
        outlines.append(scene.blob(x, y, radius, radius * scene.between(0.9, 1.1), 0.1))
    layer = scene.frame.soft(outlines, 0.9)
    scene.replace_air(finding.label, layer * np.float32(scene.between(0.72, 0.9) / 255), 0.16)
    if finding.kind == "calcified":
        scene.add_dense(finding.label, layer, scene.between(0.2, 0.32), 110)


def draw_edema(scene: Scene, finding: Finding) -> None:
    """Fluid from the hila outwards on both sides, with Kerley lines at the bases."""
    frame, thorax = scene.frame, scene.thorax
    strength = 0.2 + 0.05 * finding.extent
    wings, lines = [], []
    for side in (RIGHT, LEFT):
        wings.append(
            scene.blob(
                thorax.turn + side * scene.between(28, 52),
                scene.between(-34, 20),
                scene.between(17, 28) + 3 * finding.extent,
                scene.between(22, 38) + 4 * finding.extent,
            )
        )
        for _ in range(9):
            y = scene.between(thorax.base_of(side) - 52, thorax.base_of(side) - 6)
            wall = float(thorax.wall(y)) - 2
            lines.append(np.array([(side * wall, y), (side * (wall - scene.between(9, 15)), y + scene.between(-2, 2))]))
        for _ in range(20):
            angle, start = scene.between(-1.4, 1.4), scene.between(8, 30)
            along = np.array([start, start + scene.between(10, 24)])
            bow = np.stack(
                [thorax.turn + side * (22 + along * np.cos(angle)), -14 + along * np.sin(angle) * 1.3], axis=1
            )
            lines.append(bow)
    alveolar = finding.kind == "alveolar"
    layer = frame.soft(wings, 8)
    # One region a side: single streaks are the sign, but not the place.
    there = scene.air > np.float32(0.15)
    scene.mark(finding.label, there & (np.maximum(layer, frame.stroke(frame.blank(), lines, 6, smooth=False)) > 90))
    haze = scene.cloudy(layer, 36, 0.8 if alveolar else 0.4)
    haze *= np.float32(strength + (0.16 if alveolar else 0))
    scene.replace_air(None, haze)
    streaks = frame.blur(frame.stroke(frame.blank(), lines, 1.7, 190), 0.6)
    scene.replace_air(None, streaks * np.float32((0.6 if alveolar else 0.85) / 255))


def draw_consolidation(scene: Scene, finding: Finding) -> None:
    """A lobe without air: dense, cut off straight at the fissure, with air-filled bronchi left in it."""
    frame, thorax, side = scene.frame, scene.thorax, finding.sides[0]
    base = thorax.base_of(side)
    tilt, size = scene.between(-8, 8), 6.0 * finding.extent
    if finding.zone == UPPER:
        top, low = -100.0, -42 + size + scene.between(-6, 6)
    elif finding.zone == MIDDLE:
        top, low = -34 - size / 2 + scene.between(-6, 6), 8 + size / 2 + scene.between(-6, 6)
    else:
        top, low = base - 42 - size + scene.between(-6, 6), base + 12
    inner, outer = 6.0, 100.0
    outline = np.array(
        [(side * inner, top), (side * outer, top + tilt), (side * outer, low - tilt), (side * inner, low)]
    )
    layer = frame.soft([outline], 1.6)
    bronchi = []
    middle = (top + low) / 2 if finding.zone != UPPER else (-80 + low) / 2
    for turn in (-0.75, -0.4, -0.1, 0.2, 0.5, 0.8):
        angle = turn + scene.between(-0.1, 0.1)
        along = np.array([8.0, 30.0, 52.0])
        bronchi.append(
            spline(
                np.stack(
                    [side * (12 + along * np.cos(angle)), middle + along * np.sin(angle) + scene.between(-5, 5)], axis=1
                )
            )
        )
    left_open = frame.blur(frame.stroke(frame.blank(), bronchi, 2.4, 200), 0.7)
    opacity = scene.cloudy(layer, 20, 0.2) * np.float32(scene.between(0.86, 0.95))
    scene.replace_air(finding.label, opacity * (np.float32(1) - left_open * np.float32(0.75 / 255)), 0.2)


def draw_pneumonia(scene: Scene, finding: Finding) -> None:
    """Bronchopneumonia: many small clouds that flow together in one region."""
    for side in finding.sides:
        x, y = scene.spot(side, finding.zone, scene.between(0.4, 0.6))
        reach = 21 + 4 * finding.extent
        outlines = []
        for _ in range(17 + 4 * finding.extent):
            angle, far = scene.between(0, 6.2832), scene.between(0.05, 1.0)
            radius = scene.between(3.0, 6.2)
            outlines.append(
                scene.blob(x + reach * far * np.cos(angle), y + 1.1 * reach * far * np.sin(angle), radius, radius)
            )
        layer = scene.frame.soft(outlines, 1.7)
        scene.replace_air(finding.label, scene.cloudy(layer, 64, 0.25) * np.float32(scene.between(0.72, 0.85)), 0.16)


def draw_atelectasis(scene: Scene, finding: Finding) -> None:
    """Plates: broad bands across the lung where it has lost air; the raised diaphragm is part of the build."""
    frame = scene.frame
    bands = []
    for side in finding.sides:
        for _ in range(2 + finding.extent):
            x, y = scene.spot(side, finding.zone, scene.between(0.4, 0.6))
            y += scene.between(-8, 12)
            half, fall = scene.between(17, 25), scene.between(-7, 7)
            bands.append(spline([(x - half, y - fall), (x, y + scene.between(-2, 2)), (x + half, y + fall)]))
    layer = frame.blur(frame.stroke(frame.blank(), bands, scene.between(3.6, 5.2)), 0.8)
    scene.replace_air(finding.label, layer * np.float32(scene.between(0.75, 0.9) / 255), 0.16)


def draw_pneumothorax(scene: Scene, finding: Finding, vessels: np.ndarray) -> None:
    """Air outside a shrunken lung: a rim without vessels (taken out of `vessels`, float32) and a fine pleural line."""
    frame, thorax, side = scene.frame, scene.thorax, finding.sides[0]
    base = thorax.base_of(side)
    gap = 14 + 7 * finding.extent + scene.between(-2, 4)
    y = np.linspace(-97 + gap * 0.95, base - 4, 9)
    t = (y - y[0]) / (y[-1] - y[0])
    wall = thorax.wall(y + (1 - t) * -gap * 0.7)
    x = np.maximum(wall - gap * (1.05 - 0.5 * t) * (1 + 0.12 * scene.rng.random(9)), 12.0)
    x[0] = 16.0
    edge = spline(np.stack([side * x, y], axis=1), steps=6)
    kept = frame.soft([np.concatenate([edge, [(side * 2.0, base), (side * 2.0, y[0])]])], 0.7)
    whole = frame.fill(frame.blank(), [lung(thorax, side)])
    kept = np.minimum(kept, whole)
    rim = share(whole - kept)
    vessels -= vessels * rim
    scene.air *= np.float32(1) + rim * np.float32(0.14)
    scene.air *= np.float32(1) - kept * np.float32(0.16 / 255)
    scene.mark(finding.label, (rim > np.float32(0.5)) & (scene.air > np.float32(0.2)))
    line = frame.blur(frame.stroke(frame.blank(), [edge], 1.8), 0.45)
    scene.dense += line * scene.air * np.float32(0.3 / 255)
    scene.mark(finding.label, (line > 90) & (scene.air > np.float32(0.2)))


def draw_effusion(scene: Scene, finding: Finding) -> None:
    """Fluid: fills the angle, rises at the wall and falls to the middle (meniscus), hides the diaphragm."""
    frame, thorax = scene.frame, scene.thorax
    for side in finding.sides:
        base = thorax.base_of(side)
        rise = 25 + 15 * finding.extent + scene.between(-4, 8)
        wall = float(thorax.wall(base - rise)) + 1
        inner = float(thorax.midline(base)) * side + 8
        reach = wall - inner
        top = [
            (side * wall, base - rise),
            (side * (wall - 0.08 * reach), base - 0.8 * rise),
            (side * (wall - 0.3 * reach), base - 0.58 * rise),
            (side * (wall - 0.65 * reach), base - 0.46 * rise - 4),
            (side * inner, base - 0.42 * rise - 6),
        ]
        outline = np.concatenate([spline(top), [(side * inner, base + 14), (side * (wall + 2), base + 14)]])
        layer = frame.soft([outline], 1.3)
        scene.replace_air(finding.label, layer * np.float32(scene.between(0.9, 0.97) / 255), 0.1)
        # The diaphragm under the fluid is hidden by it: the mask follows the fluid, not only the air it replaced.
        scene.mark(finding.label, (layer > 127) & _above_angle(scene, side))


def _above_angle(scene: Scene, side: int) -> np.ndarray:
    """Return the half of the chest above the line that joins both ends of a diaphragm, bool."""
    line = diaphragm(scene.thorax, side)
    flat = np.array([(line[0, 0], -100.0), line[0], line[-1], (line[-1, 0], -100.0)])
    return scene.frame.fill(scene.frame.blank(), [flat]) > 127


def draw_pleural(scene: Scene, finding: Finding) -> None:
    """Scars of the pleura: a thick band along the wall with a cap at the apex, or calcified plaques."""
    for side in finding.sides:
        if finding.kind == "thickening":
            _thickening(scene, finding, side)
        else:
            _plaques(scene, finding, side)


def _thickening(scene: Scene, finding: Finding, side: int) -> None:
    thorax = scene.thorax
    low = thorax.base_of(side) - 18 - scene.between(0, 10)
    high = -66 + scene.between(-10, 10) if finding.extent else -30 + scene.between(-10, 10)
    y = np.linspace(high, low, 8)
    wall = thorax.wall(y)
    width = (8 + 2.5 * finding.extent) * (0.65 + 0.7 * scene.rng.random(8))
    width[[0, -1]] = 1.5
    inner = spline(np.stack([side * (wall - width), y], axis=1), steps=4)
    outer = np.stack([side * (wall + 3), y], axis=1)
    cap_y = np.array([-97.0, -84.0, -74.0])
    cap = np.stack([side * (thorax.wall(cap_y) + 2), cap_y], axis=1)
    cap = np.concatenate([cap, [(side * 26.0, -80.0 + scene.between(-3, 3)), (side * 12.0, -90.0)]])
    layer = scene.frame.soft([np.concatenate([inner, outer[::-1]]), cap], 1.2)
    scene.replace_air(finding.label, layer * np.float32(0.85 / 255), 0.14)
    scene.dense += layer * np.float32(0.07 / 255)


def _plaques(scene: Scene, finding: Finding, side: int) -> None:
    frame, thorax = scene.frame, scene.thorax
    outlines = []
    for _ in range(3 + finding.extent):
        y = scene.between(-45, thorax.base_of(side) - 22)
        x = side * (float(thorax.wall(y)) - scene.between(5, 22))
        outlines.append(scene.blob(x, y, scene.between(4.5, 8), scene.between(8, 15), 0.45))
    layer = frame.fill(frame.blank(), outlines, 215)
    layer = frame.blur(frame.stroke(layer, [diaphragm(thorax, side)[6:22]], 3.2, 235), 0.8)
    # Calcium is seen best against air, and a little where none is left.
    seen = layer * np.minimum(scene.air + np.float32(0.35), np.float32(1))
    scene.dense += seen * np.float32(0.42 / 255)
    scene.mark(finding.label, seen > 70)


DRAW: dict[str, Callable[[Scene, Finding], None]] = {
    "Lung Opacity": draw_opacity,
    "Lung Lesion": draw_lesion,
    "Edema": draw_edema,
    "Consolidation": draw_consolidation,
    "Pneumonia": draw_pneumonia,
    "Atelectasis": draw_atelectasis,
    "Pleural Effusion": draw_effusion,
    "Pleural Other": draw_pleural,
}
