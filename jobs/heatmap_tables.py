"""Scores of heatmaps as result lines, tables of differences from the nulls, and sentences.

Comes in: one row of scores a finding and setting or null (`jobs.heatmap_scoring.score_findings`). Goes out: means and
F1 with intervals that resample patients, over all findings and by label; paired differences between each setting and
each null over the same findings, with what may be said of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.bootstrap import clustered_bootstrap
from analysis.finding_hits import f1
from analysis.sentences import difference_sentence
from jobs.heatmap_scoring import CENTRE, LOCATION, MEAN_MAP, RANDOM_LABEL
from jobs.study_records import Row, number

MEANS = (
    ("pointing_game", "pointing_game"),
    ("energy", "energy"),
    ("iou", "best_iou"),
    ("dice", "best_dice"),
    ("pixel_ap", "pixel_ap"),
)
"""Name of each mean in the results, and the column that it is of."""

RATIOS = {
    "peak_f1": ("peak_hit", "peak_vain", "peak_missed"),
    "region_f1": ("region_hit", "region_vain", "region_missed"),
}
"""F1 over findings: 2 hit / (2 hit + vain + missed), counts added up first."""

COMPARED = ("pointing_game", "energy")
TOLD = (CENTRE, LOCATION)
"""Nulls that the report's sentences speak of; the table of differences has all."""


def summaries(scored: pd.DataFrame, replicates: int, seed: int, *, by_label: bool = True) -> pd.DataFrame:
    """Return means and F1 with intervals by patient, over all findings and by label.

    Returns
    -------
    DataFrame
        setting, baseline, label (None over all), metric, value, low, high, n (findings).
    """
    rows = []
    parts = [(None, scored)] + (list(scored.groupby("label", sort=False)) if by_label else [])
    for label, part in parts:
        for setting, of_setting in part.groupby("setting", sort=False):
            counts = [column for columns in RATIOS.values() for column in columns]
            values = of_setting[[column for _, column in MEANS] + counts].to_numpy(dtype=float)
            groups = of_setting["group"].to_numpy()
            means = clustered_bootstrap(values[:, : len(MEANS)], groups, replicates=replicates, seed=seed)
            told = {
                "setting": setting,
                "baseline": bool(of_setting["baseline"].iloc[0]),
                "label": label,
                "n": len(of_setting),
            }
            for place, (metric, _) in enumerate(MEANS):
                ends = {"value": means.value[place], "low": means.low[place], "high": means.high[place]}
                rows.append({**told, "metric": metric, **ends})
            known = np.isfinite(values[:, len(MEANS) :]).all(axis=1)
            if not known.any():
                continue
            added = clustered_bootstrap(values[known, len(MEANS) :], groups[known], replicates=replicates, seed=seed)
            for place, metric in enumerate(RATIOS):
                of_ratio = slice(3 * place, 3 * place + 3)
                drawn = f1(*added.replicates[:, of_ratio].T)
                low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (np.nan, np.nan)
                if len(set(groups[known])) < 2:
                    low = high = np.nan
                value = float(f1(*added.value[of_ratio]))
                rows.append({**told, "metric": metric, "value": value, "low": low, "high": high})
    columns = ["setting", "baseline", "label", "metric", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def localization_rows(summarised: pd.DataFrame, protocol: str) -> list[Row]:
    """Return `summaries` as result lines."""
    return [
        {
            "kind": "localization",
            "protocol": protocol,
            **row,
            "label": row["label"] if isinstance(row["label"], str) else None,
            **{name: number(row[name]) for name in ("value", "low", "high")},
        }
        for row in summarised.to_dict("records")
    ]


def differences(
    scored: pd.DataFrame,
    replicates: int,
    seed: int,
    metrics: Sequence[str] = COMPARED,
    nulls: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return each setting minus each null, paired over the same findings, with intervals by patient.

    Returns
    -------
    DataFrame
        setting, null, label ("all" over all findings), metric, difference, low, high, n, verdict. The verdict is
        "above" or "below" where the 95 % interval leaves out zero, else "not told apart".
    """
    names = list(scored.loc[~scored["baseline"], "setting"].unique())
    held = list(scored.loc[scored["baseline"], "setting"].unique()) if nulls is None else list(nulls)
    keys = ["row", "label", "group"]
    rows = []
    for metric in metrics:
        wide = scored.pivot_table(index=keys, columns="setting", values=metric, sort=False, dropna=False)
        labels = wide.index.get_level_values("label")
        for label in ["all", *dict.fromkeys(labels)]:
            part = wide if label == "all" else wide[labels == label]
            for setting in names:
                for null in held:
                    if null not in part or setting not in part or not _beside(null, setting, names):
                        continue
                    both = part[[setting, null]].dropna()
                    if both.empty:
                        continue
                    apart = (both[setting] - both[null]).to_numpy()[:, None]
                    groups = both.index.get_level_values("group").to_numpy()
                    found = clustered_bootstrap(apart, groups, replicates=replicates, seed=seed)
                    value, low, high = float(found.value[0]), float(found.low[0]), float(found.high[0])
                    verdict = "above" if low > 0 else "below" if high < 0 else "not told apart"
                    rows.append((setting, null, label, metric, value, low, high, len(both), verdict))
    columns = ["setting", "null", "label", "metric", "difference", "low", "high", "n", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def verdict_grid(compared: pd.DataFrame) -> pd.DataFrame:
    """Return the differences as a page shows them: one row a setting and label, one column a null.

    Parameters
    ----------
    compared : DataFrame
        Of `differences`.

    Returns
    -------
    DataFrame
        setting, label, n, and for each null the differences in pointing game and energy with what both intervals say:
        "above", "below", or "" where they do not agree on either.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (setting, label, null), part in compared.groupby(["setting", "label", "null"], sort=False):
        row = rows.setdefault((setting, label), {"setting": setting, "label": label, "n": 0})
        row["n"] = max(row["n"], int(part["n"].max()))
        verdicts = set(part["verdict"])
        said = next(iter(verdicts)) if len(verdicts) == 1 and verdicts <= {"above", "below"} else ""
        figures = " / ".join(f"{value:+.2f}" for value in part["difference"])
        row[str(null).removesuffix(f" ({setting})")] = f"{figures} {said}".strip()
    return pd.DataFrame(list(rows.values()))


def _beside(null: str, setting: str, names: Sequence[str]) -> bool:
    """Tell whether a null is everybody's, or made from the maps of this very setting."""
    return not any(null in (MEAN_MAP.format(name), RANDOM_LABEL.format(name)) for name in names if name != setting)


def heatmap_sentences(scored: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """Return what the scores say of each setting against each prior, and what could not be scored.

    Parameters
    ----------
    scored : DataFrame
    compared : DataFrame
        Of `differences`.
    """
    overall = compared[(compared["label"] == "all") & (compared["metric"] == "pointing_game")]
    sentences = [
        difference_sentence(f"{row.setting}'s pointing game", str(row.null).lower(), row.difference, row.low, row.high)
        for row in overall[overall["null"].isin(TOLD)].itertuples()
    ]
    empty = scored[~scored["baseline"]].groupby("setting", sort=False)["empty"].agg(["sum", "count"])
    sentences += [
        f"{setting}: {int(row['sum'])} of {int(row['count'])} maps are empty and count as misses."
        for setting, row in empty.iterrows()
        if row["sum"]
    ]
    unseen = int((scored.groupby(["row", "label"])["region_visible"].first() < 0.5).sum())
    if unseen:
        sentences.append(
            f"{unseen} findings lie more than half outside what the model sees; only their visible part is scored."
        )
    return sentences
