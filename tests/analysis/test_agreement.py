"""Agreement of label sources against scikit-learn's kappa, on the data and on explicit resamples."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from analysis.agreement import agreement_sentences, label_agreement
from engine.errors import DataError

LABELS = ("Edema", "Fracture", "Nodule")


@pytest.fixture
def sources():
    generator = np.random.default_rng(0)
    first = generator.random((160, 3)) < (0.3, 0.2, 0.1)
    second = np.where(generator.random((160, 3)) < 0.1, ~first, first)
    known = generator.random(160) < 0.9
    return {"file": (first, np.ones(160, bool)), "mesh": (second, known)}, np.arange(160) // 2


def test_kappa__is_scikit_learns_on_data_and_resamples(sources):
    given, groups = sources
    table = label_agreement(given, groups, label_names=LABELS, replicates=200, seed=3)
    (first, _), (second, known) = given.values()
    patients = np.unique(groups[known])
    rows_of = [np.flatnonzero(known & (groups == patient)) for patient in patients]
    generator = np.random.Generator(np.random.PCG64(3))
    drawn = generator.integers(0, len(patients), size=(200, len(patients)))
    for place, label in enumerate(LABELS):
        row = table[table["label"] == label].iloc[0]
        one, two = first[known, place], second[known, place]
        (neither, other), (only, both) = confusion_matrix(one, two)
        assert (row["both"], row["only_source"], row["only_other"], row["neither"]) == (both, only, other, neither)
        assert row["kappa"] == pytest.approx(cohen_kappa_score(one, two))
        assert row["n"] == known.sum() and row["agreement"] == pytest.approx((one == two).mean())
        kappas = []
        for chosen in drawn:
            rows = np.concatenate([rows_of[patient] for patient in chosen])
            kappas.append(cohen_kappa_score(first[rows, place], second[rows, place]))
        np.testing.assert_allclose([row["low"], row["high"]], np.quantile(kappas, [0.025, 0.975]), rtol=1e-9)


def test_labels_that_a_source_never_says__are_told_apart(sources):
    given, groups = sources
    second, known = given["mesh"]
    second = second.copy()
    second[:, 1] = False
    given["mesh"] = (second, known)
    table = label_agreement(given, groups, label_names=LABELS, replicates=100)
    assert table.loc[table["label"] == "Fracture", "kappa"].iloc[0] == 0
    (text,) = agreement_sentences(table)
    assert "over 2 labels" in text and text.endswith("never said by mesh: Fracture.")
    nobody = {"a": (np.zeros((6, 3), bool), np.ones(6, bool)), "b": (np.zeros((6, 3), bool), np.ones(6, bool))}
    empty = label_agreement(nobody, np.arange(6), label_names=LABELS, replicates=100)
    assert empty["kappa"].isna().all() and "in no label that both" in agreement_sentences(empty)[0]


def test_sources_of_other_samples__are_refused(sources):
    given, groups = sources
    with pytest.raises(DataError, match="do not fit together"):
        label_agreement(given, groups[:5], label_names=LABELS)
    unknown = {name: (values, np.zeros(160, bool)) for name, (values, _) in given.items()}
    assert label_agreement(unknown, groups, label_names=LABELS).empty
