"""Spread over repeats against NumPy, and what is said of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import repeats
from engine.errors import DataError


def rows_of(values: dict[str, list[float]], metric: str = "lrap", half: float = 0.05) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"repeat": number, "setting": setting, "metric": metric, "value": value, "low": value - half,
             "high": value + half}
            for setting, column in values.items()
            for number, value in enumerate(column)
        ]
    )  # fmt: skip


def test_spread__is_the_sample_deviation_beside_that_of_the_intervals():
    values = {"probe": [0.5, 0.6, 0.9], "ranking": [0.4, 0.7, 0.7]}
    table = repeats.spread(rows_of(values)).set_index("setting")
    for setting, column in values.items():
        row = table.loc[setting]
        assert row["mean"] == pytest.approx(np.mean(column)) and row["repeats"] == 3
        assert row["deviation"] == pytest.approx(np.std(column, ddof=1))
        assert (row["lowest"], row["highest"]) == (min(column), max(column))
        assert row["within"] == pytest.approx(0.05 / 1.959964) and row["ratio"] == row["deviation"] / row["within"]


def test_spread__of_one_repeat_or_undefined_values_is_undefined():
    table = repeats.spread(rows_of({"probe": [0.5]})).iloc[0]
    assert np.isnan(table["deviation"]) and table["mean"] == 0.5
    table = repeats.spread(rows_of({"probe": [float("nan"), 0.5]})).iloc[0]
    assert table["repeats"] == 1 and np.isnan(table["deviation"])
    empty = repeats.spread(rows_of({"probe": [float("nan")]})).iloc[0]
    assert empty["repeats"] == 0 and np.isnan(empty["mean"])
    with pytest.raises(DataError, match="no repeats"):
        repeats.spread(pd.DataFrame(columns=["repeat", "setting"]))


@pytest.mark.parametrize("metric, better", [("lrap", 2), ("coverage_error", 1)])
def test_pairs__count_the_repeats_in_which_one_is_better(metric, better):
    rows = rows_of({"probe": [0.5, 0.6, 0.9], "ranking": [0.6, 0.5, 0.7]}, metric)
    row = repeats.agreement_of_repeats(rows, [("probe", "ranking"), ("probe", "absent")])
    assert len(row) == 1 and row["better"].iloc[0] == better and row["repeats"].iloc[0] == 3
    assert row["mean"].iloc[0] == pytest.approx(0.2 / 3) and row["lowest"].iloc[0] == pytest.approx(-0.1)


def test_sentences__say_both_spreads_and_how_often():
    rows = rows_of({"probe": [0.5, 0.6, 0.9], "ranking": [0.6, 0.5, 0.7]})
    said = repeats.repeat_sentences(repeats.spread(rows), repeats.agreement_of_repeats(rows, [("probe", "ranking")]))
    assert "probe 0.67 (between repeats 0.208, within one 0.026)" in said[0]
    assert "probe better than ranking in 2 of 3 (difference 0.07, -0.10 to 0.20)" in said[1]
