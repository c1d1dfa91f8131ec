"""The bones, whole or broken: ribs, collar bones, shoulder blades, upper arms and spine are added to the scene."""

from __future__ import annotations

import numpy as np

from engine.phantom import anatomy
from engine.phantom.case import LEFT, RIGHT, Finding
from engine.phantom.scene import Scene
from engine.phantom.strokes import Points


class Break:
    """What a fracture does to the bones' lines: pieces displaced, their ends, and the callus of healing."""

    def __init__(self) -> None:
        self.ends: list[Points] = []
        self.callus: list[Points] = []

    def collar_bone(self, scene: Scene, fracture: Finding, collars: list[Points]) -> None:
        """Break a collar bone in its middle; the outer piece sinks and slides inwards."""
        side = fracture.sides[0]
        half = 0 if side == RIGHT else 1
        line = collars[half]
        cut = 7 + int(scene.between(0, 4))
        drop = np.array([-side * scene.between(3, 6), scene.between(9, 13)])
        collars[half] = line[: cut + 1]
        collars.append(line[cut:] + drop)
        self.ends += [line[cut - 2 : cut + 1], line[cut : cut + 3] + drop]
        if fracture.extent:
            x, y = (line[cut] + drop / 2).tolist()
            self.callus.append(scene.blob(x, y, 6.5, 6, 0.2))

    def ribs(self, scene: Scene, fracture: Finding, ribs: list[Points]) -> None:
        """Break three to five neighbouring ribs in their side arc, each with a step, or with callus where they heal."""
        side = fracture.sides[0]
        first = (1, 3, 5)[fracture.zone] + int(scene.between(0, 2))
        for number in range(first, min(first + 3 + fracture.extent, anatomy.RIBS - 1)):
            place = (0 if side == RIGHT else anatomy.RIBS) + number
            rib = ribs[place]
            cut = 12 + int(scene.between(0, 4))
            step = np.array([-side * scene.between(1, 3), scene.between(5, 8) * (1 if number % 2 else -1)])
            if fracture.kind == "healed ribs":
                step = step * 0.4
                x, y = (rib[cut] + step / 2).tolist()
                self.callus.append(scene.blob(x, y, 6.0, 7.5, 0.2))
            moved = rib[cut:] + step * np.linspace(1, 0.2, len(rib) - cut)[:, None]
            ribs[place] = rib[: cut + 1]
            ribs.append(moved)
            self.ends += [rib[cut - 1 : cut + 1], moved[:2]]


def draw_bones(scene: Scene, fracture: Finding | None, abdomen: np.ndarray) -> None:
    """Add all bones to the scene; `abdomen` is the belly's uint8 layer, whose thickness drowns the lowest ribs."""
    frame, thorax = scene.frame, scene.thorax
    ribs: list[Points] = list(anatomy.posterior_ribs(thorax))
    collars: list[Points] = [anatomy.clavicle(thorax, side) for side in (RIGHT, LEFT)]
    broken = Break()
    if fracture is not None and fracture.kind == "clavicle":
        broken.collar_bone(scene, fracture, collars)
    elif fracture is not None:
        broken.ribs(scene, fracture, ribs)

    # The cortex is denser than the marrow: a broad stroke with a fainter, narrower one on it.
    hind = frame.stroke(frame.blank(), ribs, 6.4, 150, smooth=False)
    hind = frame.blur(frame.stroke(hind, ribs, 3.8, 95, smooth=False), 0.7)
    front = frame.blur(frame.stroke(frame.blank(), anatomy.anterior_ribs(thorax), 7.5, 130, smooth=False), 1.1)
    cage = frame.scaled(hind, 0.3, "cage")
    frame.add(cage, front, 0.17)
    free = frame.scaled(abdomen, -0.6)
    free += np.float32(1)
    cage *= free
    scene.dense += cage

    girdle = frame.stroke(frame.blank(), collars, 8.5, 150, smooth=False)
    girdle = frame.stroke(girdle, collars, 5.2, 105, smooth=False)
    frame.fill(girdle, [anatomy.scapula(thorax, side) for side in (RIGHT, LEFT)], 60)
    arms = [anatomy.humerus(thorax, side) for side in (RIGHT, LEFT)]
    frame.stroke(girdle, [shaft for shaft, _ in arms], 10, 75, smooth=False)
    frame.fill(girdle, [head for _, head in arms], 90)
    frame.add(scene.dense, frame.blur(girdle, 0.8), 0.36)
    column = frame.fill(frame.blank(), anatomy.vertebrae(thorax), 215)
    frame.add(scene.dense, frame.blur(column, 1.3), 0.13)
    if fracture is not None:
        ends = frame.blur(frame.stroke(frame.blank(), broken.ends, 7.5), 0.6)
        frame.add(scene.dense, ends, 0.16)
        scene.mark(fracture.label, frame.stroke(frame.blank(), broken.ends, 11, smooth=False) > 127)
        if broken.callus:
            scene.add_dense(fracture.label, frame.soft(broken.callus, 0.9), 0.26, 80)
