"""What heatmap pictures are called, so that those of one sample can be found again."""

from __future__ import annotations

import re
from pathlib import Path

from engine.keys import short_hash


def safe(text: str) -> str:
    """Return a text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "x"


def figure_stem(sample: str, label: str) -> str:
    """Return a readable file name; the hash keeps apart what the readable part may merge."""
    return f"{safe(Path(sample).stem)[:60]}-{safe(label)}-{short_hash(sample + label, 6)}"
