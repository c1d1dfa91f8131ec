"""What may be said of thresholds, subgroups, pairs of settings and leaks, by fixed rules that cannot praise.

In come the tables of `threshold_families`, `subgroups`, `comparison` and `leaks`; out go sentences for the report. As
in `analysis.sentences`: a difference is called one only where its corrected test says so, and the same numbers always
give the same words.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.comparison import too_few_replicates
from analysis.sentences import TITLES, figure

FAMILY_TITLES = {
    "fixed": "0.5",
    "minmax": "per-image min-max at 0.5",
    "prevalence": "prevalence-matched",
    "f1": "F1-optimal on validation",
}
ALPHA = 0.05


def threshold_sentences(conclusions: pd.DataFrame, metrics: tuple[str, ...] = ("f1_macro", "exact_match")) -> list[str]:
    """Return for each metric whether the order of the settings depends on how scores are cut.

    Parameters
    ----------
    conclusions : DataFrame
        Of `analysis.threshold_families.conclusions`: metric, family, order, changes.
    metrics : tuple of str
        Those that are spoken of.
    """
    said = []
    for metric in metrics:
        part = conclusions[conclusions["metric"] == metric]
        orders: dict[str, list[str]] = {}
        for row in part.itertuples():
            orders.setdefault(str(row.order), []).append(FAMILY_TITLES.get(str(row.family), str(row.family)))
        if not orders:
            continue
        title = TITLES.get(metric, metric)
        if len(orders) == 1:
            said.append(
                f"By {title} the order of the settings is the same under every threshold: {next(iter(orders))}."
            )
        else:
            each = "; ".join(f"{order} ({', '.join(families)})" for order, families in orders.items())
            said.append(f"By {title} the order of the settings depends on the threshold: {each}.")
    return said


def gap_sentences(column: str, gaps: pd.DataFrame, counts: pd.DataFrame) -> list[str]:
    """Return which gaps between the best and the worst subgroup of a column are shown, and how many were looked at.

    Parameters
    ----------
    column : str
    gaps : DataFrame
        Of `analysis.subgroups.Subgroups.gaps`: setting, metric, best, worst, value (or gap), p_holm.
    counts : DataFrame
        Of `Subgroups.counts`: subgroup, groups, compared.
    """
    compared = counts[counts["compared"]]
    if len(compared) < 2:
        few = ", ".join(f"{row.subgroup} ({row.groups})" for row in counts.itertuples())
        return [f"By {column} no gap is tested: fewer than two subgroups have enough patients ({few})."]
    size = "value" if "value" in gaps else "gap"
    tested = gaps[gaps["p_holm"].notna()]
    shown = tested[tested["p_holm"] < ALPHA]
    names = ", ".join(str(name) for name in compared["subgroup"])
    if shown.empty:
        return [
            f"By {column} ({names}) none of {len(tested)} gaps between the best and the worst subgroup is more than "
            "subgroups dealt at random give, after Holm's correction."
        ]
    each = "; ".join(
        f"{row['setting']}'s {TITLES.get(row['metric'], row['metric'])} differs by {figure(row[size])} between "
        f"{row['best']} and {row['worst']} (corrected p = {figure(row['p_holm'], 3)})"
        for row in shown.to_dict("records")
    )
    return [
        f"By {column} {len(shown)} of {len(tested)} gaps are more than chance gives: {each}. Subgroups differ in what "
        "they have as well as in how well they are read."
    ]


def findings_sentences(differences: pd.DataFrame, first: str, second: str) -> list[str]:
    """Return how each setting fares on images of one kind and of another, with the interval of the difference.

    Parameters
    ----------
    differences : DataFrame
        Of `analysis.subgroups.Subgroups.difference`.
    first, second : str
        The two subgroups, such as "one finding" and "several findings".
    """
    sentences = []
    for row in differences[differences["low"].notna()].to_dict("records"):
        apart = "differ" if row["low"] > 0 or row["high"] < 0 else "are not told apart"
        sentences.append(
            f"{row['setting']}'s {TITLES.get(row['metric'], row['metric'])} is {figure(row['first'])} on images with "
            f"{first} and {figure(row['second'])} on those with {second}; the two {apart} (difference "
            f"{figure(row['difference'])}, {figure(row['low'])} to {figure(row['high'])})."
        )
    return sentences


def difference_sentences(differences: pd.DataFrame) -> list[str]:
    """Return which paired differences between settings stand after Holm's correction.

    Parameters
    ----------
    differences : DataFrame
        Of `analysis.comparison.paired_differences`: setting, other, metric, difference, p, p_holm, better, replicates.
    """
    if differences.empty:
        return []
    shown = differences[differences["better"] != ""]
    told = f"Of {len(differences)} paired differences between settings, {len(shown)} stand after Holm's correction"
    if shown.empty:
        return [" ".join(filter(None, [f"{told}.", too_few_replicates(differences, ALPHA)]))]
    wins: dict[tuple[str, str], list[str]] = {}
    for row in shown.to_dict("records"):
        worse = row["other"] if row["better"] == row["setting"] else row["setting"]
        wins.setdefault((row["better"], worse), []).append(TITLES.get(row["metric"], row["metric"]))
    each = "; ".join(f"{better} is better than {worse} in {', '.join(m)}" for (better, worse), m in wins.items())
    return [f"{told}: {each}."]


def leak_sentence(counts: Mapping[str, int], threshold: float) -> str:
    """Return how much of what is tested was seen in training, and how much only looks so to the model.

    A model whose embeddings lie close together has near-duplicates without a copy, so they are told apart from those.

    Parameters
    ----------
    counts : mapping of "identical image", "near-duplicate image", "identical text" to pairs
    threshold : float
        Cosine from which two images were called near-duplicates.
    """
    same = [
        f"{counts[kind]} {text}"
        for kind, text in (("identical image", "identical images"), ("identical text", "identical texts"))
        if counts.get(kind)
    ]
    alike = counts.get("near-duplicate image", 0)
    if not same and not alike:
        return (
            f"No image or text stands in two parts of the split, and no two images across it have a cosine of "
            f"{threshold:g} or more."
        )
    told = []
    if same:
        told.append(f"Across the parts of the split there are {' and '.join(same)}: what is tested there was seen.")
    if alike:
        told.append(
            f"{alike} pairs of images across the parts have a cosine of {threshold:g} or more: copies, or images that "
            "this model hardly tells apart; look at some of them."
        )
    return f"{' '.join(told)} All are in leaks.csv."
