"""Which samples count how often in a resample of patients, and which labels they get in a permutation of patients.

In come the group (patient) of each sample and a seed; out go weight columns for matrix products, and row orders for
nulls. Both treat a patient as one piece of evidence.
"""

from __future__ import annotations

import numpy as np

from analysis import bootstrap
from engine.errors import DataError, UsageError


def group_codes(groups: np.ndarray | None, samples: int) -> np.ndarray:
    """Return the number of each sample's group, (n,) int64; every sample its own group where there are none."""
    if groups is None:
        return np.arange(samples)
    if len(groups) != samples:
        raise DataError(f"{len(groups)} groups for {samples} embeddings; give one group a sample")
    return bootstrap.group_codes(groups)[0]


def resample_weights(codes: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Return how often each sample counts in each resample of the groups, (n, R + 1) float32; column 0 is all ones.

    The resamples are those of `analysis.bootstrap.resample_counts`, so intervals of different modules are paired.
    """
    weights = np.ones((len(codes), replicates + 1), dtype=np.float32)
    if replicates:
        number, counts = bootstrap.resample_counts(codes, replicates, seed)
        weights[:, 1:] = counts.T[number]
    return weights


def permuted_rows(codes: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Return for each permutation which sample's label row every sample gets, (P, n) int64.

    Patients exchange all their label rows with a patient who has as many samples, so what one patient's images have in
    common stays, and so do label counts and label co-occurrence (whole-block exchange; Winkler et al., Multi-level
    block permutation, 2015). Patients whose number of samples nobody shares have their rows laid end to end in random
    order of patients and dealt out again among themselves.

    Parameters
    ----------
    codes : ndarray of int, (n,)
    permutations : int
    seed : int
    """
    if permutations < 1:
        raise UsageError(f"{permutations} permutations asked for; at least 1 is needed (200 is usual)")
    codes = np.asarray(codes)
    order = np.argsort(codes, kind="stable")
    _, starts, sizes = np.unique(codes[order], return_index=True, return_counts=True)
    generator = np.random.Generator(np.random.PCG64(seed))
    blocks: list[np.ndarray] = []
    alone: list[np.ndarray] = []
    for size in np.unique(sizes):
        members = starts[sizes == size]
        rows = order[members[:, None] + np.arange(size)]
        if len(members) > 1:
            blocks.append(rows)
        else:
            alone.append(rows[0])
    result = np.tile(np.arange(len(codes)), (permutations, 1))
    for permuted in result:
        for rows in blocks:
            permuted[rows] = rows[generator.permutation(len(rows))]
        if len(alone) > 1:
            dealt = [alone[place] for place in generator.permutation(len(alone))]
            permuted[np.concatenate(alone)] = np.concatenate(dealt)
    return result


def patients_up_to(codes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return the samples of randomly drawn whole groups, at most `most` of them together, ascending; all if they fit.

    At least one group is returned, cut if it alone is larger.
    """
    if len(codes) <= most:
        return np.arange(len(codes))
    number = int(codes.max()) + 1
    sizes = np.bincount(codes, minlength=number)
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(number)
    kept = drawn[np.cumsum(sizes[drawn]) <= most]
    if not len(kept):
        return np.flatnonzero(codes == drawn[0])[:most]
    return np.flatnonzero(np.isin(codes, kept))


def merged_groups(codes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return at most `most` groups, each of as many patients (but for one) put together at random, (n,) int64.

    A resample of such bags is a bootstrap by patient whose units are larger: as right in expectation, and a little
    noisier. It makes a resample of cross products a sum of `most` matrices instead of a pass over all samples.
    """
    number = int(codes.max()) + 1
    if number <= most:
        return codes
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(number)
    return shuffled[codes] % most
