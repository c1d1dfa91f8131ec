"""Prompts: texts once each, ensembles against the formula, absence of No Finding said sensibly."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import prompts
from engine.errors import DataError, UsageError

LABELS = ("Pleural Effusion", "Edema", "No Finding")


def test_bare__is_the_label_name_as_it_is():
    built = prompts.build_prompts(LABELS, "bare")
    assert built.texts == list(LABELS)
    embeddings = np.random.default_rng(0).normal(size=(3, 8)) * 7
    positive, negative = built.combine(embeddings, normalize=False)
    np.testing.assert_array_equal(positive, embeddings)
    assert negative is None


def test_ensemble__is_the_normalised_mean_of_normalised_prompts():
    built = prompts.build_prompts(LABELS, ["a scan with {label}", "{Label} here"])
    assert built.texts[:2] == ["a scan with pleural effusion", "Pleural Effusion here"]
    embeddings = np.random.default_rng(0).normal(size=(6, 8)) * 7
    positive, _ = built.combine(embeddings)
    for row in range(3):
        first, second = (each / np.linalg.norm(each) for each in embeddings[2 * row : 2 * row + 2])
        mean = (first + second) / 2
        np.testing.assert_allclose(positive[row], mean / np.linalg.norm(mean), rtol=1e-12)


def test_negatives__say_absence_and_share_texts_once():
    built = prompts.build_prompts(LABELS, "radiograph", "no")
    assert built.negative == (("no pleural effusion",), ("no edema",), ("an abnormal finding",))
    for nothing in ("No_Finding", "no finding"):
        assert prompts.build_prompts(["Edema", nothing], "bare", "no").negative == built.negative[1:]
    assert len(built.texts) == 6
    twice = prompts.build_prompts(("Edema", "edema"), "{label}")
    assert twice.texts == ["edema"]
    positive, _ = twice.combine(np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(positive, [[0.6, 0.8]] * 2)


def test_phrases__replace_the_name_in_lower_case():
    built = prompts.build_prompts(LABELS, "there is {label}", phrases={"Edema": "pulmonary oedema"})
    assert built.texts[1] == "there is pulmonary oedema"


def test_every_named_set__can_be_filled():
    for name in prompts.TEMPLATES:
        for negative in (None, *prompts.NEGATIVE_TEMPLATES):
            built = prompts.build_prompts(LABELS, name, negative)
            assert not any("{" in text for text in built.texts)


def test_templates__without_a_place_for_the_label_are_refused():
    with pytest.raises(UsageError, match=r"'radiographs'.*bare, radiograph"):
        prompts.build_prompts(LABELS, "radiographs")
    with pytest.raises(UsageError, match="no prompt templates"):
        prompts.build_prompts(LABELS, [])
    with pytest.raises(DataError, match="for 3 prompts"):
        prompts.build_prompts(LABELS, "bare").combine(np.ones((2, 4)))
