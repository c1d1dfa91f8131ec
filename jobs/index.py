"""`fluoro index`: build a search index over the cached embeddings of an encoder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from engine.cache import Cache
from engine.errors import UsageError
from engine.index import build_index
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes, spoken_time


class Config(CacheOptions):
    """What `fluoro index` needs."""

    encoder: str | None = Field(None, description="encoder id; may be left out where the cache has one only")
    kind: Literal["image", "text"] = Field("image", description="which embeddings")
    how: Literal["exact", "ivf", "hnsw"] = Field("exact", description="kind of index")
    seed: int = Field(0, description="of the random rows that an IVF's cells are trained on")


@dataclass(frozen=True)
class Built:
    """The index that was built."""

    encoder: str
    kind: str
    how: str
    rows: int
    bytes: int
    seconds: float
    path: str

    def lines(self) -> Iterator[str]:
        """Return what was built as a sentence."""
        yield (
            f"{self.how} index over {self.rows:,} {self.kind} rows of {self.encoder}: {spoken_bytes(self.bytes)} in "
            f"{spoken_time(self.seconds)}, {self.path}"
        )


def run(config: Config, *, progress: Progress | None = None) -> Built:
    """Build and write the index.

    Raises
    ------
    UsageError
        The encoder is not named and the cache has none or several.
    CacheError
        It has no rows of it.
    """
    progress, cache, start = progress or Progress(), Cache(config.cache), time.perf_counter()
    encoder = config.encoder or only_encoder(cache, config.kind)
    with progress.step(f"index {config.kind} rows"):
        info = build_index(cache, encoder, config.kind, config.how, seed=config.seed).info
    path = cache.storage.place(f"indexes/{info.name}.faiss")
    return Built(encoder, config.kind, config.how, info.rows, info.bytes, time.perf_counter() - start, path)


def only_encoder(cache: Cache, kind: str) -> str:
    """Return the id of the one encoder that has rows of a kind; UsageError naming those there are otherwise."""
    there = [name for found, name in cache.arrays() if found == kind]
    if len(there) != 1:
        choices = f"name one with --encoder: {', '.join(there)}" if there else "`fluoro embed` computes them"
        raise UsageError(f"the cache {cache.address} has {kind} rows of {len(there) or 'no'} encoders; {choices}")
    return there[0]
