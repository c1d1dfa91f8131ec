"""What `fluoro search` is asked: texts, image files, samples and vectors, one by one, from files, or joined into one.

Comes in: the search's config. Goes out: queries, each with what it is and its vector; where several are joined, one
that is the mean of the wanted ones, each scaled to length one, less the mean of the unwanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine import pixels
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.errors import ImageError, UsageError
from engine.features import normalized
from engine.row_buffer import to_half
from engine.tables import TABLE_SUFFIXES, read_table, require_columns, text_of

TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Asked:
    """Queries of all kinds as they were given.

    Parameters
    ----------
    text, id : list of str
    image, vector : list of Path
        Vectors are .npy files of shape (dim,) or (q, dim).
    direction : dict of str to ndarray of float, (dim,)
        Weights of a head's labels.
    """

    text: list[str] = field(default_factory=list)
    image: list[Path] = field(default_factory=list)
    id: list[str] = field(default_factory=list)
    vector: list[Path] = field(default_factory=list)
    direction: dict[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.text or self.image or self.id or self.vector or self.direction)


@dataclass(frozen=True)
class Queries:
    """What is searched for.

    Parameters
    ----------
    said : list of dict
        {"text": ...}, {"image": ...}, {"id": ...}, {"vector": ...}, {"head": ...} or, joined, {"together": ...}.
    vectors : ndarray of float32, (q, dim)
    own : ndarray of int64, (q,)
        Sample that a query is, -1 where it is none.
    """

    said: list[dict[str, str]]
    vectors: np.ndarray
    own: np.ndarray


def lines_of(path: Path, column: str) -> list[str]:
    """Return the queries in a file: one a line, or a column of a .csv, .tsv or .parquet file.

    Raises
    ------
    UsageError
        No such file, nothing in it, or a line that is blank.
    DataError
        A table without such a column.
    """
    if path.name.removesuffix(".gz").endswith(TABLE_SUFFIXES):
        table = read_table(path)
        require_columns(table, [column], path)
        values, first = text_of(table[column]).tolist(), 2 - path.name.endswith(".parquet")
    else:
        try:
            values, first = path.read_text(encoding="utf-8-sig").splitlines(), 1
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise UsageError(f"the query file {str(path)!r} cannot be read: {reason}") from error
    if not values:
        raise UsageError(f"the query file {str(path)!r} is empty; write one {column} a line")
    for number, value in enumerate(values, start=first):
        if not value.strip():
            raise UsageError(f"the query file {str(path)!r} is blank in line {number}; remove the line or fill it")
    return [value.strip() for value in values]


def queries_of(
    asked: Asked, unwanted: Asked, together: bool, cache: Cache, dataset: Dataset, encoder: Encoder, dim: int
) -> Queries:
    """Return the queries with their vectors.

    Parameters
    ----------
    asked, unwanted : Asked
        With anything unwanted, all are joined into one query.
    together : bool
        Join those asked for into one query.
    dim : int
        Of the rows that are searched.

    Raises
    ------
    UsageError
        An unknown sample or one without an embedding, a file that cannot be read, a vector that does not fit, or a
        joined query in which everything cancels out.
    """
    wanted = _embedded(asked, cache, dataset, encoder, dim)
    if not (together or unwanted):
        return wanted
    vector = normalized(wanted.vectors.astype(np.float64)).mean(axis=0)
    words = " + ".join(_word(said) for said in wanted.said)
    if unwanted:
        less = _embedded(unwanted, cache, dataset, encoder, dim)
        vector = vector - normalized(less.vectors.astype(np.float64)).mean(axis=0)
        words += " - " + " - ".join(_word(said) for said in less.said)
    if np.linalg.norm(vector) < 1e-6:
        raise UsageError(f"the queries {words} cancel out, so nothing is near to them")
    own = wanted.own[:1] if len(wanted.own) == 1 else np.array([-1])
    return Queries([{"together": words}], vector[None].astype(np.float32), own)


def _embedded(asked: Asked, cache: Cache, dataset: Dataset, encoder: Encoder, dim: int) -> Queries:
    said: list[dict[str, str]] = [{"text": text} for text in asked.text]
    vectors: list[np.ndarray] = [
        encoder.encode_text(asked.text[start : start + TEXTS_AT_ONCE]).cpu().numpy()
        for start in range(0, len(asked.text), TEXTS_AT_ONCE)
    ]
    for path in asked.image:
        said.append({"image": str(path)})
        vectors.append(_embedded_file(path, encoder))
    own = [-1] * len(said)
    if asked.id:
        own += _positions(asked.id, dataset)
        said += [{"id": sample} for sample in asked.id]
        vectors.append(_stored_vectors(asked.id, own[-len(asked.id) :], cache, dataset, encoder))
    for path in asked.vector:
        loaded = read_vectors(path, dim)
        name = str(path) if len(loaded) == 1 else f"{path}[%d]"
        said += [{"vector": name % number if len(loaded) > 1 else name} for number in range(len(loaded))]
        vectors.append(loaded)
        own += [-1] * len(loaded)
    for label, weight in asked.direction.items():
        said.append({"head": label})
        vectors.append(weight[None])
        own.append(-1)
    return Queries(said, np.concatenate(vectors).astype(np.float32), np.array(own, np.int64))


def read_vectors(path: Path, dim: int) -> np.ndarray:
    """Return the vectors of a .npy file, (q, dim) float32; UsageError where they cannot be queries."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"the vectors {str(path)!r} cannot be read as a .npy file: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.ndim not in (1, 2):
        raise UsageError(f"{str(path)!r} must hold numbers of shape ({dim},) or (q, {dim}) as np.save writes them")
    rows = np.atleast_2d(values).astype(np.float32)
    if rows.shape[1] != dim or not len(rows):
        raise UsageError(f"{str(path)!r} has shape {values.shape}; embeddings here have {dim} numbers")
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1) | ~rows.any(axis=1))
    if len(wrong):
        raise UsageError(f"{str(path)!r} row {wrong[0]} holds NaN or infinity, or zeros only, so it has no neighbours")
    return rows


def _embedded_file(path: Path, encoder: Encoder) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        image = pixels.decode(content)
    except ImageError as error:
        raise UsageError(f"image {str(path)!r} cannot be read: {error}") from error
    values: np.ndarray = encoder.encode_pixels(encoder.preprocess(image)[0][None]).cpu().numpy()
    reasons = to_half(values)[1]
    if reasons:
        raise UsageError(f"image {str(path)!r} cannot be searched by: {reasons[0]}")
    return values


def _positions(samples: Sequence[str], dataset: Dataset) -> list[int]:
    """Return the positions of samples; one look at the ids however many are asked for."""
    if len(samples) == 1:
        return [dataset.position(samples[0])]
    places = {name: place for place, name in enumerate(dataset.ids.tolist())}
    return [places[name] if name in places else dataset.position(name) for name in samples]


def _stored_vectors(
    samples: Sequence[str], positions: Sequence[int], cache: Cache, dataset: Dataset, encoder: Encoder
) -> np.ndarray:
    """Return the samples' image embeddings, those of their texts where they have no image."""
    part = dataset.take(positions)
    with_image = (part.samples["uri"] != "").to_numpy(dtype=bool)
    vectors: np.ndarray | None = None
    kinds: tuple[tuple[Literal["image", "text"], Any], ...] = (("image", with_image), ("text", ~with_image))
    for kind, which in kinds:
        if not which.any():
            continue
        features = cache.features(part.take(np.flatnonzero(which)), encoder, kind)
        if len(features.missing):
            name = features.missing[0]
            raise UsageError(f"sample {name!r} has no {kind} embedding in the cache; `fluoro embed` computes it")
        if vectors is None:
            vectors = np.empty((len(samples), features.values.shape[1]), np.float32)
        vectors[which] = features.values
    assert vectors is not None  # every sample has an image or not
    return vectors


def _word(said: dict[str, str]) -> str:
    kind, value = next(iter(said.items()))
    return repr(value) if kind == "text" else f"{kind} {value}"
