"""`fluoro index`: build a search index over the cached embeddings of an encoder, or bring one up to date.

Where there is an index that is behind its cache, only the new rows are added. The result says how long exact search,
which needs no index, takes on this machine, so that one can tell whether an index is worth having.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from engine.cache import Cache
from engine.errors import UsageError
from engine.index import build_index, kinds, update_index
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes, spoken_time


class EncoderChoice(CacheOptions):
    """Fields shared by the verbs that need an encoder's rows and not the encoder."""

    encoder: str | None = Field(None, description="encoder id; may be left out where the cache has one only")
    model: str | None = Field(None, description="or the model whose rows they are; it is loaded to tell its id")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the model")
    decoder: Literal["exact", "fast"] = Field("exact", description="of the model")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    def encoder_id(self, cache: Cache, kind: str) -> str:
        """Return the encoder's id; UsageError where it is not to be known, or named twice."""
        if self.model is None:
            return self.encoder or only_encoder(cache, kind)
        from engine.precision import load_for  # torch and open_clip, which rows alone do not need

        # Nothing is embedded, so there is nothing whose precision must be compared first.
        found = load_for(
            self.model, self.cache, device=self.device, precision=self.precision, decoder=self.decoder, check=False
        ).id
        if self.encoder not in (None, found):
            raise UsageError(f"--model {self.model!r} is encoder {found}, not {self.encoder}; name one of the two")
        return found


class Config(EncoderChoice):
    """What `fluoro index` needs."""

    kind: Literal["image", "text"] = Field("image", description="which embeddings")
    how: str = Field("exact", description="exact, ivf, hnsw, pq or a FAISS factory string such as IVF1024,PQ64np")
    seed: int = Field(0, description="of the random rows that it is trained on")
    rebuild: bool = Field(False, description="build it anew also where new rows could be added to what is there")

    @field_validator("how")
    @classmethod
    def _known_kind(cls, how: str) -> str:
        try:
            return kinds.check_kind(how)
        except UsageError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Built:
    """The index that was built.

    Parameters
    ----------
    encoder, kind, how, path : str
    rows, bytes : int
        All that it covers, and its size.
    seconds : float
    added : int
        Rows that were added now; all of them where it was built.
    query_seconds, thousand_seconds : float
        About how long exact search takes here in as many rows: for one query, and for a thousand at once.
    fast_enough : int
        Up to so many rows exact search answers a query within a second here.
    """

    encoder: str
    kind: str
    how: str
    rows: int
    bytes: int
    seconds: float
    path: str
    added: int
    query_seconds: float
    thousand_seconds: float
    fast_enough: int

    def lines(self) -> Iterator[str]:
        """Return what was built as a sentence."""
        yield (
            f"{self.how} index over {self.rows:,} {self.kind} rows of {self.encoder}: {spoken_bytes(self.bytes)} in "
            f"{spoken_time(self.seconds)}, {self.path}"
        )
        if self.added < self.rows:
            yield f"it was there and took in {self.added:,} new rows; --rebuild builds it anew"
        yield (
            f"exact search, which needs no index, takes about {self.query_seconds:.3f} s a query here and "
            f"{self.thousand_seconds:.2f} s for 1,000 at once; it is fast enough (a second a query) up to some "
            f"{self.fast_enough:,} rows"
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
    from engine.index import products  # torch

    progress, cache, start = progress or Progress(), Cache(config.cache), time.perf_counter()
    encoder = config.encoder_id(cache, config.kind)
    with progress.step(f"index {config.kind} rows"):
        if config.rebuild:
            index = build_index(cache, encoder, config.kind, config.how, seed=config.seed)
            added = len(index)
        else:
            index, added = update_index(cache, encoder, config.kind, config.how, seed=config.seed)
    info, taken = index.info, time.perf_counter() - start
    path = cache.storage.place(f"indexes/{info.name}.faiss")
    one, thousand = (products.exact_seconds(info.rows, info.dim, queries) for queries in (1, 1000))
    fast_enough = products.fast_enough_rows(info.dim)
    return Built(
        encoder, config.kind, config.how, info.rows, info.bytes, taken, path, added, one, thousand, fast_enough
    )


def only_encoder(cache: Cache, kind: str) -> str:
    """Return the id of the one encoder that has rows of a kind; UsageError naming those there are otherwise."""
    there = [name for found, name in cache.arrays() if found == kind]
    if len(there) != 1:
        choices = f"name one with --encoder: {', '.join(there)}" if there else "`fluoro embed` computes them"
        raise UsageError(f"the cache {cache.address} has {kind} rows of {len(there) or 'no'} encoders; {choices}")
    return there[0]
