"""The index that a leak check asks: exact where that is fast enough, else an approximate one that is there already.

Comes in: a cache, an encoder's id, how many images will ask. Goes out: an index (`dataset leaks` and `study` ask the
same one), and the search among each part's images.
"""

from __future__ import annotations

import logging

import numpy as np

from engine.cache import Cache
from engine.errors import CacheError
from engine.index import Index, build_index, has_index, load_index, products
from engine.sample_search import SampleSearch
from jobs.progress import spoken_time

log = logging.getLogger(__name__)

# Exact search is what is done, unless it takes longer and there is another index.
PATIENCE_SECONDS = 120.0
APPROXIMATE = ("hnsw", "ivf", "pq")


def leak_index(cache: Cache, encoder_id: str, how: str, shape: tuple[int, ...]) -> Index:
    """Return the index over an encoder's images that is asked.

    Parameters
    ----------
    how : str
        A kind of index, or "auto": exact, or where that would take minutes the first of `APPROXIMATE` that was built
        and covers all rows; the log says it.
    shape : (n, d)
        Images that are compared, half of which will ask.

    Raises
    ------
    CacheError
        No such index, or one that is behind its cache: the newest images would never be found.
    """
    if how == "auto":
        seconds, how = products.exact_seconds(shape[0], shape[1], shape[0] // 2), "exact"
        if seconds > PATIENCE_SECONDS:
            there = [name for name in APPROXIMATE if has_index(cache, encoder_id, "image", name)]
            for name in there:
                index = load_index(cache, encoder_id, "image", name)
                if not index.behind(cache):
                    log.info("exact search takes about %s here; the %s index is asked instead",
                             spoken_time(seconds), name)  # fmt: skip
                    return index
            advice = f"`fluoro index --how {there[0]}` brings its index up to date" if there else (
                "`fluoro index --how ivf` makes it faster"
            )  # fmt: skip
            log.info("exact search takes about %s here; %s", spoken_time(seconds), advice)
    if how == "exact":
        return build_index(cache, encoder_id, "image", "exact", save=False)
    index = load_index(cache, encoder_id, "image", how)
    if behind := index.behind(cache):
        raise CacheError(
            f"the {how} index of {encoder_id} is behind its cache by {behind:,} rows, whose copies it cannot find; "
            f"`fluoro index --how {how}` adds them, --how exact needs none"
        )
    return index


def part_searches(index: Index, keys: np.ndarray, split: np.ndarray) -> dict[str, SampleSearch]:
    """Return the search among each part's images; samples are numbered as their keys (n, 16) are."""
    stored = index.array.find(keys)
    return {
        str(name): SampleSearch(index, stored[split == name], np.flatnonzero(split == name))
        for name in set(split) - {""}
    }
