"""A case becomes pixels: anatomy, findings, acquisition.

Attenuation is body minus air plus bone and metal; exposure and tone make grey values of it. The same patient drawn twice
differs as two exposures do: position, rotation, brightness, noise, markers.
"""

from __future__ import annotations

import numpy as np

from engine.phantom import anatomy
from engine.phantom.case import ACQUISITION_STREAM, ANATOMY_STREAM, LEFT, RIGHT, Case, Finding, stream
from engine.phantom.devices import draw_devices
from engine.phantom.findings import DRAW
from engine.phantom.scene import Scene
from engine.phantom.strokes import Frame, Points, noise_cells, share, spline

TONES = 2048
MU_TOP = 2.0
f4 = np.float32


def _build(case: Case) -> anatomy.Thorax:
    """Draw the patient's thorax; heart, mediastinum and diaphragm follow from the findings."""
    rng = stream(case.seed, case.patient_index, ANATOMY_STREAM)
    by_label = {finding.label: finding for finding in case.findings}
    wide = by_label.get("Enlarged Cardiomediastinum")
    collapse = by_label.get("Atelectasis")
    lifts = tuple(8.0 + 2 * collapse.extent if collapse and side in collapse.sides else 0.0 for side in (RIGHT, LEFT))
    return anatomy.draw_thorax(
        rng,
        heart_growth=0.75 + 0.25 * by_label["Cardiomegaly"].extent if "Cardiomegaly" in by_label else 0.0,
        widening=0.0 if wide is None else (0.9 + 0.15 * wide.extent if wide.kind == "widened" else 0.35),
        aorta=1.0 + 0.2 * wide.extent if wide is not None and wide.kind == "aorta" else 0.0,
        lifts=(lifts[0], lifts[1]),
    )


def _frame(rng: np.random.Generator, size: int, projection: str) -> Frame:
    u = rng.random(6)
    scale = 0.86 + 0.32 * u[0]
    return Frame(
        size=size,
        wide=float(scale * (0.95 + 0.1 * u[1])),
        high=float(scale * (1.02 - 0.1 * u[1])),
        angle=float((u[2] + u[3] - 1) * (0.09 if projection == "PA" else 0.16)),
        x=float(128 + 42 * u[4] - 21),
        y=float(133 + 40 * u[5] - 20),
    )


def _pneumothorax(scene: Scene, finding: Finding | None, vessels: np.ndarray) -> np.ndarray:
    """Let the lung shrink from the wall: a rim without vessels, a fine pleural line. Returns the vessels that are left."""
    if finding is None:
        return vessels
    frame, thorax, side = scene.frame, scene.thorax, finding.sides[0]
    base = thorax.base_of(side)
    gap = 14 + 7 * finding.extent + scene.between(-2, 4)
    y = np.linspace(-97 + gap * 0.95, base - 4, 9)
    t = (y - y[0]) / (y[-1] - y[0])
    wall = thorax.wall(y + (1 - t) * -gap * 0.7)
    x = np.maximum(wall - gap * (1.05 - 0.5 * t) * (1 + 0.12 * scene.rng.random(9)), 12.0)
    x[0] = 16.0
    edge = spline(np.stack([side * x, y], axis=1), steps=6)
    inner = np.concatenate([edge, [(side * 2.0, base), (side * 2.0, y[0])]])
    kept = frame.soft([inner], 0.7)
    whole = frame.fill(frame.blank(), [anatomy.lung(thorax, side)])
    rim = share(np.where(kept > whole, 0, whole - kept).astype(np.uint8))
    scene.air = scene.air * (f4(1) + rim * f4(0.14)) * (f4(1) - share(np.minimum(kept, whole)) * f4(0.16))
    scene.mark(finding.label, (rim > f4(0.5)) & (scene.air > f4(0.2)))
    line = frame.blur(frame.stroke(frame.blank(), [edge], 1.8), 0.45)
    scene.dense += line * scene.air * f4(0.3 / 255)
    scene.mark(finding.label, (line > 90) & (scene.air > f4(0.2)))
    return (vessels * (f4(1) - rim)).astype(np.float32)


def _bones(scene: Scene, fracture: Finding | None, abdomen: np.ndarray) -> None:
    """Draw ribs, collar bones, shoulder blades and spine, broken where there is a fracture."""
    frame, thorax = scene.frame, scene.thorax
    hind, front = anatomy.posterior_ribs(thorax), anatomy.anterior_ribs(thorax)
    hind_lines: list[Points] = [rib for half in hind for rib in half]
    collars: list[Points] = [anatomy.clavicle(thorax, side) for side in (RIGHT, LEFT)]
    callus: list[Points] = []
    gaps: list[Points] = []
    if fracture is not None:
        side = fracture.sides[0]
        half = 0 if side == RIGHT else 1
        if fracture.kind == "clavicle":
            line = collars[half]
            cut = 7 + int(scene.between(0, 4))
            drop = np.array([-side * scene.between(3, 6), scene.between(9, 13)])
            collars[half] = line[: cut + 1]
            collars.append(line[cut:] + drop)
            gaps += [line[cut - 2 : cut + 1], line[cut : cut + 3] + drop]
            if fracture.extent:
                callus.append(scene.blob(*(line[cut] + drop / 2), 6.5, 6, 0.2))
        else:
            first = (1, 3, 5)[fracture.zone] + int(scene.between(0, 2))
            for number in range(first, min(first + 3 + fracture.extent, anatomy.RIBS - 1)):
                rib = hind[half, number]
                cut = 12 + int(scene.between(0, 4))
                turn = np.array([-side * scene.between(1, 3), scene.between(5, 8) * (1 if number % 2 else -1)])
                if fracture.kind == "healed ribs":
                    turn = turn * 0.4
                    callus.append(scene.blob(*(rib[cut] + turn / 2), 6.0, 7.5, 0.2))
                hind_lines[half * anatomy.RIBS + number] = rib[: cut + 1]
                moved = rib[cut:] + turn * np.linspace(1, 0.2, len(rib) - cut)[:, None]
                hind_lines.append(moved)
                gaps += [rib[cut - 1 : cut + 1], moved[:2]]
    ribs = frame.stroke(frame.blank(), hind_lines, 6.4, 150)
    ribs = frame.blur(frame.stroke(ribs, hind_lines, 3.8, 95), 0.7)
    fore = frame.blur(frame.stroke(frame.blank(), [rib for half in front for rib in half], 7.5, 130), 1.1)
    # The belly's thickness drowns the lowest ribs.
    scene.dense += (ribs * f4(0.3 / 255) + fore * f4(0.17 / 255)) * (f4(1) - abdomen * f4(0.6))
    bone = frame.stroke(frame.blank(), collars, 8.5, 150)
    bone = frame.stroke(bone, collars, 5.2, 105)
    bone = frame.fill(bone, [anatomy.scapula(thorax, side) for side in (RIGHT, LEFT)], 60)
    arms = [anatomy.humerus(thorax, side) for side in (RIGHT, LEFT)]
    frame.stroke(bone, [shaft for shaft, _ in arms], 10, 75)
    frame.fill(bone, [head for _, head in arms], 90)
    scene.dense += frame.blur(bone, 0.8) * f4(0.36 / 255)
    column = frame.fill(frame.blank(), anatomy.vertebrae(thorax), 215)
    scene.dense += frame.blur(column, 1.3) * f4(0.13 / 255)
    if fracture is not None:
        ends = frame.blur(frame.stroke(frame.blank(), gaps, 7.5, 255), 0.6)
        scene.dense += ends * f4(0.16 / 255)
        scene.mark(fracture.label, frame.stroke(frame.blank(), gaps, 11, 255) > 127)
        if callus:
            scene.add_dense(fracture.label, frame.soft(callus, 0.9), 0.26, 80)


def _marker(frame: Frame, rng: np.random.Generator, projection: str) -> np.ndarray:
    """Return the side marker as a uint8 layer: an L at the patient's left or an R at the right."""
    u = rng.random(5)
    layer = frame.blank()
    upright = Frame(frame.size, 1.0, 1.0, 0.0, 0.0, 0.0)
    left = u[0] < 0.6
    x, y, k = (226 + 18 * u[1] if left else 10 + 18 * u[1]), 10 + 36 * u[2], 0.8 + 0.5 * u[3]
    letter = [[(0, 0), (0, 12), (7, 12)]] if left else [[(0, 12), (0, 0), (6, 1), (7, 4), (5, 6), (0, 6.5), (7, 12)]]
    lines = [np.array(stroke, np.float64) * k + (x, y) for stroke in letter]
    if projection == "AP" and u[4] < 0.6:
        for number in range(3):
            lines.append(np.array([(x - 5, y + 19 + 4 * number), (x + 11 - 3 * number, y + 19 + 4 * number)]))
    if len(lines) > 1:
        upright.stroke(layer, lines[1:], 1.2, 200)
    return upright.stroke(layer, lines[:1], 2.0, 255)


def _tone(rng: np.random.Generator) -> np.ndarray:
    """Return the look-up table from attenuation to grey, uint8 (TONES,), by rational curves only."""
    u = rng.random(4)
    mu = np.arange(TONES) * (MU_TOP / TONES)
    t = np.clip(mu * (0.5 + 0.3 * u[0]) + (-0.09 + 0.2 * u[1]), 0.0, 1.12)
    s = t * t * (3 - 2 * np.minimum(t, 1.0))
    mix = 0.55 * u[2]
    bent = (1 - mix) * t + mix * s
    bent = bent * (1 + (u[3] - 0.5) * 0.5 * (1 - bent))
    return np.clip(np.rint(bent * 240 + 4), 0, 255).astype(np.uint8)


def draw(case: Case, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a case.

    Returns
    -------
    pixels : ndarray of uint8, (size, size)
    masks : dict of label to ndarray of bool, (size, size)
    """
    thorax = _build(case)
    rng = stream(case.seed, case.index, ACQUISITION_STREAM)
    frame = _frame(rng, size, case.projection)
    by_label = {finding.label: finding for finding in case.findings}
    edema = by_label.get("Edema")

    # Body: thick in the middle, thin at its rim, thicker downwards.
    outlines = anatomy.body(thorax)
    flesh = share(frame.soft(outlines, 2.5)) * f4(0.45) + share(frame.soft(outlines, 20)) * f4(0.55)
    belly = np.concatenate([anatomy.diaphragm(thorax, RIGHT), anatomy.diaphragm(thorax, LEFT)[::-1], [(110.0, 180.0), (-110.0, 180.0)]])
    abdomen = share(frame.soft([belly], 1.2))
    depth = share(frame.soft([np.array([(-300.0, 40.0), (300.0, 40.0), (300.0, 400.0), (-300.0, 400.0)])], 24))
    tissue = flesh * (f4(0.95) + depth * f4(0.22)) + abdomen * flesh * f4(0.10)
    tissue += flesh * frame.cloud(rng, 5) * f4(0.07)

    # Air, less heart and great vessels.
    air = np.zeros((size, size), np.float32)
    for side in (RIGHT, LEFT):
        outline = [anatomy.lung(thorax, side)]
        air += share(frame.soft(outline, 0.9)) * (f4(0.72) + share(frame.soft(outline, 9)) * f4(0.28))
    solid = frame.blank()
    frame.fill(solid, [anatomy.heart(thorax)], 232)
    frame.fill(solid, [anatomy.mediastinum(thorax)], 222)
    solid = frame.blur(solid, 1.2)
    air *= f4(1) - share(solid)
    tissue += share(frame.soft([anatomy.heart(thorax)], 5)) * f4(0.1)
    scene = Scene(frame, thorax, rng, air, np.zeros((size, size), np.float32))
    for label in ("Cardiomegaly", "Enlarged Cardiomediastinum"):
        if label in by_label:
            outline = [anatomy.heart(thorax)] if label == "Cardiomegaly" else [anatomy.mediastinum(thorax)]
            scene.mark(label, frame.fill(frame.blank(), outline) > 127)

    # Vessels, engorged in edema.
    tree = frame.blank()
    thick = 1.35 if edema else 1.0
    orders = [anatomy.vessels(thorax, rng, side) for side in (RIGHT, LEFT)]
    for order, (width, value) in reversed(list(enumerate(((2.3, 170), (1.2, 135), (0.8, 90))))):
        frame.stroke(tree, np.concatenate([half[order] for half in orders]), width * thick, value)
    hila = [scene.blob(thorax.turn + side * 23, -14 - (4 if side == LEFT else 0), 7 * thick, 13 * thick, 0.2) for side in (RIGHT, LEFT)]
    frame.fill(tree, hila, 150)
    vessels = share(frame.blur(tree, 0.6))
    vessels = _pneumothorax(scene, by_label.get("Pneumothorax"), vessels)
    scene.air = scene.air * (f4(1) - vessels * f4(0.5))

    for finding in case.findings:
        if finding.label in DRAW:
            DRAW[finding.label](scene, finding)
    _bones(scene, by_label.get("Fracture"), abdomen)
    if "Support Devices" in by_label:
        draw_devices(scene, by_label["Support Devices"])

    # Windpipe, stomach bubble, breasts.
    mid = thorax.turn * 0.6
    windpipe = spline([(mid, -150), (mid, -90), (thorax.turn + 1, -55), (thorax.turn + 2, -38)])
    pipe = frame.blur(frame.stroke(frame.blank(), [windpipe], 8.5), 1.5)
    tissue -= pipe * f4(0.2 / 255)
    if rng.random() < 0.6:
        bubble = [scene.blob(40 + scene.between(-8, 12), thorax.base_of(LEFT) + scene.between(2, 12), scene.between(9, 20), scene.between(6, 11), 0.2)]
        tissue -= share(frame.soft(bubble, 1.8)) * abdomen * f4(scene.between(0.15, 0.35))
    if thorax.breast < 0.45:
        low = thorax.base - 4 + 20 * thorax.breast
        cups = [spline([(side * 22, low - 34), (side * 60, low - 50), (side * 96, low - 30), (side * 98, low), (side * 62, low + 14), (side * 28, low)], closed=True) for side in (RIGHT, LEFT)]
        tissue += share(frame.soft(cups, 3)) * flesh * f4(0.16)

    mu = tissue + scene.dense * (f4(0.4) + f4(0.6) * flesh) - scene.air * f4(scene.between(0.5, 0.7)) * np.minimum(flesh * f4(1.3), f4(1))

    # Acquisition: grain, heel effect, tone, marker, collimation.
    grain = scene.between(0.015, 0.05)
    mu += (noise_cells(rng, size).astype(np.float32) - f4(127.5)) * f4(grain / 127.5)
    mu += frame.cloud(rng, max(size * 5 // 8, 8)) * f4(grain * 1.1)
    mu += frame.cloud(rng, 3) * f4(0.06)
    steps = np.clip(mu * f4(TONES / MU_TOP), f4(0), f4(TONES - 1)).astype(np.int16)
    pixels = _tone(rng)[steps]
    marker = _marker(frame, rng, case.projection)
    pixels = np.maximum(pixels, marker)
    u = rng.random(6)
    if u[0] < 0.35:
        shutter = Frame(size, 1.0, 1.0, float((u[1] - 0.5) * 0.05), 128.0, 128.0)
        x0, x1, y0, y1 = -126 + 12 * u[2], 126 - 12 * u[3], -127 + 12 * u[4], 127 - 12 * u[5]
        field = shutter.soft([np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])], 0.8)
        pixels = (pixels * share(field)).astype(np.uint8)
    return np.ascontiguousarray(pixels), scene.masks
