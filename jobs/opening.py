"""What several verbs begin with: open the data set, split it, load the model in the precision that fits; open an image.

Comes in: validated options. Goes out: the engine's own data set and encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from engine.dataset import Dataset
from engine.errors import UsageError
from engine.memory import importing
from engine.model_files import resolve_model
from engine.sources import open_dataset
from engine.splits import apply_split
from engine.tables import offer
from jobs.config import DatasetOptions, ModelOptions, SplitOptions

if TYPE_CHECKING:
    from PIL import Image

    from engine.encoder import Encoder

log = logging.getLogger(__name__)


def check_columns(names: Sequence[str], samples: pd.DataFrame) -> None:
    """Raise UsageError for a name that no column of the samples has."""
    for name in names:
        if name not in samples:
            raise UsageError(f"no sample column {name!r} for subgroups; {offer(name, samples.columns)}")


def encoder_row(encoder: Encoder) -> dict[str, Any]:
    """Return what a run's provenance keeps of an encoder."""
    return {"id": encoder.id, "name": encoder.name, "description": encoder.description}


def open_data(options: DatasetOptions, split: SplitOptions | None = None) -> Dataset:
    """Open a data set and, where a split is given, apply and check it."""
    dataset = open_dataset(options.dataset, **options.data)
    return dataset if split is None else split_data(dataset, split)


def load_model(
    options: ModelOptions,
    cache: Any,
    dataset: Dataset,
    what: Sequence[str] = ("image", "text"),
    texts: Sequence[str] = (),
) -> Encoder:
    """Load the model; at the first use of its towers its precision is compared with float32.

    Parameters
    ----------
    options : ModelOptions
    cache : path or Storage
    dataset : Dataset
        Whose samples are compared.
    what : sequence of str
        What the job embeds, prompts among the texts.
    texts : sequence of str
        Texts besides the data set's own.
    """
    files = resolve_model(options.model)
    _ = files.hashing  # begins, while torch and open_clip are imported
    with importing("engine.precision"):
        from engine.precision import load_for
    return load_for(
        files,
        cache,
        device=options.device,
        precision=options.precision,
        decoder=options.decoder,
        dataset=dataset,
        what=what,
        texts=texts,
    )


def split_data(dataset: Dataset, split: SplitOptions) -> Dataset:
    """Apply a split and check it; "auto" is the one given in the data if there is one, else one by group."""
    how = split.how
    if how == "auto":
        how = "given" if (dataset.samples["split"] != "").any() else "grouped"
        log.info("split: %s", "as given in the data" if how == "given" else f"by group, seed {split.seed}")
    return apply_split(dataset, how, split.seed, split.fractions)


def read_image(dataset: Dataset, row: int) -> Image.Image:
    """Return a sample's original image, decoded (mode L or RGB); ImageError where it cannot be read."""
    from engine import pixels

    return pixels.decode(dataset.reader.read(str(dataset.samples["uri"].iloc[row])))
