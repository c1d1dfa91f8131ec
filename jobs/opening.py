"""What several verbs begin with: open the data set, load the encoder, bring embeddings from the cache.

Comes in: validated options. Goes out: the engine's own objects. The name ``phantom-clip`` stands for the shipped model.
"""

from __future__ import annotations

from engine.dataset import Dataset
from engine.resources import resource
from engine.sources import open_dataset
from engine.splits import apply_split
from jobs.config import DatasetOptions, SplitOptions

SHIPPED_MODEL = "phantom-clip"


def open_data(options: DatasetOptions, split: SplitOptions | None = None) -> Dataset:
    """Open a data set and, where a split is given, apply and check it."""
    dataset = open_dataset(options.dataset, **options.data)
    if split is None:
        return dataset
    return apply_split(dataset, split.how, split.seed, split.fractions)


def model_name(name: str) -> str:
    """Return the open_clip name of a model, ``phantom-clip`` resolved to the folder it is shipped in."""
    return f"local-dir:{resource(f'configs/{SHIPPED_MODEL}')}" if name == SHIPPED_MODEL else name
