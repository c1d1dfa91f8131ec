"""`fluoro dataset leaks`: find images and texts that lie on both sides of a split.

Comes in: a data set with its split, and a model. Goes out: tables of pairs of images across splits that are the same
bytes, or whose cached embeddings are nearly the same, and of texts that occur in several parts; exit status 1 where
there is such a pair of images. Each image asks the index over the cache for its nearest ones in the other parts: exact
search, or, where that would take minutes and there is one, an approximate index; which one is said. Texts do not count
as damage: many patients have the same normal report; but who trains on texts should look at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from analysis import leaks
from engine.cache import Cache
from engine.dataset import Dataset
from engine.errors import UsageError
from engine.index import kinds
from jobs import opening
from jobs.config import CacheOptions, DatasetOptions, ModelOptions, SplitOptions
from jobs.leak_search import image_pairs
from jobs.progress import Progress

PAIRS_SHOWN = 20
TEXT_SHOWN = 60


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro dataset leaks` needs."""

    split: SplitOptions = Field(default_factory=SplitOptions, description="the split that is checked")
    threshold: float = Field(leaks.THRESHOLD, gt=-1, le=1, description="cosine from which two images count as one")
    how: str = Field("auto", description="kind of index; auto: exact where that is fast enough, else what was built")
    batch_size: int | None = Field(None, ge=1, description="samples a batch; by the device if empty")
    threads: int | None = Field(None, ge=1, description="threads that read and decode; by cores if empty")

    @field_validator("how")
    @classmethod
    def _known_kind(cls, how: str) -> str:
        if how != "auto":
            try:
                kinds.check_kind(how)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return how


@dataclass(frozen=True)
class Leaks:
    """What lies on both sides of a split.

    Parameters
    ----------
    images : int
        Samples with an embedding, of all parts.
    threshold : float
    encoder : str
    pairs : DataFrame
        `analysis.leaks.PAIR_COLUMNS`; kind is "identical image" or "near-duplicate image".
    texts : DataFrame
        text, samples, a column a part, and one id a part.
    highest : DataFrame
        What the highest cosine to a train image usually is (`analysis.leaks.highest_by_part`).
    failures : DataFrame
        Samples that could not be embedded.
    how : str
        Kind of index that was asked.
    """

    images: int
    threshold: float
    encoder: str
    pairs: pd.DataFrame = field(compare=False)
    texts: pd.DataFrame = field(compare=False)
    highest: pd.DataFrame = field(compare=False)
    failures: pd.DataFrame = field(compare=False)
    how: str = "exact"

    @property
    def exit_status(self) -> int:
        """1 where images lie on both sides."""
        return 1 if len(self.pairs) else 0

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the pairs, the texts, and how alike images usually are."""
        shown = self.texts.head(PAIRS_SHOWN).copy()
        if len(shown):
            shown["text"] = [
                text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..." for text in shown["text"]
            ]
        tables = {
            "Images on both sides of the split": self.pairs.head(PAIRS_SHOWN),
            "Texts on both sides of the split": shown,
            "Highest cosine of an image to one in train": self.highest,
        }
        return {title: table for title, table in tables.items() if len(table)}

    def lines(self) -> Iterator[str]:
        """Return the verdict."""
        kinds = self.pairs["kind"].value_counts()
        if len(self.pairs):
            said = " and ".join(f"{count:,} of {kind}s" for kind, count in kinds.items())
            yield f"{len(self.pairs):,} pairs of images across splits ({said}) among {self.images:,} images"
            if len(self.pairs) > PAIRS_SHOWN:
                yield f"  {PAIRS_SHOWN} are shown; --json lists all"
            yield "give each pair one group, or leave one of the two out, and split again"
        else:
            yield f"no image lies on both sides: {self.images:,} images, cosines below {self.threshold:g}"
        missed = "" if self.how == "exact" else ", which may miss some: `fluoro index check` says how many"
        yield f"near-duplicates were looked for with the {self.how} index of {self.encoder}{missed}"
        if len(self.texts):
            several = int(self.texts["samples"].sum())
            yield f"{len(self.texts):,} texts of {several:,} samples occur in several parts"


def run(config: Config, *, progress: Progress | None = None) -> Leaks:
    """Compare images and texts across the split.

    Raises
    ------
    DataError
        No split, or so many pairs that the threshold says nothing.
    """
    progress = progress or Progress()
    dataset = opening.open_data(config, config.split)
    encoder = opening.load_model(config, config.cache, dataset, ("image",))
    cache = Cache(config.cache)
    report = cache.embed(
        dataset, encoder, ("image",), batch_size=config.batch_size, threads=config.threads, progress=progress
    )
    features = cache.features(dataset, encoder, "image")
    kept = dataset.take(features.rows)
    split = kept.samples["split"].to_numpy(dtype=object)
    found = image_pairs(cache, kept, encoder.id, features.values, features.keys, config.threshold, config.how)
    return Leaks(
        images=len(kept),
        threshold=config.threshold,
        encoder=encoder.id,
        pairs=found.pairs,
        texts=_texts(dataset),
        highest=leaks.highest_by_part(features.values, split, searches=found.searches)
        if "train" in set(split)
        else pd.DataFrame(),
        failures=report.failures,
        how=found.how,
    )


def _texts(dataset: Dataset) -> pd.DataFrame:
    """Return texts that occur in several parts, with the id of one sample a part."""
    texts = dataset.samples["text"].to_numpy(dtype=object)
    plain = np.array([leaks.plain_text(text) for text in texts], dtype=object)
    found = leaks.identical(plain, dataset.samples["split"].to_numpy(dtype=object)).rename(columns={"value": "text"})
    for column in [name for name in found.columns if name.endswith(" first")]:
        rows = found[column].to_numpy(dtype=np.int64)
        found[column] = np.where(rows >= 0, dataset.ids[rows], "") if len(rows) else ""
    return found
