"""Permutations keep patients and label sets whole; parts and bags are made of whole patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.space import resampling
from engine.errors import DataError, UsageError


def test_permuted_rows__exchange_whole_patients_of_equal_size():
    codes = np.array([0, 1, 0, 2, 1, 3, 4, 2])
    for order in resampling.permuted_rows(codes, 50, 0):
        assert sorted(order) == list(range(8))
        for patient in (0, 1, 2):
            assert len(set(codes[order[codes == patient]])) == 1, "rows of one patient go to one patient"
        assert set(order[[5, 6]]) == {5, 6}
    assert len({tuple(order) for order in resampling.permuted_rows(codes, 50, 0)}) > 5


def test_patients_of_a_size_nobody_shares__deal_their_rows_among_themselves():
    codes = np.repeat([0, 1, 2], [1, 2, 3])
    orders = resampling.permuted_rows(codes, 30, 1)
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6, "every order of the three patients"


def test_parts_and_bags__are_whole_patients():
    codes = np.random.default_rng(0).integers(0, 40, 200)
    part = resampling.patients_up_to(codes, 60, 3)
    assert len(part) <= 60 and not set(codes[part]) & set(np.delete(codes, part))
    assert len(resampling.patients_up_to(np.zeros(9, dtype=int), 4, 0)) == 4
    bags = resampling.merged_groups(codes, 7, 0)
    assert set(bags) == set(range(7)) and all(len(set(bags[codes == c])) == 1 for c in set(codes))


def test_wrong_numbers__are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        resampling.permuted_rows(np.arange(3), 0, 0)
    with pytest.raises(DataError, match="2 groups for 3 embeddings"):
        resampling.group_codes(np.arange(2), 3)
    for lacking in (np.array(["a", None], dtype=object), pd.Series(["a", pd.NA], dtype="string"), np.array(["a", ""])):
        with pytest.raises(DataError, match="1 samples have no group"):
            resampling.group_codes(lacking, 2)
