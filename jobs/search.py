"""`fluoro search`: the samples of a data set nearest to texts, image files, samples of it, vectors, or heads' labels.

Comes in: an embedded data set, the model, any number of queries, conditions on the samples. Goes out: for each query
its nearest samples with cosine, id, patient, labels and text, as a table or JSON, and in files if wanted. A filter is
applied before the search, so it takes nothing away from the k. Only what is embedded can be found; what is not is
counted and said, as is what an index on disk does not cover yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from engine import sample_filter
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.errors import CacheError, UsageError
from engine.features import align
from engine.index import Index, build_index, has_index, kinds, load_index, products
from engine.sample_search import SampleSearch
from engine.tables import offer
from jobs import heads, opening, search_output, search_queries
from jobs.config import CacheOptions, DatasetOptions, ModelOptions
from jobs.progress import Progress, spoken_time
from jobs.search_queries import Asked

log = logging.getLogger(__name__)

TEXT_SHOWN = 60
TABLES_SHOWN = 20
HIT_COLUMNS = ["rank", "score", "id", "group", "view", "split", "labels", "text"]
# Exact search is what is done, unless it takes longer and there is another index.
PATIENCE_SECONDS = 2.0
SMALL_SEARCH = 1 << 31


class Config(DatasetOptions, ModelOptions, CacheOptions):
    """What `fluoro search` needs."""

    text: list[str] = Field(default_factory=list, description="texts to search by")
    image: list[Path] = Field(default_factory=list, description="image files to search by")
    id: list[str] = Field(default_factory=list, description="ids of samples to search by")
    vector: list[Path] = Field(default_factory=list, description=".npy files of vectors to search by")
    head: Path | None = Field(None, description="saved head, or run folder of fluoro probe, to search by its labels")
    label: list[str] = Field(default_factory=list, description="labels of the head whose weights are searched by")
    text_file: list[Path] = Field(default_factory=list, description="files of texts: one a line, or a column 'text'")
    id_file: list[Path] = Field(default_factory=list, description="files of ids: one a line, or a column 'id'")
    together: bool = Field(False, description="join all queries into one: their mean, each scaled to length one")
    minus_text: list[str] = Field(default_factory=list, description="texts to keep away from; joins all queries")
    minus_image: list[Path] = Field(default_factory=list, description="image files to keep away from")
    minus_id: list[str] = Field(default_factory=list, description="samples to keep away from")
    where: list[str] = Field(default_factory=list, description="conditions on the samples: " + sample_filter.FORMS)
    one_per: str | None = Field(None, description="column of which each value is found once, such as group")
    k: int = Field(10, ge=1, description="neighbours of each query")
    kind: Literal["image", "text"] = Field("image", description="search among images or texts")
    how: str = Field("auto", description="kind of index; auto: exact where that is fast enough, else what was built")
    exclude_self: bool = Field(True, description="leave a sample out of its own neighbours")
    output: list[Path] = Field(default_factory=list, description="files to write: .csv, .parquet, .json or .png")

    @field_validator("how")
    @classmethod
    def _known_kind(cls, how: str) -> str:
        return how if how == "auto" else _as_value(kinds.check_kind, how)

    @field_validator("output")
    @classmethod
    def _known_outputs(cls, output: list[Path]) -> list[Path]:
        for path in output:
            _as_value(search_output.form_of, path)
        return output

    @model_validator(mode="after")
    def _asked(self) -> Config:
        if self.head is not None and not self.label:
            raise ValueError("--head needs --label NAME: which of the head's labels to search by")
        if self.label and self.head is None:
            raise ValueError("--label names a label of a head; give --head FILE, or filter with --where label:NAME")
        if not (self.text or self.image or self.id or self.vector or self.text_file or self.id_file or self.head):
            raise ValueError(
                "nothing to search by; give --text, --image, --id, --vector, --text-file or --id-file, each as often "
                "as wanted, or --head with --label"
            )
        if not all(text.strip() for text in [*self.text, *self.minus_text]):
            raise ValueError("an empty text cannot be searched by")
        return self


@dataclass(frozen=True)
class Answer:
    """One query's neighbours.

    Parameters
    ----------
    query : dict
        {"text": ...}, {"image": ...}, {"id": ...}, {"vector": ...}, {"head": ...} or, joined, {"together": ...}.
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
        In the order texts, images, ids, vectors, labels of a head.
    searched, missing : int
        Samples of the data set that were searched, and that are not embedded (those cannot be found).
    behind : int
        Rows of the cache that the index on disk does not cover.
    how : str
        Kind of index that answered.
    files : list of Path
        What was written.
    note : str
        What a search by a head's weights is, "" without one.
    """

    encoder: str
    kind: str
    answers: list[Answer]
    searched: int
    missing: int
    behind: int
    how: str = "exact"
    files: list[Path] | None = None
    note: str = ""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return one table a query, of the first queries."""
        tables = {}
        for answer in self.answers[:TABLES_SHOWN]:
            kind, value = next(iter(answer.query.items()))
            frame = pd.DataFrame(answer.hits, columns=HIT_COLUMNS)
            tables[f"{kind} {value}"] = frame.assign(text=[_shortened(text) for text in frame["text"]])
        return tables

    def lines(self) -> Iterator[str]:
        """Return what was searched."""
        if len(self.answers) > TABLES_SHOWN:
            yield f"{len(self.answers) - TABLES_SHOWN:,} further queries are not shown; --output FILE.csv has them"
        if self.note:
            yield self.note
        yield f"searched {self.searched:,} {self.kind}s by {self.encoder} ({self.how})"
        if self.missing:
            adding = f"`fluoro embed --what {self.kind}` adds it"
            yield f"{self.missing:,} samples have no {self.kind} embedding and cannot be found: {adding}"
        if self.behind:
            yield f"the index is behind by {self.behind:,} rows of the cache: `fluoro index` adds them"
        for path in self.files or ():
            yield f"written: {path}"


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
        A data set without images or texts to search among, an unknown sample, column, label or value, a sample without
        an embedding, a file of queries that is empty, does not fit or cannot be decoded, or conditions that no sample
        passes.
    ModelError
        A head that cannot be read, has no weights on the embedding, or is of another encoder.
    """
    texts = [line for path in config.text_file for line in search_queries.lines_of(path, "text")]
    ids = [line for path in config.id_file for line in search_queries.lines_of(path, "id")]
    asked = Asked([*config.text, *texts], config.image, [*config.id, *ids], config.vector)
    unwanted = Asked(config.minus_text, config.minus_image, config.minus_id)
    cache, dataset = Cache(config.cache), opening.open_data(config)
    _check_content(dataset, config.kind)
    passing = sample_filter.matching(dataset, config.where)
    groups = _groups(dataset, config.one_per)
    if encoder is None:
        # What is searched through is embedded already; what is embedded now are the queries.
        queried = ["text"] * bool(asked.text or unwanted.text) + ["image"] * bool(asked.image or unwanted.image)
        words = [*asked.text, *unwanted.text]
        encoder = opening.load_model(config, config.cache, dataset, [config.kind, *queried], words)
    directions, note = _directions(config, encoder)
    asked = replace(asked, direction=directions)
    dim = cache.array(config.kind, encoder.id).form.row_shape[0]
    queries = search_queries.queries_of(asked, unwanted, config.together, cache, dataset, encoder, dim)
    index = _index(cache, encoder.id, config, len(queries.said))
    keys = cache.image_keys(dataset) if config.kind == "image" else cache.text_keys(dataset)
    stored, positions, missing = align(dataset, keys, index.array)
    wanted = passing[positions]
    if not wanted.any():
        content = dataset.samples["uri" if config.kind == "image" else "text"].to_numpy(dtype=object)
        advice = f"`fluoro embed --what {config.kind}` adds them"
        if not (content[passing] != "").any():
            advice = f"none of them has a{'n' if config.kind == 'image' else ''} {config.kind}"
        filtered = f" that pass the filter ({'; '.join(config.where)})" if config.where else ""
        raise CacheError(
            f"none of the {int(passing.sum()):,} samples of {dataset.called}{filtered} has its {config.kind} "
            f"embedding by {encoder.id} in {config.cache}; {advice}"
        )
    search = SampleSearch(index, stored[wanted], positions[wanted], groups)
    hits = search.search(queries.vectors, config.k, queries.own if config.exclude_self else None)
    answers = [
        Answer(said, search_output.hit_records(dataset, found)) for said, found in zip(queries.said, hits, strict=True)
    ]
    having = (dataset.samples["uri" if config.kind == "image" else "text"] != "").to_numpy(dtype=bool)
    lacking = int((having & passing & np.isin(dataset.ids, missing)).sum())
    for path in config.output:
        search_output.write(path, answers, hits, queries, dataset)
    return Found(
        encoder.id, config.kind, answers, len(search), lacking, index.behind(cache), index.info.how, config.output,
        note,
    )  # fmt: skip


def _directions(config: Config, encoder: Encoder) -> tuple[dict[str, np.ndarray], str]:
    """Return the weights of a head's labels as queries, and what the order of the answers then is."""
    if config.head is None:
        return {}, ""
    head = heads.open_head(config.head, encoder)
    found = {label: heads.weights_of(head, label, config.head) for label in dict.fromkeys(config.label)}
    order = (
        "so the order is that of the head's own logits"
        if head.normalised
        else "and the head was trained on embeddings of their own length, so its logits order them a little differently"
    )
    return found, (
        f"head {config.head}: searched by the weights of {', '.join(found)}, the score is the cosine with them, {order}"
    )


def _check_content(dataset: Dataset, kind: str) -> None:
    """Raise UsageError where no sample has what is searched among, which embedding cannot change."""
    if (dataset.samples["uri" if kind == "image" else "text"] != "").any():
        return
    other, how = ("text", "images") if kind == "image" else ("image", "texts")
    named = ""
    if dataset.schema.startswith("table:"):
        named = f"name its column, such as --data {kind}=COLUMN, or "
    raise UsageError(f"{dataset.called} has no {how} to search among; {named}search --kind {other}")


def _groups(dataset: Dataset, column: str | None) -> np.ndarray | None:
    """Return the values of which each is found once; blank ones count as different from one another."""
    if column is None:
        return None
    if column not in dataset.samples.columns:
        near = offer(column, map(str, dataset.samples.columns))
        raise UsageError(f"{dataset.called} has no column {column!r} to find one of each; {near}")
    values = dataset.samples[column].astype(str).to_numpy(dtype=object)
    blank = values == ""
    values[blank] = np.char.add("\0", np.flatnonzero(blank).astype(str))
    return values


def _index(cache: Cache, encoder_id: str, config: Config, queries: int) -> Index:
    """Return the index to search: exact search needs none on disk."""
    how = config.how
    if how == "auto":
        array = cache.array(config.kind, encoder_id)
        dim, how = array.form.row_shape[0], "exact"
        # A search so small is over before products are timed.
        small = len(array) * dim * queries < SMALL_SEARCH
        seconds = 0.0 if small else products.exact_seconds(len(array), dim, queries)
        if seconds > PATIENCE_SECONDS:
            how = next((name for name in ("hnsw", "ivf", "pq") if has_index(cache, encoder_id, config.kind, name)), how)
            advice = (
                f"the {how} index answers instead" if how != "exact" else "`fluoro index --how ivf` makes it faster"
            )
            log.info("exact search takes about %s here; %s", spoken_time(seconds), advice)
    if how == "exact":
        return build_index(cache, encoder_id, config.kind, "exact", save=False)
    return load_index(cache, encoder_id, config.kind, how)


def _as_value(check: Any, value: Any) -> Any:
    """Check one value; pydantic wants ValueErrors."""
    try:
        return check(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _shortened(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."
