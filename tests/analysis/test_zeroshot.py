"""Zero-shot scores against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from analysis.zeroshot import zero_shot_scores
from engine.errors import DataError


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    return (generator.normal(size=(n, 16)).astype(np.float32) for n in (20, 14, 14))


def test_sound__is_cosine_times_logit_scale(vectors):
    image, text, _ = vectors
    expected = 85.2 * cosine_similarity(image.astype(float), text.astype(float)) - 3
    np.testing.assert_allclose(zero_shot_scores(image, text, logit_scale=85.2, logit_bias=-3), expected, rtol=1e-10)


def test_paper__is_the_raw_dot_product(vectors):
    image, text, _ = vectors
    expected = image.astype(float) @ text.astype(float).T
    np.testing.assert_allclose(zero_shot_scores(image, text, normalize=False), expected, rtol=1e-12)


def test_negative__is_the_log_odds_of_a_softmax_over_presence_and_absence(vectors):
    image, text, absent = vectors
    with_, without = (10 * cosine_similarity(image.astype(float), each.astype(float)) for each in (text, absent))
    probability = np.exp(with_) / (np.exp(with_) + np.exp(without))
    scores = zero_shot_scores(image, text, logit_scale=10, negative=absent)
    np.testing.assert_allclose(scores, np.log(probability / (1 - probability)), rtol=1e-8)


def test_vectors_that_do_not_fit__are_refused(vectors):
    image, text, absent = vectors
    with pytest.raises(DataError, match="16 dimensions, text embeddings 8"):
        zero_shot_scores(image, text[:, :8])
    with pytest.raises(DataError, match="negative prompts"):
        zero_shot_scores(image, text, negative=absent[:3])
