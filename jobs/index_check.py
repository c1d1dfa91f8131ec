"""`fluoro index check`: how much of what is really nearest an index finds, and what search by this encoder is worth.

Comes in: an index of the cache and, if wanted, a data set. Goes out: recall@k of the index against exact search for
queries of both kinds (a text lies far from all images, and an index that is good between images may miss what is
nearest to it), with the time both took; and with a data set, how often an image finds its own text and a text its
image (identical texts count as right), and how often hits have the query's label. An image of the query's patient
never counts as a hit for its label.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from analysis import retrieval_scores
from engine.cache import Cache
from engine.dataset import Dataset
from engine.errors import CacheError, UsageError
from engine.index import Index, build_index, load_index
from engine.index.kinds import check_kind
from jobs import opening
from jobs.index import EncoderChoice
from jobs.progress import Progress

KS = (1, 10, 100)
PAIR_KS = (1, 5, 10)


class Config(EncoderChoice):
    """What `fluoro index check` needs."""

    kind: Literal["image", "text"] = Field("image", description="which embeddings")
    how: str = Field("exact", description="kind of index")
    k: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="neighbours at which recall and precision are taken; 1, 10, 100 and 1, 5, 10 unless given"
    )
    queries: int = Field(1000, ge=1, description="queries of each kind, drawn at random")
    dataset: str | None = Field(None, description="data set whose texts and labels tell what is right")
    data: dict = Field(default_factory=dict, description="options of the data set, such as labels or boxes")
    seed: int = Field(0, description="of the queries that are drawn")

    @property
    def against_exact(self) -> tuple[int, ...]:
        """At how many neighbours recall against exact search is taken."""
        return tuple(sorted(set(self.k))) or KS

    @property
    def against_truth(self) -> tuple[int, ...]:
        """At how many neighbours texts and labels are looked for."""
        return tuple(sorted(set(self.k))) or PAIR_KS

    @field_validator("how")
    @classmethod
    def _known_kind(cls, how: str) -> str:
        try:
            return check_kind(how)
        except UsageError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Checked:
    """What was found.

    Parameters
    ----------
    encoder, kind, how : str
    rows, behind : int
        Rows that the index covers, and that it does not.
    recall : DataFrame
        queries ("image rows" | "text rows"), count, recall@1 ..., seconds and exact_seconds for all of them.
    pairs : DataFrame
        direction ("text to image" | "image to text"), queries, recall@1 ...; empty without a data set or texts.
    labels : DataFrame
        label, queries, precision@1 ..., map, chance; empty without a data set or labels.
    """

    encoder: str
    kind: str
    how: str
    rows: int
    behind: int
    recall: pd.DataFrame
    pairs: pd.DataFrame
    labels: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that have rows."""
        named = {
            f"recall of the {self.how} index against exact search": self.recall,
            "an image and its own text": self.pairs,
            "hits with the query's label": self.labels,
        }
        return {title: table for title, table in named.items() if len(table)}

    def lines(self) -> Iterator[str]:
        """Return what was checked as a sentence."""
        yield f"{self.how} index over {self.rows:,} {self.kind} rows of {self.encoder}"
        if self.behind:
            yield f"it is behind by {self.behind:,} rows of the cache, which it cannot find: `fluoro index` adds them"
        if len(self.recall) == 1 and self.recall["queries"].iloc[0] == f"{self.kind} rows":
            other = "text" if self.kind == "image" else "image"
            yield f"no {other} rows of this encoder are cached, so queries of that kind are not measured"


def run(config: Config, *, progress: Progress | None = None) -> Checked:
    """Check an index.

    Raises
    ------
    UsageError
        The encoder is not named and the cache has none or several.
    CacheError
        There is no such index, or it does not fit the cache; nothing is embedded.
    """
    progress, cache = progress or Progress(), Cache(config.cache)
    encoder = config.encoder_id(cache, config.kind)
    if config.how == "exact":
        index = build_index(cache, encoder, config.kind, "exact", save=False)
    else:
        index = load_index(cache, encoder, config.kind, config.how)
    if not len(index):
        raise CacheError(f"the index {index.info.name} covers no rows, so there is nothing to check")
    with progress.step("recall against exact search"):
        recall = _recall(cache, encoder, config, index)
    pairs, labels = pd.DataFrame(), pd.DataFrame()
    if config.dataset is not None:
        dataset = opening.open_dataset(config.dataset, **config.data)
        with progress.step("texts and labels"):
            pairs = _pairs(cache, encoder, dataset, config)
            labels = _labels(cache, encoder, dataset, config)
    return Checked(encoder, config.kind, config.how, len(index), index.behind(cache), recall, pairs, labels)


def _recall(cache: Cache, encoder: str, config: Config, index: Index) -> pd.DataFrame:
    """Return recall and times for queries of both kinds; a row that asks does not find itself."""
    rows, exact = [], index.exactly()
    for kind in ("image", "text"):
        if (kind, encoder) not in cache.arrays() or not len(cache.array(kind, encoder)):
            continue
        own = kind == config.kind
        source = index.array if own else cache.array(kind, encoder)
        drawn = _drawn(min(len(source), len(index)) if own else len(source), config.queries, config.seed)
        queries = source.read(drawn).astype(np.float32)
        ks = config.against_exact
        most = min(ks[-1], len(index)) + own
        found, seconds = _timed(index, queries, most)
        truth, exact_seconds = _timed(exact, queries, most)
        if own:
            found, truth = _without(found, drawn), _without(truth, drawn)
        shares = retrieval_scores.recall_against(found, truth, ks)
        named = {f"recall@{k}": share for k, share in zip(ks, shares.tolist(), strict=True)}
        rows.append(
            {
                "queries": f"{kind} rows",
                "count": len(drawn),
                **named,
                "seconds": seconds,
                "exact seconds": exact_seconds,
            }
        )
    return pd.DataFrame(rows)


def _pairs(cache: Cache, encoder: str, dataset: Dataset, config: Config) -> pd.DataFrame:
    """Return how often a text finds its image and an image its text, among the samples that have both."""
    if ("text", encoder) not in cache.arrays() or ("image", encoder) not in cache.arrays():
        return pd.DataFrame()
    images, texts = cache.features(dataset, encoder, "image"), cache.features(dataset, encoder, "text")
    both, at_image, at_text = np.intersect1d(images.rows, texts.rows, return_indices=True)
    if not len(both):
        return pd.DataFrame()
    text_keys = [key.tobytes() for key in texts.keys[at_text]]
    drawn = _drawn(len(both), config.queries, config.seed)
    asking = {"text to image": ("image", texts.values[at_text]), "image to text": ("text", images.values[at_image])}
    rows = []
    for direction, (kind, vectors) in asking.items():
        searched = build_index(cache, encoder, kind, "exact", save=False)
        stored = searched.array.find(images.keys[at_image] if kind == "image" else texts.keys[at_text])
        among = np.unique(stored)
        hits = searched.search_rows(vectors[drawn], min(config.against_truth[-1], len(among)), among=among)[1]
        # An image that several samples share has the texts of all of them.
        partners = pd.DataFrame({"row": stored, "text": text_keys}).groupby("row")["text"].agg(set)
        right = np.array(
            [
                [row >= 0 and text_keys[query] in partners[row] for row in found]
                for query, found in zip(drawn.tolist(), hits.tolist(), strict=True)
            ]
        )
        shares = {f"recall@{k}": float(right[:, :k].any(axis=1).mean()) for k in config.against_truth}
        rows.append({"direction": direction, "queries": len(drawn), "items": len(among), **shares})
    return pd.DataFrame(rows)


def _labels(cache: Cache, encoder: str, dataset: Dataset, config: Config) -> pd.DataFrame:
    """Return precision@k and mAP of each label between images of different patients."""
    if not dataset.label_names or ("image", encoder) not in cache.arrays():
        return pd.DataFrame()
    features = cache.features(dataset, encoder, "image")
    if not len(features):
        return pd.DataFrame()
    truth = dataset.labels[features.rows] > 0
    groups, asked = dataset.groups[features.rows], _drawn(len(features), config.queries, config.seed)
    hits = retrieval_scores.image_to_image(features.values, truth, config.against_truth, groups=groups, queries=asked)
    ranking = retrieval_scores.label_ranking(features.values, truth, groups=groups, queries=asked)
    table = pd.DataFrame({"label": dataset.label_names, "queries": hits.queries})
    for place, k in enumerate(config.against_truth):
        table[f"precision@{k}"] = hits.precision[:, place]
    table["map"], table["chance"] = ranking.average_precision, ranking.chance
    mean = {name: table[name].mean() for name in table.columns if name not in ("label", "queries")}
    return pd.concat([table, pd.DataFrame([{"label": "(mean)", "queries": len(asked), **mean}])], ignore_index=True)


def _drawn(count: int, wanted: int, seed: int) -> np.ndarray:
    """Return some of count numbers, at random, ascending."""
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(count)[:wanted])


def _without(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return each line's rows, (q, k - 1), without its own one (or without the last, where that is not there)."""
    kept = rows != own[:, None]
    kept[kept.all(axis=1), -1] = False
    return rows[kept].reshape(len(rows), -1)


def _timed(index: Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Return the rows found and how long that took."""
    start = time.perf_counter()
    rows = index.search_rows(queries, k)[1]
    return rows, time.perf_counter() - start
