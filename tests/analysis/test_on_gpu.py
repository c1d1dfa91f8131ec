"""Metrics and distances on a GPU give the processor's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis import bootstrap, distances, metrics, space, subgroups
from analysis.metrics import Prediction

NAMES = ("a", "b", "c", "d")
# "cpu:0" takes the way of a GPU, through tensors, on any machine.
DEVICES = [
    "cpu:0",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def case(count: int = 90) -> tuple:
    generator = np.random.default_rng(3)
    y = generator.random((count, 4)) < (0.5, 0.3, 0.2, 0.08)
    y[0] = True
    features = generator.normal(size=(count, 12)).astype(np.float32) + y[:, :1]
    scores = 1 / (1 + np.exp(-generator.normal(size=y.shape) - y))
    return y, {"x": Prediction(scores, scores > 0.5), "y": Prediction(1 - scores, scores < 0.4)}, features


@pytest.mark.parametrize("device", DEVICES)
def test_metrics__are_those_of_numpy(device):
    y, predictions, _ = case()
    for each in predictions.values():
        tensors = [torch.as_tensor(part, device=device) for part in (y, *each)]
        found, expected = metrics.summary(*tensors), metrics.summary(y, *each)
        for metric, value in expected["overall"].items():
            np.testing.assert_allclose(found["overall"][metric], value, rtol=0, atol=1e-12, err_msg=metric)
        for metric, values in expected["per_label"].items():
            np.testing.assert_allclose(found["per_label"][metric].cpu(), values, rtol=0, atol=1e-12, err_msg=metric)


@pytest.mark.parametrize("device", DEVICES)
def test_bootstrap_and_subgroups__are_those_of_numpy(device):
    y, predictions, _ = case()
    options = {"label_names": NAMES, "replicates": 70, "seed": 4}
    expected = bootstrap.bootstrap_metrics(y, predictions, np.arange(90) // 2, **options)
    found = bootstrap.bootstrap_metrics(y, predictions, np.arange(90) // 2, device=device, **options)
    np.testing.assert_allclose(found.replicates, expected.replicates, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-12)
    sexes = np.array(["F", "M", "M"], dtype=object)[np.arange(90) % 3]
    options |= {"permutations": 40, "least_groups": 5}
    expected = subgroups.subgroup_metrics(y, predictions, np.arange(90), sexes, **options).gaps()
    found = subgroups.subgroup_metrics(y, predictions, np.arange(90), sexes, device=device, **options).gaps()
    for column in ("gap", "low", "high", "p"):
        np.testing.assert_allclose(found[column], expected[column], rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_distances__are_those_of_the_processor(device):
    y, _, features = case()
    classes, groups = distances.first_positive(y), np.arange(90) // 2
    options = {"replicates": 20, "permutations": 20, "seed": 1}
    named = options | {"label_names": NAMES}
    for measured, given, how in (
        (space.measure_space, (features, classes, y, groups), named),
        (distances.overlap_distances, (features, y, groups), named),
        (distances.label_separation, (features, y, groups), named),
        (space.space_similarity, (features, features[:, ::-1].copy(), groups), options),
    ):
        expected = space.measure_table(measured(*given, **how))
        found = space.measure_table(measured(*given, device=device, **how))
        for column in ("value", "low", "high", "null", "p"):
            np.testing.assert_allclose(found[column], expected[column], rtol=1e-4, atol=1e-5)
    expected = distances.bootstrap_distances(features, classes, groups, replicates=30)
    found = distances.bootstrap_distances(features, classes, groups, replicates=30, device=device)
    for name, interval in expected.items():
        np.testing.assert_allclose(found[name], interval, rtol=0, atol=1e-10)
    null = distances.permuted_null(features, classes, permutations=30)
    turned = distances.permuted_null(features, classes, permutations=30, device=device)
    np.testing.assert_allclose(turned.ratios, null.ratios, rtol=0, atol=1e-10)
