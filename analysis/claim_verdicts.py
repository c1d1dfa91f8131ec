"""What may be said of the study's three claims, by fixed rules.

In come the tables of `analysis.claims`; out go sentences. A claim "holds" only where every difference that it is about
is shown in its favour (corrected for their number); it "does not hold" where none of those to the other settings is, or
one is shown against it; else it "holds in part". Being above a trivial baseline alone holds nothing. Fewer images than
can be scored say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analysis.baselines import PREVALENCE
from analysis.claims import LEAST_IMAGES, SubsetScores
from analysis.sentences import TITLES, figure
from analysis.verdicts import FAMILY_TITLES

ABOVE_ZERO = "zero"
OWN = "own"
TITLES_OF_FAMILIES = FAMILY_TITLES | {ABOVE_ZERO: "raw score above 0", OWN: "its own rule"}
CLAIM_1 = "Claim 1, zero-shot over-predicts every label"
CLAIM_2 = "Claim 2, fine-tuning improves distinct diseases"
CLAIM_3 = "Claim 3, the linear probe finds overlapping features"
# What is spoken of; the table has more.
SPOKEN = ("lrap", "auroc_macro")


def over_prediction_sentences(counts: pd.DataFrame, setting: str, others: Sequence[str] = ()) -> list[str]:
    """Return how many labels a setting over-predicts under each threshold, and what the threshold has to do with it.

    Parameters
    ----------
    counts : DataFrame
        Of `analysis.claims.over_prediction_counts`.
    setting : str
        Whom the claim is about.
    others : sequence of str
        Settings that are cut in the same ways.
    """
    own = counts[(counts["setting"] == setting) & (counts["family"] != OWN)]
    if own.empty:
        return []
    holding = [_family(row.family) for row in own.itertuples() if row.holds]
    if len(holding) == len(own):
        verdict = "holds under every threshold tried"
    elif holding:
        verdict = f"holds when cut by {', '.join(holding)} only, so the threshold makes it"
    else:
        verdict = "does not hold under any threshold tried"
    told = ", ".join(f"{row.over} of {row.labels} by {_family(row.family)} ({_ratio(row)})" for row in own.itertuples())
    sentences = [
        f"{CLAIM_1}: {verdict}. Labels said more often than they occur, and all labels said over all true ones with "
        f"the 95 % interval: {told}."
    ]
    alike = []
    for row in own.itertuples():
        same = counts[(counts["family"] == row.family) & counts["setting"].isin(list(others))]
        as_many = [f"{each.setting} {each.over}" for each in same.itertuples() if each.over >= row.over > 0]
        if as_many:
            alike.append(f"by {_family(row.family)} ({', '.join(as_many)}; {setting} {row.over})")
    if alike:
        sentences.append(f"Cut alike, trained settings over-predict as many labels or more: {'; '.join(alike)}.")
    return sentences


def subset_sentences(
    claim: str, found: SubsetScores, setting: str, subset: str, least: int = LEAST_IMAGES
) -> list[str]:
    """Return what the images with one or several findings say of a claim.

    Parameters
    ----------
    claim : str
        `CLAIM_2` or `CLAIM_3`.
    found : SubsetScores
    setting : str
        Whom the claim is about.
    subset : str
        "one finding" or "several findings".
    """
    count = f"{found.images} test images with {subset}, {found.patients} patients"
    if found.table.empty:
        return [f"{claim}: cannot be tested here ({count}; at least {least} images of 2 patients are needed)."]
    part = found.differences[(found.differences["setting"] == setting) & found.differences["metric"].isin(list(SPOKEN))]
    if part.empty:
        return [f"{claim}: cannot be tested here, nothing stands beside {setting} ({count})."]
    settings = part[part["other"] != PREVALENCE]
    asked, shown = len(part), int((part["better"] == setting).sum())
    against = int((settings["better"] == settings["other"]).sum())
    if shown == asked:
        verdict = "holds"
    elif against or not (settings["better"] == setting).any():
        verdict = "does not hold"
    else:
        verdict = "holds in part"
    told = "; ".join(_differences_of(metric, rows) for metric, rows in part.groupby("metric", sort=False))
    return [
        f"{claim}: {verdict} here ({count}). {setting} less another, with the 95 % interval: {told}. {shown} of {asked}"
        f" stand in its favour after Holm's correction, {against} against it.{_null_told(found.table, setting)}"
    ]


def _differences_of(metric: object, rows: pd.DataFrame) -> str:
    each = ", ".join(
        f"{row['other']} {figure(row['difference'], 3)}" + _interval(row["low"], row["high"])
        for row in rows.to_dict("records")
    )
    return f"{TITLES[str(metric)]}: {each}"


def _interval(low: float, high: float) -> str:
    """Return an interval in brackets, "" where there is none."""
    return f" ({figure(low, 3)} to {figure(high, 3)})" if math.isfinite(low) else ""


def _null_told(table: pd.DataFrame, setting: str) -> str:
    part = table[(table["setting"] == setting) & table["metric"].isin(list(SPOKEN)) & table["null"].notna()]
    told = ", ".join(
        f"{TITLES[str(row.metric)]} {figure(row.null)} where it has {figure(row.value)} (p = {figure(row.p, 3)})"
        for row in part.itertuples()
    )
    return f" Truth dealt to other patients gives {told}." if told else ""


def _family(family: object) -> str:
    return TITLES_OF_FAMILIES.get(str(family), str(family))


def _ratio(row: object) -> str:
    ratio, low, high = (float(getattr(row, name)) for name in ("ratio", "low", "high"))
    if not math.isfinite(ratio):
        return "nothing is true"
    return f"{figure(ratio)}, {figure(low)} to {figure(high)}" if math.isfinite(low) else figure(ratio)
