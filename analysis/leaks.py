"""Is what is tested seen in training? Near-duplicate images, identical images and identical texts across splits.

Embeddings (n, D), keys, texts and the split column come in; tables of pairs go out. A split by patient keeps a patient
on one side, but not an image that is in the data twice under two names, nor one that two patients' records share.
Cosines are taken exactly, in blocks of matrix products between the parts, so memory stays bounded; or each held-out
sample asks a search index for its nearest ones (`engine.sample_search`), which a large collection wants.

A cosine says how alike two images look to the model, and models differ: chest radiographs of different patients can lie
above 0.95. `highest_by_part` gives what is usual within the data, to choose a threshold by; identical keys (the same
bytes) need none.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from engine.errors import DataError, UsageError
from engine.sample_search import SampleSearch

THRESHOLD = 0.99
# Pairs beyond which a threshold says nothing about duplicates any more, and a table serves nobody.
MOST_PAIRS = 100_000
_ROWS, _COLUMNS = 2048, 8192
# Neighbours that a sample asks an index for at first; four times as many again while all of them are alike.
_ASKED, _MORE = 8, 4
PAIR_COLUMNS = ["kind", "similarity", "split", "id", "group", "other_split", "other_id", "other_group"]


def near_duplicates(
    embeddings: np.ndarray,
    split: Sequence[str] | np.ndarray,
    threshold: float = THRESHOLD,
    most: int = MOST_PAIRS,
    *,
    searches: Mapping[str, SampleSearch] | None = None,
) -> pd.DataFrame:
    """Return the pairs of samples in different parts whose embeddings have a cosine of at least `threshold`.

    Parameters
    ----------
    embeddings : ndarray of float, (n, D)
        Not necessarily normalised. A row of zeros is like no other.
    split : (n,) str
        Samples with "" are in no part.
    threshold : float in (-1, 1]
        Cosines are taken in float32, and are right to about 1e-6.
    most : int
        Pairs allowed.
    searches : mapping of part to SampleSearch, optional
        The index over each part's samples, which then finds the pairs; where it is approximate, it may miss some.

    Returns
    -------
    DataFrame
        first, second (row numbers, the first in the part that comes first), similarity; the most alike first.

    Raises
    ------
    UsageError
        A threshold that is no cosine.
    DataError
        Rows that differ, values that are not finite (the row is named), or more pairs than `most`.
    """
    if not -1 < threshold <= 1:
        raise UsageError(f"threshold {threshold} is not a cosine; give a number up to 1, such as {THRESHOLD}")
    parts = _parts(split, len(embeddings))
    unit = _normalized(embeddings)
    # An identical pair may come out a little below 1.
    least = min(threshold, 1 - 2e-6)
    found: list[pd.DataFrame] = []
    count = 0
    pairs_found = _searched(unit, parts, searches, least, most) if searches else _alike(unit, parts, least)
    for first, second, similarity in pairs_found:
        count += len(first)
        if count > most:
            raise DataError(
                f"more than {most:,} pairs have a cosine of {threshold:g} or more across splits; raise the threshold, "
                "or look at the embeddings: they hardly differ"
            )
        found.append(pd.DataFrame({"first": first, "second": second, "similarity": similarity}))
    pairs = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["first", "second", "similarity"])
    pairs = pairs.astype({"first": np.int64, "second": np.int64, "similarity": np.float64})
    pairs["similarity"] = pairs["similarity"].clip(upper=1.0)
    return pairs.sort_values(["similarity", "first", "second"], ascending=[False, True, True], ignore_index=True)


def highest_by_part(
    embeddings: np.ndarray,
    split: Sequence[str] | np.ndarray,
    levels: Sequence[float] = (0.5, 0.9, 0.99),
    *,
    searches: Mapping[str, SampleSearch] | None = None,
) -> pd.DataFrame:
    """Return how alike each held-out sample is to its nearest one in train: quantiles of the highest cosine.

    Parameters
    ----------
    searches : mapping of part to SampleSearch, optional
        As in `near_duplicates`.

    Returns
    -------
    DataFrame
        One row a part beside train: split, samples, one column a level ("50 %", ...), and highest.
    """
    parts = _parts(split, len(embeddings))
    unit = _normalized(embeddings)
    best = np.full(len(unit), -np.inf, dtype=np.float32)
    if searches and "train" in parts:
        asking = np.concatenate([rows for name, rows in parts.items() if name != "train"])
        for row, hits in zip(asking, searches["train"].search(unit[asking], 1), strict=True):
            best[row] = hits.scores[0] if len(hits.scores) else -np.inf
    else:
        for _, columns, products in _products(unit, parts, only="train"):
            np.maximum.at(best, columns, products.max(axis=0))
    table = []
    for name, rows in parts.items():
        if name == "train" or not np.isfinite(best[rows]).any():
            continue
        quantiles = np.quantile(best[rows], levels)
        row = {"split": name, "samples": len(rows)}
        row |= {f"{100 * level:g} %": float(value) for level, value in zip(levels, quantiles, strict=True)}
        table.append(row | {"highest": float(best[rows].max())})
    return pd.DataFrame(table)


def identical(values: Sequence[str] | np.ndarray, split: Sequence[str] | np.ndarray) -> pd.DataFrame:
    """Return the values (keys, texts) that occur in more than one part, one row each.

    Parameters
    ----------
    values : (n,) str
        "" is no value.
    split : (n,) str

    Returns
    -------
    DataFrame
        value, samples (over all parts), then for each part the number there and, under "<part> first", the row of the
        first sample there (-1 where there is none); the most frequent first.
    """
    parts = _parts(split, len(values))
    frame = pd.DataFrame({"value": np.asarray(values, dtype=object), "split": np.asarray(split, dtype=object)})
    frame["row"] = np.arange(len(frame))
    frame = frame[(frame["value"] != "") & (frame["split"] != "")]
    grouped = frame.groupby(["value", "split"], sort=True)["row"].agg(["size", "first"]).unstack("split")
    if not len(grouped):
        return pd.DataFrame(columns=["value", "samples"])
    sizes = grouped["size"].fillna(0).astype(np.int64)
    several = (sizes > 0).sum(axis=1) > 1
    table = pd.DataFrame({"value": sizes.index[several].to_numpy(), "samples": sizes[several].sum(axis=1).to_numpy()})
    for name in parts:
        table[name] = sizes.loc[several, name].to_numpy() if name in sizes else 0
        first = grouped["first"].loc[several, name].fillna(-1) if name in sizes else -1
        table[f"{name} first"] = np.asarray(first, dtype=np.int64)
    return table.sort_values(["samples", "value"], ascending=[False, True], ignore_index=True)


def identical_pairs(values: Sequence[str] | np.ndarray, split: Sequence[str] | np.ndarray) -> pd.DataFrame:
    """Return one pair for each value and each two parts that share it, in the form of `near_duplicates`."""
    table = identical(values, split)
    names = [name.removesuffix(" first") for name in table.columns if name.endswith(" first")]
    rows = [
        (row[f"{one} first"], row[f"{two} first"], 1.0)
        for row in table.to_dict("records")
        for one, two in itertools.combinations(names, 2)
        if row[one] and row[two]
    ]
    return pd.DataFrame(rows, columns=["first", "second", "similarity"])


def plain_text(text: str) -> str:
    """Return a text without what does not change its meaning: case, accents' forms, punctuation, spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w]+", " ", folded).split())


def name_pairs(pairs: pd.DataFrame, kind: str, ids: np.ndarray, groups: np.ndarray, split: np.ndarray) -> pd.DataFrame:
    """Return pairs of row numbers with the samples' names: the columns `PAIR_COLUMNS`."""
    first, second = pairs["first"].to_numpy(dtype=np.int64), pairs["second"].to_numpy(dtype=np.int64)
    columns = [
        [kind] * len(pairs),
        pairs["similarity"].to_numpy(),
        *(column[rows] for rows in (first, second) for column in (split, ids, groups)),
    ]
    return pd.DataFrame(dict(zip(PAIR_COLUMNS, columns, strict=True)))


def _parts(split: Sequence[str] | np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return the rows of each part: train first, then the others in the order of their names."""
    names = np.asarray(split, dtype=object)
    if len(names) != count:
        raise DataError(f"{len(names)} values of the split for {count} samples; give one a sample")
    present = sorted(set(names) - {""}, key=lambda name: (name != "train", name != "val", str(name)))
    if len(present) < 2:
        found = f"only {present[0]!r}" if present else "none"
        raise DataError(f"leaks are looked for between the parts of a split, and there is {found}; give a split")
    return {str(name): np.flatnonzero(names == name) for name in present}


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    values = np.asarray(embeddings, dtype=np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(f"{(~finite).sum()} embeddings are not finite, first in row {int(np.argmin(finite))}")
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)


def _alike(
    unit: np.ndarray, parts: dict[str, np.ndarray], least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows, other rows, cosines) of the pairs across parts with at least such a cosine."""
    for rows, columns, products in _products(unit, parts):
        at, across = np.nonzero(products >= least)
        yield rows[at], columns[across], products[at, across]


def _searched(
    unit: np.ndarray, parts: dict[str, np.ndarray], searches: Mapping[str, SampleSearch], least: float, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `_alike` does, as far as indexes find it; who finds nothing but alike ones asks for more."""
    for one, two in itertools.combinations(parts, 2):
        for start in range(0, len(parts[two]), _ROWS):
            waiting, asked = parts[two][start : start + _ROWS], _ASKED
            while len(waiting):
                hits = searches[one].search(unit[waiting], asked)
                alike = [int((each.scores >= least).sum()) for each in hits]
                # Beyond the most that are allowed there is no need to ask for more: who counts them stops.
                more = np.array([count == asked and sum(alike) <= most for count in alike])
                told = [(row, each.samples[:count], each.scores[:count])
                        for row, each, count, wait in zip(waiting, hits, alike, more, strict=True)
                        if count and not wait]  # fmt: skip
                for row, samples, scores in told:
                    yield samples, np.full(len(samples), row), scores
                waiting, asked = waiting[more], asked * _MORE


def _products(
    unit: np.ndarray, parts: dict[str, np.ndarray], only: str | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (rows, other rows, cosines between them) of all blocks of each two parts, or of those with part `only`."""
    for one, two in itertools.combinations(parts, 2):
        if only is not None and one != only:
            continue
        for start in range(0, len(parts[one]), _ROWS):
            rows = parts[one][start : start + _ROWS]
            some = unit[rows]
            for across in range(0, len(parts[two]), _COLUMNS):
                columns = parts[two][across : across + _COLUMNS]
                yield rows, columns, some @ unit[columns].T
