"""Do two sources of labels mean the same by a label? Counts, Cohen's kappa and its interval by patient.

In come labels of the same samples by several sources; out goes one row a pair of sources and label. Kappa is what they
agree on beyond what their prevalences alone give (Cohen 1960), and falls with rarity for the same error rates, so the
counts stand beside it. Only samples that both sources know are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.bootstrap import group_sums, percentile_ends, resample_counts
from analysis.metrics import check_truth, divide
from analysis.sentences import figure
from engine.errors import DataError


def label_agreement(
    sources: Mapping[str, tuple[np.ndarray, np.ndarray]],
    groups: np.ndarray,
    *,
    label_names: Sequence[str],
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how every two sources agree on every label.

    Parameters
    ----------
    sources : mapping of name to (values (n, L) of 0/1, known (n,) bool)
    groups : ndarray, (n,)
        Patients, which are resampled.
    label_names : sequence of str, length L
    replicates, seed, level

    Returns
    -------
    DataFrame
        source, other, label, n (samples that both know), both, only_source, only_other, neither, agreement (share),
        kappa (NaN where both sources say the same of every sample, all yes or all no), low, high.
    """
    names = list(sources)
    columns = ["source", "other", "label", "n", "both", "only_source", "only_other", "neither", "agreement", "kappa"]
    rows: list[dict] = []
    for one, two in itertools.combinations(names, 2):
        first, second = check_truth(sources[one][0]), check_truth(sources[two][0])
        known = np.asarray(sources[one][1], dtype=bool) & np.asarray(sources[two][1], dtype=bool)
        if first.shape != second.shape or len(groups) != len(first) or len(label_names) != first.shape[1]:
            raise DataError(
                f"labels of shape {first.shape} by {one!r} and {second.shape} by {two!r} do not fit together"
            )
        if not known.any():
            continue
        first, second = first[known], second[known]
        cells = np.stack([first & second, first & ~second, ~first & second, ~first & ~second], axis=2)
        codes, counts = resample_counts(np.asarray(groups)[known], replicates, seed)
        sums = group_sums(cells, codes, counts.shape[1])
        whole = cells.sum(axis=0)
        kappa = _kappa(whole.astype(np.float64))
        drawn = _kappa(np.tensordot(counts, sums, axes=1))
        low, high = percentile_ends(drawn, level, axis=0)
        for place, label in enumerate(label_names):
            both, only, other, neither = (int(value) for value in whole[place])
            values = [one, two, label, int(known.sum()), both, only, other, neither, (both + neither) / known.sum()]
            ends = (low[place], high[place]) if counts.shape[1] > 1 else (np.nan, np.nan)
            rows.append(dict(zip(columns, [*values, kappa[place]], strict=True)) | {"low": ends[0], "high": ends[1]})
    return pd.DataFrame(rows, columns=[*columns, "low", "high"])


def agreement_sentences(table: pd.DataFrame, low_kappa: float = 0.6) -> list[str]:
    """Return for each pair of sources how well they agree, and on which labels they do not.

    Labels that one of the two never says are named apart: there kappa is 0 whatever the other one says.

    Parameters
    ----------
    table : DataFrame
        Of `label_agreement`.
    low_kappa : float
        Below it labels are named; 0.6 is where Landis and Koch (1977) call agreement moderate at best.
    """
    sentences = []
    for (one, two), part in table.groupby(["source", "other"], sort=False):
        said = [part["both"] + part[only] > 0 for only in ("only_source", "only_other")]
        defined = part[said[0] & said[1] & part["kappa"].notna()]
        told = [f"Labels from {one} and from {two} agree on {int(part['n'].iloc[0])} samples"]
        if len(defined):
            low = defined[defined["kappa"] < low_kappa].sort_values("kappa")
            named = ", ".join(f"{row.label} ({figure(row.kappa)})" for row in low.itertuples())
            told[0] += f" with a median kappa of {figure(float(defined['kappa'].median()))} over {len(defined)} labels"
            told.append(f"below {figure(low_kappa, 1)}: {named}" if named else f"none is below {figure(low_kappa, 1)}")
        else:
            told[0] += " in no label that both of them say"
        for name, mine, others in ((one, *said), (two, *reversed(said))):
            never = part.loc[~mine & others, "label"]
            if len(never):
                told.append(f"never said by {name}: {', '.join(never)}")
        sentences.append("; ".join(told) + ".")
    return sentences


def _kappa(cells: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa of counts (..., 4): both, only the first, only the second, neither."""
    both, only, other, neither = np.moveaxis(np.asarray(cells, dtype=np.float64), -1, 0)
    total = both + only + other + neither
    observed = divide(both + neither, total, np.nan)
    yes = divide((both + only) * (both + other), total**2, np.nan)
    no = divide((neither + other) * (neither + only), total**2, np.nan)
    expected = yes + no
    return divide(observed - expected, 1 - expected, np.nan)
