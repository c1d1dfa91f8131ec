"""Splits: who is trained on, who is tuned on, who is tested on; a patient is in one of them only.

Groups (patients) or a split column come in; one of "train", "val", "test" or "" a sample goes out. Four ways: as given
in the data; the study's own; grouped by patient from a seed; and so that each part also has each label about as often
(`engine.stratified_split`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from engine.dataset import Dataset
from engine.errors import DataError, UsageError
from engine.stratified_split import stratified_parts
from engine.tables import offer

SPLITS = ("train", "val", "test")
HOW = ("given", "study", "grouped", "stratified")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
STUDY_SEED = 42
FRACTIONS = (0.7, 0.15, 0.15)


def split_name(word: str) -> str | None:
    """Return train, val or test for a word that means it, "" for a blank one, None for another."""
    folded = word.strip().lower()
    return "" if not folded else SPLIT_WORDS.get(folded)


def check_split(groups: Sequence[str] | np.ndarray | pd.Series, split: Sequence[str] | np.ndarray | pd.Series) -> None:
    """Raise DataError naming the groups that are in more than one split.

    Parameters
    ----------
    groups, split : (n,) str
        Samples with the split "" are in none.
    """
    columns = {"group": groups, "split": split}
    # Columns of a table stay as they are: as objects, millions of them would fill the memory.
    pairs = pd.DataFrame(
        {
            name: column.reset_index(drop=True) if isinstance(column, pd.Series) else np.asarray(column, dtype=object)
            for name, column in columns.items()
        }
    )
    pairs = pairs[pairs["split"] != ""].drop_duplicates()
    torn = pairs[pairs["group"].duplicated(keep=False)]
    if len(torn):
        named = [
            f"{group!r} in {' and '.join(members)}" for group, members in torn.groupby("group", sort=True)["split"]
        ]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise DataError(
            f"{len(named)} groups are in more than one split, so what is tested was seen in training: "
            f"{'; '.join(named[:5])}{more}; correct the split column, or leave it out (split='') "
            "and split by group (how='grouped')"
        )


def given(dataset: Dataset) -> np.ndarray:
    """Return the split column of the data, (n,) object, after checking it.

    Raises
    ------
    DataError
        The data have no split, or a group is in two.
    """
    split = dataset.samples["split"].to_numpy(dtype=object)
    if not (split != "").any():
        raise DataError(f"{dataset.called} brings no split; name its split column, or split by group (how='grouped')")
    unknown = sorted(set(split) - {*SPLITS, ""})
    if unknown:
        raise DataError(f"{dataset.called} has the split {unknown[0]!r}; known are {', '.join(SPLITS)} and blank")
    check_split(dataset.groups, split)
    return split


def study_split(groups: Sequence[str] | np.ndarray, seed: int = STUDY_SEED) -> np.ndarray:
    """Return the study's split: 70 / 15 / 15 % of the groups, with its own two calls and seed.

    Parameters
    ----------
    groups : (n,) str
        The uid of each frontal image, in the order of the projections table; another order is another split.
    seed : int
        42 in the study; another one gives a split made in the same way.

    Returns
    -------
    ndarray of object, (n,)
        For the real table: 2,582 / 553 / 554 groups with 2,670 / 575 / 573 images.

    References
    ----------
    arXiv 2506.14136 and its code: unique uids in file order, ``train_test_split(uids, test_size=0.30, random_state=42,
    shuffle=True)``, then the held-out part halved in the same way.
    """
    from sklearn.model_selection import train_test_split

    unique = pd.unique(np.asarray(groups, dtype=object))
    if len(unique) < 4:
        raise DataError(
            f"the study's split needs at least 4 groups, here are {len(unique)}; use how='grouped' or 'given'"
        )
    train, held_out = train_test_split(unique, test_size=0.30, random_state=seed, shuffle=True)
    val, test = train_test_split(held_out, test_size=0.50, random_state=seed, shuffle=True)
    of_group = dict.fromkeys(train, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    return np.array([of_group[group] for group in np.asarray(groups, dtype=object)], dtype=object)


def grouped_split(
    groups: Sequence[str] | np.ndarray, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> np.ndarray:
    """Return a random split by group, whose parts hold about these fractions of the samples.

    Parameters
    ----------
    groups : (n,) str
        Their order does not matter: the same groups and seed give the same split.
    fractions : (train, val, test)
        Must add up to 1; a part may be 0.
    seed : int

    Returns
    -------
    ndarray of object, (n,)

    Raises
    ------
    UsageError
        Fractions that are negative or do not add up to 1.
    DataError
        A part that is asked for stays empty, because there are too few groups or one is too large.
    """
    shares = _checked_shares(fractions)
    unique, of_sample, counts = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(unique))
    # A group goes where its middle sample falls, which keeps each part as near to its share as whole groups allow.
    middles = (np.cumsum(counts[order]) - counts[order] / 2) / max(len(of_sample), 1)
    parts = np.empty(len(unique), dtype=object)
    parts[order] = np.array(SPLITS, dtype=object)[np.searchsorted(np.cumsum(shares)[:2], middles, side="right")]
    split = parts[of_sample]
    _check_parts(split, shares, len(unique))
    return split


def stratified_split(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> np.ndarray:
    """Return a split by group whose parts hold about these fractions of the samples and of each label's positives.

    Parameters
    ----------
    groups : (n,) str
        Their order does not matter.
    labels : ndarray of 0/1, (n, L)
    fractions : (train, val, test)
        Must add up to 1; a part may be 0.
    seed : int

    Returns
    -------
    ndarray of object, (n,)

    Raises
    ------
    UsageError
        Fractions that are negative or do not add up to 1.
    DataError
        Nothing to stratify by, or a part that is asked for stays empty.
    """
    shares = _checked_shares(fractions)
    parts = np.array(SPLITS, dtype=object)
    split = parts[stratified_parts(groups, labels, shares, seed)]
    _check_parts(split, shares, len(set(groups)))
    return split


def _checked_shares(fractions: Sequence[float]) -> np.ndarray:
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or not np.isfinite(shares).all() or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise UsageError(f"split fractions {tuple(fractions)} must be three numbers of 0 or more that add up to 1")
    return shares


def _check_parts(split: np.ndarray, shares: np.ndarray, groups: int) -> None:
    """Raise DataError where a part that is asked for is empty."""
    for name, share in zip(SPLITS, shares, strict=True):
        if share > 0 and not (split == name).any():
            raise DataError(
                f"no group falls into {name!r} (fraction {share:g} of {len(split)} samples, {groups} groups); "
                "use more data, a larger fraction, or a split given in the data"
            )


def apply_split(dataset: Dataset, how: str = "given", seed: int = 0, fractions: Sequence[float] = FRACTIONS) -> Dataset:
    """Return the data set with its split column set and checked.

    Parameters
    ----------
    how : {"given", "study", "grouped", "stratified"}
        As in the data; the study's own, over the frontal images in their order; by group from a seed; or by group with
        each label about as often in every part.

    Raises
    ------
    UsageError
        Another `how`.
    DataError
        No split in the data, or a group in two splits.
    """
    if how == "given":
        split = given(dataset)
    elif how == "study":
        split = _study_split_of(dataset)
    elif how == "grouped":
        split = grouped_split(dataset.groups, fractions, seed)
    elif how == "stratified":
        split = stratified_split(dataset.groups, dataset.labels, fractions, seed)
    else:
        raise UsageError(f"unknown split {how!r}; {offer(how, HOW)}")
    check_split(dataset.groups, split)
    return dataset.with_split(split)


def resplit(dataset: Dataset, number: int, how: str, seed: int, fractions: Sequence[float] = FRACTIONS) -> Dataset:
    """Return the data set split once more, in the way it was split, from another seed.

    Parameters
    ----------
    number : int
        0 gives the same split; each other one another.
    how, seed, fractions
        As for `apply_split`. A split given in the data is made again by group, in its own proportions, among the
        samples that are in it.

    Raises
    ------
    DataError
        A part stays empty.
    """
    if number == 0:
        return dataset
    if how == "study":
        split = _study_split_of(dataset, STUDY_SEED + number)
    elif how == "given":
        current = dataset.samples["split"].to_numpy(dtype=object)
        split, inside = current.copy(), current != ""
        shares = [float((current == part).sum() / inside.sum()) for part in SPLITS]
        split[inside] = grouped_split(dataset.groups[inside], shares, seed + number)
    else:
        return apply_split(dataset, how, seed + number, fractions)
    check_split(dataset.groups, split)
    return dataset.with_split(split)


def _study_split_of(dataset: Dataset, seed: int = STUDY_SEED) -> np.ndarray:
    """Return the study's split of the frontal images; other samples follow their group, or get ""."""
    frontal = (dataset.samples["view"] == "frontal").to_numpy()
    if not frontal.any():
        return study_split(dataset.groups, seed)
    of_group = dict(zip(dataset.groups[frontal], study_split(dataset.groups[frontal], seed), strict=True))
    return np.array([of_group.get(group, "") for group in dataset.groups], dtype=object)
