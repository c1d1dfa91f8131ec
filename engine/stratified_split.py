"""A split by patient in which every part has each label about as often as the whole.

Groups (patients) and 0/1 columns (labels) of n samples come in; "train", "val" or "test" a sample goes out, and a table
of how well it was kept. With labels of 20 among 3,818 a split by chance leaves a part without a positive now and then;
drawing each label's patients separately is impossible, since patients have several.

Method: groups with the same size and the same label counts are alike, so each such pattern is dealt out in proportion
first, all at once; that also keeps combinations of labels. What is left over, a few groups a pattern, is given one by
one, rarest label first and large groups first, to the part where it lowers most the distance from a perfect split: the
sum over labels (and samples) of (had - wanted)^2 / share / total^1.5, which is the chi-square distance with rarer
labels weighing more; then each of them is thought over twice. The second step is iterative stratification (Sechidis,
Tsoumakas, Vlahavas, ECML PKDD 2011) with all of a group's labels weighed at once. Random choices come from the seed;
the order of the samples does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from engine.errors import DataError

# Most groups of each frequent pattern that are given one by one, to make up for what rarer ones left uneven.
_KEPT_BACK = 64
# Power of a label's total by which its distance is divided; from 1.5 to 2 all is kept, at 1 rare labels suffer.
_RARITY = 1.5
_SECOND_THOUGHTS = 2


def stratified_parts(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, shares: np.ndarray, seed: int
) -> np.ndarray:
    """Return the part of each sample, 0 to P - 1.

    Parameters
    ----------
    groups : (n,) str
    labels : ndarray of 0/1, (n, L)
    shares : ndarray of float, (P,)
        Of the samples that each part shall hold; add up to 1; 0 for a part that shall be empty.
    seed : int

    Returns
    -------
    ndarray of int64, (n,)

    Raises
    ------
    DataError
        Rows that differ, or no label that some but not all samples have: there is nothing to stratify by.
    """
    truth = np.asarray(labels)
    if truth.ndim != 2 or len(truth) != len(groups):
        raise DataError(f"labels of shape {truth.shape} for {len(groups)} groups of samples; give one row a sample")
    positives = (truth != 0).sum(axis=0)
    useful = (positives > 0) & (positives < len(truth))
    if not useful.any():
        raise DataError(
            "no label is there in some samples and absent in others, so there is nothing to stratify by; "
            "split by group instead (how='grouped')"
        )
    of_sample, unique = pd.factorize(np.asarray(groups, dtype=object), sort=True)
    if (of_sample < 0).any():
        raise DataError(f"{(of_sample < 0).sum()} samples have no group; a split by patient needs one for each")
    # One row a group: its samples, and how many of them have each label.
    held = np.empty((len(unique), 1 + int(useful.sum())), dtype=np.int64)
    held[:, 0] = np.bincount(of_sample, minlength=len(unique))
    for column, label in enumerate(np.flatnonzero(useful), start=1):
        held[:, column] = np.bincount(of_sample[truth[:, label] != 0], minlength=len(unique))
    return _deal(held, shares, np.random.Generator(np.random.PCG64(seed)))[of_sample]


def _deal(held: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the part of each group from what groups hold (G, 1 + L)."""
    # Equal rows get equal numbers; unequal ones too once in 2^64, which would only deal them out together.
    factors = generator.integers(1, 1 << 63, size=held.shape[1], dtype=np.uint64) | np.uint64(1)
    pattern = np.unique((held.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64), return_inverse=True)[1]
    order = generator.permutation(len(held))
    order = order[np.argsort(pattern[order], kind="stable")]
    sizes = np.bincount(pattern)
    place = np.arange(len(held)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Whole shares of each pattern; 1e-9 takes 0.7 * 10 for 7. Some of the frequent ones are kept to even out the rest.
    dealt = sizes - np.where(sizes >= 16, np.minimum(sizes // 4, _KEPT_BACK), 0)
    quotas = np.floor(np.outer(dealt, shares) + 1e-9).astype(np.int64)
    ends = np.cumsum(quotas, axis=1)[pattern[order]]
    parts = np.empty(len(held), dtype=np.int64)
    parts[order] = (place[:, None] >= ends).sum(axis=1)
    left = parts == len(shares)

    wanted = np.outer(shares, held.sum(axis=0)).astype(np.float64)
    had = np.stack([held[parts == part].sum(axis=0) for part in range(len(shares))]).astype(np.float64)
    allowed = np.flatnonzero(shares > 0)
    lacking = (wanted - had)[allowed]
    inverse = 1.0 / (shares[allowed, None] * held.sum(axis=0, dtype=np.float64) ** _RARITY)
    order = _rarest_first(held, np.flatnonzero(left), generator)
    for turn in range(1 + _SECOND_THOUGHTS):
        for group in order:
            row = held[group]
            if turn:
                lacking[parts[group]] += row
            # What the distance gains where the group goes to each part.
            best = int(((row - 2.0 * lacking) * row * inverse).sum(axis=1).argmin())
            lacking[best] -= row
            parts[group] = best
    parts[left] = allowed[parts[left]]
    return parts


def _rarest_first(held: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return groups in the order of their rarest label (those without any last), then the largest first."""
    totals = held[:, 1:].sum(axis=0)
    rarest = np.where(held[groups, 1:] > 0, totals, np.iinfo(np.int64).max).min(axis=1)
    return groups[np.lexsort((generator.permutation(len(groups)), -held[groups, 0], rarest))]


def split_report(
    split: np.ndarray, labels: np.ndarray, label_names: Sequence[str], parts: Sequence[str]
) -> pd.DataFrame:
    """Return how well a split kept the prevalences, one row a label.

    Parameters
    ----------
    split : (n,) str
        Samples with "" are in no part and not counted.
    labels : ndarray of 0/1, (n, L)
    label_names, parts : sequence of str

    Returns
    -------
    DataFrame
        label, positives, prevalence (in all parts), then for each part its prevalence; deviation, the largest
        difference of a part's prevalence from the whole's as a share of it, and by_chance, what a random split by
        sample has for that part on average (its standard deviation, the same share). NaN for a label without positives.
    """
    names = np.asarray(split, dtype=object)
    truth = np.asarray(labels) != 0
    present = [name for name in parts if (names == name).any()]
    inside = np.isin(names, present)
    rows = []
    for column, label in enumerate(label_names):
        positive = truth[:, column]
        prevalence = float(positive[inside].mean()) if inside.any() else np.nan
        held = {name: float(positive[names == name].mean()) for name in present}
        off = {name: abs(share / prevalence - 1) for name, share in held.items()} if prevalence > 0 else {}
        row: dict[str, Any] = {"label": label, "positives": int(positive[inside].sum()), "prevalence": prevalence}
        row |= held | {"deviation": max(off.values(), default=np.nan), "by_chance": np.nan}
        if off:
            size = (names == max(off, key=lambda name: off[name])).sum()
            rest = 1 - size / inside.sum()
            row["by_chance"] = float(np.sqrt((1 - prevalence) * rest / (prevalence * size)))
        rows.append(row)
    return pd.DataFrame(rows)
