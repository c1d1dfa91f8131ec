"""The exposure: where the patient stands, how attenuation becomes grey, what the technician adds.

The same patient taken twice differs in all of this and in nothing else.
"""

from __future__ import annotations

import numpy as np

from engine.phantom.strokes import Frame, noise_cells, share

TONES = 2048
# Attenuation that the tone curve's table reaches to; soft tissue in mid-body is about 1.
MU_TOP = 2.0


def draw_frame(rng: np.random.Generator, size: int, projection: str) -> Frame:
    """Draw position, magnification and rotation; bedside (AP) pictures lie more askew."""
    u = rng.random(6)
    scale = 0.86 + 0.32 * u[0]
    return Frame(
        size=size,
        wide=float(scale * (0.95 + 0.1 * u[1])),
        high=float(scale * (1.02 - 0.1 * u[1])),
        angle=float((u[2] + u[3] - 1) * (0.09 if projection == "PA" else 0.16)),
        x=float(107 + 42 * u[4]),
        y=float(113 + 40 * u[5]),
    )


def expose(mu: np.ndarray, frame: Frame, rng: np.random.Generator, projection: str) -> np.ndarray:
    """Return grey values, uint8 (size, size), of attenuation `mu`, float32, which is used up.

    Grain of two sizes, an uneven field (heel effect), a tone curve, a side marker, and now and then collimation.
    """
    grain = 0.015 + 0.035 * float(rng.random())
    frame.add(mu, noise_cells(rng, frame.size), 2 * grain)
    mu += frame.cloud(rng, max(frame.size * 5 // 8, 8), grain * 1.1)
    mu += frame.cloud(rng, 3, 0.06)
    mu -= np.float32(grain)
    mu *= np.float32(TONES / MU_TOP)
    np.clip(mu, np.float32(0), np.float32(TONES - 1), out=mu)
    pixels = tone_curve(rng).take(mu.astype(np.int16))
    np.maximum(pixels, _marker(frame, rng, projection), out=pixels)
    u = rng.random(6)
    if u[0] < 0.35:
        shutter = Frame(frame.size, 1.0, 1.0, float((u[1] - 0.5) * 0.05), 128.0, 128.0)
        left, right, top, low = -126 + 12 * u[2], 126 - 12 * u[3], -127 + 12 * u[4], 127 - 12 * u[5]
        field = shutter.soft([np.array([(left, top), (right, top), (right, low), (left, low)])], 0.8)
        pixels = (pixels * share(field)).astype(np.uint8)
    return pixels


def tone_curve(rng: np.random.Generator) -> np.ndarray:
    """Return the look-up table from attenuation to grey, uint8 (TONES,); gain, offset and bend vary."""
    u = rng.random(4)
    mu = np.arange(TONES) * (MU_TOP / TONES)
    t = np.clip(mu * (0.5 + 0.3 * u[0]) + (-0.09 + 0.2 * u[1]), 0.0, 1.12)
    s_shaped = t * t * (3 - 2 * np.minimum(t, 1.0))
    mix = 0.55 * u[2]
    bent = (1 - mix) * t + mix * s_shaped
    bent = bent * (1 + (u[3] - 0.5) * 0.5 * (1 - bent))
    return np.clip(np.rint(bent * 240 + 4), 0, 255).astype(np.uint8)


def _marker(frame: Frame, rng: np.random.Generator, projection: str) -> np.ndarray:
    """Return the side marker as a uint8 layer: L or R on that side of the patient, lines of text for AP."""
    u = rng.random(5)
    upright = Frame(frame.size, 1.0, 1.0, 0.0, 0.0, 0.0)
    layer = upright.blank()
    left = u[0] < 0.6
    x, y, tall = (226 + 18 * u[1] if left else 10 + 18 * u[1]), 10 + 36 * u[2], 0.8 + 0.5 * u[3]
    letter = [(0, 0), (0, 12), (7, 12)] if left else [(0, 12), (0, 0), (6, 1), (7, 4), (5, 6), (0, 6.5), (7, 12)]
    if projection == "AP" and u[4] < 0.6:
        text = [np.array([(x - 5, y + 19 + 4 * row), (x + 11 - 3 * row, y + 19 + 4 * row)]) for row in range(3)]
        upright.stroke(layer, text, 1.2, 200)
    return upright.stroke(layer, [np.array(letter, np.float64) * tall + (x, y)], 2.0, 255)
