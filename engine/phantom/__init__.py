"""Phantoms: seeded chest radiographs with known findings, as medical physics tests its instruments on phantoms.

Comes in: a seed, an index, a size in pixels and how far rare labels are enriched. Goes out: pixels, 14 labels, a mask
and boxes for each finding, a patient, a view and a report. Everything follows from these numbers, and is bit for bit
the same on every machine (see `engine.phantom.strokes` for what that takes). Rooms: `cooccurrence` and `case` say what
there is, `report` and `wording` put it into words, `anatomy`, `findings`, `devices` and `skeleton` say what it looks
like, `draw` and `acquisition` make the picture.
"""

from __future__ import annotations

from engine.phantom.case import Case, Finding, draw_case
from engine.phantom.phantom import GENERATOR_VERSION, Phantom, draw_phantom

__all__ = ["GENERATOR_VERSION", "Case", "Finding", "Phantom", "draw_case", "draw_phantom"]
