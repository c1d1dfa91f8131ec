"""Support devices: what lies in or on the patient, drawn bold as metal and radiopaque plastic are."""

from __future__ import annotations

import numpy as np

from engine.phantom.case import Finding
from engine.phantom.scene import Scene
from engine.phantom.strokes import Points, spline


def draw_devices(scene: Scene, finding: Finding) -> None:
    """Draw the devices of one kind and mark their lines, a little wider than drawn."""
    side = finding.sides[0]
    draw = {
        "pacemaker": _pacemaker,
        "port": _port,
        "chest tube": _chest_tube,
        "intubation": _intubation,
        "sternotomy": _sternotomy,
        "electrodes": _electrodes,
    }[finding.kind]
    draw(scene, finding, side)


def _lines(scene: Scene, label: str, lines: list[Points], width: float, strength: float, closed: bool = False) -> None:
    frame = scene.frame
    layer = frame.blur(frame.stroke(frame.blank(), lines, width, closed=closed), 0.5)
    frame.add(scene.dense, layer, strength)
    scene.mark(label, frame.stroke(frame.blank(), lines, width + 3, closed=closed, smooth=False) > 127)


def _solid(scene: Scene, label: str, outlines: list[Points], strength: float) -> None:
    scene.add_dense(label, scene.frame.soft(outlines, 0.6), strength, 100)


def _pacemaker(scene: Scene, finding: Finding, side: int) -> None:
    thorax = scene.thorax
    x, y = side * scene.between(56, 72), scene.between(-62, -44)
    wide, high = scene.between(14, 18), scene.between(13, 16)
    _solid(scene, finding.label, [scene.blob(x, y, wide, high, 0.06)], scene.between(0.42, 0.65))
    entry = (thorax.turn - 10, -52.0)
    ends = [(thorax.turn + thorax.heart[1] * 0.55, thorax.base - 20.0), (thorax.turn - thorax.heart[0] * 0.7, 8.0)]
    leads = []
    for end in ends[: 1 + (finding.extent > 0)]:
        leads.append(
            spline(
                [
                    (x, y - high),
                    (x - side * 18, y - high - 12),
                    (side * 20, -74),
                    entry,
                    (thorax.turn - 13, -15),
                    ((entry[0] + end[0]) / 2, end[1] + 4),
                    end,
                ]
            )
        )
    _lines(scene, finding.label, leads, 2.2, 0.5)
    _lines(scene, finding.label, [lead[-5:] for lead in leads], 3.6, 0.3)


def _port(scene: Scene, finding: Finding, side: int) -> None:
    thorax = scene.thorax
    x, y = side * scene.between(50, 64), scene.between(-56, -40)
    rim = scene.blob(x, y, 8.5, 8.5, 0.03)
    _solid(scene, finding.label, [rim], 0.4)
    _lines(scene, finding.label, [rim], 2.6, 0.4, closed=True)
    tip = (thorax.turn - 13 + scene.between(-2, 2), scene.between(-12, 12))
    _lines(
        scene,
        finding.label,
        [
            spline(
                [
                    (x, y - 8),
                    (x - side * 10, -80),
                    (side * 26, -86),
                    (side * 8 + thorax.turn, -66),
                    (thorax.turn - 12, -42),
                    tip,
                ]
            )
        ],
        2.6,
        0.5,
    )


def _chest_tube(scene: Scene, finding: Finding, side: int) -> None:
    base = scene.thorax.base_of(side)
    low, tip = base - scene.between(25, 45), scene.between(-78, -50)
    wall = float(scene.thorax.wall(low))
    tube = spline(
        [
            (side * (wall + 34), low + 20),
            (side * (wall + 6), low + 2),
            (side * (wall - 18), low - 22),
            (side * scene.between(48, 58), -25),
            (side * scene.between(26, 42), tip),
        ]
    )
    _lines(scene, finding.label, [tube], 5.5, 0.2)
    _lines(scene, finding.label, [tube], 2.0, 0.5)


def _intubation(scene: Scene, finding: Finding, side: int) -> None:
    thorax = scene.thorax
    mid = thorax.turn * 0.6
    _lines(
        scene,
        finding.label,
        [spline([(mid + 2, -160), (mid, -110), (mid + 1, -80), (mid + 1, scene.between(-56, -42))])],
        6.0,
        0.24,
    )
    _lines(
        scene, finding.label, [spline([(mid + 3, -160), (mid + 2, -110), (mid + 2, -80), (mid + 2, -50)])], 2.0, 0.45
    )
    _lines(
        scene,
        finding.label,
        [
            spline(
                [
                    (mid - 5, -160),
                    (mid - 5, -90),
                    (mid - 3, -20),
                    (mid + 3, 40),
                    (mid + 12, thorax.base + 8),
                    (mid + 34, thorax.base + 24),
                ]
            )
        ],
        3.2,
        0.45,
    )
    if finding.extent:
        _electrodes(scene, finding, side)


def _sternotomy(scene: Scene, finding: Finding, side: int) -> None:
    mid = scene.thorax.turn
    wires = []
    for y in np.linspace(-56, 28, 6):
        tilt = scene.between(-2, 2)
        x = mid + scene.between(-2, 2)
        wires.append(
            spline(
                [(x - 6, y - tilt), (x - 2, y - 5), (x + 5, y - 2), (x + 6, y + 3), (x, y + 5), (x - 5, y + 3)],
                closed=True,
            )
        )
    _lines(scene, finding.label, wires, 2.4, 0.6, closed=True)
    clips = []
    for _ in range(3 + 2 * finding.extent):
        x, y = mid + scene.between(8, 40), scene.between(-20, 35)
        clips.append(np.array([(x, y), (x + scene.between(-3, 3), y + 5)]))
    _lines(scene, finding.label, clips, 2.6, 0.6)
    if finding.extent == 2:
        _lines(scene, finding.label, [scene.blob(mid + 14, 8, 9, 7, 0.04)], 3.0, 0.6, closed=True)


def _electrodes(scene: Scene, finding: Finding, side: int) -> None:
    pads, wires = [], []
    for at, height in ((-1, -72), (1, -72), (-1, 40), (1, 40), (1, -10)):
        x, y = at * scene.between(52, 84), height + scene.between(-14, 14)
        pads.append(scene.blob(x, y, 5.5, 5.5, 0.05))
        wires.append(
            spline(
                [
                    (x, y),
                    (x + at * 14, y + scene.between(10, 30)),
                    (at * scene.between(20, 110), scene.between(60, 90)),
                    (scene.between(-30, 30), 150),
                ]
            )
        )
    _solid(scene, finding.label, pads, 0.5)
    _lines(scene, finding.label, wires, 1.8, 0.36)
