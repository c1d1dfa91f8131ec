"""Leaks against brute force over all pairs: near-duplicates, identical keys, and texts that mean the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from analysis import leaks
from engine.errors import DataError, UsageError
from engine.sample_search import SampleSearch


def collection(seed: int = 0, count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    embeddings = generator.normal(size=(count, 16)).astype(np.float32) * generator.uniform(0.1, 50, (count, 1))
    split = generator.choice(["train", "val", "test", ""], count, p=[0.5, 0.2, 0.2, 0.1]).astype(object)
    return embeddings, split


def brute_force(embeddings: np.ndarray, split: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    cosines = cosine_similarity(embeddings.astype(np.float64))
    rank = {"train": 0, "val": 1, "test": 2}
    pairs = set()
    for one, two in itertools.combinations(range(len(split)), 2):
        if split[one] and split[two] and split[one] != split[two] and cosines[one, two] >= threshold:
            pairs.add((one, two) if rank[split[one]] < rank[split[two]] else (two, one))
    return pairs


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.999999])
def test_near_duplicates__are_those_of_all_pairs(threshold, monkeypatch):
    monkeypatch.setattr(leaks, "_ROWS", 7)
    monkeypatch.setattr(leaks, "_COLUMNS", 5)
    embeddings, split = collection()
    embeddings[60:70] = embeddings[:10] * 3  # the same direction, another length
    pairs = leaks.near_duplicates(embeddings, split, threshold)
    assert set(zip(pairs["first"], pairs["second"], strict=True)) == brute_force(embeddings, split, threshold)
    assert pairs["similarity"].is_monotonic_decreasing and pairs["similarity"].max() <= 1
    assert len(pairs) >= 3


class BruteIndex:
    """What a search index answers, over rows as they are, by sorting all cosines."""

    def __init__(self, embeddings):
        self.unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-30)

    def __len__(self):
        return len(self.unit)

    def search_rows(self, queries, k, *, among=None):
        cosines = cosine_similarity(queries, self.unit).astype(np.float32)
        if among is not None:
            cosines[:, np.setdiff1d(np.arange(len(self)), among)] = -np.inf
        rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(cosines, rows, axis=1)
        return scores, np.where(np.isfinite(scores), rows, -1)


@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.999999])
def test_an_index__finds_the_pairs_that_all_products_do(threshold):
    embeddings, split = collection()
    embeddings[60:70] = embeddings[:10] * 3
    index = BruteIndex(embeddings)
    searches = {
        name: SampleSearch(index, np.flatnonzero(split == name), np.flatnonzero(split == name))
        for name in ("train", "val", "test")
    }
    pairs = leaks.near_duplicates(embeddings, split, threshold, searches=searches)
    assert set(zip(pairs["first"], pairs["second"], strict=True)) == brute_force(embeddings, split, threshold)
    by_index = leaks.highest_by_part(embeddings, split, searches=searches)
    np.testing.assert_allclose(
        by_index.iloc[:, 2:].to_numpy(), leaks.highest_by_part(embeddings, split).iloc[:, 2:].to_numpy(), atol=1e-6
    )
    with pytest.raises(DataError, match="more than 10 pairs"):
        leaks.near_duplicates(embeddings, split, -0.5, most=10, searches=searches)


def test_identical_embeddings__are_found_at_a_threshold_of_one():
    embeddings, split = collection(1, 40)
    split[:2] = "train", "test"
    embeddings[1] = embeddings[0]
    assert leaks.near_duplicates(embeddings, split, 1.0)[["first", "second"]].to_numpy().tolist() == [[0, 1]]


def test_rows_of_zeros__are_like_nothing():
    embeddings, split = collection(2, 40)
    embeddings[:10] = 0
    found = leaks.near_duplicates(embeddings, split, 0.9)
    assert not (found[["first", "second"]] < 10).any(axis=None)


def test_highest__is_the_nearest_neighbour_in_train():
    embeddings, split = collection(3)
    cosines = cosine_similarity(embeddings)
    table = leaks.highest_by_part(embeddings, split).set_index("split")
    for name in ("val", "test"):
        nearest = cosines[np.ix_(split == name, split == "train")].max(axis=1)
        np.testing.assert_allclose(table.loc[name, "highest"], nearest.max(), atol=1e-6)
        np.testing.assert_allclose(table.loc[name, "50 %"], np.median(nearest), atol=1e-6)
        assert table.loc[name, "samples"] == (split == name).sum()


def test_identical_values__are_counted_by_part_and_blank_ones_are_not():
    values = np.array(["a", "b", "a", "", "", "c", "a", "b", "d"], dtype=object)
    split = np.array(["train", "train", "test", "train", "test", "val", "test", "train", ""], dtype=object)
    table = leaks.identical(values, split)
    assert table["value"].tolist() == ["a"] and table["samples"].tolist() == [3]
    assert table.loc[0, ["train", "val", "test"]].tolist() == [1, 0, 2]
    assert table.loc[0, ["train first", "val first", "test first"]].tolist() == [0, -1, 2]
    assert leaks.identical_pairs(values, split)[["first", "second"]].to_numpy().tolist() == [[0, 2]]
    assert len(leaks.identical(values[[0, 1]], ["train", "test"])) == 0
    assert len(leaks.identical(["", ""], ["train", "test"])) == 0


def test_texts__are_the_same_whatever_their_case_spaces_and_points():
    same = ["No acute disease.", "  no  ACUTE\ndisease", "No acute, disease!", "\uff2eo acute disease"]
    assert {leaks.plain_text(text) for text in same} == {"no acute disease"}
    assert leaks.plain_text("no acute diseases") != leaks.plain_text(same[0])
    assert leaks.plain_text("...") == ""


def test_pairs__are_named():
    ids, groups = np.array(["x", "y"], dtype=object), np.array(["p", "q"], dtype=object)
    split = np.array(["train", "test"], dtype=object)
    pairs = leaks.near_duplicates(np.eye(3)[[0, 0]], split, 0.5)
    named = leaks.name_pairs(pairs, "near-duplicate", ids, groups, split)
    assert named.to_dict("records") == [
        {"kind": "near-duplicate", "similarity": 1.0, "split": "train", "id": "x", "group": "p",
         "other_split": "test", "other_id": "y", "other_group": "q"}
    ]  # fmt: skip


def test_bad_input__is_told():
    embeddings, split = collection()
    with pytest.raises(UsageError, match="threshold 99 is not a cosine"):
        leaks.near_duplicates(embeddings, split, 99)
    with pytest.raises(DataError, match="89 values of the split for 90"):
        leaks.near_duplicates(embeddings, split[:-1])
    with pytest.raises(DataError, match="there is only 'train'"):
        leaks.near_duplicates(embeddings, np.full(90, "train"))
    with pytest.raises(DataError, match=r"more than 10 pairs .* raise the threshold"):
        leaks.near_duplicates(embeddings, split, -0.5, most=10)
    embeddings[5, 3] = np.nan
    with pytest.raises(DataError, match="1 embeddings are not finite, first in row 5"):
        leaks.near_duplicates(embeddings, split)
