"""A case becomes pixels: tissue, air, vessels, findings, bones and devices, then the exposure.

Attenuation is soft tissue minus air plus bone and metal. Large arrays are used again and changed in place: fresh
memory costs more than the arithmetic on it.
"""

from __future__ import annotations

import numpy as np

from engine.phantom import anatomy
from engine.phantom.acquisition import draw_frame, expose
from engine.phantom.case import ACQUISITION_STREAM, ANATOMY_STREAM, LEFT, RIGHT, Case, Finding, stream
from engine.phantom.devices import draw_devices
from engine.phantom.findings import DRAW, draw_pneumothorax
from engine.phantom.scene import Scene
from engine.phantom.skeleton import draw_bones
from engine.phantom.strokes import Frame, spline

f4 = np.float32
SIDES = (RIGHT, LEFT)


def draw(case: Case, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a case.

    Returns
    -------
    pixels : ndarray of uint8, (size, size)
    masks : dict of label to ndarray of bool, (size, size)
    """
    by_label = {finding.label: finding for finding in case.findings}
    thorax = build(case)
    rng = stream(case.seed, case.index, ACQUISITION_STREAM)
    frame = draw_frame(rng, size, case.projection)

    flesh = _flesh(frame, thorax)
    belly = anatomy.belly(thorax)
    abdomen = frame.soft([belly], 1.2)
    tissue = _tissue(frame, thorax, rng, flesh, abdomen)
    heart, mediastinum = anatomy.heart(thorax), anatomy.mediastinum(thorax)
    frame.add(tissue, frame.soft([heart], 5), 0.1)
    dense = frame.room("dense")
    dense.fill(0)
    scene = Scene(frame, thorax, rng, _air(frame, thorax, heart, mediastinum), dense)
    for label, outline in (("Cardiomegaly", heart), ("Enlarged Cardiomediastinum", mediastinum)):
        if label in by_label:
            scene.mark(label, frame.fill(frame.blank(), [outline]) > 127)

    vessels = frame.scaled(_vessels(scene, engorged="Edema" in by_label), 1.0, "vessels")
    if "Pneumothorax" in by_label:
        draw_pneumothorax(scene, by_label["Pneumothorax"], vessels)
    vessels *= f4(-0.5)
    vessels += f4(1)
    scene.air *= vessels
    for finding in case.findings:
        if finding.label in DRAW:
            DRAW[finding.label](scene, finding)
    draw_bones(scene, by_label.get("Fracture"), abdomen)
    if "Support Devices" in by_label:
        draw_devices(scene, by_label["Support Devices"])

    # Bone and metal fade where the body ends, as the tissue that scatters does; air only counts within it.
    mu = tissue
    rest = np.multiply(flesh, f4(0.6), out=frame.room())
    rest += f4(0.4)
    scene.dense *= rest
    mu += scene.dense
    flesh *= f4(1.3)
    np.minimum(flesh, f4(1), out=flesh)
    flesh *= scene.air
    flesh *= f4(scene.between(0.5, 0.7))
    mu -= flesh
    return expose(mu, frame, rng, case.projection), scene.masks


def build(case: Case) -> anatomy.Thorax:
    """Return the patient's thorax; heart, mediastinum and diaphragm follow from the findings."""
    by_label: dict[str, Finding] = {finding.label: finding for finding in case.findings}
    heart, wide = by_label.get("Cardiomegaly"), by_label.get("Enlarged Cardiomediastinum")
    collapse = by_label.get("Atelectasis")
    right, left = (8.0 + 2 * collapse.extent if collapse and side in collapse.sides else 0.0 for side in SIDES)
    growth = 0.75 + 0.25 * heart.extent if heart else 0.0
    widening = aorta = 0.0
    if wide and wide.kind == "widened":
        widening = 0.9 + 0.15 * wide.extent
    elif wide:
        widening, aorta = 0.35, 1.0 + 0.2 * wide.extent
    rng = stream(case.seed, case.patient_index, ANATOMY_STREAM)
    return anatomy.draw_thorax(rng, growth, widening, aorta, (right, left))


def _flesh(frame: Frame, thorax: anatomy.Thorax) -> np.ndarray:
    """Return the body's thickness, float32 in [0, 1]: full in the middle, thin at its rim."""
    outlines = anatomy.body(thorax)
    flesh = frame.scaled(frame.soft(outlines, 2.5), 0.45, "flesh")
    frame.add(flesh, frame.soft(outlines, 20), 0.55)
    return flesh


def _tissue(
    frame: Frame, thorax: anatomy.Thorax, rng: np.random.Generator, flesh: np.ndarray, abdomen: np.ndarray
) -> np.ndarray:
    """Return soft tissue's attenuation, float32: denser downwards, with belly, breasts, windpipe and stomach bubble."""
    half = np.array([(-300.0, 40.0), (300.0, 40.0), (300.0, 400.0), (-300.0, 400.0)])
    tissue = frame.scaled(frame.soft([half], 24), 0.22, "tissue")
    frame.add(tissue, abdomen, 0.1)
    tissue += frame.cloud(rng, 5, 0.07)
    tissue += f4(0.95)
    if thorax.breast < 0.45:
        frame.add(tissue, frame.soft(anatomy.breasts(thorax), 3), 0.16)
    tissue *= flesh
    mid = thorax.turn * 0.6
    windpipe = spline([(mid, -150), (mid, -90), (thorax.turn + 1, -55), (thorax.turn + 2, -38)])
    tissue -= frame.scaled(frame.blur(frame.stroke(frame.blank(), [windpipe], 8.5, smooth=False), 1.5), 0.2)
    u = rng.random(7)
    if u[0] < 0.6:
        x, y = 32 + 20 * u[1], thorax.base_of(LEFT) + 2 + 10 * u[2]
        turn = np.arange(8) * (2 * np.pi / 8)
        gas = np.stack([x + (9 + 11 * u[3]) * np.cos(turn), y + (6 + 5 * u[4]) * np.sin(turn + u[6])], axis=1)
        bubble = np.minimum(frame.soft([spline(gas, closed=True, steps=4)], 1.8), abdomen)
        tissue -= frame.scaled(bubble, 0.15 + 0.2 * u[5])
    return tissue


def _air(frame: Frame, thorax: anatomy.Thorax, heart: np.ndarray, mediastinum: np.ndarray) -> np.ndarray:
    """Return the air in the lungs, float32 in [0, 1], with a little left behind heart and great vessels."""
    lungs = [anatomy.lung(thorax, side) for side in SIDES]
    air = frame.scaled(frame.soft(lungs, 9), 0.28, "air")
    air += f4(0.72)
    air *= frame.scaled(frame.soft(lungs, 0.9), 1.0)
    solid = frame.fill(frame.blank(), [heart], 232)
    frame.fill(solid, [mediastinum], 222)
    air *= frame.scaled(~frame.blur(solid, 1.2), 1.0)
    return air


def _vessels(scene: Scene, engorged: bool) -> np.ndarray:
    """Return hila and vessels as a uint8 layer."""
    frame, thorax = scene.frame, scene.thorax
    thick = 1.35 if engorged else 1.0
    tree = frame.blank()
    orders = [anatomy.vessels(thorax, scene.rng, side) for side in SIDES]
    for order, width, value in ((2, 0.8, 90), (1, 1.2, 135), (0, 2.3, 170)):
        frame.stroke(tree, np.concatenate([half[order] for half in orders]), width * thick, value)
    hila = [
        scene.blob(thorax.turn + side * 23, -18 if side == LEFT else -14, 7 * thick, 13 * thick, 0.2) for side in SIDES
    ]
    return frame.blur(frame.fill(tree, hila, 150), 0.6)
