"""The thorax: outlines of body, lungs, heart, bones and vessels in thorax units, varied from patient to patient.

Comes in: a stream of random numbers, and how far heart and mediastinum are enlarged. Goes out: outlines as float64
points (x to the image's right, so the patient's left; y down; the rib cage about 180 units wide and high).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.phantom.case import LEFT, RIGHT
from engine.phantom.strokes import Points, spline

# Inner chest wall: half width of the rib cage by height, in an average patient.
WALL_Y = np.array([-96.0, -90.0, -80.0, -66.0, -45.0, -20.0, 10.0, 40.0, 70.0, 100.0])
WALL_X = np.array([14.0, 32.0, 47.0, 60.0, 72.0, 80.0, 86.0, 89.0, 90.0, 88.0])
RIBS = 10
# Which of a vessel's six points are drawn, by order of branching.
CORNERS = ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [0, 3, 5])


@dataclass(frozen=True)
class Thorax:
    """One patient's build; lengths in thorax units."""

    base: float  # height of the diaphragm: large is a deep breath
    dome: tuple[float, float]  # how far each dome (right, left) rises above the costophrenic angle
    lift: tuple[float, float]  # how far each half of the diaphragm is raised
    heart: tuple[float, float]  # reach of the heart to the image's left and right
    heart_top: float
    mediastinum: tuple[float, float]  # half widths of the upper mediastinum
    knob: float  # radius of the aortic knob
    bend: float  # scoliosis
    turn: float  # sideways shift of the mid-line structures by the patient's rotation
    slope: float  # how steeply the ribs fall
    spacing: float  # distance of the ribs
    fat: float  # width of the soft tissue outside the ribs
    breast: float  # 0 without
    clavicle: float

    def wall(self, y: np.ndarray | float) -> np.ndarray:
        """Return the half width of the rib cage at heights y."""
        return np.interp(y, WALL_Y, WALL_X)

    def midline(self, y: np.ndarray | float) -> np.ndarray:
        """Return the x of the spine at heights y."""
        t = np.asarray(y, np.float64) / 100.0
        return self.bend * t * (1 - t * t * 0.6) + self.turn * 0.35

    def base_of(self, side: int) -> float:
        """Return the height of the costophrenic angle of a side."""
        return self.base - (self.lift[0] if side == RIGHT else self.lift[1])


def draw_thorax(
    rng: np.random.Generator, heart_growth: float, widening: float, aorta: float, lifts: tuple[float, float]
) -> Thorax:
    """Draw a patient's build.

    Parameters
    ----------
    rng : Generator
    heart_growth, widening, aorta : float
        0 where normal, 1 for a clearly enlarged heart, upper mediastinum, aorta.
    lifts : (float, float)
        Raised diaphragm, right and left.
    """
    u = rng.random(20)

    def between(k: int, low: float, high: float) -> float:
        return float(low + (high - low) * u[k])

    reach = between(0, 0.0, 1.0)
    return Thorax(
        base=between(1, 46, 80),
        dome=(between(2, 14, 26), between(3, 13, 24)),
        lift=(between(4, 4, 11) + lifts[0], between(5, 0, 5) + lifts[1]),
        heart=(
            18 + 9 * reach + (4 + 8 * u[6]) * heart_growth,
            41 + 11 * between(7, 0, 1) + (17 + 8 * u[8]) * heart_growth,
        ),
        heart_top=between(9, -30, -18) - 8 * heart_growth,
        mediastinum=(
            between(10, 13, 18) + (11 + 6 * u[11]) * widening,
            between(12, 13, 19) + (11 + 6 * u[13]) * widening,
        ),
        knob=between(14, 8, 12) + 9 * aorta,
        bend=between(15, -4, 4),
        turn=between(16, -8, 8),
        slope=between(17, 0.75, 1.25),
        spacing=between(18, 14.5, 17.0),
        fat=10 + 22 * float(u[19]) * float(u[19]),
        breast=float(rng.random()),
        clavicle=float(rng.random()),
    )


def body(thorax: Thorax) -> list[Points]:
    """Return the outlines of neck, trunk and upper arms."""
    fat, away = thorax.fat, 18 * thorax.clavicle - 8
    half = [
        (26 + fat * 0.3, -150),
        (27 + fat * 0.3, -118),
        (40 + fat * 0.5, -104),
        (80 + fat * 0.5, -97),
        (112 + fat * 0.6, -86),
        (134 + fat * 0.8, -62),
        (142 + fat, -30),
        (146 + fat, 20),
        (150 + fat, 90),
        (150 + fat, 160),
        (118 + fat + away, 160),
        (114 + fat + away, 80),
        (107 + fat * 0.9 + away / 2, 25),
        (104 + fat * 0.7, -2),
    ]
    trunk = [(95 + fat, 0), (93 + fat, 30), (94 + fat, 70), (92 + fat * 1.1, 110), (94 + fat * 1.2, 160)]
    outlines = []
    for side in (RIGHT, LEFT):
        outlines.append(spline([(side * x, y) for x, y in half], closed=True, steps=4))
    whole = [(-x, y) for x, y in reversed(trunk)] + [
        (-90, -80),
        (-40, -100),
        (-26 - fat * 0.3, -125),
        (-26 - fat * 0.3, -160),
    ]
    whole += [(26 + fat * 0.3, -160), (26 + fat * 0.3, -125), (40, -100), (90, -80), *trunk]
    outlines.append(np.array(whole, np.float64))
    return outlines


def diaphragm(thorax: Thorax, side: int) -> Points:
    """Return the line of one half of the diaphragm, from the costophrenic angle to the spine."""
    base = thorax.base_of(side)
    dome = thorax.dome[0] if side == RIGHT else thorax.dome[1]
    wall = float(thorax.wall(base)) - 1
    mid = float(thorax.midline(base))
    reach = wall - side * mid
    points = [
        (side * wall, base + 5),
        (side * (wall - 0.07 * reach), base - 0.38 * dome),
        (side * (wall - 0.24 * reach), base - 0.85 * dome),
        (side * (wall - 0.46 * reach), base - dome),
        (side * (wall - 0.7 * reach), base - 0.86 * dome),
        (mid + side * 8, base - 0.55 * dome),
    ]
    return spline(points, steps=6)


def belly(thorax: Thorax) -> Points:
    """Return the outline of what lies below the diaphragm."""
    low = [(110.0, 180.0), (-110.0, 180.0)]
    return np.concatenate([diaphragm(thorax, RIGHT), diaphragm(thorax, LEFT)[::-1], low])


def breasts(thorax: Thorax) -> list[Points]:
    """Return the outlines of both breasts."""
    low = thorax.base - 4 + 20 * thorax.breast
    half = [(22, low - 34), (60, low - 50), (96, low - 30), (98, low), (62, low + 14), (28, low)]
    return [spline([(side * x, y) for x, y in half], closed=True) for side in (RIGHT, LEFT)]


def lung(thorax: Thorax, side: int) -> Points:
    """Return the outline of one half of the chest, from the apex down to the diaphragm."""
    base = thorax.base_of(side)
    heights = np.array([-94.0, -90.0, -80.0, -66.0, -45.0, -20.0, 10.0, 40.0])
    heights = np.append(heights[heights < base - 8], base - 4)
    wall = np.stack([side * (thorax.wall(heights) - 1), heights], axis=1)
    inner_y = np.array([base - 20, 20.0, -20.0, -55.0, -80.0, -93.0])
    inner = np.stack([thorax.midline(inner_y) + side * np.array([9.0, 9.0, 9.0, 9.0, 8.0, 15.0]), inner_y], axis=1)
    outer = spline(wall, steps=4)
    return np.concatenate([outer, diaphragm(thorax, side), spline(inner, steps=4)])


def heart(thorax: Thorax) -> Points:
    """Return the outline of the heart and the great vessels' roots."""
    right, left = thorax.heart
    turn = thorax.turn
    top = thorax.heart_top
    low = thorax.base - 8
    points = [
        (turn - 13, top - 14),
        (turn - 0.85 * right, top + 12),
        (turn - right, top + 36),
        (turn - 0.92 * right, low - 12),
        (turn - 0.5 * right, low + 6),
        (turn + 0.35 * left, low + 10),
        (turn + 0.86 * left, low + 3),
        (turn + left, low - 13),
        (turn + 0.96 * left, low - 31),
        (turn + 0.8 * left, low - 50),
        (turn + 0.56 * left, top + 14),
        (turn + 21, top - 2),
        (turn + 15, top - 14),
    ]
    return spline(points, closed=True, steps=6)


def mediastinum(thorax: Thorax) -> Points:
    """Return the outline of the upper mediastinum, aortic knob included."""
    right, left = thorax.mediastinum
    turn, knob = thorax.turn, thorax.knob
    reach = max(left, 13.0) + knob * 0.75
    points = [
        (turn * 0.6 - right * 0.45, -104),
        (turn - right * 0.8, -74),
        (turn - right, -45),
        (turn - right * 0.95, -15),
        (turn, 5),
        (turn + left * 0.95, -12),
        (turn + max(left, reach * 0.72), -30),
        (turn + reach, -42),
        (turn + reach * 0.93, -52),
        (turn + max(left * 0.85, 11), -64),
        (turn * 0.6 + left * 0.45, -104),
    ]
    return spline(points, closed=True, steps=6)


def posterior_ribs(thorax: Thorax) -> np.ndarray:
    """Return the hind arcs, (2 * RIBS, points, 2), from the spine to the wall: first those of the right."""
    number = np.arange(RIBS)
    top = -86 + number * thorax.spacing
    drop = thorax.slope * (10 + 1.6 * number)
    end = top + drop + 8
    out = []
    for side in (RIGHT, LEFT):
        wall = thorax.wall(end) + 2
        mid = thorax.midline(top)
        knots = np.stack(
            [
                np.stack([mid + side * 8, top], axis=1),
                np.stack([mid + side * (8 + 0.3 * wall), top - 3 + 0.05 * drop], axis=1),
                np.stack([side * 0.72 * wall, top + 0.28 * drop], axis=1),
                np.stack([side * 0.94 * wall, top + 0.7 * drop], axis=1),
                np.stack([side * wall, end], axis=1),
            ],
            axis=1,
        )
        out.append(spline(knots, steps=5))
    return np.concatenate(out)


def anterior_ribs(thorax: Thorax) -> np.ndarray:
    """Return the front arcs, (12, points, 2), from the wall to the cartilage."""
    number = np.arange(6)
    start = np.minimum(-86 + number * thorax.spacing + thorax.slope * (10 + 1.6 * number) + 8, 98.0)
    drop = thorax.slope * (26 + 3.0 * number)
    out = []
    for side in (RIGHT, LEFT):
        wall = thorax.wall(start) + 2
        knots = np.stack(
            [
                np.stack([side * wall, start], axis=1),
                np.stack([side * 0.93 * wall, start + 0.35 * drop], axis=1),
                np.stack([side * 0.7 * wall, start + 0.75 * drop], axis=1),
                np.stack([side * (0.34 * wall + 6), start + drop], axis=1),
            ],
            axis=1,
        )
        out.append(spline(knots, steps=5))
    return np.concatenate(out)


def clavicle(thorax: Thorax, side: int) -> Points:
    """Return the collar bone's line from the breast bone to the shoulder."""
    rise = 14 * thorax.clavicle
    start = thorax.turn * 0.7
    points = [
        (start + side * 13, -68),
        (start + side * 32, -74 - 0.3 * rise),
        (side * 62, -80 - 0.7 * rise),
        (side * 96, -84 - rise),
    ]
    return spline(points, steps=6)


def humerus(thorax: Thorax, side: int) -> list[Points]:
    """Return the upper arm bone's shaft as a line, and its head as an outline."""
    out = 6 * thorax.clavicle + 0.3 * thorax.fat
    turn = np.arange(12) * (2 * np.pi / 12)
    head = np.stack([side * (117 + out + 11 * np.cos(turn)), -68 + 12 * np.sin(turn)], axis=1)
    shaft = np.array([(side * (119 + out), -62.0), (side * (126 + out), -30.0), (side * (131 + out), 60.0)])
    return [shaft, head]


def scapula(thorax: Thorax, side: int) -> Points:
    """Return the outline of a shoulder blade, partly over the lung's edge."""
    out = 6 * thorax.clavicle
    points = [
        (side * (74 + out), -70),
        (side * (100 + out), -84),
        (side * (112 + out), -70),
        (side * (104 + out), -46),
        (side * (92 + out), 4),
        (side * (84 + out), -2),
        (side * (78 + out), -38),
    ]
    return spline(points, closed=True, steps=4)


def vertebrae(thorax: Thorax) -> list[Points]:
    """Return the vertebral bodies as boxes that follow the spine's bend."""
    tops = np.arange(-140.0, 150.0, 15.5)
    half = 8.0 + (tops + 140) * 0.016
    low = tops + 12.2
    above, below = thorax.midline(np.clip(tops, -100, 100)), thorax.midline(np.clip(low, -100, 100))
    corners = [(above - half, tops), (above + half, tops), (below + half, low), (below - half, low)]
    return list(np.stack([np.stack(corner, axis=1) for corner in corners], axis=1))


def vessels(thorax: Thorax, rng: np.random.Generator, side: int) -> list[np.ndarray]:
    """Return the lung's vessels by order of branching, each (n, points, 2): they leave the hilum and fork."""
    hilum_x = thorax.turn + side * 20
    hilum_y = -12 - (4 if side == LEFT else 0)
    count, steps = 11, 5
    spread = np.linspace(-1.30, 1.42, count) + rng.random(count) * 0.24 - 0.12
    start = np.stack([hilum_x + side * rng.random(count) * 4, hilum_y + spread * 9], axis=1)
    length = (34 + 22 * rng.random(count)) * (1 + 0.28 * np.abs(spread))
    orders: list[np.ndarray] = []
    bend = rng.random(count) * 0.5 - 0.25
    for _ in range(3):
        t = np.arange(steps + 1) / steps
        heading = spread[:, None] + bend[:, None] * t
        pace = length[:, None] / steps
        path_x = start[:, :1] + side * np.cumsum(np.cos(heading) * pace, axis=1) - side * np.cos(heading[:, :1]) * pace
        path_y = start[:, 1:] + np.cumsum(np.sin(heading) * pace, axis=1) - np.sin(heading[:, :1]) * pace
        path = np.stack([path_x, path_y], axis=-1)
        # Finer branches need fewer corners.
        orders.append(path[:, CORNERS[len(orders)]])
        picks = np.stack([path[:, 2], path[:, 3], path[:, 5]], axis=1)
        angles = np.stack([heading[:, 2] + 0.55, heading[:, 3] - 0.55, heading[:, 5] + 0.25], axis=1)
        start = picks.reshape(-1, 2)
        many = len(start)
        spread = angles.reshape(-1) + rng.random(many) * 0.4 - 0.2
        length = np.repeat(length, 3) * (0.42 + 0.22 * rng.random(many))
        bend = rng.random(many) * 0.8 - 0.4
    return orders
