"""Samples found through an index: the right number of them whatever is left out, against brute force over samples."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engine import index
from engine.index import searching
from engine.sample_search import SampleSearch
from tests.engine.test_index import ENCODER, QUERIES, cosines, filled, values_of

ROWS = 300


@pytest.fixture(scope="module", params=["exact", "ivf"])
def built(request, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(searching, "FEW_ROWS", 5)
    yield index.build_index(filled(tmp_path_factory.mktemp("samples"), ROWS), ENCODER, how=request.param, save=False)
    patch.undo()


def brute(stored, positions, k, own=None, groups=None):
    """Return scores of the k best samples of each query, one a group where groups are given, without its own."""
    scores = cosines(QUERIES, values_of(range(ROWS)))[:, stored]
    best = []
    for number, line in enumerate(scores):
        seen, found = set(), []
        for place in np.argsort(-line, kind="stable"):
            position = positions[place]
            if own is not None and position == own[number]:
                continue
            if groups is not None and groups[position] in seen:
                continue
            seen.add(groups[position] if groups is not None else position)
            found.append(line[place])
        best.append(found[:k])
    return best


def check(found, expected, least=1.0):
    assert [len(hits.samples) for hits in found] == [len(line) for line in expected]
    same = [np.isclose(hits.scores, line, atol=1e-6).mean() for hits, line in zip(found, expected, strict=True)]
    assert np.mean(same) >= least


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_samples_that_share_a_row_are_all_found(built, k):
    rng = np.random.Generator(np.random.PCG64(1))
    stored, positions = rng.integers(0, ROWS, 500), rng.permutation(900)[:500]
    search = SampleSearch(built, stored, positions)
    found = search.search(QUERIES, k)
    least = 1.0 if built.info.how == "exact" else 0.6
    check(found, brute(stored, positions, k), least)
    assert all(len(set(hits.samples.tolist())) == len(hits.samples) for hits in found)


def test_one_of_each_group_and_never_itself(built):
    rng = np.random.Generator(np.random.PCG64(2))
    stored, positions = np.arange(ROWS), np.arange(ROWS)
    groups, own = rng.integers(0, 12, ROWS), rng.integers(0, ROWS, len(QUERIES))
    found = SampleSearch(built, stored, positions, groups).search(QUERIES, 10, own)
    check(found, brute(stored, positions, 10, own, groups), 1.0 if built.info.how == "exact" else 0.6)
    for hits, number in zip(found, own.tolist(), strict=True):
        assert number not in hits.samples and len(set(groups[hits.samples])) == 10
    everything = SampleSearch(built, stored, positions, groups).search(QUERIES, 50)
    assert all(len(hits.samples) == 12 for hits in everything)


def test_rows_that_the_index_does_not_cover_and_no_samples_at_all(built):
    search = SampleSearch(built, np.array([5, ROWS + 3]), np.array([0, 1]))
    assert len(search) == 1 and search.search(QUERIES[:2], 4)[1].samples.tolist() == [0]
    empty = SampleSearch(built, np.array([], np.int64), np.array([], np.int64)).search(QUERIES[:2], 4)
    assert [len(hits.samples) for hits in empty] == [0, 0]
