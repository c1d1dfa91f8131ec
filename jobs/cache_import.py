"""`fluoro cache import`: embeddings that others made, under an id of their own or a model's.

Comes in: a folder of npy and Parquet files, the name of the model that made them. Goes out: rows in the cache, found by
content as all rows are, so data sets that hold the same images find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from engine.errors import UsageError
from engine.upkeep.importing import MOST_LISTED, Source, find_source, import_rows, imported_id
from jobs.config import CacheOptions
from jobs.progress import Progress


class Config(CacheOptions):
    """What `fluoro cache import` needs."""

    folder: Path = Field(description="folder as clip-retrieval writes it, or with .npy and .parquet files")
    name: str | None = Field(None, description="name of the model that made them")
    description: str = Field("", description="what else makes them what they are: weights, precision, preprocessing")
    kind: Literal["both", "image", "text"] = Field("both", description="which embeddings")
    root: str | Path | None = Field(
        None, description="where the images are: folder or URL that their paths are relative to, or tar:PATTERN"
    )
    column: str | None = Field(None, description="column of paths (or of captions, with kind text)")
    encoder_id: str | None = Field(None, description="the id of a model whose embeddings these are; needs model")
    model: str | None = Field(None, description="model that computes some rows again to compare them")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="numbers the model computes in")
    decoder: Literal["exact", "fast"] = Field("exact", description="as the rows were computed")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _named(self) -> Config:
        if (self.encoder_id is None) != (self.model is None):
            raise ValueError("--encoder-id and --model go together: the model computes some rows again to compare them")
        if self.name is None and self.encoder_id is None:
            raise ValueError("which model made these embeddings? Give --name NAME (or --encoder-id and --model)")
        return self


@dataclass(frozen=True)
class Imported:
    """What was taken in.

    Parameters
    ----------
    encoder : str
        Its id in the cache.
    rows : DataFrame
        Columns kind, rows (in the files), added, there (already, or twice), left out.
    failures : DataFrame
        Rows left out: id, uri, what, reason.
    compared : int
        Rows that were computed again and agreed; 0 without a model.
    least_cosine : float or None
        Of the compared rows.
    """

    encoder: str
    rows: pd.DataFrame
    failures: pd.DataFrame
    compared: int = 0
    least_cosine: float | None = field(default=None)

    def lines(self) -> Iterator[str]:
        """Return what was taken in, and what to do about the rest."""
        yield f"encoder {self.encoder}"
        for row in self.rows.to_dict("records"):
            yield (
                f"{row['kind']}: {row['added']:,} of {row['rows']:,} rows added, "
                f"{row['there']:,} there already or twice, {row['left out']:,} left out"
            )
        if self.compared:
            yield f"{self.compared} rows computed again: cosine at least {self.least_cosine:.5f}"
        if len(self.failures):
            yield (
                "rows are found by the content of their image, so one whose image cannot be read has no place here: "
                "say with --root where the images are and run the same command again; what is there is not added twice"
            )


def run(config: Config, *, progress: Progress | None = None) -> Imported:
    """Import.

    Raises
    ------
    UsageError
        No such folder, nothing to import in it, or embeddings that are not the model's.
    DataError
        Files that do not belong together.
    CacheError
        The cache cannot be written.
    """
    progress = progress or Progress()
    sources = _sources(config)
    encoder, cosines = _encoder(config, sources) if config.model else (None, [])
    description: dict[str, Any] = {"name": config.name, "imported": True, "description": config.description}
    name = imported_id(str(config.name), description) if encoder is None else encoder.id
    rows, failures = [], []
    for source in sources:
        described = description if encoder is None else encoder.description
        done = import_rows(source, config.cache, name, described, progress)
        rows.append((source.kind, done.rows, done.added, done.there, done.left_out))
        failures += [(row, "", source.kind, reason) for row, reason in done.failures]
        if done.left_out > MOST_LISTED:
            failures.append(("", "", source.kind, f"and {done.left_out - MOST_LISTED:,} more"))
    return Imported(
        name,
        pd.DataFrame(rows, columns=["kind", "rows", "added", "there", "left out"]),
        pd.DataFrame(failures, columns=["id", "uri", "what", "reason"]),
        len(cosines),
        min(cosines) if cosines else None,
    )


def _sources(config: Config) -> list[Source]:
    if not config.folder.is_dir():
        raise UsageError(f"{str(config.folder)!r} is no folder; name the one that holds img_emb and metadata")
    found: list[Source] = []
    for kind in ("image", "text") if config.kind == "both" else (config.kind,):
        column = config.column if config.kind == kind or kind == "image" else None
        # Files side by side are of one kind, which has to be said.
        source = find_source(config.folder, kind, column=column, root=config.root)
        if source is not None and not (found and source.pairs == found[0].pairs):
            found.append(source)
    if not found:
        raise UsageError(f"{str(config.folder)!r} holds no embeddings: no img_emb or text_emb folder and no .npy file")
    return found


def _encoder(config: Config, sources: list[Source]) -> tuple[Any, list[float]]:
    """Return the model that the rows are said to be of, and the cosines of the rows that were computed again."""
    from engine.precision import load_for
    from engine.upkeep.spot_check import compare_with

    # Not compared with float32: it is compared with the rows themselves.
    encoder = load_for(
        str(config.model),
        config.cache,
        device=config.device,
        precision=config.precision,
        decoder=config.decoder,
        check=False,
    )
    if encoder.id != config.encoder_id:
        raise UsageError(
            f"model {config.model!r} is {encoder.id}, not {config.encoder_id!r}; `fluoro model info` tells a model's id"
        )
    return encoder, np.concatenate([compare_with(encoder, source) for source in sources]).tolist()
