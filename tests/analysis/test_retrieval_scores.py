"""Retrieval scores against loops over queries."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from analysis import retrieval_scores
from engine.errors import DataError, UsageError


@pytest.fixture
def gallery():
    generator = np.random.default_rng(0)
    y = generator.random((60, 5)) < np.array([0.5, 0.2, 0.1, 0.05, 0.0])
    y[7, 3] = True
    features = generator.normal(size=(60, 12)) + y @ generator.normal(size=(5, 12))
    groups = np.array([f"p{number // 2}" for number in range(60)], dtype=object)
    return features, y, groups


def test_text_to_image__equals_a_loop_over_labels(gallery):
    features, y, _ = gallery
    scores = np.round(features[:, :5], 1)
    found = retrieval_scores.text_to_image(scores, y, (10, 1, 3))
    assert found.ks == (1, 3, 10)
    for label in range(4):
        ranking = sorted(range(60), key=lambda row, label=label: (-scores[row, label], row))
        for place, k in enumerate(found.ks):
            right = sum(y[row, label] for row in ranking[:k])
            np.testing.assert_allclose(found.precision[label, place], right / k)
            np.testing.assert_allclose(found.recall[label, place], right / y[:, label].sum())
        np.testing.assert_allclose(found.chance[label], y[:, label].mean())
    assert np.isnan(found.precision[4]).all() and found.queries.tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_allclose(found.macro()["recall"], found.recall[:4].mean(axis=0))


@pytest.mark.parametrize("by_group", [True, False])
def test_image_to_image__equals_a_loop_and_never_finds_its_own_patient(gallery, by_group, monkeypatch):
    features, y, groups = gallery
    monkeypatch.setattr(retrieval_scores, "_SCORE_CELLS", 60 * 7)
    found = retrieval_scores.image_to_image(features, y, (1, 5), groups=groups if by_group else None)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for label in range(5):
        rows = []
        for query in np.flatnonzero(y[:, label]):
            others = [row for row in range(60) if (groups[row] != groups[query] if by_group else row != query)]
            total = sum(y[row, label] for row in others)
            if total == 0:
                continue
            ranking = sorted(others, key=lambda row, query=query: (-(unit[query] @ unit[row]), row))
            right = [sum(y[row, label] for row in ranking[:k]) for k in (1, 5)]
            rows.append([right[0], right[1] / 5, right[0] / total, right[1] / total, total / len(others)])
        assert found.queries[label] == len(rows)
        if rows:
            expected = np.mean(rows, axis=0)
            np.testing.assert_allclose(found.precision[label], expected[:2])
            np.testing.assert_allclose(found.recall[label], expected[2:4])
            np.testing.assert_allclose(found.chance[label], expected[4])


def test_queries__may_be_some_rows_only(gallery):
    features, y, groups = gallery
    found = retrieval_scores.image_to_image(features, y, queries=np.array([0, 1, 2]), groups=groups)
    assert found.queries.sum() <= y[:3].sum()
    table = found.table(["a", "b", "c", "d", "e"])
    assert len(table) == 15 and list(table["k"].unique()) == [1, 5, 10]


def test_paired_recall__takes_equal_texts_for_the_same():
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    by_row = retrieval_scores.paired_recall(scores, [0, 1, 9], [0, 1, 2], (1, 2, 9))
    np.testing.assert_allclose(by_row, [1 / 3, 2 / 3, 2 / 3])
    same_text = retrieval_scores.paired_recall(scores, ["normal", "normal", "z"], ["normal", "normal", "z"], (1,))
    np.testing.assert_allclose(same_text, [1.0])


def test_hits__are_stable_and_say_where_there_are_none():
    scores = np.array([[1.0, 1.0, 2.0, 1.0]])
    np.testing.assert_array_equal(retrieval_scores.top_hits(scores, 3), [[2, 0, 1]])
    exclude = np.array([[True, False, True, True]])
    np.testing.assert_array_equal(retrieval_scores.top_hits(scores, 3, exclude), [[1, -1, -1]])
    assert retrieval_scores.top_hits(scores, 99).shape == (1, 4)


def test_wrong_requests__are_refused(gallery):
    features, y, _ = gallery
    with pytest.raises(UsageError, match="at least 1"):
        retrieval_scores.text_to_image(features[:, :5], y, (0, 5))
    with pytest.raises(UsageError, match="there must be one"):
        retrieval_scores.image_to_image(features, y, ())
    with pytest.raises(DataError, match="3 embeddings for 60"):
        retrieval_scores.image_to_image(features[:3], y)
    with pytest.raises(DataError, match=r"scores of shape \(2, 2\) for 3 queries"):
        retrieval_scores.paired_recall(np.ones((2, 2)), [1, 2, 3], [1, 2])


@pytest.mark.parametrize("grouped", [False, True])
def test_label_ranking_is_scikit_learns_average_precision_of_each_query(grouped):
    from sklearn.metrics import average_precision_score

    rng = np.random.Generator(np.random.PCG64(4))
    features = np.round(rng.standard_normal((40, 3)), 0) + 0.1  # many equal cosines
    y = (rng.random((40, 4)) < [0.5, 0.2, 0.03, 0]).astype(int)
    y[3, 2] = 1
    groups = rng.integers(0, 9, 40) if grouped else np.arange(40)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [[] for _ in range(4)]
    for row in range(40):
        others = groups != groups[row]
        scores = np.round(unit[others] @ unit[row], 10)
        for label in np.flatnonzero(y[row]):
            if y[others, label].any():
                expected[label].append(average_precision_score(y[others, label], scores))
    found = retrieval_scores.label_ranking(features, y, groups=groups if grouped else None)
    assert found.queries.tolist() == [len(values) for values in expected]
    for label, values in enumerate(expected):
        if values:
            assert found.average_precision[label] == pytest.approx(np.mean(values), abs=1e-9)
        else:
            assert np.isnan(found.average_precision[label])
    assert found.macro() == pytest.approx(np.nanmean(found.average_precision))


def test_equal_cosines__are_tied_whatever_rounding_leaves_of_them():
    """Whole numbers have exact cosines: signed squares of them are fractions."""
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(24)
    features = rng.integers(-2, 3, (40, 3))
    features[(features == 0).all(axis=1)] = 1
    y = rng.random((40, 2)) < 0.4
    dots = (features @ features.T).tolist()
    cosines = [
        [Fraction(dot * abs(dot), dots[row][row] * dots[other][other]) for other, dot in enumerate(line)]
        for row, line in enumerate(dots)
    ]
    places = {value: place for place, value in enumerate(sorted({value for line in cosines for value in line}))}
    ranks = np.array([[places[value] for value in line] for line in cosines])
    ranking, hits = retrieval_scores.label_ranking(features, y), retrieval_scores.image_to_image(features, y, (3,))
    for label, truth in enumerate(y.T):
        asking = [(row, np.flatnonzero(np.arange(40) != row)) for row in np.flatnonzero(truth)]
        precisions = [average_precision_score(truth[others], ranks[row, others]) for row, others in asking]
        assert ranking.average_precision[label] == pytest.approx(np.mean(precisions))
        first = [others[np.argsort(-ranks[row, others], kind="stable")[:3]] for row, others in asking]
        assert hits.precision[label, 0] == pytest.approx(truth[np.array(first)].mean())


def test_recall_against_counts_shared_rows_and_leaves_out_what_is_not_there():
    found, truth = np.array([[3, 1, 2], [5, 9, -1], [0, 1, 2]]), np.array([[1, 3, 7], [5, -1, -1], [-1, -1, -1]])
    np.testing.assert_allclose(retrieval_scores.recall_against(found, truth, (1, 2, 3)), [0.5, 1.0, (2 / 3 + 1) / 2])
    assert np.isnan(retrieval_scores.recall_against(found, np.full((3, 3), -1), (1,))).all()


def test_each_query__has_its_precision_and_their_means_are_the_figures():
    generator = np.random.default_rng(5)
    features, y = generator.normal(size=(40, 6)), generator.random((40, 3)) < 0.4
    groups, queries = np.arange(40) // 2, np.arange(0, 40, 3)
    found = retrieval_scores.image_to_image(features, y, (1, 4), groups=groups, queries=queries, keep_each=True)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for place, row in enumerate(queries):
        others = np.flatnonzero(groups != groups[row])
        nearest = others[np.argsort(-(unit[others] @ unit[row]), kind="stable")]
        for label in range(3):
            if not y[row, label]:
                assert np.isnan(found.each[place, label]).all()
                continue
            expected = [y[nearest[:k], label].mean() for k in (1, 4)]
            np.testing.assert_allclose(found.each[place, label], expected)
    np.testing.assert_allclose(np.nanmean(found.each, axis=0), found.precision)
    plain = retrieval_scores.image_to_image(features, y, (1, 4), groups=groups, queries=queries)
    assert plain.each is None and np.array_equal(plain.precision, found.precision)


def test_paired_hits__are_those_that_recall_averages():
    scores = np.random.default_rng(6).normal(size=(9, 5))
    keys = np.arange(9) % 5
    hits = retrieval_scores.paired_hits(scores, keys, np.arange(5), (1, 3))
    order = np.argsort(-scores, axis=1)
    for row in range(9):
        assert hits[row].tolist() == [keys[row] in order[row, :k] for k in (1, 3)]
    np.testing.assert_array_equal(retrieval_scores.paired_recall(scores, keys, np.arange(5), (1, 3)), hits.mean(axis=0))
