"""Every step of the published protocol on awkward inputs: ties, singletons, empty and full classes, few images."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    classification_report,
    coverage_error,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from analysis import paper
from engine.errors import DataError
from engine.labels import STUDY_LABELS

LABELS = len(STUDY_LABELS)


def random_case(seed: int, images: int = 60):
    generator = np.random.default_rng(seed)
    y = generator.random((images, LABELS)) < np.linspace(0.02, 0.4, LABELS)
    y[~y.any(axis=1), -1] = True
    return y, generator.normal(size=(images, LABELS)) * 5


def tied():
    y, scores = random_case(1)
    return y, np.round(scores / 5)  # a handful of different values


def constant_rows():
    y, scores = random_case(2)
    scores[::3] = 7.0  # an image whose scores are all alike is scaled to zeros
    return y, scores


def constant_columns():
    y, scores = random_case(3)
    scores[:, ::2] = 1.5
    return y, scores


def empty_classes():
    y, scores = random_case(4)
    y[:, [0, 5, 12]] = False
    y[~y.any(axis=1), -1] = True
    return y, scores


def full_class():
    y, scores = random_case(5)
    y[:, 2] = True
    return y, scores


def singletons():
    _, scores = random_case(6, images=LABELS)
    return np.eye(LABELS, dtype=bool), scores


def one_image():
    y, scores = random_case(7, images=1)
    return y, scores


def huge_and_tiny():
    y, scores = random_case(8)
    return y, scores * np.where(np.arange(len(y)) % 2, 1e-9, 1e9)[:, None]


CASES = {
    each.__name__: each
    for each in (tied, constant_rows, constant_columns, empty_classes, full_class, singletons, one_image, huge_and_tiny)
} | {"random": lambda: random_case(0)}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def row_minmax(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - low) / (high - low + 1e-8)


def per_label(score, truth, values):
    """scikit-learn's score of each label, NaN where the label has one value only."""
    return [score(t, v) if 0 < t.sum() < len(t) else np.nan for t, v in zip(truth.T.astype(int), values.T, strict=True)]


def test_row_of_the_table__is_scikit_learns(case):
    y, scores = case
    scaled = row_minmax(scores)
    row = paper.table_row(y, scores)
    report = classification_report(y, (scaled > 0.5).astype(int), zero_division=0, output_dict=True)
    assert row["f1_macro"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-12)
    assert row["exact_match"] == pytest.approx(accuracy_score(y, scaled > 0.5), abs=1e-12)
    assert row["lrap"] == pytest.approx(label_ranking_average_precision_score(y, scaled), abs=1e-12)
    assert row["coverage_error"] == pytest.approx(coverage_error(y, scaled), abs=1e-12)


def test_every_cut__is_strict_on_scaled_scores(case):
    y, scores = case
    sweep = paper.threshold_sweep(y, scores)
    assert list(sweep) == [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    for cut, found in sweep.items():
        said = row_minmax(scores) > cut
        _, _, f1, _ = precision_recall_fscore_support(y, said, average=None, zero_division=0)
        micro = precision_recall_fscore_support(y, said, average="micro", zero_division=0)[2]
        assert found["f1_macro"] == pytest.approx(f1.mean(), abs=1e-12)
        assert found["f1_micro"] == pytest.approx(micro, abs=1e-12)
        assert found["exact_match"] == pytest.approx((said == y).all(axis=1).mean(), abs=1e-12)
        np.testing.assert_array_equal(paper.decisions(scores, cut), said)


def test_scaled_ranking__is_scikit_learns_and_undefined_for_classes_of_one_value(case):
    y, scores = case
    areas, precisions = paper.scaled_ranking(y, scores)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        np.testing.assert_allclose(areas, per_label(roc_auc_score, y, row_minmax(scores)), atol=1e-12)
        some = y.any(axis=0)
        expected = [average_precision_score(t, v) for t, v in zip(y.T[some], row_minmax(scores).T[some], strict=True)]
    np.testing.assert_allclose(precisions[some], expected, atol=1e-12)
    assert np.isnan(precisions[~some]).all()


def test_figures_above_zero__are_scikit_learns(case):
    y, scores = case
    table = paper.above_zero_figures(y, scores)
    precision, recall, f1, support = precision_recall_fscore_support(y, scores > 0, average=None, zero_division=0)
    assert list(table["label"]) == list(STUDY_LABELS)
    np.testing.assert_allclose(table[["precision", "recall", "f1"]], np.column_stack([precision, recall, f1]))
    np.testing.assert_array_equal(table[["positives", "said"]], np.column_stack([support, (scores > 0).sum(axis=0)]))


def test_domains__are_scikit_learns_on_the_union_of_their_labels(case):
    y, scores = case
    said = row_minmax(scores) > 0.5
    table = paper.domain_figures(y, said).set_index("label")
    frames = [pd.DataFrame(each, columns=list(STUDY_LABELS)) for each in (y, said)]
    members = {
        "Cardiovascular": ["Enlarged Cardiomediastinum", "Cardiomegaly"],
        "Skeletal": ["Fracture"],
        "Device": ["Support Devices"],
        "Pulmonary": ["Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis",
                      "Pneumothorax", "Pleural Effusion", "Pleural Other"],
    }  # fmt: skip
    assert set(table.index) == set(members)
    for domain, labels in members.items():
        truth, decided = (frame[labels].max(axis=1).astype(int) for frame in frames)
        scored = precision_recall_fscore_support(truth, decided, average="binary", zero_division=0)
        np.testing.assert_allclose(table.loc[domain, ["precision", "recall", "f1"]].astype(float), scored[:3])
        assert table.loc[domain, "positives"] == truth.sum() and table.loc[domain, "said"] == decided.sum()


def test_distances__are_the_notebooks_also_with_singletons_and_absent_classes(case):
    y, scores = case
    features = np.random.default_rng(9).normal(size=(len(y), 16)) * 20 + scores[:, :1]
    flat = y.argmax(1)
    means = {c: features[flat == c].mean(0) for c in np.unique(flat)}
    intra = np.mean([np.linalg.norm(features[flat == c] - m, axis=1).mean() for c, m in means.items()])
    pairs = [np.linalg.norm(means[a] - means[b]) for a, b in itertools.combinations(means, 2)]
    found = paper.distances_of(features, y)
    assert found.intra == pytest.approx(intra, rel=1e-9, abs=1e-9)
    if not pairs:
        assert np.isnan(found.inter) and np.isnan(found.ratio)
    else:
        assert found.inter == pytest.approx(np.mean(pairs), rel=1e-9)
    if pairs and intra > 1e-9:
        assert found.ratio == pytest.approx(np.mean(pairs) / intra, rel=1e-9)
    assert found.singletons == sum((flat == c).sum() == 1 for c in means)


@pytest.mark.parametrize("blank", [np.nan, -1.0, 0.0, 0.5, 2.0])
def test_truth__of_tables_without_a_single_one_is_no_finding(blank):
    truth = paper.truth_of(np.full((5, LABELS), blank))
    assert truth.tolist() == [[0] * 13 + [1]] * 5
    assert paper.truth_of(np.full((2, 3), blank), ["a", "b", "c"]).sum() == 0


def test_truth__keeps_no_finding_beside_a_finding():
    values = np.full((1, LABELS), np.nan)
    values[0, [1, 13]] = 1
    assert paper.truth_of(values)[0, [1, 13]].tolist() == [1, 1]


@pytest.mark.parametrize("images", [4, 7, 41])
def test_split__keeps_uids_whole_in_any_order_of_images(images):
    uids = np.array([f"u{number % max(4, images // 3)}" for number in range(images)], dtype=object)
    split = paper.split(uids)
    assert all(len(set(split[uids == uid])) == 1 for uid in set(uids))
    assert (split == "train").any() and (split == "test").any()


def test_split__of_too_few_uids_is_refused():
    with pytest.raises(DataError, match="at least 4 groups"):
        paper.split(["a", "b", "c", "a"])


@pytest.mark.parametrize("count", [1, 14, 15, 16, 573])
def test_heatmap_images__are_the_draw_of_pandas(count):
    frame = pd.DataFrame({"row": np.arange(count)})
    expected = frame.sample(n=min(15, count), random_state=42)["row"].to_numpy()
    np.testing.assert_array_equal(paper.heatmap_positions(count), expected)
