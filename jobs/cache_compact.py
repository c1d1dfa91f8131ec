"""`fluoro cache compact`: arrays without holes, doubles and rows that nobody uses any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from pydantic import Field

from engine.arrays.storage import storage_of
from engine.upkeep.compact import compact_cache
from jobs.config import CacheOptions
from jobs.progress import Progress, spoken_bytes


class Config(CacheOptions):
    """What `fluoro cache compact` needs."""

    unused: bool = Field(False, description="drop image, pixel and token rows that no sample table names")
    removed: bool = Field(False, description="also those of samples that their data set did not hold at the last scan")
    texts: bool = Field(False, description="with these: text rows too, prompts among them")
    dry_run: bool = Field(False, description="only say what would go")


@dataclass(frozen=True)
class Compacted:
    """What went, or would go.

    Parameters
    ----------
    cache : Path
    arrays : DataFrame
        Columns array, rows (that stay), unused, doubles, holes, bytes (freed).
    indexes : list of str
        Removed, since their rows have other numbers now.
    done : bool
        False after a dry run.
    """

    cache: Path
    arrays: pd.DataFrame
    indexes: list[str] = field(default_factory=list)
    done: bool = True

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return what went by array."""
        shown = self.arrays.assign(bytes=[spoken_bytes(size) for size in self.arrays["bytes"]])
        return {"Compacted" if self.done else "Would go": shown} if len(shown) else {}

    def lines(self) -> Iterator[str]:
        """Return the sum."""
        texts = self.arrays["unused"][self.arrays["array"].str.startswith("text/")].sum()
        if texts:
            yield f"{texts:,} text rows of no data set {'went' if self.done else 'would go'}: prompts may be among them"
        for name in self.indexes:
            yield f"removed the index {name}, whose rows have other numbers now; `fluoro index` builds it again"
        if not len(self.arrays):
            yield f"nothing to compact in {self.cache}"
        elif self.done:
            yield f"{spoken_bytes(int(self.arrays['bytes'].sum()))} freed"
        else:
            yield f"{spoken_bytes(int(self.arrays['bytes'].sum()))} would be freed; nothing was changed"


def run(config: Config, *, progress: Progress | None = None) -> Compacted:
    """Compact.

    Raises
    ------
    CacheError
        An array is damaged.
    UsageError
        Nothing says which rows are used.
    """
    progress, cache = progress or Progress(), storage_of(config.cache).local_folder()
    with progress.step("compact"):
        found, indexes = compact_cache(
            cache, unused=config.unused, removed=config.removed, texts=config.texts, dry_run=config.dry_run
        )
    rows = [
        (f"{each.kind}/{each.name}", each.rows, each.unused, each.doubles, each.holes, each.bytes) for each in found
    ]
    table = pd.DataFrame(rows, columns=["array", "rows", "unused", "doubles", "holes", "bytes"])
    return Compacted(cache, table, indexes, not config.dry_run)
