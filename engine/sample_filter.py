"""Which samples of a data set pass some conditions on their columns and labels.

Comes in: a data set and conditions as they are typed: ``view=frontal``, ``split!=test``, ``age>=60``,
``group=P01|P02`` (any of these), ``label:Pneumonia`` and ``label!:Pneumonia``. Goes out: a mask. All conditions must
hold. A name or value that the data set does not have is an error that offers the nearest: a filter that silently
matches nothing looks like an answer.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from engine.dataset import Dataset
from engine.errors import UsageError
from engine.tables import offer, text_of

CONDITION = re.compile(r"\s*(?P<column>[^=!<>]+?)\s*(?P<sign>!=|>=|<=|=|>|<)\s*(?P<value>.*?)\s*$", re.S)
LABEL = re.compile(r"\s*label(?P<sign>!?):\s*(?P<name>.*?)\s*$", re.S)
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
FORMS = "COLUMN=VALUE, COLUMN!=VALUE, COLUMN>=NUMBER, COLUMN=ONE|OTHER, label:NAME or label!:NAME"


def matching(dataset: Dataset, conditions: Sequence[str]) -> np.ndarray:
    """Return which samples pass all conditions.

    Parameters
    ----------
    dataset : Dataset
    conditions : sequence of str
        None at all lets every sample pass.

    Returns
    -------
    ndarray of bool, (n,)

    Raises
    ------
    UsageError
        A condition that cannot be read, an unknown column, label or value (the nearest are offered), or conditions of
        which each lets samples pass and all together none.
    """
    passing, counts = np.ones(len(dataset), bool), []
    for condition in conditions:
        one = _matching(dataset, condition)
        counts.append(f"{condition}: {int(one.sum()):,}")
        passing &= one
    if conditions and not passing.any():
        raise UsageError(
            f"no sample of {dataset.called} passes the filter ({'; '.join(counts)} of {len(dataset):,} samples by "
            "itself); leave out a condition"
        )
    return passing


def _matching(dataset: Dataset, condition: str) -> np.ndarray:
    label = LABEL.match(condition)
    if label:
        return _labelled(dataset, label["name"]) ^ (label["sign"] == "!")
    parts = CONDITION.match(condition)
    if parts is None:
        raise UsageError(f"the condition {condition!r} cannot be read; write it as {FORMS}")
    column, sign, value = parts["column"], parts["sign"], parts["value"]
    if column not in dataset.samples.columns:
        known = [*map(str, dataset.samples.columns), *(f"label:{name}" for name in dataset.label_names)]
        raise UsageError(f"{dataset.called} has no column {column!r} to filter by; {offer(column, known)}")
    values = dataset.samples[column]
    if sign in ORDERS:
        return _ordered(values, sign, value, condition)
    return _equal(values, value.split("|"), condition) ^ (sign == "!=")


def _labelled(dataset: Dataset, name: str) -> np.ndarray:
    if name not in dataset.label_names:
        raise UsageError(f"{dataset.called} has no label {name!r} to filter by; {offer(name, dataset.label_names)}")
    return dataset.labels[:, dataset.label_names.index(name)] > 0


def _equal(values: pd.Series, wanted: list[str], condition: str) -> np.ndarray:
    """Return where a column is one of some values; numbers are compared as numbers, everything else as text."""
    found = np.zeros(len(values), bool)
    text = text_of(values) if not pd.api.types.is_bool_dtype(values) else values.astype(str)
    codes, distinct = pd.factorize(text)
    known = [str(each) for each in distinct]
    if known == [""] and any(value.strip() for value in wanted):
        raise UsageError(f"the column {values.name!r} is empty for all samples, so {condition!r} compares with nothing")
    for value in wanted:
        number = _number(value)
        same = [each == value.strip() or (number is not None and _number(each) == number) for each in known]
        if not any(same):
            raise UsageError(
                f"no sample has {value!r} in the column {values.name!r} ({condition}); {offer(value, known)}"
            )
        found |= np.isin(codes, np.flatnonzero(same))
    return found


def _ordered(values: pd.Series, sign: str, value: str, condition: str) -> np.ndarray:
    number = _number(value)
    if number is None:
        raise UsageError(f"the condition {condition!r} compares with {value!r}, which is no number")
    numbers = pd.to_numeric(text_of(values), errors="coerce").to_numpy(np.float64)
    if len(numbers) and np.isnan(numbers).all():
        raise UsageError(f"the column {values.name!r} holds no numbers, so {condition!r} cannot be; use = or !=")
    with np.errstate(invalid="ignore"):
        return np.asarray(ORDERS[sign](numbers, float(number)))  # a blank cell passes no comparison


def _number(text: str) -> Decimal | None:
    """Return a number with all its digits; float() would take an id such as 1_2 for 12, and round long ones."""
    return Decimal(text.strip()) if NUMBER.fullmatch(text.strip()) else None
