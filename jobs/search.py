"""`fluoro search`: the samples of a data set nearest to texts, image files or samples of it.

Comes in: an embedded data set, the model, any number of queries. Goes out: for each query its nearest samples with
cosine, id, patient, labels and text. Only what is embedded can be found; what is not is counted and said, as is what an
index on disk does not cover yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from engine import pixels
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.errors import UsageError
from engine.faiss_loader import load_faiss
from engine.features import align
from engine.index import Index, build_index, has_index, load_index
from engine.row_buffer import to_half
from jobs import opening
from jobs.config import CacheOptions, DatasetOptions, ModelOptions
from jobs.progress import Progress

TEXT_SHOWN = 60
HIT_COLUMNS = ["rank", "score", "id", "group", "view", "split", "labels", "text"]


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro search` needs."""

    text: list[str] = Field(default_factory=list, description="texts to search by")
    image: list[Path] = Field(default_factory=list, description="image files to search by")
    id: list[str] = Field(default_factory=list, description="ids of samples to search by")
    k: int = Field(10, ge=1, description="neighbours of each query")
    kind: Literal["image", "text"] = Field("image", description="search among images or texts")
    how: Literal["exact", "ivf", "hnsw"] = Field("exact", description="kind of index")
    exclude_self: bool = Field(True, description="leave a sample out of its own neighbours")

    @model_validator(mode="after")
    def _asked(self) -> Config:
        if not (self.text or self.image or self.id):
            raise ValueError("nothing to search by; give --text, --image or --id, each as often as wanted")
        if not all(text.strip() for text in self.text):
            raise ValueError("an empty text cannot be searched by")
        return self


@dataclass(frozen=True)
class Answer:
    """One query's neighbours.

    Parameters
    ----------
    query : dict
        {"text": ...}, {"image": ...} or {"id": ...}.
    hits : list of dict
        rank, score (cosine), id, group, view, split, labels, text; best first, at most k.
    """

    query: dict[str, str]
    hits: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """All answers.

    Parameters
    ----------
    encoder : str
    answers : list of Answer
        In the order texts, images, ids.
    searched, missing : int
        Samples of the data set that are embedded, and that are not (those cannot be found).
    behind : int
        Rows of the cache that the index on disk does not cover.
    """

    encoder: str
    kind: str
    answers: list[Answer]
    searched: int
    missing: int
    behind: int

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return one table a query."""
        tables = {}
        for answer in self.answers:
            kind, value = next(iter(answer.query.items()))
            frame = pd.DataFrame(answer.hits, columns=HIT_COLUMNS)
            tables[f"{kind} {value}"] = frame.assign(text=[_shortened(text) for text in frame["text"]])
        return tables

    def lines(self) -> Iterator[str]:
        """Return what was searched."""
        yield f"searched {self.searched:,} {self.kind}s by {self.encoder}"
        if self.missing:
            yield f"{self.missing:,} samples have no {self.kind} embedding and cannot be found: `fluoro embed` adds it"
        if self.behind:
            yield f"the index is behind by {self.behind:,} rows of the cache: `fluoro index` builds it again"


def run(config: Config, *, encoder: Encoder | None = None, progress: Progress | None = None) -> Found:
    """Search.

    Parameters
    ----------
    config : Config
    encoder : Encoder, optional
        A loaded one, instead of the config's model.
    progress : Progress, optional

    Raises
    ------
    CacheError
        Nothing is embedded, or there is no such index.
    UsageError
        An unknown sample, or one without an embedding.
    ImageError
        A query's file cannot be decoded.
    """
    cache, dataset = Cache(config.cache), opening.open_data(config)
    if encoder is None:
        encoder = opening.load_model(config, config.cache)
    index = _index(cache, encoder.id, config)
    keys = cache.image_keys(dataset) if config.kind == "image" else cache.text_keys(dataset)
    stored, positions, missing = align(dataset, keys, cache.array(config.kind, encoder.id))
    samples_of = _by_row(stored, positions, len(index))
    among = np.fromiter(samples_of, np.int64, len(samples_of))
    queries, vectors = _queries(config, cache, dataset, encoder)
    most = max((len(samples) for samples in samples_of.values()), default=1)
    # A sample may have to be left out, and several samples may share one row.
    wanted = config.k + (most if config.id else 0)
    scores, rows = index.search_rows(vectors, wanted, among=None if len(among) == len(index) else among)
    answers = [
        Answer(query, _hits(config, dataset, query, scores[number], rows[number], samples_of))
        for number, query in enumerate(queries)
    ]
    having = dataset.samples["uri" if config.kind == "image" else "text"] != ""
    lacking = int(having.to_numpy()[np.isin(dataset.ids, missing)].sum())
    return Found(encoder.id, config.kind, answers, len(positions), lacking, index.behind(cache))


def _index(cache: Cache, encoder_id: str, config: Config) -> Index:
    """Return the index on disk; an exact one that is not there or behind is made for this search only."""
    if config.how == "exact":
        if load_faiss() is not None and has_index(cache, encoder_id, config.kind, "exact"):
            index = load_index(cache, encoder_id, config.kind, "exact")
            if not index.behind(cache):
                return index
        return build_index(cache, encoder_id, config.kind, "exact", save=False)
    return load_index(cache, encoder_id, config.kind, config.how)


def _by_row(stored: np.ndarray, positions: np.ndarray, covered: int) -> dict[int, list[int]]:
    """Return which samples have which row, for rows that the index covers."""
    samples: dict[int, list[int]] = {}
    for row, position in zip(stored.tolist(), positions.tolist(), strict=True):
        if row < covered:
            samples.setdefault(row, []).append(position)
    return samples


def _queries(
    config: Config, cache: Cache, dataset: Dataset, encoder: Encoder
) -> tuple[list[dict[str, str]], np.ndarray]:
    """Return the queries and their embeddings, (q, dim) float32."""
    queries: list[dict[str, str]] = []
    vectors: list[np.ndarray] = []
    if config.text:
        queries += [{"text": text} for text in config.text]
        vectors.append(encoder.encode_text(config.text).cpu().numpy())
    for path in config.image:
        queries.append({"image": str(path)})
        vectors.append(_embedded_file(path, encoder))
    for sample in config.id:
        queries.append({"id": sample})
        vectors.append(_stored_vector(sample, cache, dataset, encoder))
    return queries, np.concatenate(vectors)


def _embedded_file(path: Path, encoder: Encoder) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error.strerror}") from error
    values = encoder.encode_pixels(encoder.preprocess(pixels.decode(content))[0][None]).cpu().numpy()
    reasons = to_half(values)[1]
    if reasons:
        raise UsageError(f"image {str(path)!r} cannot be searched by: {reasons[0]}")
    return values


def _stored_vector(sample: str, cache: Cache, dataset: Dataset, encoder: Encoder) -> np.ndarray:
    """Return a sample's image embedding, its text's where it has no image."""
    one = dataset.take([dataset.position(sample)])
    kind: Literal["image", "text"] = "image" if one.samples["uri"][0] else "text"
    features = cache.features(one, encoder, kind)
    if not len(features):
        raise UsageError(f"sample {sample!r} has no {kind} embedding in the cache; `fluoro embed` computes it")
    return features.values


def _hits(
    config: Config,
    dataset: Dataset,
    query: dict[str, str],
    scores: np.ndarray,
    rows: np.ndarray,
    samples_of: dict[int, list[int]],
) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = []
    for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
        for position in samples_of.get(row, ()):
            sample = dataset.samples.iloc[position]
            if len(hits) == config.k or (config.exclude_self and sample["id"] == query.get("id")):
                continue
            labels = [dataset.label_names[number] for number in np.flatnonzero(dataset.labels[position])]
            hits.append(
                {
                    "rank": len(hits) + 1,
                    "score": score,
                    **{name: sample[name] for name in ("id", "group", "view", "split")},
                    "labels": labels,
                    "text": sample["text"],
                }
            )
    return hits


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."
