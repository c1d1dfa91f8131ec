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
from analysis.claims import DISTINCT, LEAST_IMAGES, SubsetScores
from analysis.sentences import TITLES, difference_sentence, figure
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
    told = "; ".join(
        f"{TITLES_OF_FAMILIES.get(str(row.family), str(row.family))}: {row.over} of {row.labels} labels more often "
        f"than they occur, {row.under} less often, in all {_ratio(row)}"
        for row in own.itertuples()
    )
    holding = [TITLES_OF_FAMILIES.get(str(row.family), str(row.family)) for row in own.itertuples() if row.holds]
    if len(holding) == len(own):
        verdict = "It holds under every threshold tried."
    elif not holding:
        verdict = "It does not hold: no threshold tried makes it say every label too often."
    else:
        verdict = f"It holds under {', '.join(holding)} only: the threshold makes it, not the model alone."
    sentences = [f"{CLAIM_1}: {told}. {verdict}"]
    for family in own["family"]:
        same = counts[(counts["family"] == family) & counts["setting"].isin(list(others))]
        own_over = int(own.loc[own["family"] == family, "over"].iloc[0])
        as_many = [f"{row.setting} ({row.over})" for row in same.itertuples() if row.over >= own_over > 0]
        if as_many:
            title = TITLES_OF_FAMILIES.get(str(family), str(family))
            sentences.append(
                f"Cut by {title}, as many labels or more are over-predicted by {', '.join(as_many)} as by {setting} "
                f"({own_over})."
            )
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
        `DISTINCT` or `OVERLAPPING`.
    """
    count = f"{found.images} test images with {subset}, {found.patients} patients"
    if found.table.empty:
        return [f"{claim}: cannot be tested here ({count}; at least {least} images of 2 patients are needed)."]
    part = found.differences[(found.differences["setting"] == setting) & found.differences["metric"].isin(list(SPOKEN))]
    if part.empty:
        return [f"{claim}: cannot be tested here, nothing stands beside {setting} ({count})."]
    told = [
        difference_sentence(
            f"{setting}'s {TITLES[row['metric']]}", row["other"], row["difference"], row["low"], row["high"]
        )
        for row in part.to_dict("records")
    ]
    settings = part[part["other"] != PREVALENCE]
    asked, shown = len(part), int((part["better"] == setting).sum())
    against = int((settings["better"] == settings["other"]).sum())
    if shown == asked:
        verdict = "holds"
    elif against or not (settings["better"] == setting).any():
        verdict = "does not hold"
    else:
        verdict = "holds in part"
    sentences = [
        f"{claim} ({count}): {verdict} here; {shown} of {asked} differences stand in its favour after Holm's "
        f"correction, {against} against it. " + " ".join(told)
    ]
    return sentences + _null_sentences(found.table, setting, subset)


def _null_sentences(table: pd.DataFrame, setting: str, subset: str) -> list[str]:
    part = table[(table["setting"] == setting) & table["metric"].isin(SPOKEN) & table["null"].notna()]
    told = [
        f"{TITLES[str(row.metric)]} {figure(row.value)}, truth dealt to other patients {figure(row.null)} "
        f"({figure(row.null_low)} to {figure(row.null_high)}), p = {figure(row.p, 3)}"
        for row in part.itertuples()
    ]
    which = "one finding" if subset == DISTINCT else "several findings"
    return [f"On images with {which}, {setting}: {'; '.join(told)}."] if told else []


def _ratio(row: object) -> str:
    ratio, low, high = (float(getattr(row, name)) for name in ("ratio", "low", "high"))
    if not math.isfinite(ratio):
        return "without a true label"
    ends = f", 95 % interval {figure(low)} to {figure(high)}" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{figure(ratio)} times{ends}"
