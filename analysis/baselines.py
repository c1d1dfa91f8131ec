"""What a model must beat before it is said to see anything: four predictors that never look at an image.

In come training truth and the number of samples to predict; out go scores and decisions in the form of any setting, so
that they stand as rows beside the settings. On IU-Xray the ranking by prevalence alone reaches an LRAP of 0.75-0.84 and
"No Finding" for everyone an exact match of 0.63, above the study's trained settings.
"""

from __future__ import annotations

import numpy as np

from analysis.metrics import Prediction, check_truth
from engine.errors import DataError

RANDOM = "Random scores"
PREVALENCE = "Prevalence ranking"
ALL_POSITIVE = "All positive"
MOST_FREQUENT = "Most frequent set"
BASELINES = (RANDOM, PREVALENCE, ALL_POSITIVE, MOST_FREQUENT)


def random_scores(train_y: np.ndarray, samples: int, seed: int) -> Prediction:
    """Return uniform random scores (samples, L); each label is said at random as often as it occurs in training."""
    prevalence = _prevalence(train_y)
    scores = np.random.Generator(np.random.PCG64(seed)).random((samples, len(prevalence)))
    return Prediction(scores, scores > 1.0 - prevalence)


def prevalence_ranking(train_y: np.ndarray, samples: int) -> Prediction:
    """Return for every sample the labels' training prevalence as scores; said are the labels more than half have."""
    prevalence = _prevalence(train_y)
    scores = np.tile(prevalence, (samples, 1))
    return Prediction(scores, scores > 0.5)


def all_positive(train_y: np.ndarray, samples: int) -> Prediction:
    """Return all labels for every sample, with equal scores."""
    shape = (samples, check_truth(train_y).shape[1])
    return Prediction(np.ones(shape), np.ones(shape, dtype=bool))


def most_frequent_set(train_y: np.ndarray, samples: int) -> Prediction:
    """Return for every sample the label set that occurs most often in training, with scores 1 and 0.

    Of sets equally frequent, the first when rows of 0 and 1 are sorted.
    """
    truth = check_truth(train_y)
    _require_rows(truth)
    sets, counts = np.unique(truth, axis=0, return_counts=True)
    decisions = np.tile(sets[np.argmax(counts)], (samples, 1))
    return Prediction(decisions.astype(np.float64), decisions)


def trivial_baselines(train_y: np.ndarray, samples: int, seed: int) -> dict[str, Prediction]:
    """Return all four by name, in the order of `BASELINES`, for `samples` samples.

    Parameters
    ----------
    train_y : ndarray of 0/1, (n, L)
        Truth of the training split only.
    samples : int
        How many test samples to predict.
    seed : int
        Seed of the random scores.
    """
    return {
        RANDOM: random_scores(train_y, samples, seed),
        PREVALENCE: prevalence_ranking(train_y, samples),
        ALL_POSITIVE: all_positive(train_y, samples),
        MOST_FREQUENT: most_frequent_set(train_y, samples),
    }


def _prevalence(train_y: np.ndarray) -> np.ndarray:
    truth = check_truth(train_y)
    _require_rows(truth)
    return truth.mean(axis=0)


def _require_rows(truth: np.ndarray) -> None:
    if not len(truth):
        raise DataError("no training samples to take a baseline from; look at the split")
