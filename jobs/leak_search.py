"""Images on both sides of a split, found through an index: exact where that is fast enough, else one that is there.

Comes in: a cache, an encoder's id, embedded samples with a split. Goes out: pairs of the same bytes or nearly the same
embedding, as `dataset leaks` and `study` show them, and the search among each part's images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import leaks
from engine.cache import Cache
from engine.dataset import Dataset
from engine.errors import CacheError
from engine.index import Index, build_index, has_index, load_index, products
from engine.sample_search import SampleSearch
from jobs.progress import spoken_time

log = logging.getLogger(__name__)

# Exact search is what is done, unless it takes longer and there is another index.
PATIENCE_SECONDS = 120.0
APPROXIMATE = ("hnsw", "ivf", "pq")


@dataclass(frozen=True)
class ImagePairs:
    """Pairs of images in different parts of a split.

    Parameters
    ----------
    pairs : DataFrame
        `analysis.leaks.PAIR_COLUMNS`; kind is "identical image" or "near-duplicate image".
    how : str
        Kind of index that was asked.
    searches : dict of str to SampleSearch
        The search among each part's images.
    """

    pairs: pd.DataFrame
    how: str
    searches: dict[str, SampleSearch]


def image_pairs(
    cache: Cache,
    dataset: Dataset,
    encoder_id: str,
    features: np.ndarray,
    keys: np.ndarray,
    threshold: float,
    how: str = "auto",
) -> ImagePairs:
    """Find the images that lie on both sides of a data set's split.

    Parameters
    ----------
    features : ndarray of float, (n, d)
        The samples' image embeddings.
    keys : ndarray of uint8, (n, 16)
        Their keys: the same bytes have the same.
    threshold : float
        Cosine from which two images count as nearly the same.
    how : str
        See `leak_index`.

    Raises
    ------
    CacheError
        See `leak_index`.
    DataError
        So many pairs that the threshold says nothing.
    """
    split = dataset.samples["split"].to_numpy(dtype=object)
    index = leak_index(cache, encoder_id, how, features.shape)
    searches = part_searches(index, keys, split)
    names = np.array([key.tobytes().hex() for key in keys], dtype=object)
    same = leaks.identical_pairs(names, split)
    near = leaks.near_duplicates(features, split, threshold, searches=searches)
    # Two names of the same bytes are said once, as what they are: one of each part stands for its copies.
    near = near[names[near["first"]] != names[near["second"]]]
    found = [
        leaks.name_pairs(pairs, kind, dataset.ids, dataset.groups, split)
        for kind, pairs in (("identical image", same), ("near-duplicate image", near))
    ]
    return ImagePairs(pd.concat(found, ignore_index=True), index.info.how, searches)


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
