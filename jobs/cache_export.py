"""`fluoro cache export`: embeddings as a NumPy file, a Parquet table, a FAISS index, or their keys as CSV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from engine.arrays.storage import storage_of
from engine.cache import Cache
from engine.errors import UsageError
from engine.upkeep.export import export_rows, format_of
from engine.upkeep.usage import one_table_of
from jobs.config import CacheOptions
from jobs.index import only_encoder
from jobs.progress import Progress, spoken_bytes

SHOWN = 10


class Config(CacheOptions):
    """What `fluoro cache export` needs."""

    out: Path = Field(description="file to write; its ending says the format: .npy, .parquet, .faiss, .csv")
    encoder: str | None = Field(None, description="encoder id; may be left out where the cache has one only")
    kind: Literal["image", "text", "pixels", "tokens"] = Field("image", description="which rows")
    format: Literal["npy", "parquet", "faiss", "csv"] | None = Field(None, description="by the file's ending if empty")
    dataset: str | None = Field(None, description="its samples in its order, with their ids; all rows if empty")
    normalize: bool = Field(False, description="scale rows to length one")
    overwrite: bool = Field(False, description="replace what is there")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Parameters
    ----------
    encoder : str
    rows : int
    dim : list of int
        Shape of a row.
    files : list of Path
    bytes : int
    missing : list of str
        Samples without a row, which are left out.
    """

    encoder: str
    rows: int
    dim: list[int]
    files: list[Path]
    bytes: int
    missing: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Return what was written."""
        shape = " x ".join(map(str, [f"{self.rows:,}", *self.dim]))
        yield f"{shape} of {self.encoder}: {', '.join(map(str, self.files))} ({spoken_bytes(self.bytes)})"
        if self.missing:
            more = len(self.missing) - SHOWN
            names = ", ".join(self.missing[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
            yield f"{len(self.missing):,} samples have no row and are left out: {names}; `fluoro embed` computes them"


def run(config: Config, *, progress: Progress | None = None) -> Exported:
    """Export.

    Raises
    ------
    UsageError
        No such encoder or data set, a format that does not fit, or a file that is there.
    CacheError
        A row is damaged, or the file cannot be written.
    """
    progress = progress or Progress()
    form = format_of(config.out, config.format)
    cache = Cache(config.cache)
    name = config.encoder or only_encoder(cache, config.kind)
    array = cache.array(config.kind, name)
    table = None
    if config.dataset is not None:
        table = one_table_of(storage_of(config.cache).local_folder(), config.dataset)
        if not table.sound:
            raise UsageError(
                f"the sample table of {config.dataset!r} is damaged, so its samples are not known; "
                "`fluoro cache verify --repair` and `fluoro embed` make it anew"
            )
    with progress.step(f"export {config.kind} rows"):
        done = export_rows(array, config.out, form, table=table, normalize=config.normalize, overwrite=config.overwrite)
    size = sum(path.stat().st_size for path in done.files)
    return Exported(name, done.rows, list(array.form.row_shape), done.files, size, done.missing)
