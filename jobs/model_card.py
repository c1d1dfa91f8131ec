"""The card of a fine-tuned model: README.md in its folder.

In comes what training did, as plain values; out goes a text for people with the same values as YAML. Test metrics are
added when they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.arrays.durable import write_plainly
from jobs.plain import plain

CARD_FILE = "README.md"
_TEST = "## On the test split"


def text(name: str, card: Mapping[str, Any], kind: str = "An image tower fine-tuned by fluoroscope") -> str:
    """Return the card of a model.

    Parameters
    ----------
    name : str
    card : mapping
        parent, data, split, protocol, objective, validation metrics, recipe ...
    kind : str
        What it is, as the beginning of a sentence.
    """
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in dict(card.get("validation", {})).items())
    lines = [
        f"# {name}",
        "",
        f"{kind}; not for diagnosis.",
        "",
        f"- parent encoder: `{card['parent']}`",
        f"- data: `{card['data']}`, split digest `{card['split']}`",
        f"- objective: {card.get('objective', 'none: weights of finished trainings were averaged')}",
        f"- on validation, by which it was chosen: {scores or 'not measured'}",
        "- the folder is an open_clip `local-dir:` model; `head.npz` holds the classifier on its embeddings",
        "",
        "```yaml",
        yaml.safe_dump(plain(card), sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def add_test_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write a model's metrics on the test split into its card, in place of earlier ones."""
    path = folder / CARD_FILE
    before, _, _ = path.read_text(encoding="utf-8").partition(_TEST)
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    added = [_TEST, "", "| metric | value |", "|---|---|", *rows, ""]
    partial = path.with_name(f"{CARD_FILE}.partial")
    write_plainly(partial, (before.rstrip() + "\n\n" + "\n".join(added)).encode())
    partial.replace(path)
