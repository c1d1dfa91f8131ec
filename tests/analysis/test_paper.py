"""The study's protocol, each step against a short version of its own, written with NumPy, pandas and scikit-learn."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    classification_report,
    coverage_error,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)
from sklearn.model_selection import train_test_split

from analysis import paper
from engine.errors import DataError
from engine.labels import STUDY_LABELS
from tests.conftest import shared_data


@pytest.fixture
def study():
    """Un-normalised embeddings of 200 images, 14 texts, and truth at uneven prevalences."""
    generator = np.random.default_rng(0)
    image = generator.normal(size=(200, 32)).astype(np.float32) * 3 + 1
    text = generator.normal(size=(14, 32)).astype(np.float32) * 2
    values = np.where(generator.random((200, 14)) < np.linspace(0.02, 0.3, 14), 1.0, 0.0)
    values[generator.random((200, 14)) < 0.05] = -1
    values[generator.random((200, 14)) < 0.3] = np.nan
    return image, text, values


def test_labels__are_the_studys_14_in_its_order():
    assert STUDY_LABELS[:3] == ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity")
    assert len(STUDY_LABELS) == 14 and STUDY_LABELS[-1] == "No Finding"


def test_truth__takes_only_ones_and_fills_no_finding(study):
    values = study[2]
    frame = pd.DataFrame(values, columns=list(STUDY_LABELS))
    targets = frame.apply(lambda row: [name for name in STUDY_LABELS if row[name] == 1] or ["No Finding"], axis=1)
    expected = np.array([[name in target for name in STUDY_LABELS] for target in targets])
    np.testing.assert_array_equal(paper.truth_of(values), expected)
    with pytest.raises(DataError, match="for 14 label names"):
        paper.truth_of(values[:, :3])


def test_split__is_two_calls_of_train_test_split():
    uids = np.array([f"CXR{number // 2}" for number in range(400)], dtype=object)
    train, rest = train_test_split(pd.unique(uids), test_size=0.30, random_state=42, shuffle=True)
    val, _ = train_test_split(rest, test_size=0.50, random_state=42, shuffle=True)
    expected = np.where(np.isin(uids, train), "train", np.where(np.isin(uids, val), "val", "test"))
    np.testing.assert_array_equal(paper.split(uids), expected)


def test_split__of_the_real_table_has_the_facts_counts():
    table = pd.read_csv(shared_data("data/iu-xray-reports/indiana_projections.csv"))
    frontal = table[table["projection"] == "Frontal"]
    counts = pd.Series(paper.split(frontal["uid"].to_numpy())).value_counts()
    assert (counts["train"], counts["val"], counts["test"]) == (2670, 575, 573)


def test_zero_shot__is_bare_names_and_raw_dot_products(study):
    image, text, _ = study
    assert paper.prompts().texts == list(STUDY_LABELS)
    combined, negative = paper.prompts().combine(text, normalize=False)
    assert negative is None
    expected = image.astype(float) @ text.astype(float).T
    np.testing.assert_allclose(paper.zero_shot_scores(image, combined), expected, rtol=1e-12)


def row_minmax(x):
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - low) / (high - low + 1e-8)


def test_table_row__is_scikit_learn_on_scaled_scores(study):
    image, text, values = study
    y, scores = paper.truth_of(values), paper.zero_shot_scores(image, text)
    chance = row_minmax(scores)
    for cut in (0.5, 0.85):
        report = classification_report(y, (chance > cut).astype(int), zero_division=0, output_dict=True)
        expected = {
            "f1_macro": report["macro avg"]["f1-score"],
            "exact_match": accuracy_score(y, (chance > cut).astype(int)),
            "lrap": label_ranking_average_precision_score(y, chance),
            "coverage_error": coverage_error(y, chance),
        }
        row = paper.table_row(y, scores, cut)
        assert set(row) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(paper.decisions(scores, cut), chance > cut)
    areas, precisions = paper.scaled_ranking(y, scores)
    np.testing.assert_allclose(areas, roc_auc_score(y, chance, average=None), atol=1e-12)
    np.testing.assert_allclose(precisions, average_precision_score(y, chance, average=None), atol=1e-12)


def test_sweep__shows_every_cut_and_the_rows_own(study):
    image, text, values = study
    y, scores = paper.truth_of(values), paper.zero_shot_scores(image, text)
    sweep = paper.threshold_sweep(y, scores)
    np.testing.assert_allclose(list(sweep), np.arange(0.20, 0.91, 0.05))
    assert len(sweep) == 15
    for cut, found in sweep.items():
        _, _, f1, _ = precision_recall_fscore_support(y, row_minmax(scores) > cut, average=None, zero_division=0)
        np.testing.assert_allclose(found["f1_macro"], f1.mean(), atol=1e-12)
    row = paper.table_row(y, scores)
    assert sweep[0.5]["f1_macro"] == row["f1_macro"] and sweep[0.5]["exact_match"] == row["exact_match"]


def test_above_zero__over_predicts_where_all_scores_are_positive(study):
    scores = np.abs(study[0] @ study[1].T)
    assert paper.decisions_above_zero(scores).all()
    assert not paper.decisions_above_zero(np.zeros((2, 3))).any()


def test_distances__are_the_notebooks(study):
    image, _, values = study
    y = paper.truth_of(values)
    flat = y.argmax(1)
    means = [image[flat == c].mean(0) for c in np.unique(flat)]
    intra = np.mean(
        [np.linalg.norm(image[flat == c] - m, axis=1).mean() for c, m in zip(np.unique(flat), means, strict=True)]
    )
    inter = np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(means, 2)])
    found = paper.distances_of(image, y)
    np.testing.assert_allclose([found.inter, found.intra, found.ratio], [inter, intra, inter / intra], rtol=1e-5)


def test_domains__are_positive_where_any_of_their_labels_is(study):
    image, text, values = study
    y, decided = paper.truth_of(values), paper.decisions(paper.zero_shot_scores(image, text))
    names, truth, said = paper.by_domain(y, decided)
    columns = {"Cardiovascular": [0, 1], "Skeletal": [11], "Device": [12], "Pulmonary": list(range(2, 11))}
    assert set(names) == set(columns)
    for place, name in enumerate(names):
        np.testing.assert_array_equal(truth[:, place], y[:, columns[name]].sum(1) > 0)
        np.testing.assert_array_equal(said[:, place], decided[:, columns[name]].sum(1) > 0)
    with pytest.raises(DataError, match="none of the labels"):
        paper.by_domain(y[:, 13:], decided[:, 13:], ["No Finding"])


def test_reference__is_the_published_table():
    table = paper.reference_table().set_index(["setting", "metric"])["value"]
    assert len(table) == 3 * 8 - 1
    assert table["zero-shot", "lrap"] == 0.250 and table["linear probe", "minutes"] == 6.10
    for setting in paper.REFERENCE_ROWS:
        quotient = table[setting, "inter"] / table[setting, "intra"]
        np.testing.assert_allclose(table[setting, "ratio"], quotient, atol=2e-3)


def test_probe__takes_the_studys_settings(study):
    image, _, values = study
    y = paper.truth_of(values)
    fitted = paper.linear_probe(image[:140], y[:140], image[140:], y[140:], encoder_id="tiny")
    account = fitted.head.provenance
    for name, value in {"learning_rate": 1e-4, "weight_decay": 1e-2, "batch_size": 24, "epochs": 10}.items():
        assert account[name] == value
    assert account["patience"] == 5 and account["minimum_improvement"] == 1e-4 and account["seed"] == 42
    assert fitted.head.encoder_id == "tiny" and not fitted.head.normalised


def test_finetuning__is_described_as_it_is_carried_out():
    finetune = pytest.importorskip("analysis.finetuning")
    carried_out = dataclasses.asdict(finetune.study_recipe(7))
    for name, value in paper.paper_finetune_settings().items():
        assert carried_out[name] == value, name


def test_heatmap_images__are_pandas_sample():
    frame = pd.DataFrame({"image": np.arange(573)})
    expected = frame.sample(n=15, random_state=42)["image"].to_numpy()
    np.testing.assert_array_equal(paper.heatmap_positions(573), expected)
    assert len(paper.heatmap_positions(4)) == 4
