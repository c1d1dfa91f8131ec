"""`fluoro embed`: compute what is missing of a data set, once.

Comes in: a data set, a model, the products asked for. Goes out: rows in the cache, and a run folder with the plan, what
was computed and reused, what it cost, and what failed. What was stopped is gone on with by the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import Field

from engine.cache import Cache
from engine.cluster import Cluster, start_cluster
from engine.embed import Doubles
from engine.errors import FluoroscopeError
from engine.products import product_of
from engine.row_buffer import COMMIT_SECONDS
from jobs import opening
from jobs.config import CacheOptions, DatasetOptions, ModelOptions
from jobs.progress import Progress, spoken_bytes, spoken_rate, spoken_time
from jobs.runs import open_run

if TYPE_CHECKING:
    from engine.encoder import Encoder

log = logging.getLogger(__name__)

LIMITS = {
    "decode": "reading and decoding images was the limit: more --threads, a faster disk, or cached pixels",
    "encode": "the model was the limit: a GPU, or another --precision",
    "store": "writing the cache was the limit: a faster disk",
}


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro embed` needs."""

    what: list[str] = Field(["image"], min_length=1, description="image, text, pixels, tokens@LAYER")
    batch_size: int | None = Field(None, ge=1, description="samples a batch; by the device if empty")
    threads: int | None = Field(None, ge=1, description="threads that read and decode; by cores if empty")
    workers: int | None = Field(None, ge=1, description="worker processes to start; this process alone if empty")
    scheduler: str | None = Field(None, description="Dask scheduler whose workers compute, such as tcp://host:8786")
    commit_seconds: float = Field(COMMIT_SECONDS, gt=0, description="commit at least this often")
    compiled: bool | None = Field(None, description="compile the image tower; by the size of the job if empty")
    rehash: bool = Field(False, description="read every file, also those that look unchanged")
    max_pixels: int | None = Field(None, ge=1, description="refuse larger images (decompression bombs)")


@dataclass(frozen=True)
class Embedded:
    """What was done.

    Parameters
    ----------
    encoder : str
        Its id: what `features`, `index` and `search` ask for.
    samples : int
    computed, reused : dict of str to int
        By product.
    failures : DataFrame
        Columns id, uri, what, reason.
    opened : int
        Images that were read.
    seconds : float
    bytes : int
    waits : dict of str to float
        Seconds spent waiting for "decode", in "encode" and in "store".
    folder : Path
        The run's record.
    doubles : dict of str to Doubles
        Samples with the content of another; see `engine.embed.EmbedReport`.
    """

    encoder: str
    samples: int
    computed: dict[str, int]
    reused: dict[str, int]
    failures: pd.DataFrame
    opened: int
    seconds: float
    bytes: int
    waits: dict[str, float]
    folder: Path
    doubles: dict[str, Doubles] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Return what was done as sentences."""
        yield f"encoder {self.encoder}"
        for what, count in self.computed.items():
            kind = "text" if what == "text" else "image"
            double = self.doubles.get(kind, Doubles(0))
            said = f"{what}: {count:,} computed, {max(self.reused[what] - double.samples, 0):,} there already"
            if double.samples:
                same = "words" if kind == "text" else "bytes"
                said += f", {double.samples:,} with the same {same} as another ({double.second} and {double.first})"
            yield said
        spent = f"in {spoken_time(self.seconds)}, {self.opened:,} images read"
        rate = sum(self.computed.values()) / self.seconds if self.seconds > 0 else 0.0
        if any(self.computed.values()):
            yield f"{spoken_bytes(self.bytes)} added {spent} ({spoken_rate(rate)} rows/s)"
        else:
            yield f"nothing was left to compute: looked {spent}"
        if self.seconds > 10 and any(self.computed.values()):
            yield LIMITS[max(self.waits, key=lambda name: self.waits[name])]
        yield f"run {self.folder}"


def run(
    config: Config,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    encoder: Encoder | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Embed.

    Parameters
    ----------
    config : Config
    out : Path, optional
        The run folder; a new one in the cache unless given.
    overwrite : bool
        Replace an earlier run in `out`.
    encoder : Encoder, optional
        A loaded one, instead of the config's model.
    progress : Progress, optional

    Raises
    ------
    FluoroscopeError
        See `engine.cache.Cache.embed`; failed samples are no error but listed.
    KeyboardInterrupt
        After Ctrl-C; what was computed is kept.
    """
    progress = progress or Progress()
    cache = Cache(config.cache)
    dataset = opening.open_data(config)
    if encoder is None:
        encoder = opening.load_model(config, config.cache, dataset, config.what)
    products = [product_of(what, encoder).what for what in config.what]
    with open_run("embed", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        record.note(encoders=[opening.encoder_row(encoder)])
        with _cluster(config) as cluster, record.step("embed") as step:
            try:
                report = cache.embed(
                    dataset,
                    encoder,
                    config.what,
                    batch_size=config.batch_size,
                    threads=config.threads,
                    commit_seconds=config.commit_seconds,
                    rehash=config.rehash,
                    limits={"max_pixels": config.max_pixels} if config.max_pixels else None,
                    compiled=config.compiled,
                    settled=partial(record.plan, encoder.id, dataset.schema, products),
                    cluster=cluster,
                    progress=progress,
                )
            except KeyboardInterrupt:
                with suppress(FluoroscopeError):
                    log.warning("stopped: %s; %s", _kept(cache, encoder, config.what), record.way_on)
                raise
            step.items, step.reused = sum(report.computed.values()), sum(report.reused.values())
            step.bytes = report.bytes
        record.fail(report.failures)
        record.record("embedded", computed=report.computed, reused=report.reused, waits=report.waits)
    return Embedded(
        encoder.id,
        len(dataset),
        report.computed,
        report.reused,
        report.failures,
        report.opened,
        report.seconds,
        report.bytes,
        report.waits,
        record.folder,
        report.doubles,
    )


def _cluster(config: Config) -> AbstractContextManager[Cluster | None]:
    """Return the workers that compute, None for this process alone."""
    if config.workers is None and config.scheduler is None:
        return nullcontext()
    return start_cluster(config.workers, config.scheduler, threads=config.threads)


def _kept(cache: Cache, encoder: Encoder, what: Sequence[str]) -> str:
    there = cache.arrays()
    counts = []
    for kind, name in there:
        if name.split("@")[0] in (encoder.id, encoder.preprocess.id) and kind in {part.split("@")[0] for part in what}:
            counts.append(f"{len(cache.array(kind, name)):,} {kind} rows of {name} are kept")
    return ", ".join(counts) or "nothing was computed yet"
