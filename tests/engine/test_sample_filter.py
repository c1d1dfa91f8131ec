"""Conditions on samples, against pandas' own comparisons; names that are not there offer the nearest."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from engine.dataset import Dataset
from engine.errors import UsageError
from engine.sample_filter import matching
from tests.engine.fakes import ArrayReader

COUNT = 60


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.Generator(np.random.PCG64(0))
    samples = pd.DataFrame(
        {
            "id": [f"s{number}" for number in range(COUNT)],
            "uri": [str(number) for number in range(COUNT)],
            "text": [""] * COUNT,
            "group": [f"P{number // 3:02d}" for number in range(COUNT)],
            "view": rng.choice(["frontal", "lateral", ""], COUNT),
            "split": rng.choice(["train", "val", "test"], COUNT),
            "age": rng.choice(["7", "34", "60.0", "81", ""], COUNT),
            "dose": rng.normal(size=COUNT),
            "portable": rng.random(COUNT) < 0.5,
        }
    )
    labels = (rng.random((COUNT, 2)) < 0.4).astype(np.int8)
    return Dataset("fake:filter", "filter", samples, ("Pneumonia", "Pleural Effusion"), labels, ArrayReader())


def ages(dataset: Dataset) -> np.ndarray:
    return pd.to_numeric(dataset.samples["age"], errors="coerce").to_numpy(float)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("group=12", [True, False, False, False, True]),
        ("group=1_2", [False, True, False, False, False]),
        ("group=10000000000000001", [False, False, True, False, False]),
        ("group!=10000000000000000", [True, True, True, False, True]),
        ("group=1.20e1", [True, False, False, False, True]),
    ],
)
def test_ids_are_equal_only_with_all_their_digits(dataset, condition, expected):
    ids = ["12", "1_2", "10000000000000001", "10000000000000000", "12.0"]
    some = dataset.take(np.arange(5)).with_columns(group=pd.array(ids, "str"))
    assert matching(some, [condition]).tolist() == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("view=frontal", lambda d: d.samples["view"] == "frontal"),
        (" view = frontal ", lambda d: d.samples["view"] == "frontal"),
        ("view!=frontal", lambda d: d.samples["view"] != "frontal"),
        ("view=", lambda d: d.samples["view"] == ""),
        ("split=val|test", lambda d: d.samples["split"].isin(["val", "test"])),
        ("group=P03", lambda d: d.samples["group"] == "P03"),
        ("age>=60", lambda d: ages(d) >= 60),
        ("age<34", lambda d: ages(d) < 34),
        ("age=60", lambda d: ages(d) == 60),
        ("dose>-0.5", lambda d: d.samples["dose"] > -0.5),
        ("portable=True", lambda d: d.samples["portable"]),
        ("label:Pneumonia", lambda d: d.labels[:, 0] == 1),
        ("label: Pleural Effusion", lambda d: d.labels[:, 1] == 1),
        ("label!:Pneumonia", lambda d: d.labels[:, 0] == 0),
    ],
)
def test_a_condition_is_the_comparison_it_says(dataset, condition, expected):
    found = matching(dataset, [condition])
    np.testing.assert_array_equal(found, np.asarray(expected(dataset), bool))
    assert 0 < found.sum() < COUNT


def test_all_conditions_must_hold_and_none_lets_all_pass(dataset):
    both = matching(dataset, ["view=frontal", "label:Pneumonia"])
    np.testing.assert_array_equal(both, (dataset.samples["view"] == "frontal") & (dataset.labels[:, 0] == 1))
    assert matching(dataset, []).all()


@pytest.mark.parametrize(
    ("conditions", "problem"),
    [
        (["veiw=frontal"], "no column 'veiw' to filter by; nearest: view"),
        (["label:Pnuemonia"], "no label 'Pnuemonia' to filter by; nearest: Pneumonia"),
        (["Pneumonia=1"], "no column 'Pneumonia' to filter by; nearest: .*label:Pneumonia"),
        (["view=fronatl"], "no sample has 'fronatl' in the column 'view' .*; nearest: frontal"),
        (["group=P99"], "no sample has 'P99' in the column 'group'"),
        (["text=none"], "the column 'text' is empty for all samples, so 'text=none' compares with nothing"),
        (["age>=old"], "compares with 'old', which is no number"),
        (["view>3"], "the column 'view' holds no numbers"),
        (["frontal"], "the condition 'frontal' cannot be read; write it as COLUMN=VALUE"),
        (["group=P00", "group=P01"], "no sample .* passes the filter .group=P00: 3; group=P01: 3 of 60 samples"),
    ],
)
def test_what_cannot_match_is_an_error_that_offers_the_nearest(dataset, conditions, problem):
    with pytest.raises(UsageError, match=problem):
        matching(dataset, conditions)
