"""How well search finds what it is asked for: precision and recall among the first k hits, by label.

In come scores or embeddings and truth; out go figures a label beside chance (the label's share of the gallery). A hit
is right when it has the label that was asked for. An image never finds itself, nor another image of its patient where
groups are given: that would be remembering, not finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.metrics import check_scores, check_truth, mean_of_defined
from analysis.vectors import normalise_rows, without_rounding
from engine.errors import DataError, UsageError

KS = (1, 5, 10)
NO_HIT = -1

# Cells of the (queries, gallery) score matrix held at once.
_SCORE_CELLS = 1 << 24


@dataclass(frozen=True)
class RetrievalScores:
    """Figures of every label.

    Parameters
    ----------
    ks : tuple of int, length K
    precision, recall : ndarray of float64, (L, K)
        Mean over the label's queries; NaN for labels without queries or without anything to find.
    chance : ndarray of float64, (L,)
        Precision of hits drawn at random, the mean over the label's queries.
    queries : ndarray of int64, (L,)
    each : ndarray of float64, (q, L, K), or None
        Precision of every query for each of its labels, NaN elsewhere; kept where it is asked for, for intervals.
    """

    ks: tuple[int, ...]
    precision: np.ndarray
    recall: np.ndarray
    chance: np.ndarray
    queries: np.ndarray
    each: np.ndarray | None = None

    def macro(self) -> dict[str, np.ndarray]:
        """Return "precision", "recall" (K,) and "chance" (scalar) averaged over the labels that have them."""
        return {
            "precision": mean_of_defined(self.precision.T),
            "recall": mean_of_defined(self.recall.T),
            "chance": mean_of_defined(self.chance),
        }

    def table(self, label_names: Sequence[str]) -> pd.DataFrame:
        """Return one row a label and k: label, k, precision, recall, chance, queries."""
        rows = [
            (name, k, self.precision[row, place], self.recall[row, place], self.chance[row], int(self.queries[row]))
            for row, name in enumerate(label_names)
            for place, k in enumerate(self.ks)
        ]
        return pd.DataFrame(rows, columns=["label", "k", "precision", "recall", "chance", "queries"])


def top_hits(scores: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """Return the rows of the k best scores of each query, best first; equal scores in order of rows.

    Parameters
    ----------
    scores : ndarray of float, (q, n)
    k : int
    exclude : ndarray of bool, (q, n), optional
        Rows that may not be found.

    Returns
    -------
    ndarray of int64, (q, min(k, n))
        -1 where fewer rows may be found.
    """
    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}")
    values = np.asarray(scores, dtype=np.float64)
    if exclude is not None:
        values = np.where(exclude, -np.inf, values)
    hits = np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int64)
    if exclude is not None:
        hits[np.take_along_axis(np.asarray(exclude), hits, axis=1)] = NO_HIT
    return hits


def text_to_image(scores: np.ndarray, y: np.ndarray, ks: Sequence[int] = KS) -> RetrievalScores:
    """Return how well each label's prompt finds images that have the label.

    Parameters
    ----------
    scores : ndarray of float, (n, L)
        Score of every image for every label's text (`analysis.zeroshot.zero_shot_scores`).
    y : ndarray of 0/1, (n, L)
    ks : sequence of int
        Precision counts k hits even where the gallery holds fewer.
    """
    truth = check_truth(y)
    values = check_scores(truth, scores)
    wanted = _wanted(ks)
    hits = top_hits(values.T, wanted[-1])
    right = np.take_along_axis(truth.T, hits, axis=1)
    totals = truth.sum(axis=0)
    precision, recall = _at(right, totals, wanted)
    empty = totals == 0
    precision[empty], recall[empty] = np.nan, np.nan
    chance = np.where(empty, np.nan, totals / max(1, len(truth)))
    return RetrievalScores(wanted, precision, recall, chance, (~empty).astype(np.int64))


def image_to_image(
    features: np.ndarray,
    y: np.ndarray,
    ks: Sequence[int] = KS,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    queries: np.ndarray | None = None,
    normalize: bool = True,
    keep_each: bool = False,
) -> RetrievalScores:
    """Return how well images with a label find others with it, over cosine similarity.

    Parameters
    ----------
    features : ndarray of float, (n, d)
    y : ndarray of 0/1, (n, L)
        An image counts as a query for each of its labels.
    ks : sequence of int
    groups : (n,) str, optional
        Patient of each image; images of the query's patient are not in its gallery.
    queries : ndarray of int, (q,), optional
        Rows that ask; by default all. The gallery is always all rows.
    normalize : bool
        Cosine (True) or dot product.
    keep_each : bool
        Keep the precision of every query.

    Returns
    -------
    RetrievalScores
        A query for a label that no other image has is left out of that label's figures.
    """
    truth = check_truth(y)
    values = normalise_rows(features) if normalize else np.asarray(features, dtype=np.float64)
    if len(values) != len(truth):
        raise DataError(f"{len(values)} embeddings for {len(truth)} rows of labels")
    own = pd.factorize(np.arange(len(truth)) if groups is None else np.asarray(groups, dtype=object))[0]
    asked = np.arange(len(truth)) if queries is None else np.asarray(queries, dtype=np.int64)
    wanted = _wanted(ks)
    labels = truth.shape[1]
    precision, recall = np.zeros((labels, len(wanted))), np.zeros((labels, len(wanted)))
    chance, counts = np.zeros(labels), np.zeros(labels, dtype=np.int64)
    each = np.full((len(asked), labels, len(wanted)), np.nan) if keep_each else None
    block = max(1, _SCORE_CELLS // max(1, len(truth)))
    largest = 1.0 if normalize else float((values**2).sum(axis=1).max(initial=0.0))
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        same = own[rows][:, None] == own[None, :]
        hits = top_hits(without_rounding(values[rows] @ values.T, largest), wanted[-1], same)
        gallery = (~same).sum(axis=1)
        for label in range(labels):
            others = truth[:, label].sum() - (same & truth[:, label]).sum(axis=1)
            asking = np.flatnonzero(truth[rows, label] & (others > 0))
            if not len(asking):
                continue
            right = truth[hits[asking], label] & (hits[asking] != NO_HIT)
            found = _at(right, others[asking], wanted)
            precision[label] += found[0].sum(axis=0)
            recall[label] += found[1].sum(axis=0)
            chance[label] += (others[asking] / gallery[asking]).sum()
            counts[label] += len(asking)
            if each is not None:
                each[start + asking, label] = found[0]
    with np.errstate(invalid="ignore"):
        precision, recall = precision / counts[:, None], recall / counts[:, None]
        return RetrievalScores(wanted, precision, recall, chance / counts, counts, each)


def paired_recall(
    scores: np.ndarray, query_keys: Sequence | np.ndarray, item_keys: Sequence | np.ndarray, ks: Sequence[int] = KS
) -> np.ndarray:
    """Return the share of queries with their own partner among the first k, such as the report of an image, (K,).

    As `paired_hits`, averaged over the queries.
    """
    return np.asarray(paired_hits(scores, query_keys, item_keys, ks).mean(axis=0))


def paired_hits(
    scores: np.ndarray, query_keys: Sequence | np.ndarray, item_keys: Sequence | np.ndarray, ks: Sequence[int] = KS
) -> np.ndarray:
    """Return which queries have their own partner among the first k.

    Partners are told by key and not by row, so that of several equal texts any one counts as found; 942 of 3,851
    IU-Xray reports share their exact text with another.

    Parameters
    ----------
    scores : ndarray of float, (q, n)
    query_keys : (q,)
        What each query should find.
    item_keys : (n,)
        What each item is.
    ks : sequence of int

    Returns
    -------
    ndarray of bool, (q, K)
        Queries whose partner is not among the items count as not found.
    """
    values = np.asarray(scores)
    if values.shape != (len(query_keys), len(item_keys)):
        raise DataError(f"scores of shape {values.shape} for {len(query_keys)} queries and {len(item_keys)} items")
    codes = pd.factorize(np.concatenate([np.asarray(query_keys, dtype=object), np.asarray(item_keys, dtype=object)]))[0]
    own, items = codes[: len(values)], codes[len(values) :]
    wanted = _wanted(ks)
    right = items[top_hits(values, wanted[-1])] == own[:, None]
    return np.stack([right[:, :k].any(axis=1) for k in wanted], axis=1)


def recall_against(found: np.ndarray, truth: np.ndarray, ks: Sequence[int] = KS) -> np.ndarray:
    """Return the share of the k truly nearest rows that a search has among its first k, a mean over queries.

    Parameters
    ----------
    found, truth : ndarray of int, (q, at least the largest k)
        Row numbers, best first; -1 where there are fewer.
    ks : sequence of int

    Returns
    -------
    ndarray of float64, (K,)
        Queries to which nothing is near (truth of -1 only) are left out; NaN where none is left.
    """
    wanted, shares = _wanted(ks), []
    for k in wanted:
        real = truth[:, :k] != NO_HIT
        same = (found[:, :k, None] == truth[:, None, :k]) & real[:, None, :]
        counts = real.sum(axis=1)
        asked = counts > 0
        shares.append((same.any(axis=1).sum(axis=1)[asked] / counts[asked]).mean() if asked.any() else np.nan)
    return np.array(shares)


@dataclass(frozen=True)
class LabelRanking:
    """How well whole rankings put images with the query's label first.

    Parameters
    ----------
    average_precision : ndarray of float64, (L,)
        Mean over the label's queries (mAP of a label); NaN for labels without queries.
    chance : ndarray of float64, (L,)
        Share of the label among the other images, which a ranking at random reaches.
    queries : ndarray of int64, (L,)
    """

    average_precision: np.ndarray
    chance: np.ndarray
    queries: np.ndarray

    def macro(self) -> float:
        """Return the mean over the labels that have it."""
        return float(mean_of_defined(self.average_precision))


def label_ranking(
    features: np.ndarray,
    y: np.ndarray,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    queries: np.ndarray | None = None,
) -> LabelRanking:
    """Return the mean average precision of ranking all other images by cosine similarity to images with a label.

    Parameters
    ----------
    features : ndarray of float, (n, d)
    y : ndarray of 0/1, (n, L)
        An image counts as a query for each of its labels.
    groups : (n,) str, optional
        Patient of each image; images of the query's patient are not ranked.
    queries : ndarray of int, (q,), optional
        Rows that ask; by default all. All other rows are ranked.

    Notes
    -----
    Average precision as `sklearn.metrics.average_precision_score`; equal cosines share their place there, and do here.
    """
    truth, values = check_truth(y), normalise_rows(features)
    if len(values) != len(truth):
        raise DataError(f"{len(values)} embeddings for {len(truth)} rows of labels")
    own = pd.factorize(np.arange(len(truth)) if groups is None else np.asarray(groups, dtype=object))[0]
    asked = np.arange(len(truth)) if queries is None else np.asarray(queries, dtype=np.int64)
    sums, chances = np.zeros(truth.shape[1]), np.zeros(truth.shape[1])
    counts = np.zeros(truth.shape[1], np.int64)
    for row in asked.tolist():
        labels = np.flatnonzero(truth[row])
        others = own != own[row]
        if not len(labels) or not others.any():
            continue
        right = truth[others][:, labels]
        there = right.any(axis=0)
        precision = _average_precision(without_rounding(values[others] @ values[row]), right[:, there])
        sums[labels[there]] += precision
        chances[labels[there]] += right[:, there].mean(axis=0)
        counts[labels[there]] += 1
    with np.errstate(invalid="ignore"):
        return LabelRanking(sums / counts, chances / counts, counts)


def _average_precision(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the average precision, (l,), of one ranking (n,) for several truths (n, l), each with a positive."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(right[order], axis=0)
    # Places with equal scores count as one: only the last of them is a cut.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    gains = np.diff(found[ends], axis=0, prepend=0)
    return np.asarray((gains * found[ends] / (ends + 1)[:, None]).sum(axis=0) / found[-1])


def _wanted(ks: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(sorted({int(k) for k in ks}))
    if not wanted or wanted[0] < 1:
        raise UsageError(f"k must be at least 1 and there must be one, got {list(ks)}")
    return wanted


def _at(right: np.ndarray, totals: np.ndarray, ks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall (q, K) from hits that are right (q, hits) and how many there were to find (q,)."""
    found = np.stack([right[:, :k].sum(axis=1) for k in ks], axis=1)
    return found / np.array(ks), found / np.maximum(totals, 1)[:, None]
